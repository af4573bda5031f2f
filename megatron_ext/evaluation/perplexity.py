"""Perplexity against context length, by a window that slides over each document.

    plan = make_plan(find_subject(run_dir), lengths=[1024, 4096, 16384])
    with open_checkpoint(plan.subject.config, plan.subject.weights) as scorer:
        results = measure(plan, scorer)              # also in RUN/evaluation/perplexity.json

A window of W tokens moves by the stride S: begin = 0, S, 2S, ..; each scores only the tokens past
the end of the one before, up to the document's end, so every token but the first of a document is
scored once at every length, and what differs between lengths is only how far back the model sees.
Reported: exp of the mean loss over tokens, and the mean over documents of each one's perplexity,
which is what the paper averages (arXiv 2405.14591); also loss by position in context.

A length that the file already holds for the same checkpoint, texts and settings is not computed
again. Refuses lengths below 2. Needs no torch.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ext.checkpoint.manifest import write_json
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluation import texts as texts_
from megatron_ext.evaluation.subject import Subject
from megatron_ext.evaluation.texts import Tokens

FORMAT = 1
POSITION_BINS = 32  # of the longest window
TOKENS_AT_ONCE = 8192  # of one forward pass: enough to fill a CPU; a GPU is filled by long windows

AGGREGATION = {
    "token_weighted_perplexity": "exp(sum of losses / tokens scored)",
    "mean_document_perplexity": "mean over documents of exp(mean loss of the document)",
    "loss_by_position": "mean loss of tokens with from <= tokens before them < to, first windows",
}


class Scoring(Protocol):
    """What `measure` needs of a model; `scoring.Scorer` is one."""

    part: int
    parts: int
    is_main: bool

    def score(self, tokens: NDArray[Any], last: int | None = None) -> Any: ...

    def total(self, parts: NDArray[np.float64]) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class Plan:
    """What is to be measured and what the results file holds already."""

    subject: Subject
    output: Path
    documents: list[Tokens]
    header: dict[str, Any]  # the results file without its lengths
    done: dict[int, dict[str, Any]]
    missing: list[int]

    @property
    def results(self) -> dict[str, Any]:
        """The file's content for the lengths that are done."""
        return {**self.header, "lengths": [self.done[length] for length in sorted(self.done)]}


@dataclass(frozen=True)
class Window:
    """Tokens begin .. end - 1 of a document; those from `scored` on are scored."""

    document: int
    begin: int
    end: int
    scored: int


def make_plan(
    subject: Subject,
    lengths: Sequence[int] = (),
    stride: int | None = None,
    max_tokens: int | None = None,
    text: Sequence[Path] = (),
) -> Plan:
    """Decide what to score; what is not given is taken from the config's `evaluation` settings.
    Raises UserError."""
    config = subject.config
    settings = config.evaluation
    asked = sorted(set(lengths or settings.lengths or default_lengths(config)))
    stride, max_tokens = stride or settings.stride, max_tokens or settings.max_tokens
    for name, value, least in (
        ("--lengths", asked[0], 2),
        ("--stride", stride, 1),
        ("--max-tokens", max_tokens, 2),
    ):
        if value < least:
            raise UserError(f"{name} {value} is too small: write {least} or more")
    if text:
        texts = texts_.own_texts(subject.tokenizer(), text)
    elif config.data.corpora:
        texts = texts_.validation_texts(config)
    else:
        raise UserError("a Hugging Face folder brings no text: name some by --text FILE")
    output = subject.results / ("perplexity.json" if not text else _own_name(text))
    header = {
        "format": FORMAT,
        "task": "perplexity",
        "checkpoint": subject.identity,
        "settings": {
            "stride": stride,
            "max_tokens": max_tokens,
            "text": texts.source,
            "bos": subject.bos,
        },
        "aggregation": AGGREGATION,
    }
    before = read_results(output)
    known = {entry["length"]: entry for entry in before.get("lengths", [])}
    same = all(before.get(key) == header[key] for key in header)
    # The texts depend on the longest length: shorter ones may join it, a longer one begins anew.
    longest = max([*asked, *known]) if same else asked[-1]
    if longest != max(known, default=0):
        known = {}
    documents, notes = texts_.choose(texts, longest, max_tokens)
    header["text"] = {
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "longest_document": max(map(len, documents)),
        "notes": notes,
    }
    done = known if same else {}
    missing = [n for n in asked if n not in done]
    return Plan(subject, output, documents, header, done, missing)


def measure(plan: Plan, scorer: Scoring) -> dict[str, Any]:
    """Score what is missing, longest first; the file is written after each length. Every rank
    calls this; returns the results."""
    done = dict(plan.done)
    # The longest first: it decides the texts, and its time is the one to know early.
    for length in sorted(plan.missing, reverse=True):
        entry = measure_length(plan, length, scorer)
        done[length] = entry
        if scorer.is_main:
            plan.output.parent.mkdir(parents=True, exist_ok=True)
            lengths = [done[n] for n in sorted(done)]
            write_json(plan.output, {**plan.header, "lengths": lengths})
    return {**plan.header, "lengths": [done[n] for n in sorted(done)]}


def measure_length(plan: Plan, length: int, scorer: Scoring) -> dict[str, Any]:
    """One entry of the results file: windows of `length` tokens over every document."""
    stride = min(plan.header["settings"]["stride"], max(1, length // 2))
    bos = [] if plan.subject.bos is None else [plan.subject.bos]
    # A BOS stands before every window and is one of its tokens.
    batches = list(batch(windows([len(d) for d in plan.documents], length - len(bos), stride)))
    bin_width = -(-length // POSITION_BINS)
    losses, counts = np.zeros((2, len(plan.documents)))
    position_losses, position_counts = np.zeros((2, POSITION_BINS))

    mine = batches[scorer.part :: scorer.parts]
    for group in progress(mine, f"length {length}", scorer.is_main):
        tokens = np.stack(
            [np.append(bos, plan.documents[w.document][w.begin : w.end]) for w in group]
        )
        log_probs = scorer.score(tokens).log_probs.astype(np.float64)[:, len(bos) :]
        for window, values in zip(group, -log_probs, strict=True):
            # values[k] is the loss of token begin + k + 1; the first of a document has none.
            scored = values[max(window.scored - 1, window.begin) - window.begin :]
            losses[window.document] += scored.sum()
            counts[window.document] += len(scored)
            if window.begin == 0:
                bins = np.arange(1, len(values) + 1) // bin_width
                position_losses += np.bincount(bins, values, POSITION_BINS + 1)[:POSITION_BINS]
                position_counts += np.bincount(bins, minlength=POSITION_BINS + 1)[:POSITION_BINS]

    totals = scorer.total(np.concatenate((losses, counts, position_losses, position_counts)))
    losses, counts = totals[: 2 * len(losses)].reshape(2, -1)
    position_losses, position_counts = totals[-2 * POSITION_BINS :].reshape(2, -1)
    return {
        "length": length,
        "stride": stride,
        "windows": sum(map(len, batches)),
        "tokens_scored": int(counts.sum()),
        "documents": len(counts),
        "loss": losses.sum() / counts.sum(),
        "token_weighted_perplexity": float(np.exp(losses.sum() / counts.sum())),
        "mean_document_perplexity": float(np.exp(losses / counts).mean()),
        "loss_by_position": [
            {
                "from": max(1, k * bin_width),
                "to": min((k + 1) * bin_width, length),
                "tokens": int(position_counts[k]),
                "loss": position_losses[k] / position_counts[k],
            }
            for k in range(POSITION_BINS)
            if position_counts[k]
        ],
    }


def windows(document_lengths: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """The windows of every document, in order."""
    for document, tokens in enumerate(document_lengths):
        begin, previous_end = 0, 0
        while previous_end < tokens:
            end = min(begin + length, tokens)
            yield Window(document, begin, end, previous_end)
            previous_end = end
            begin += stride


def batch(items: Iterator[Window]) -> Iterator[list[Window]]:
    """Windows of equal size together, as many as one forward pass takes."""
    waiting: dict[int, list[Window]] = {}
    for window in items:
        size = window.end - window.begin
        group = waiting.setdefault(size, [])
        group.append(window)
        if (len(group) + 1) * size > TOKENS_AT_ONCE:
            yield waiting.pop(size)
    yield from waiting.values()


def default_lengths(config: Config) -> list[int]:
    """Powers of two from 128 to twice the trained context."""
    most = 2 * config.training.sequence_length
    return [1 << k for k in range(7, most.bit_length()) if 1 << k <= most] or [most]


def _own_name(text: Sequence[Path]) -> str:
    return f"perplexity-{text[0].stem}.json"


def read_results(file: Path) -> dict[str, Any]:
    """A results file; nothing where there is none that can be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def progress(items: Sequence[Any], label: str, show: bool) -> Iterator[Any]:
    """A bar on a terminal; in a log a line at the end and one every half minute before it."""
    if not show or sys.stderr.isatty():
        yield from tqdm(items, label, unit="batch", disable=not show)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == len(items) or now - said > 30:
            print(f"{label}: {done}/{len(items)} batches, {now - started:.0f} s", file=sys.stderr)
            said = now
