"""Train, validation and test sets by what a document says, not by where it lies.

    split("corpus", {"train": 0.98, "valid": 0.01, "test": 0.01})     # corpus-train.bin/.idx, ...

A document's ids and the seed decide its set: new data moves no old document, and copies of one
document are never on both sides. Shares are therefore met on average, not exactly.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools import indexed
from data_tools.errors import Failure, UserError
from data_tools.files import checksum, write_json
from data_tools.options import check_seed
from data_tools.pair import PairWriter
from data_tools.publication import finished, publish_all, work_folder
from data_tools.receipt import (
    BINS,
    FORMAT,
    command_line,
    histogram,
    pairs_of,
    read_receipt,
    versions,
)

_BLOCK = 1 << 13  # documents


def split(
    prefix: str | os.PathLike[str],
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write one pair PREFIX-NAME a set; returns the receipts by name. Raises `UserError`, and
    `Failure` when the pair is damaged."""
    whole = abs(sum(shares.values()) - 1) <= 1e-9  # false for nan
    if not (whole and all(share > 0 for share in shares.values())):
        raise UserError(
            f"--shares {dict(shares)} do not add up to 1 with every one above 0: write "
            "train=0.98,valid=0.01,test=0.01"
        )
    check_seed(seed)
    for name in shares:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(
                f"--shares names a set {name!r}, which becomes part of a file's name: write "
                "letters, digits, - or _"
            )
    prefix = indexed.prefix(prefix)
    if len(pairs := pairs_of(prefix)) > 1:
        raise UserError(
            f"{prefix} has {len(pairs)} pairs (shards): `data-tools merge` them, then split"
        )
    index = indexed.read_index(prefix)
    if index.documents != len(index.lengths):
        raise UserError(
            f"{prefix} has several sequences in a document: only pairs of one each can be split"
        )
    receipt: dict[str, Any] = read_receipt(prefix) or {"tokenizer": {}, "options": {}}
    stat = os.stat(indexed.paths(prefix)[0])
    receipts: dict[str, dict[str, Any]] = {}
    low, intact = 0.0, False
    for name, share in shares.items():
        wanted: dict[str, Any] = {
            "inputs": [{"path": str(prefix), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}],
            "tokenizer": {},
            "options": {"set": name, "from": low, "to": low + share, "seed": seed},
        }
        target = prefix.with_name(f"{prefix.name}-{name}")
        known = finished(target, wanted, overwrite)
        if known is None:
            intact = intact or _check_intact(prefix, receipt)
            with work_folder(target, wanted, overwrite) as folder:
                if not (folder / "publish.json").exists():
                    body = _write(prefix, index, folder, target, low, low + share, seed)
                    write_json(
                        folder / "publish.json",
                        {
                            "format": FORMAT,
                            "kind": "tokens",
                            "wanted": wanted,
                            "inputs": [{**wanted["inputs"][0], "checksum": _bin_checksum(receipt)}],
                            "tokenizer": receipt["tokenizer"],
                            "options": {
                                **receipt["options"],
                                **wanted["options"],
                                "seed": None,
                                "shard_tokens": 0,
                            },
                            **body,
                            "versions": versions(),
                            "command": command_line(),
                        },
                    )
                known = publish_all(folder, target)
        receipts[name] = known
        low += share
    return receipts


def _check_intact(prefix: Path, receipt: dict[str, Any]) -> bool:
    """Raises `Failure` when the ids are not those that the receipt tells of: what is damaged would
    get a new receipt that calls it whole."""
    known, path = _bin_checksum(receipt), indexed.paths(prefix)[0]
    if known and checksum(path) != known:
        raise Failure(f"{path} differs from the checksum in its receipt: see `data-tools verify`")
    return True


def _bin_checksum(receipt: dict[str, Any]) -> str:
    outputs = receipt.get("outputs")
    return outputs["pairs"][0]["bin"]["checksum"] if outputs else ""


def _write(
    prefix: Path,
    index: indexed.Index,
    folder: Path,
    target: Path,
    low: float,
    high: float,
    seed: int,
) -> dict[str, Any]:
    """The documents whose number in [0, 1) lies in [low, high)."""
    tokens = indexed.open_tokens(prefix, index)
    shutil.rmtree(folder / "pairs", ignore_errors=True)
    writer = PairWriter(folder / "pairs", index.dtype)
    counts = np.zeros(BINS, dtype=np.int64)
    for first in range(0, index.documents, _BLOCK):
        lengths = np.array(index.lengths[first : first + _BLOCK])
        start = int(index.pointers[first]) // index.dtype.itemsize
        ends = start + np.cumsum(lengths, dtype=np.int64)
        ids = np.asarray(tokens[start : int(ends[-1])])
        chosen = []
        for i, (end, length) in enumerate(
            zip((ends - start).tolist(), lengths.tolist(), strict=True)
        ):
            number = xxhash.xxh3_64_intdigest(ids[end - length : end].data, seed=seed) / 2**64
            # The last set takes what rounding leaves above its upper end.
            if low <= number and (number < high or high > 1 - 1e-9):
                chosen.append((i, ids[end - length : end].data))
        kept = lengths[[i for i, _ in chosen]]
        counts += histogram(kept)
        writer.append((data for _, data in chosen), kept)
    pairs = writer.complete(target)
    return {
        "counts": {
            "documents": pairs[0]["documents"],
            "tokens": pairs[0]["tokens"],
            "rejected": {},
            "slices": None,  # ids do not tell
        },
        "lengths": counts.tolist(),
        "outputs": {"dtype": index.dtype.name, "pairs": pairs},
        "pairs_folder": "pairs",
    }
