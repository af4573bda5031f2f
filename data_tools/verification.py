"""Find truncation, flipped bits and wrong ids in a .bin/.idx pair, and say where.

    problems = verify("corpus")              # [] when all is well; sentences otherwise

Always: the structure of .idx against .bin. With a receipt also: checksums (of .bin by blocks of
16 MiB), ids within the vocabulary, EOD at every document's end, counts. Nothing is mended.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools import indexed
from data_tools.errors import UserError
from data_tools.files import checksum, json_bytes
from data_tools.indexed import CHUNK, Index
from data_tools.pair import CHECKED_BYTES
from data_tools.receipt import is_intact, read_receipt, receipt_path


def find(prefix: str | os.PathLike[str]) -> Path:
    """The prefix without a file's ending. Raises `UserError` when there is nothing to verify."""
    found = indexed.prefix(prefix)
    if not any(path.exists() for path in (*indexed.paths(found), receipt_path(found))):
        raise UserError(f"{found}.idx does not exist: name the prefix of a .bin/.idx pair")
    return found


def verify(prefix: str | os.PathLike[str]) -> list[str]:
    """All problems of PREFIX (of every pair its receipt lists), one sentence each."""
    prefix = find(prefix)
    try:
        receipt = read_receipt(prefix)
    except UserError as error:
        return [str(error)]
    if receipt is None:
        return _verify_pair(prefix, None, None)
    problems = []
    # Compared as bytes too: another spelling of the same values was not written by us.
    if not is_intact(receipt) or receipt_path(prefix).read_bytes() != json_bytes(receipt):
        problems.append(f"{receipt_path(prefix)} was altered after it was written")
    try:
        pairs = receipt["outputs"]["pairs"]
        for pair in pairs:
            problems += _verify_pair(prefix.with_name(pair["prefix"]), receipt, pair)
        for key in ("documents", "tokens"):
            total = sum(pair[key] for pair in pairs)
            if total != receipt["counts"][key]:
                problems.append(
                    f"the receipt counts {receipt['counts'][key]:,} {key}, its pairs {total:,}"
                )
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read: make it readable") from error
    except OSError as error:
        problems.append(f"{error.filename or prefix} cannot be read ({error.strerror})")
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{receipt_path(prefix)} is damaged ({type(error).__name__}: {error})")
    return problems


def _verify_pair(
    prefix: Path, receipt: dict[str, Any] | None, pair: dict[str, Any] | None
) -> list[str]:
    bin_path, idx_path = indexed.paths(prefix)
    problems = [f"{path} is missing" for path in (bin_path, idx_path) if not path.is_file()]
    if problems:
        return problems
    if pair and checksum(idx_path) != pair["idx"]["checksum"]:
        problems.append(f"{idx_path} differs from the checksum in its receipt")
    try:
        index = indexed.read_index(prefix)
    except UserError as error:
        return [*problems, str(error)]
    structure = _verify_structure(bin_path, idx_path, index)
    problems += structure
    if pair:
        for key, found in (("documents", index.documents), ("tokens", index.tokens)):
            if found != pair[key]:
                problems.append(f"{idx_path} has {found:,} {key}, its receipt says {pair[key]:,}")
    return problems + _verify_tokens(bin_path, index, receipt, pair, sound=not structure)


def _verify_structure(bin_path: Path, idx_path: Path, index: Index) -> list[str]:
    problems = []
    item, expected = index.dtype.itemsize, 0
    for first in range(0, len(index.lengths), CHUNK):
        lengths = index.lengths[first : first + CHUNK]
        if (lengths < 0).any():
            bad = first + int(np.argmax(lengths < 0))
            problems.append(f"{idx_path}: sequence {bad:,} has the length {index.lengths[bad]}")
            return problems
        starts = expected + (np.cumsum(lengths, dtype=np.int64) - lengths) * item
        wrong = starts != index.pointers[first : first + CHUNK]
        if wrong.any():
            at = int(np.argmax(wrong))
            problems.append(
                f"{idx_path}: sequence {first + at:,} begins at byte "
                f"{index.pointers[first + at]:,}, where those before it end at {starts[at]:,}"
            )
            return problems
        expected += int(lengths.sum(dtype=np.int64)) * item
    boundaries = index.boundaries
    for first in range(0, len(boundaries), CHUNK):
        chunk = boundaries[first : first + CHUNK + 1]
        if (chunk[1:] < chunk[:-1]).any():
            bad = first + int(np.argmax(chunk[1:] < chunk[:-1]))
            problems.append(f"{idx_path}: document {bad:,} ends before it begins")
            break
    if boundaries[0] != 0 or boundaries[-1] != len(index.lengths):
        problems.append(
            f"{idx_path}: documents span sequences {boundaries[0]:,} to {boundaries[-1]:,}, "
            f"not 0 to {len(index.lengths):,}"
        )
    size = bin_path.stat().st_size
    if size != expected:
        word = "truncated" if size < expected else "too long"
        problems.append(f"{bin_path} is {word}: {size:,} bytes where the index has {expected:,}")
    return problems


def _verify_tokens(
    bin_path: Path,
    index: Index,
    receipt: dict[str, Any] | None,
    pair: dict[str, Any] | None,
    sound: bool,
) -> list[str]:
    """One pass over .bin: checksums by block, ids within the vocabulary, EOD at document ends."""
    problems: list[str] = []
    item = index.dtype.itemsize
    tokenizer = receipt["tokenizer"] if receipt else {}
    vocab_size = tokenizer.get("vocab_size")
    eod = (
        tokenizer.get("eod_id")
        if sound and receipt and receipt["options"].get("append_eod")
        else None
    )
    known = pair["bin"]["blocks"] if pair else None
    block_bytes = int(pair["bin"]["block_bytes"]) if pair else CHECKED_BYTES
    with open(bin_path, "rb", buffering=0) as stream:
        start = 0
        while block := _read_full(stream, block_bytes):
            number = start // block_bytes
            if known is not None:
                if number >= len(known):
                    problems.append(f"{bin_path} goes on after byte {start:,}, where it should end")
                    break
                if xxhash.xxh3_64_hexdigest(block) != known[number]:
                    problems.append(
                        f"{bin_path}: bytes {start:,} to {start + len(block):,} differ from "
                        f"their checksum ({_documents(index, start, start + len(block))})"
                    )
            ids = np.frombuffer(block[: len(block) // item * item], dtype=index.dtype)
            if vocab_size and len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
                at = start + int(np.argmax((ids >= vocab_size) | (ids < 0))) * item
                problems.append(
                    f"{bin_path}: the id {ids[(at - start) // item]} at byte {at:,} is outside "
                    f"the vocabulary of {vocab_size:,} ({_documents(index, at, at + item)})"
                )
            if eod is not None and len(ids):
                # A document ends where the next begins; the last one where the file ends.
                stop = start + len(ids) * item
                low, high = np.searchsorted(index.pointers, [start, stop], side="right")
                ends = index.pointers[low:high]
                if stop == index.tokens * item:
                    ends = np.append(ends, stop)
                last = ids[(ends - start) // item - 1]
                if (last != eod).any():
                    document = int(low) - 1 + int(np.argmax(last != eod))
                    problems.append(
                        f"{bin_path}: document {document:,} does not end with EOD ({eod})"
                    )
            start += len(block)
    if known is not None and start < (len(known) - 1) * block_bytes:
        problems.append(f"{bin_path} ends in block {start // block_bytes:,} of {len(known):,}")
    return problems


def _read_full(stream: Any, size: int) -> bytes:
    """Exactly `size` bytes, or what is left of the file."""
    pieces, left = [], size
    while left and (piece := stream.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _documents(index: Index, start: int, end: int) -> str:
    first = max(0, int(np.searchsorted(index.pointers, start, side="right")) - 1)
    last = max(first, int(np.searchsorted(index.pointers, end, side="left")) - 1)
    return f"document {first:,}" if first == last else f"documents {first:,} to {last:,}"
