"""One function a command of `data-tools`: arguments in, a library call, a few printed lines out.

    run_inspect(argparse.Namespace(prefix="corpus", json=False))

Libraries are imported by the command that needs them, so that every command starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import unicodedata
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from data_tools.errors import Failure, UserError


def run_tokenize(given: Namespace) -> None:
    from data_tools import indexed
    from data_tools.options import Options, parse_task
    from data_tools.tokenization import tokenize

    task = parse_task(given.task)
    options = Options(
        append_eod=given.append_eod,
        prepend_bos=given.prepend_bos,
        text_keys=_words(given.text_key),
        min_tokens=given.min_tokens,
        max_line_bytes=given.max_line_bytes,
        max_uncut_bytes=given.max_uncut_bytes,
        shard_tokens=given.shard_tokens,
        seed=given.seed,
        task=task,
    )
    prefix = str(indexed.prefix(given.output, "--output "))
    if task[1] > 1:
        prefix = f"{prefix}.task-{task[0]:05d}-of-{task[1]:05d}"
    with _hidden("scipy"):  # Numba would load its linear algebra, a tenth of a second, for nothing
        receipt = tokenize(
            given.inputs,
            given.tokenizer,
            prefix,
            options,
            workers=given.workers,
            max_rejected=given.max_rejected,
            eod_token=given.eod_token,
            bos_token=given.bos_token,
            overwrite=given.overwrite,
            window_bytes=given.max_window_bytes,
            fast=given.fast,
            quiet=given.quiet,
        )
    rejected = sum((receipt["counts"]["rejected"] or {}).values())
    tail = f", {rejected:,} lines rejected (see {prefix}.rejected.jsonl)" if rejected else ""
    _show(given, receipt, _written(receipt, prefix) + tail)


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """As if this package were not installed, unless it is in use already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def run_train(given: Namespace) -> None:
    from data_tools.reading import rejected_words
    from data_tools.tokenizer_training import train_tokenizer

    receipt = train_tokenizer(
        given.inputs,
        given.output,
        given.vocab_size,
        sample_bytes=given.sample_bytes,
        seed=given.seed,
        character_coverage=given.character_coverage,
        text_keys=_words(given.text_key),
        slice_shares=_shares("--slice-shares", given.slice_shares, "c4=0.6,arxiv=0.4"),
        window_bytes=given.max_window_bytes,
        overwrite=given.overwrite,
    )
    model, sample = receipt["model"], receipt["sample"]
    _show(
        given,
        receipt,
        f"{model['path']}: {_done(receipt)}, {model['vocab_size']:,} pieces from "
        f"{sample['documents']:,} documents, {sample['bytes'] / 1e6:.1f} MB"
        + rejected_words(receipt["rejected"]),
    )


def run_merge(given: Namespace) -> None:
    from data_tools.merge import merge

    receipt = merge(
        given.inputs,
        given.output,
        seed=given.seed,
        shard_tokens=given.shard_tokens,
        overwrite=given.overwrite,
    )
    _show(given, receipt, _written(receipt, given.output))


def run_split(given: Namespace) -> None:
    from data_tools.splitting import split

    shares = _shares("--shares", given.shares, "train=0.98,valid=0.02")
    receipts = split(given.prefix, shares, seed=given.seed, overwrite=given.overwrite)
    lines = [_written(receipt, given.prefix) for receipt in receipts.values()]
    _show(given, receipts, "\n".join(lines))


def run_verify(given: Namespace) -> None:
    from data_tools.receipt import read_receipt
    from data_tools.verification import find, verify

    prefixes = [str(find(prefix)) for prefix in given.prefixes]  # before hours of reading
    found = {prefix: verify(prefix) for prefix in prefixes}
    lines = []
    for prefix, problems in found.items():
        if not problems:
            receipt = read_receipt(prefix) is not None
            lines.append(f"{prefix}: sound" + ("" if receipt else " (no receipt: structure only)"))
        lines += [f"{prefix}: {problem}" for problem in problems]
    _show(given, found, "\n".join(lines))
    if bad := [prefix for prefix, problems in found.items() if problems]:
        raise Failure(f"{len(bad)} of {len(found)} damaged: {', '.join(bad)}")


def run_inspect(given: Namespace) -> None:
    from data_tools.inspection import show_summary, summary

    found = summary(given.prefix)
    _show(given, found, show_summary(found))


def run_lengths(given: Namespace) -> None:
    from data_tools.inspection import context_lengths

    try:
        contexts = [int(word) for word in _words(given.contexts)]
    except ValueError as error:
        raise UserError(
            f"--contexts {given.contexts} is not a list of numbers: write 4096,32768"
        ) from error
    rows = context_lengths(given.prefix, contexts)
    lines = ["  context  longer documents  tokens in them   share  share beyond the context"]
    for row in rows:
        lines.append(
            f"{row['context']:>9,} {row['documents_longer']:>17,} {row['tokens_in_longer']:>15,} "
            f"{row['share_of_tokens']:>7.1%} {row['share_of_tokens_beyond']:>25.1%}"
        )
    _show(given, rows, "\n".join(lines))


def run_peek(given: Namespace) -> None:
    from data_tools.inspection import peek

    documents = given.documents or ([] if given.sample else [0])
    found = peek(
        given.prefix,
        documents,
        sample=given.sample,
        seed=given.seed,
        tokenizer=given.tokenizer,
        max_tokens=given.max_tokens,
    )
    parts = [
        f"--- document {one['document']:,}, {one['tokens']:,} tokens\n{_visible(one['text'])}"
        for one in found
    ]
    _show(given, found, "\n".join(parts))


def run_download(given: Namespace) -> None:
    from data_tools.downloading import download

    found = download(
        given.manifest,
        given.output,
        checksums=given.checksums,
        connections=given.connections,
        quiet=given.quiet,
    )
    old = found["not_compared"]
    new = found["without_checksum"] - old
    unsure = [f"{new:,} fetched now and compared in length"] if new else []
    unsure += [f"{old:,} found there and not looked into"] if old else []
    _show(
        given,
        found,
        f"{given.output}: {found['files']:,} files, {found['bytes'] / 1e6:,.1f} MB, "
        f"{found['fetched']:,} fetched now"
        + (f"; without checksum: {', '.join(unsure)}" if unsure else ""),
    )


def run_dedup(given: Namespace) -> None:
    from data_tools.deduplication import deduplicate
    from data_tools.reading import rejected_words

    found = deduplicate(
        given.inputs,
        given.report,
        near=given.near,
        threshold=given.threshold,
        output=given.output,
        text_keys=_words(given.text_key),
        window_bytes=given.max_window_bytes,
        overwrite=given.overwrite,
    )
    share = found["duplicate_bytes"] / max(1, found["bytes"])
    _show(
        given,
        found,
        f"{given.report}: {found['duplicates']:,} of {found['documents']:,} documents are "
        f"duplicates ({found['exact']:,} exact, {found['near']:,} near), {share:.1%} of the text"
        + (f"; {given.output} holds the rest" if found["removed"] else "; nothing was removed")
        + rejected_words(found["rejected"]),
    )


def _shares(flag: str, text: str, example: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for word in filter(None, _words(text)):
        name, _, share = word.partition("=")
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise UserError(f"{flag} {text} is not NAME=SHARE,...: write {example}") from error
    return shares


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _done(receipt: dict[str, Any]) -> str:
    return "already done" if receipt["reused"] else "written"


def _written(receipt: dict[str, Any], beside: str) -> str:
    counts, pairs = receipt["counts"], receipt["outputs"]["pairs"]
    folder = os.path.dirname(beside)
    first, last = (os.path.join(folder, pair["prefix"]) for pair in (pairs[0], pairs[-1]))
    files = f"{first}.bin/.idx" + (f" to {last} ({len(pairs)} pairs)" if len(pairs) > 1 else "")
    return (
        f"{files}: {_done(receipt)}, {counts['documents']:,} documents, {counts['tokens']:,} tokens"
    )


def _show(given: Namespace, result: Any, text: str) -> None:
    # What the terminal's encoding lacks is spelled out.
    encoding = sys.stdout.encoding or "utf-8"
    if given.json:
        import orjson

        text = orjson.dumps(result, option=orjson.OPT_INDENT_2).decode()
        if text.encode(encoding, "replace").decode(encoding) != text:
            text = json.dumps(orjson.loads(text), indent=2)
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _visible(text: str) -> str:
    """Control characters, which a terminal may obey, as their escapes; lines stay lines."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else repr(char)[1:-1]
        for char in text
    )
