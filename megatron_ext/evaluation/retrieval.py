"""Retrieval at token-exact lengths: is a fact found, how far back, in how long a context?

    plan = make_plan(subject, "passkey", lengths=[1024, 4096], depths=11, samples=10)
    with open_checkpoint(plan.subject.config, plan.subject.weights) as scorer:
        results = measure(plan, scorer)                   # also in RUN/evaluation/passkey.json

An answer counts as retrieved when every one of its tokens is the most probable one in its place,
given the prompt and the answer before it. That is exactly when greedy decoding would write it, and
takes one forward pass over prompt and answer; prompts of one length are scored together. A sample
is made from task, length, depth, its number, the seed and the tokenizer, so every model with the
same tokenizer gets the same ones. A length that the file already holds for the same weights and
settings is not computed again. Refuses (UserError) unknown tasks and lengths that are too short.
Needs no torch.
"""

import hashlib
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.tokenizer import Tokenizer
from megatron_ext.checkpoint.manifest import write_json
from megatron_ext.errors import UserError
from megatron_ext.evaluation import texts as texts_
from megatron_ext.evaluation.perplexity import (
    FORMAT,
    TOKENS_AT_ONCE,
    Scoring,
    default_lengths,
    progress,
    read_results,
)
from megatron_ext.evaluation.prompts import Kit, Sample
from megatron_ext.evaluation.ruler import RULER
from megatron_ext.evaluation.subject import Subject
from megatron_ext.evaluation.tasks import BASIC, Task
from megatron_ext.evaluation.texts import Tokens

log = logging.getLogger(__name__)

TASKS: dict[str, Task] = {task.name: task for task in (*BASIC, *RULER)}

AGGREGATION = {
    "correct": "every token of the answer is the argmax in its place, as in greedy decoding",
    "accuracy": "correct samples / samples, over all depths",
    "prediction": "the argmax tokens up to the first one that differs from the answer",
}


@dataclass(frozen=True)
class Plan:
    """What is to be measured and what the results file holds already."""

    subject: Subject
    task: Task
    kit: Kit
    output: Path
    header: dict[str, Any]  # the results file without its lengths
    done: dict[int, dict[str, Any]]
    missing: list[int]

    @property
    def results(self) -> dict[str, Any]:
        """The file's content for the lengths that are done."""
        return {**self.header, "lengths": [self.done[length] for length in sorted(self.done)]}


def make_plan(
    subject: Subject,
    task: str,
    lengths: Sequence[int] = (),
    depths: int | None = None,
    samples: int | None = None,
    seed: int | None = None,
    text: Sequence[Path] = (),
) -> Plan:
    """Decide what to ask; what is not given is taken from the config's `evaluation` settings.

    depths: points from 0 to 100%; samples: at each length and depth. text: files to hide facts in;
    else the run's validation documents. Raises UserError.
    """
    if task not in TASKS:
        raise UserError(f"task {task} is unknown: choose perplexity, {', '.join(TASKS)}")
    settings, chosen = subject.config.evaluation, TASKS[task]
    depths, samples = depths or settings.depths, samples or settings.samples
    asked = sorted(set(lengths or settings.lengths or default_lengths(subject.config)))
    tokenizer = subject.tokenizer()
    if tokenizer.vocab_size > subject.config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model "
            f"{subject.config.model.vocab_size}: name the model's own by data.tokenizer"
        )
    haystack = _haystack(subject, tokenizer, text) if chosen.needs_text else None
    header = {
        "format": FORMAT,
        "task": task,
        "checkpoint": subject.identity,
        "settings": {
            "depths": np.linspace(0, 100, depths).round(2).tolist() if chosen.has_depth else [None],
            "samples": samples,
            "seed": settings.seed if seed is None else seed,
            "tokenizer": tokenizer.hash,
            "bos": subject.bos,
            "prompt": chosen.source,
            "haystack": None if haystack is None else _hash(haystack),
        },
        "aggregation": AGGREGATION,
    }
    output = subject.results / f"{task}.json"
    before = read_results(output)
    same = all(before.get(key) == header[key] for key in header)
    done = {entry["length"]: entry for entry in before.get("lengths", [])} if same else {}
    plan = Plan(subject, chosen, Kit(tokenizer, haystack, subject.bos), output, header, done, [])
    return replace(plan, missing=[n for n in _long_enough(plan, asked) if n not in done])


def measure(plan: Plan, scorer: Scoring) -> dict[str, Any]:
    """Ask what is missing, shortest first; the file is written after each length. Every rank calls
    this; returns the results."""
    for length in plan.missing:
        entry = measure_length(plan, length, scorer)
        plan = replace(plan, done={**plan.done, length: entry})
        if scorer.is_main:
            plan.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(plan.output, plan.results)
    return plan.results


def measure_length(plan: Plan, length: int, scorer: Scoring) -> dict[str, Any]:
    """One entry of the results file."""
    records, samples = [], []
    for record, sample in make_samples(plan, length):
        records.append(record)
        samples.append(sample)
    groups = list(_batches(samples))
    # What the model says in each place of each answer; 0 where another rank knows.
    said = np.zeros((len(samples), max(len(sample.answer) for sample in samples)))
    mine = groups[scorer.part :: scorer.parts]
    for group in progress(mine, f"{plan.task.name} {length}", scorer.is_main):
        tokens = np.array([samples[i].prompt + samples[i].answer for i in group])
        size = len(samples[group[0]].answer)
        said[group, :size] = scorer.score(tokens, last=size).argmax
    said = scorer.total(said)
    for record, sample, row in zip(records, samples, said.astype(int), strict=True):
        right = row[: len(sample.answer)] == sample.answer
        first_wrong = len(right) if right.all() else int(right.argmin()) + 1
        record["prediction"] = plan.kit.tokenizer.decode(row[:first_wrong]).strip()
        record["correct"] = bool(right.all())
    depths = plan.header["settings"]["depths"]
    return {
        "length": length,
        "samples": len(records),
        "accuracy": sum(record["correct"] for record in records) / len(records),
        "depths": [
            {
                "depth": depth,
                "samples": sum(record["depth"] == depth for record in records),
                "correct": sum(record["correct"] for record in records if record["depth"] == depth),
            }
            for depth in depths
        ],
        "records": records,
    }


def make_samples(plan: Plan, length: int) -> Iterator[tuple[dict[str, Any], Sample]]:
    """What is asked at a length, in order: the record without a verdict, and the tokens."""
    settings = plan.header["settings"]
    for depth in settings["depths"]:
        for number in range(settings["samples"]):
            words = f"{plan.task.name} {length} {depth} {number}"
            rng = np.random.default_rng([settings["seed"], zlib.crc32(words.encode())])
            sample = plan.task.make(plan.kit, length, depth or 0.0, rng)
            assert len(sample.prompt) == length, (plan.task.name, length, len(sample.prompt))
            record = {
                "task": plan.task.name,
                "length": length,
                "depth": depth,
                "seed": settings["seed"],
                "sample": number,
                "answer": plan.kit.tokenizer.decode(sample.answer).strip(),
            }
            yield record, sample


def _long_enough(plan: Plan, lengths: Sequence[int]) -> list[int]:
    """Those that hold the task's text; said are the others, refused when there is none."""
    fit = []
    for length in lengths:
        try:
            _check_fits(plan, length)
            fit.append(length)
        except UserError as error:
            refused = error
    if not fit:
        raise UserError(f"{plan.task.name}: {refused}")
    if len(fit) < len(lengths):
        left_out = ", ".join(str(length) for length in lengths if length not in fit)
        log.warning("%s: too short for its text and left out: %s tokens", plan.task.name, left_out)
    return fit


def _check_fits(plan: Plan, length: int) -> None:
    """Raises UserError when a sample's text overfills the length. Their texts differ a little: one
    sample tells of all only where it leaves half of the length free."""
    try:
        next(make_samples(plan, length // 2))
    except UserError:
        for _ in make_samples(plan, length):
            pass


def _batches(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Numbers of samples with answers of one length, as many as one forward pass takes."""
    by_size: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        by_size.setdefault(len(sample.answer), []).append(number)
    for size, numbers in by_size.items():
        most = max(1, TOKENS_AT_ONCE // (len(samples[numbers[0]].prompt) + size))
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]


def _haystack(subject: Subject, tokenizer: Tokenizer, files: Sequence[Path]) -> Tokens:
    """Tokens of the files, or of the validation documents from the longest on, without the ids that
    end documents."""
    if files:
        documents = texts_.own_texts(tokenizer, files).documents
    elif subject.config.data.corpora:
        documents = texts_.validation_texts(subject.config).documents
    else:
        raise UserError("a Hugging Face folder brings no text: name some by --text FILE")
    longest = sorted(documents, key=len, reverse=True)[:64]
    tokens = np.concatenate([np.asarray(document) for document in longest])
    return tokens if tokenizer.eod_id is None else tokens[tokens != tokenizer.eod_id]


def _hash(tokens: Tokens) -> str:
    return hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).hexdigest()
