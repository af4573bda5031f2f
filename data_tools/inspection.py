"""Look into a .bin/.idx pair: counts, lengths, documents.

    summary("corpus")                     # documents, tokens, percentiles, histogram, slices
    context_lengths("corpus")             # share of tokens in documents longer than 4k, 8k ...
    peek("corpus", documents=[0, 7])      # decoded text

A prefix whose receipt lists several pairs (shards) stands for all of them, in order. Refuses a
tokenizer whose hash is not the one in the receipt.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_tools import indexed
from data_tools.errors import Failure, UserError
from data_tools.indexed import CHUNK, Index
from data_tools.options import check_count, check_seed
from data_tools.receipt import BINS, histogram, pairs_of, read_receipt
from data_tools.tokenizer import load_tokenizer

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
CONTEXTS = (4096, 8192, 32768, 131072)


def document_lengths(index: Index) -> np.ndarray:
    """Tokens of each document, int64 [documents]."""
    if len(index.lengths) == index.documents:
        return index.lengths
    sums = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
    return np.diff(sums[index.boundaries])


def summary(prefix: str | os.PathLike[str]) -> dict[str, Any]:
    """Counts, percentiles of length in tokens, histogram by powers of two, slices by receipt."""
    prefix = indexed.prefix(prefix)
    receipt = read_receipt(prefix)
    pairs = pairs_of(prefix)
    indexes = [indexed.read_index(pair) for pair in pairs]
    lengths = np.concatenate([document_lengths(index) for index in indexes])
    counts = np.zeros(BINS, dtype=np.int64)
    for first in range(0, len(lengths), CHUNK):
        counts += histogram(lengths[first : first + CHUNK])
    percentiles = (
        np.percentile(lengths, PERCENTILES) if len(lengths) else np.zeros(len(PERCENTILES))
    )
    return {
        "prefix": os.fspath(prefix),
        "dtype": indexes[0].dtype.name,
        "documents": len(lengths),
        "tokens": sum(index.tokens for index in indexes),
        "bytes": sum(indexed.bin_size(pair) for pair in pairs),
        "mean": float(lengths.mean()) if len(lengths) else 0.0,
        "longest": int(lengths.max(initial=0)),
        "percentiles": {str(p): float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
        "histogram": counts.tolist(),
        "tokenizer": receipt["tokenizer"] if receipt else None,
        "slices": receipt["counts"]["slices"] if receipt else None,
        "rejected": receipt["counts"]["rejected"] if receipt else None,
    }


def show_summary(found: dict[str, Any]) -> str:
    """`summary` as text."""
    lines = [
        f"{found['prefix']}: {found['documents']:,} documents, {found['tokens']:,} tokens, "
        f"{found['dtype']}, {found['bytes'] / 1e6:,.1f} MB",
        f"  tokens a document: mean {found['mean']:,.1f}, longest {found['longest']:,}",
        "  percentiles: " + ", ".join(f"{p}% {v:,.0f}" for p, v in found["percentiles"].items()),
    ]
    if found["tokenizer"]:
        kind = found["tokenizer"]
        lines.append(
            f"  tokenizer: {kind['path']} ({kind['vocab_size']:,} ids, EOD {kind['eod_id']}) "
            f"{kind['hash'][:23]}"
        )
    for name, counts in (found["slices"] or {}).items():
        lines.append(
            f"  slice {name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens"
        )
    for reason, count in (found["rejected"] or {}).items():
        lines.append(f"  rejected, {reason}: {count:,} lines")
    most = max(found["histogram"], default=0)
    for power, count in enumerate(found["histogram"]):
        if count:
            low, high = (0, 0) if power == 0 else (2 ** (power - 1), 2**power - 1)
            bar = "#" * max(1, round(40 * count / most))
            lines.append(f"  {low:>9,} - {high:>9,} tokens {count:>12,} {bar}")
    return "\n".join(lines)


def context_lengths(
    prefix: str | os.PathLike[str], contexts: Sequence[int] = CONTEXTS
) -> list[dict[str, Any]]:
    """For each context: documents longer than it, and their share of all tokens.

    `share_of_tokens_beyond` is the share at positions the context cannot reach, cut at document
    starts: what a model with that context never sees together with the document's beginning.
    """
    if any(context < 1 for context in contexts):
        raise UserError(
            f"--contexts {','.join(map(str, contexts))}: every context is 1 token or more"
        )
    indexes = [indexed.read_index(pair) for pair in pairs_of(indexed.prefix(prefix))]
    rows = []
    total = max(1, sum(index.tokens for index in indexes))
    for context in contexts:
        documents = tokens = beyond = 0
        for chunk in _chunks(indexes):
            longer = chunk[chunk > context].astype(np.int64)
            documents += len(longer)
            tokens += int(longer.sum())
            beyond += int((longer - context).sum())
        rows.append(
            {
                "context": int(context),
                "documents_longer": documents,
                "tokens_in_longer": tokens,
                "share_of_tokens": tokens / total,
                "share_of_tokens_beyond": beyond / total,
            }
        )
    return rows


def _chunks(indexes: Sequence[Index]) -> Iterator[np.ndarray]:
    for index in indexes:
        lengths = document_lengths(index)
        for first in range(0, len(lengths), CHUNK):
            yield lengths[first : first + CHUNK]


def peek(
    prefix: str | os.PathLike[str],
    documents: Sequence[int] = (),
    *,
    sample: int = 0,
    seed: int = 0,
    tokenizer: str | None = None,
    max_tokens: int = 0,
) -> list[dict[str, Any]]:
    """Decoded documents: those asked for (negative counts from the end) and a seeded sample.

    Raises `UserError`, and `Failure` for a document that lies outside the .bin.
    """
    check_count("--sample", sample)
    check_count("--max-tokens", max_tokens)
    check_seed(seed)
    prefix = indexed.prefix(prefix)
    receipt = read_receipt(prefix)
    pairs = pairs_of(prefix)
    indexes = [indexed.read_index(pair) for pair in pairs]
    made_by = receipt["tokenizer"] if receipt else {}
    path = tokenizer or made_by.get("path")
    if path is None:
        raise UserError(f"{prefix} has no receipt that names its tokenizer: write --tokenizer")
    loaded = load_tokenizer(path)
    if made_by and loaded.hash != made_by["hash"]:
        raise UserError(
            f"tokenizer {path} is not the one that made {prefix} ({made_by['hash'][:23]}): give "
            "that one with --tokenizer"
        )
    ends = np.cumsum([index.documents for index in indexes])
    total = int(ends[-1])
    numbers = [k + total if k < 0 else k for k in documents]
    for k, number in zip(documents, numbers, strict=True):
        if not 0 <= number < total:
            raise UserError(f"document {k} does not exist: {prefix} has {total:,}, counted from 0")
    numbers += random.Random(seed).sample(range(total), min(sample, total))
    found = []
    for number in numbers:
        which = int(np.searchsorted(ends, number, side="right"))
        index, tokens = indexes[which], indexed.open_tokens(pairs[which], indexes[which])
        start, end = index.span(number - int(ends[which]) + index.documents)
        if not 0 <= start <= end <= len(tokens):
            raise Failure(
                f"{pairs[which]}.bin does not reach to document {number:,}, or its index is "
                "damaged: see `data-tools verify`"
            )
        ids = np.asarray(tokens[start : min(end, start + max_tokens) if max_tokens else end])
        text = loaded.decode(ids[(ids >= 0) & (ids < loaded.vocab_size)])
        found.append({"document": number, "tokens": end - start, "text": text})
    return found
