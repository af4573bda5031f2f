"""A run folder, read back: settings, metrics, evaluation, and what is missing.

    run = read_run(Path("runs/demo/above"))
    run.name, run.config.rope.base, run.training[-1]["loss"], run.perplexity, run.missing

Needs no torch. Refuses (UserError) a folder without config.yaml; anything else may be absent, and
stands in `missing` as a phrase for the reader.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import Config, load_config, rope_verdict
from megatron_ext.errors import UserError
from megatron_ext.rope.bound import BoundVerdict, first_failing_distance
from megatron_ext.rope.frequencies import rope_frequencies

Record = dict[str, Any]
HORIZON = 1 << 20  # distances looked at for the first failing one


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself."""

    name: str
    folder: Path
    config: Config
    training: list[Record]  # logged steps, in order
    validation: list[Record]
    perplexity: Record | None
    environment: Record
    fingerprint: str | None  # of the tokens and their order, wherever the files lie
    missing: list[str]

    @property
    def steps_done(self) -> int:
        return self.training[-1]["step"] if self.training else 0

    @property
    def verdict(self) -> BoundVerdict:
        """B_m over the trained context."""
        return rope_verdict(self.config)

    @property
    def first_failing_distance(self) -> int | None:
        """Least m < HORIZON with B_m < 0, within the context or beyond."""
        return first_failing_distance(self.inv_freq, HORIZON)

    @property
    def inv_freq(self) -> Any:
        """Frequencies of all pairs of a head, radians a token, at the trained context."""
        rope, length = self.config.rope, self.config.training.sequence_length
        return rope_frequencies(
            rope.base, self.config.model.head_dim, rope.scaling, rope.rotary_fraction, length
        ).all_inv_freq


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError when it is none."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml: name the folder of a run")
    config = load_config(folder / "config.yaml")
    records = _records(folder / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "validation_loss" in record]
    perplexity = _json(folder / "evaluation" / "perplexity.json")
    data = _json(folder / "data.json")
    missing = []
    if not training:
        missing.append("no step has been logged yet")
    elif training[-1]["step"] < config.training.steps:
        missing.append(f"unfinished: {training[-1]['step']} of {config.training.steps} steps")
    if not validation:
        missing.append("no validation loss")
    if perplexity is None:
        missing.append("not evaluated (megatron-ext evaluate writes it)")
    elif training and perplexity["checkpoint"]["step"] < training[-1]["step"]:
        missing.append(f"evaluated at step {perplexity['checkpoint']['step']}, not at the last one")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        training=training,
        validation=validation,
        perplexity=perplexity,
        environment=_json(folder / "environment.json") or {},
        fingerprint=_fingerprint(data),
        missing=missing,
    )


def count(number: float) -> str:
    """A count as a person says it: 819k, 1.33M, 2.1B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _fingerprint(data: Record | None) -> str | None:
    if data is None:
        return None

    def without_paths(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_paths(v) for k, v in value.items() if k != "path"}
        return value

    text = json.dumps(without_paths(data), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _records(file: Path) -> list[Record]:
    if not file.is_file():
        return []
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the line that a kill cut short
            continue
    return found


def _json(file: Path) -> Record | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
