"""Several .bin/.idx pairs to one, by copying bytes; nothing is encoded again.

    merge(["all.task-00000-of-00002", "all.task-00001-of-00002"], "all")

Memory does not grow with the number of documents. Checksums of the inputs are compared while they
are copied. Refuses pairs of different dtype or tokenizer, a task of a `tokenize --task` that is
missing, and an index this tool (one sequence a document, without gaps) would not have written.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools import indexed
from data_tools.errors import Failure, UserError
from data_tools.files import COPY_BYTES, json_bytes, write_json
from data_tools.indexed import CHUNK, Index
from data_tools.options import check_count, check_seed
from data_tools.pair import PairWriter, shuffled
from data_tools.publication import finished, publish_all, work_folder
from data_tools.receipt import (
    BINS,
    FORMAT,
    command_line,
    histogram,
    pairs_of,
    read_receipt,
    receipt_path,
    versions,
)

Pair = tuple[str, Index, "dict[str, Any] | None"]


def merge(
    inputs: Sequence[str],
    prefix: str | os.PathLike[str],
    *,
    seed: int | None = None,
    shard_tokens: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge pairs in the order given (globs sorted); returns the receipt of the whole.

    Raises `UserError` (exit code 2) and `Failure` (exit code 1: an input is damaged).
    """
    check_seed(seed)
    check_count("--shard-tokens", shard_tokens)
    prefix = indexed.prefix(prefix, "--output ")
    pairs = [(name, indexed.read_index(name), read_receipt(name)) for name in find_prefixes(inputs)]
    _refuse_mixtures(pairs)
    _look_for_missing_shards(pairs, inputs)
    wanted = {
        "inputs": [_identity(name) for name, _, _ in pairs],
        "tokenizer": {},
        "options": {"seed": seed, "shard_tokens": shard_tokens},
    }
    known = finished(prefix, wanted, overwrite)
    if known is not None:
        return known
    with work_folder(prefix, wanted, overwrite) as folder:
        if not (folder / "publish.json").exists():
            shutil.rmtree(folder / "pairs", ignore_errors=True)
            writer = PairWriter(
                folder / "pairs", pairs[0][1].dtype, 0 if seed is not None else shard_tokens
            )
            lengths = np.zeros(BINS, dtype=np.int64)
            for name, index, receipt in pairs:
                lengths += _copy(name, index, receipt, writer)
            outputs = writer.complete(prefix)
            if seed is not None:
                shutil.rmtree(folder / "shuffle", ignore_errors=True)
                writer = shuffled(writer, folder / "shuffle", seed, shard_tokens)
                outputs = writer.complete(prefix)
            rejected = _join_rejected(pairs, folder)
            receipt = {
                **_joined_receipt(pairs, outputs, lengths, seed, shard_tokens),
                "wanted": wanted,
                "rejected_lines": rejected,
                "pairs_folder": str(writer.folder.relative_to(folder)),
            }
            write_json(folder / "publish.json", receipt)
        return publish_all(folder, prefix)


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Prefixes as given (the shards that their receipts list), or all that a glob of .idx (or .bin)
    files matches, sorted, each once."""
    found: list[str] = []
    for text in inputs:
        if indexed.paths(text)[1].is_file() or receipt_path(text).is_file():
            found += map(str, pairs_of(indexed.prefix(text)))
            continue
        files = (name for name in glob.glob(text) if name.endswith((".bin", ".idx")))
        matches = sorted({str(indexed.prefix(name)) for name in files})
        if not matches:
            raise UserError(
                f"{text} is no .bin/.idx pair and matches none: name prefixes or a glob of .idx "
                "files"
            )
        found += matches
    doubled = [name for name, times in Counter(map(os.path.realpath, found)).items() if times > 1]
    if doubled:
        raise UserError(f"{doubled[0]} is given twice: its documents would be there twice")
    return found


def _look_for_missing_shards(pairs: Sequence[Pair], inputs: Sequence[str]) -> None:
    """A glob means all of them, and is refused; where they are named, some may be meant."""
    shards = {
        name: receipt["shard"] for name, _, receipt in pairs if receipt and "shard" in receipt
    }
    owners = {_owner(name, shard): shard["of"] for name, shard in shards.items()}
    for owner, count in owners.items():
        missing = {f"{owner}-{number:05d}" for number in range(count)} - set(shards)
        if not missing:
            continue
        words = f"{min(missing)} is missing of the {count} shards of {owner}"
        if any(map(glob.has_magic, inputs)):
            raise UserError(f"{words}: bring it back, or name the pairs to merge without it")
        print(f"merge: {words}; the others are merged without it", file=sys.stderr)


def _owner(name: str, shard: dict[str, Any]) -> str:
    """The PREFIX that shards were written under."""
    return name.removesuffix(f"-{shard['number']:05d}")


def _identity(name: str) -> dict[str, Any]:
    stat = os.stat(indexed.paths(name)[0])
    return {"path": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _refuse_mixtures(pairs: Sequence[Pair]) -> None:
    first, index, receipt = pairs[0]
    for name, other, _ in pairs:
        if other.dtype != index.dtype:
            raise UserError(
                f"{name} holds {other.dtype}, {first} holds {index.dtype}: encode both with one "
                "tokenizer"
            )
        if other.documents != len(other.lengths):
            raise UserError(
                f"{name} has several sequences in a document: only pairs of one each can be merged"
            )
    keys = ("hash", "eod_id", "bos_id")
    for name, _, other_receipt in pairs:
        if (receipt is None) != (other_receipt is None):
            raise UserError(
                f"only one of {first} and {name} has a receipt: their tokenizers cannot be compared"
            )
        if receipt is None or other_receipt is None:
            continue
        for key in keys:
            if receipt["tokenizer"].get(key) != other_receipt["tokenizer"].get(key):
                raise UserError(
                    f"{name} and {first} differ in the tokenizer's {key}: encode both with the "
                    "same tokenizer"
                )
        for option in ("append_eod", "prepend_bos"):
            if receipt["options"].get(option) != other_receipt["options"].get(option):
                raise UserError(
                    f"{name} and {first} differ in {option}: encode both with the same options"
                )
    _refuse_missing_tasks(pairs)


def _refuse_missing_tasks(pairs: Sequence[Pair]) -> None:
    tasks = [tuple(receipt["options"].get("task", (0, 1))) for _, _, receipt in pairs if receipt]
    counts = {n for _, n in tasks if n > 1}
    if not counts:
        return
    if len(counts) > 1 or len(tasks) != len(pairs) or any(n == 1 for _, n in tasks):
        raise UserError(
            "some inputs are tasks of one `tokenize --task` run and others are not: merge each "
            "run alone first"
        )
    (count,) = counts
    numbers = [i for i, _ in tasks]
    missing = sorted(set(range(count)) - set(numbers))
    if missing:
        raise UserError(f"task {missing[0]}/{count} is missing: run it, then merge all {count}")
    if numbers != list(range(count)):
        raise UserError(
            f"the tasks are given in the order {numbers}: give them from 0/{count} to "
            f"{count - 1}/{count}"
        )
    options = [{**receipt["options"], "task": 0} for _, _, receipt in pairs if receipt]
    if any(other != options[0] for other in options):
        raise UserError("the tasks were run with different options: run all with the same ones")
    # Times of change may differ from node to node; shares of bytes depend on names and sizes.
    seen = [
        [(entry["path"], entry["size"]) for entry in receipt["wanted"]["inputs"]]
        for _, _, receipt in pairs
        if receipt
    ]
    for (name, _, _), inputs in zip(pairs, seen, strict=True):
        if inputs != seen[0]:
            raise UserError(
                f"{name} and {pairs[0][0]} saw different inputs, so documents would be missing or "
                "doubled: run all tasks again on the same files"
            )


def _copy(
    name: str, index: Index, receipt: dict[str, Any] | None, writer: PairWriter
) -> np.ndarray:
    """Append one pair; returns its histogram. Raises `Failure` when it is damaged."""
    path, _ = indexed.paths(name)
    item = index.dtype.itemsize
    digest = xxhash.xxh3_128()
    counts = np.zeros(BINS, dtype=np.int64)
    expected = 0
    with open(path, "rb", buffering=0) as stream:

        def blocks(left: int) -> Iterator[bytes]:
            while left:
                block = stream.read(min(left, COPY_BYTES))
                if not block:
                    raise Failure(f"{path} is truncated at byte {stream.tell():,}: make it anew")
                digest.update(block)
                left -= len(block)
                yield block

        for first in range(0, len(index.lengths), CHUNK):
            lengths = np.array(index.lengths[first : first + CHUNK])
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            if lengths.min(initial=0) < 0 or not np.array_equal(
                index.pointers[first : first + CHUNK], expected + starts * item
            ):
                raise Failure(
                    f"{name}.idx is damaged or has gaps from document {first:,} on: see "
                    "`data-tools verify`"
                )
            size = int(lengths.sum(dtype=np.int64)) * item
            writer.append(blocks(size), lengths)
            counts += histogram(lengths)
            expected += size
        if stream.read(1):
            raise Failure(f"{path} is longer than its index says: see `data-tools verify`")
    if receipt is not None:
        known = next(p["bin"]["checksum"] for p in receipt["outputs"]["pairs"])
        if known != f"xxh128:{digest.hexdigest()}":
            raise Failure(
                f"{path} differs from the checksum in its receipt: see `data-tools verify`"
            )
    return counts


def _join_rejected(pairs: Sequence[Pair], folder: Path) -> int:
    """Concatenate PREFIX.rejected.jsonl of all inputs, that of shards once; returns the number of
    lines."""
    owners = [
        _owner(name, receipt["shard"]) if receipt and "shard" in receipt else name
        for name, _, receipt in pairs
    ]
    count = 0
    with open(folder / "rejected.jsonl", "wb") as stream:
        for name in dict.fromkeys(owners):
            path = Path(f"{name}.rejected.jsonl")
            if path.is_file():
                with open(path, "rb") as source:
                    for line in source:
                        stream.write(line)
                        count += 1
    return count


def _joined_counts(receipts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums of what all inputs count; None for what one of them does not.

    Shards count some things for all of them together: known when all are here.
    """
    parts = [receipt["counts"] for receipt in receipts if "shard" not in receipt]
    runs: dict[bytes, list[dict[str, Any]]] = {}
    for receipt in receipts:
        if "shard" in receipt:
            runs.setdefault(json_bytes(receipt["wanted"]), []).append(receipt["shard"])
    for shards in runs.values():
        complete = sorted(shard["number"] for shard in shards) == list(range(shards[0]["of"]))
        parts.append(shards[0]["counts"] if complete else {})
    counts: dict[str, Any] = {}
    for key in ("characters", "bytes", "lines", "rejected", "literal_control_tokens", "slices"):
        values = [part.get(key) for part in parts]
        counts[key] = None if None in values or not values else _total(values)
    return counts


def _total(values: Sequence[Any]) -> Any:
    """The sum of numbers, or of dictionaries of them key by key."""
    if not isinstance(values[0], dict):
        return sum(values)
    keys = sorted({key for value in values for key in value})
    return {key: _total([value[key] for value in values if key in value]) for key in keys}


def _joined_receipt(
    pairs: Sequence[Pair],
    outputs: list[dict[str, Any]],
    lengths: np.ndarray,
    seed: int | None,
    shard_tokens: int,
) -> dict[str, Any]:
    receipts = [receipt for _, _, receipt in pairs if receipt]
    counts = {
        **_joined_counts(receipts),
        "documents": sum(pair["documents"] for pair in outputs),
        "tokens": sum(pair["tokens"] for pair in outputs),
    }
    # Shards of one run all name its inputs.
    inputs = {json_bytes(entry): entry for receipt in receipts for entry in receipt["inputs"]}
    return {
        "format": FORMAT,
        "kind": "tokens",
        "inputs": list(inputs.values()),
        "merged": [name for name, _, _ in pairs],
        "tokenizer": receipts[0]["tokenizer"] if receipts else {},
        "options": {
            **(receipts[0]["options"] if receipts else {}),
            "task": [0, 1],
            "seed": seed,
            "shard_tokens": shard_tokens,
        },
        "counts": counts,
        "lengths": lengths.tolist(),
        "outputs": {"dtype": pairs[0][1].dtype.name, "pairs": outputs},
        "versions": versions(),
        "command": command_line(),
    }
