"""Find documents that are there twice; report first, remove on request.

    report = deduplicate(["data/"], "duplicates.jsonl")                  # exact, after normalising
    deduplicate(["data/"], "duplicates.jsonl", near=True, output="clean/")

Exact: the same words in the same order, letters' case, punctuation and white space aside (without
any word, the same text); 32 bytes of memory a document. Near: MinHash (Broder 1997) over 5-word
shingles with locality-sensitive hashing, by datasketch (the `dedup` extra); estimated Jaccard
similarity of `threshold` or more, in memory. The first document in input order is kept. Removing
writes new files and leaves the inputs; a file that is there is replaced only with `overwrite`, an
input never.
"""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from data_tools.corpus import WINDOW_BYTES, Source, find_sources
from data_tools.documents import DEFAULT_TEXT_KEYS, TOO_LONG
from data_tools.errors import UserError
from data_tools.files import atomic_write
from data_tools.lines import MAX_LINE_BYTES, read_lines
from data_tools.lock import exclusive
from data_tools.reading import read_documents

_WORD = re.compile(r"\w+")
SHINGLE = 5
PERMUTATIONS = 128
MOST_SIMILAR = 0.98  # beyond, 128 permutations make no two bands to look documents up by


def deduplicate(
    inputs: Sequence[str],
    report: str | os.PathLike[str],
    *,
    near: bool = False,
    threshold: float = 0.8,
    output: str | os.PathLike[str] | None = None,
    text_keys: tuple[str, ...] = DEFAULT_TEXT_KEYS,
    window_bytes: int = WINDOW_BYTES,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one JSON line a duplicate to `report`; with `output`, also the inputs without them.

    Returns counts, among them those of lines without a document, by reason. Raises `UserError`, and
    `Failure` when an input is damaged.
    """
    if not 0 < threshold <= MOST_SIMILAR:
        raise UserError(
            f"--threshold {threshold} is not above 0 and up to {MOST_SIMILAR}: write 0.8, or leave "
            "out --near for documents that are equal"
        )
    report = Path(report)
    sources = find_sources(inputs, window_bytes)
    if output is not None and any(s.path == "-" or s.compression == "parquet" for s in sources):
        raise UserError(
            "dedup --output reads its input twice and writes JSONL: name JSONL files, not - or "
            "Parquet, or leave --output out"
        )
    targets = _targets(sources, Path(output)) if output is not None else []
    _refuse_replacing(sources, report, targets, overwrite)  # before folders are made for the locks
    with contextlib.ExitStack() as locks:
        locks.enter_context(
            exclusive(report.with_name(f".{report.name}.lock"), f"--report {report}")
        )
        if output is not None:
            locks.enter_context(exclusive(Path(output) / ".dedup.lock", f"--output {output}"))
        _refuse_replacing(sources, report, targets, overwrite)  # what another has just written
        return _deduplicate(sources, report, targets, threshold if near else None, text_keys)


def _deduplicate(
    sources: Sequence[Source],
    report: Path,
    targets: Sequence[Path],
    threshold: float | None,
    text_keys: tuple[str, ...],
) -> dict[str, Any]:
    places = array("Q")  # source << 40 | line
    sizes = array("Q")
    low, high = array("Q"), array("Q")
    index = _NearIndex(threshold) if threshold is not None else None
    near_of: dict[int, tuple[int, float]] = {}
    rejected: Counter[str] = Counter()
    for number, source in enumerate(sources):
        for line, document in read_documents(source, text_keys, rejected):
            text = document.text.decode()
            # A text without any word (emoji, rules of dashes) is compared as it is.
            words = normalise(text) or [text]
            digest = xxhash.xxh3_128_intdigest(" ".join(words).encode())
            k = len(places)
            places.append(number << 40 | line.number)
            sizes.append(len(text))
            low.append(digest & 0xFFFFFFFFFFFFFFFF)
            high.append(digest >> 64)
            if index is not None and (match := index.add(k, words)) is not None:
                near_of[k] = match
        if targets and rejected[TOO_LONG]:
            raise UserError(
                f"{source.path} has a line of more than {MAX_LINE_BYTES:,} bytes, too many to "
                "copy: leave --output out, or name files without such lines"
            )
    duplicate_of, kinds = _exact(low, high)
    for k, (first, _) in near_of.items():
        if k not in duplicate_of:
            duplicate_of[k], kinds[k] = first, "near"
    with atomic_write(report) as stream:
        for k in sorted(duplicate_of):
            record = {
                **_place(places[k], sources),
                "duplicate_of": _place(places[duplicate_of[k]], sources),
                "kind": kinds[k],
                "similarity": round(near_of[k][1], 3) if kinds[k] == "near" else 1.0,
                "bytes": sizes[k],
            }
            stream.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
    doomed = {places[k] for k in duplicate_of}
    for number, target in enumerate(targets):
        _filter(sources[number], number, doomed, target)
    return {
        "documents": len(places),
        "duplicates": len(duplicate_of),
        "exact": sum(kind == "exact" for kind in kinds.values()),
        "near": sum(kind == "near" for kind in kinds.values()),
        "bytes": sum(sizes),
        "duplicate_bytes": sum(sizes[k] for k in duplicate_of),
        "rejected": dict(rejected),
        "report": os.fspath(report),
        "removed": bool(targets),
    }


def normalise(text: str) -> list[str]:
    """The words that decide equality: NFKC, lower case, without punctuation and white space."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _exact(low: array, high: array) -> tuple[dict[int, int], dict[int, str]]:
    """Documents with the digest of an earlier one, and which."""
    if not len(low):
        return {}, {}
    a, b = np.frombuffer(low, dtype=np.uint64), np.frombuffer(high, dtype=np.uint64)
    order = np.lexsort((np.arange(len(a)), b, a))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (a[order[1:]] != a[order[:-1]]) | (b[order[1:]] != b[order[:-1]])
    firsts = order[new][np.cumsum(new) - 1]
    found = {int(k): int(first) for k, first in zip(order[~new], firsts[~new], strict=True)}
    return found, dict.fromkeys(found, "exact")


class _NearIndex:
    def __init__(self, threshold: float) -> None:
        try:
            import datasketch
        except ImportError as error:
            raise UserError("--near needs datasketch: pip install 'megatron-ext[dedup]'") from error
        self.minhash = datasketch.MinHash
        self.threshold = threshold
        self.index = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self.kept: dict[int, Any] = {}

    def add(self, key: int, words: list[str]) -> tuple[int, float] | None:
        """Index a document, or return the earlier one it resembles, with the similarity."""
        shingles = {
            " ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))
        }
        sketch = self.minhash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        best = max(
            ((sketch.jaccard(self.kept[other]), -other) for other in self.index.query(sketch)),
            default=None,
        )
        if best is not None and best[0] >= self.threshold:
            return -best[1], float(best[0])
        self.index.insert(key, sketch)
        self.kept[key] = sketch
        return None


def _place(code: int, sources: Sequence[Source]) -> dict[str, Any]:
    return {"file": sources[code >> 40].path, "line": code & ((1 << 40) - 1)}


def _targets(sources: Sequence[Source], folder: Path) -> list[Path]:
    """Where the cleaned files go: names of the inputs below what they share, always plain JSONL."""
    paths = [Path(os.path.abspath(source.path)) for source in sources]
    root = os.path.commonpath([path.parent for path in paths])
    targets = []
    for path in paths:
        name = re.sub(r"\.(gz|zst|zstd|bz2|xz)$", "", path.name)
        targets.append(folder / path.relative_to(root).parent / name)
    if len(set(targets)) < len(targets):
        raise UserError(
            f"two inputs would have one name below --output {folder}: clean them one by one"
        )
    return targets


def _refuse_replacing(
    sources: Sequence[Source], report: Path, targets: Sequence[Path], overwrite: bool
) -> None:
    inputs = {os.path.realpath(source.path) for source in sources}
    if os.path.realpath(report) in {os.path.realpath(target) for target in targets}:
        raise UserError(f"{report} would be the report and a cleaned file: choose another --report")
    for path in (report, *targets):
        if os.path.realpath(path) in inputs:
            raise UserError(f"{path} is an input, and would be overwritten: choose another place")
        if os.path.lexists(path) and not overwrite:
            raise UserError(
                f"{path} exists: choose another place, or write --overwrite to replace it"
            )


def _filter(source: Source, number: int, doomed: set[int], target: Path) -> None:
    """Copy a source without the doomed lines; bad ones stay, for `tokenize` to report."""
    with atomic_write(target) as stream:
        for line in read_lines(source):
            if number << 40 | line.number not in doomed:
                stream.write(line.data + b"\n")
