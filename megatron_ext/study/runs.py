"""A run folder, read back: settings, metrics, evaluation, and what is missing.

    run = read_run(Path("runs/demo/above"))
    run.name, run.config.rope.base, run.training[-1]["loss"], run.perplexity, run.missing
    arms(read_runs([Path("runs/rope_base")]))        # of a sweep, its seeds together

Needs no torch. Refuses (UserError) a folder without config.yaml; anything else may be absent, and
stands in `missing` as a phrase for the reader.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import Config, load_config, rope_verdict, short_number
from megatron_ext.errors import UserError
from megatron_ext.jobs import journal
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
    retrieval: dict[str, Record]  # by task, in the order of their names
    jobs: list[str]  # ids of the Slurm jobs that trained it
    config_hash: str  # sha256 of config.yaml
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


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone: one point of the study, measured several times."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """Any of them, for what all have alike."""
        return self.runs[0]


def arms(runs: Sequence[Run]) -> list[Arm]:
    """In the order of their first runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = run.config.model_dump(mode="json")
        settings["training"] = {
            k: v for k, v in settings["training"].items() if k not in ("seed", "run_dir")
        }
        found.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    return [Arm(_common_name([run.name for run in group]), group) for group in found.values()]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Of run folders, and of folders that hold runs (a sweep's), by base. Raises UserError."""
    found: list[Run] = []
    for folder in folders:
        inside = sorted(file.parent for file in folder.glob("*/config.yaml"))
        if inside and not (folder / "config.yaml").is_file():
            held = [read_run(run) for run in inside]
            found += sorted(held, key=lambda run: (run.config.rope.base, run.name))
        else:
            found.append(read_run(folder))
    # A folder named beside the sweep that holds it is one run all the same.
    return list({run.folder.resolve(): run for run in found}.values())


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError when it is none."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml: name the folder of a run or sweep")
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
    retrieval = _retrieval(folder / "evaluation")
    for task, results in retrieval.items():
        if training and results["checkpoint"]["step"] < training[-1]["step"]:
            missing.append(f"{task} at step {results['checkpoint']['step']}, not at the last one")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        training=training,
        validation=validation,
        perplexity=perplexity,
        retrieval=retrieval,
        jobs=list(dict.fromkeys(life.job for life in journal.read(folder) if life.job != "none")),
        config_hash=hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest(),
        environment=_json(folder / "environment.json") or {},
        fingerprint=_fingerprint(data),
        missing=missing,
    )


def usable(run: Run) -> int:
    """What the theory allows the run's own rule, tokens; HORIZON - 1 where nothing below fails."""
    failing = run.first_failing_distance
    return (HORIZON if failing is None else failing) - 1


def base_text(run: Run) -> str:
    """10,000 or 1e6."""
    base = run.config.rope.base
    return f"{base:,g}" if base < 1e6 else short_number(base)


def count(number: float) -> str:
    """A count as a person says it: 819k, 1.33M, 2.1B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _common_name(names: Sequence[str]) -> str:
    """base_1e4 of base_1e4-seed_1 and base_1e4-seed_2; the seed may stand in front as well."""
    seed = r"seed[-_= ]?\d+"
    without = {re.sub(rf"^{seed}[-_. ]*|[-_. ]*{seed}$", "", name) for name in names}
    return without.pop() if len(names) > 1 and len(without) == 1 else ", ".join(names)


def _retrieval(folder: Path) -> dict[str, Record]:
    found = {}
    for file in sorted(folder.glob("*.json")):
        results = _json(file)
        if results and results.get("lengths") and "depths" in results["lengths"][0]:
            found[results["task"]] = results
    return found


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
