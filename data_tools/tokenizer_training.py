"""Train a sentencepiece tokenizer: BPE, byte fallback, split digits, LLaMA-like defaults.

    train_tokenizer(["corpus.jsonl"], "tokenizer.model", vocab_size=32000)

The same inputs, options and seed give the same model on any number of cores. Refuses a vocabulary
that the text cannot fill. A finished model with the same inputs and options is left alone, any
other file of its name is replaced only with `overwrite`.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_tools.corpus import WINDOW_BYTES, Source, find_sources, slice_of_path
from data_tools.documents import DEFAULT_TEXT_KEYS
from data_tools.errors import UserError
from data_tools.files import checksum, read_json, write_file, write_json
from data_tools.lock import exclusive
from data_tools.options import available_cores, check_count, check_seed
from data_tools.reading import read_documents
from data_tools.receipt import command_line, receipt_path, versions

SMALLEST = 300  # ids


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the model. `sample_bytes` of text are drawn, evenly over all documents, or so
    that each of the slices in `slice_shares` has its share of them."""

    vocab_size: int
    sample_bytes: int = 200_000_000
    seed: int = 0
    character_coverage: float = 0.99995
    text_keys: tuple[str, ...] = DEFAULT_TEXT_KEYS
    slice_shares: tuple[tuple[str, float], ...] = ()


def train_tokenizer(
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    vocab_size: int,
    *,
    sample_bytes: int = 200_000_000,
    seed: int = 0,
    character_coverage: float = 0.99995,
    text_keys: tuple[str, ...] = DEFAULT_TEXT_KEYS,
    slice_shares: Mapping[str, float] | None = None,
    window_bytes: int = WINDOW_BYTES,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train and write `output` (a .model, or a prefix of one) and X.model.receipt.json; returns
    the receipt.

    slice_shares: of the sample, by slice; slices that are not named give nothing. Unset: every
    slice gives as much as it has of the whole.

    `receipt["reused"]` is true when the model was already there. Raises `UserError`.
    """
    shares = tuple(sorted((slice_shares or {}).items()))
    options = TrainingOptions(vocab_size, sample_bytes, seed, character_coverage, text_keys, shares)
    _check(options)
    model_path = Path(output) if str(output).endswith(".model") else Path(f"{output}.model")
    if model_path.name == ".model":
        raise UserError(f"--output {output} names no file: write a name such as tokenizer.model")
    sources = find_sources(inputs, window_bytes)
    wanted = {
        "inputs": [{"path": s.path, "size": s.size, "mtime_ns": s.mtime_ns} for s in sources],
        "options": {**asdict(options), "text_keys": list(text_keys), "slice_shares": dict(shares)},
    }
    # A finished one is of use in a folder that nobody may write, too.
    if (known := _finished(model_path, wanted, overwrite)) is not None:
        return {**known, "reused": True}
    with exclusive(model_path.with_name(f".{model_path.name}.lock"), f"--output {output}"):
        if (known := _finished(model_path, wanted, overwrite)) is not None:
            return {**known, "reused": True}
        rejected: Counter[str] = Counter()
        texts, slices = sample(sources, options, rejected)
        model = _train(texts, options)
        receipt = {
            "format": 1,
            "kind": "tokenizer",
            "wanted": wanted,
            "sample": {"documents": len(texts), "bytes": sum(map(len, texts)), "slices": slices},
            "rejected": dict(rejected),
            "model": {
                "path": str(model_path),
                "hash": f"sha256:{hashlib.sha256(model).hexdigest()}",
                "checksum": f"xxh128:{xxhash.xxh3_128_hexdigest(model)}",
                "vocab_size": vocab_size,
            },
            "versions": versions(),
            "command": command_line(),
        }
        # The receipt first: a model without one would be a stranger's, and not replaced.
        write_json(receipt_path(model_path), receipt)
        write_file(model_path, model)
    return {**receipt, "reused": False}


def _check(options: TrainingOptions) -> None:
    whole = abs(sum(share for _, share in options.slice_shares) - 1) <= 1e-6  # false for nan
    if options.slice_shares and not (whole and all(share > 0 for _, share in options.slice_shares)):
        raise UserError(
            f"--slice-shares {dict(options.slice_shares)} do not add up to 1 with every one above "
            "0: write such as c4=0.6,arxiv=0.4"
        )
    if options.vocab_size < SMALLEST:
        raise UserError(
            f"--vocab-size {options.vocab_size} leaves no room beside 256 bytes and 3 control "
            f"tokens: write {SMALLEST} or more"
        )
    check_seed(options.seed)
    check_count("--sample-bytes", options.sample_bytes, least=1)
    if not 0.98 <= options.character_coverage <= 1:
        raise UserError(
            f"--character-coverage {options.character_coverage} is outside 0.98 to 1, which "
            "sentencepiece asks for: write 0.99995, or 1 for every character"
        )


def _finished(model: Path, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The receipt, if the model is already made from the same things; None if it has to be made.

    Raises `UserError` when another file is there that may not be replaced.
    """
    if not os.path.lexists(model):
        return None
    # A receipt that is missing or broken does not say what the model was made from.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = read_json(receipt_path(model))
        repeatable = all(entry["path"] != "-" for entry in wanted["inputs"])
        same = known["wanted"] == wanted and known["model"]["checksum"] == checksum(model)
        if same and repeatable:
            return known
    if not overwrite:
        raise UserError(
            f"{model} exists and was made from other inputs or options, or no receipt says from "
            "what: choose another --output, or write --overwrite to replace it (token files made "
            "with it then lose their tokenizer)"
        )
    return None


def sample(
    sources: Sequence[Source], options: TrainingOptions, rejected: Counter[str] | None = None
) -> tuple[list[bytes], dict[str, int]]:
    """Documents drawn evenly until `sample_bytes` are full, and how many bytes each slice gave.

    Every document gets a number from its text and the seed; the lowest numbers are kept, of all
    documents or of each slice that has a share. So the draw needs one pass, bounded memory, and
    does not depend on the order of the files.
    """
    shares = dict(options.slice_shares)
    heaps: dict[str, _Lowest] = {
        name: _Lowest(int(share * options.sample_bytes)) for name, share in shares.items()
    } or {"": _Lowest(options.sample_bytes)}
    rejected = Counter() if rejected is None else rejected
    for source in sources:
        for _, document in read_documents(source, options.text_keys, rejected):
            number = xxhash.xxh3_64_intdigest(document.text, seed=options.seed)
            name = document.slice or slice_of_path(source.path)
            if heap := heaps.get(name if shares else ""):
                heap.add(number, document.text, name)
    for name, share in shares.items():
        if heaps[name].seen < int(share * options.sample_bytes):
            raise UserError(
                f"--slice-shares {name}={share:g} of --sample-bytes {options.sample_bytes} is more "
                f"than the {heaps[name].seen} bytes of this slice in the inputs: lower one of them"
            )
    kept = [entry for heap in heaps.values() for entry in heap.kept]
    if not kept:
        raise UserError("the inputs hold no text to train on: check --text-key and the files")
    slices: dict[str, int] = {}
    for _, text, name in kept:
        slices[name] = slices.get(name, 0) + len(text)
    return [text for _, text, _ in sorted(kept, reverse=True)], dict(sorted(slices.items()))


class _Lowest:
    """The documents with the lowest numbers, as many as `most` bytes hold; one at least."""

    def __init__(self, most: int) -> None:
        self.most, self.size, self.seen = most, 0, 0
        self.kept: list[tuple[int, bytes, str]] = []  # a heap with the highest number on top

    def add(self, number: int, text: bytes, name: str) -> None:
        heapq.heappush(self.kept, (-number, text, name))
        self.size += len(text)
        self.seen += len(text)
        while self.size > self.most and len(self.kept) > 1:
            self.size -= len(heapq.heappop(self.kept)[1])


def _sentences(texts: Sequence[bytes]) -> Iterator[str]:
    """Lines, as LLaMA's tokenizer was trained; a newline becomes its byte token."""
    for text in texts:
        for line in text.decode().split("\n"):
            # sentencepiece treats NUL and its own space mark specially while it trains.
            line = line.replace("\0", "").replace("\u2581", "")
            for start in range(0, len(line), 4000):
                yield line[start : start + 4000]


def _train(texts: Sequence[bytes], options: TrainingOptions) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=options.vocab_size,
            character_coverage=options.character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=available_cores(),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(_too_many_or_too_few(options.vocab_size, reason)) from error
    return model.getvalue()


def _too_many_or_too_few(vocab_size: int, reason: str) -> str:
    """What to write in place of a vocabulary that sentencepiece refuses for `reason`."""
    if few := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return (
            f"--vocab-size {vocab_size} is too small for the characters of this text: write "
            f"{few[1]} or more, or a smaller --character-coverage"
        )
    if many := re.search(r"Vocabulary size too high .* <= (\d+)", reason):
        less = f"write {many[1]} or less, or " if int(many[1]) >= SMALLEST else ""
        return (
            f"--vocab-size {vocab_size} is more than this text has pieces for: {less}give more text"
        )
    return f"--vocab-size {vocab_size} does not suit this text: sentencepiece says {reason!r}"
