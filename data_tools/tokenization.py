"""Documents to Megatron's .bin/.idx with the exact ids of the tokenizer, and a receipt.

tokenize(["corpus.jsonl"], "tokenizer.model", "out/corpus", append_eod=True)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_tools import indexed
from data_tools.corpus import find_sources
from data_tools.documents import DEFAULT_TEXT_KEYS, TOO_LONG, parse_line
from data_tools.errors import UserError
from data_tools.files import atomic_write, checksum, write_json
from data_tools.lines import MAX_LINE_BYTES, read_lines
from data_tools.receipt import (
    FORMAT,
    command_line,
    describe_tokenizer,
    histogram,
    read_receipt,
    receipt_path,
    versions,
)
from data_tools.tokenizer import load_tokenizer


def tokenize(
    inputs: Sequence[str],
    tokenizer_path: str,
    prefix: str | os.PathLike[str],
    *,
    append_eod: bool = True,
    text_keys: tuple[str, ...] = DEFAULT_TEXT_KEYS,
) -> dict[str, Any]:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.receipt.json; returns the receipt."""
    tokenizer = load_tokenizer(tokenizer_path)
    if append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"tokenizer {tokenizer_path} names no end-of-document token: write --eod-token or --no-append-eod"
        )
    sources = find_sources(inputs)
    wanted = {
        "inputs": [{"path": s.path, "size": s.size, "mtime_ns": s.mtime_ns} for s in sources],
        "tokenizer": tokenizer.hash,
        "options": {"append_eod": append_eod, "text_keys": list(text_keys)},
    }
    known = read_receipt(prefix)
    bin_path, idx_path = indexed.paths(prefix)
    if known and known["wanted"] == wanted and bin_path.is_file() and idx_path.is_file():
        return {**known, "reused": True}
    receipt_path(prefix).unlink(missing_ok=True)
    dtype = indexed.token_dtype(tokenizer.vocab_size)
    lengths: list[int] = []
    rejected: list[dict] = []
    reasons: Counter[str] = Counter()
    slices: dict[str, Counter[str]] = {}
    with atomic_write(bin_path) as bin_stream, atomic_write(idx_path) as idx_stream:
        for source in sources:
            for line in read_lines(source):
                if line.size > MAX_LINE_BYTES:
                    document = None
                    reason: str | None = TOO_LONG
                else:
                    document = parse_line(line.data, text_keys)
                    reason = document.reason
                if document is None or reason is not None:
                    reasons[str(reason)] += 1
                    rejected.append(
                        {
                            "file": source.path,
                            "line": line.number,
                            "offset": line.offset,
                            "reason": reason,
                        }
                    )
                    continue
                text = document.text.decode()
                ids = tokenizer.encode(text)
                if append_eod:
                    ids = np.append(ids, np.int32(tokenizer.eod_id or 0))
                bin_stream.write(ids.astype(dtype).tobytes())
                lengths.append(len(ids))
                counter = slices.setdefault(document.slice or source.slice, Counter())
                counter.update(
                    documents=1, characters=len(text), bytes=len(document.text), tokens=len(ids)
                )
        indexed.write_index(idx_stream, dtype, np.array(lengths, dtype=np.int32))
    total: Counter[str] = Counter()
    for counter in slices.values():
        total.update(counter)
    receipt = {
        "format": FORMAT,
        "kind": "tokens",
        "wanted": wanted,
        "inputs": [
            {"path": s.path, "size": s.size, "slice": s.slice, "checksum": checksum(s.path)}
            for s in sources
        ],
        "tokenizer": describe_tokenizer(tokenizer),
        "options": wanted["options"],
        "counts": {
            **{k: total[k] for k in ("documents", "characters", "bytes", "tokens")},
            "rejected": dict(reasons),
            "slices": {k: dict(v) for k, v in sorted(slices.items())},
        },
        "lengths": histogram(np.array(lengths, dtype=np.int32)).tolist(),
        "outputs": {
            "dtype": np.dtype(dtype).name,
            "bin": {
                "path": bin_path.name,
                "size": bin_path.stat().st_size,
                "checksum": checksum(bin_path),
            },
            "idx": {
                "path": idx_path.name,
                "size": idx_path.stat().st_size,
                "checksum": checksum(idx_path),
            },
        },
        "versions": versions(),
        "command": command_line(),
    }
    write_json(receipt_path(prefix), receipt)
    return {**receipt, "reused": False}
