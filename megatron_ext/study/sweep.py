"""A sweep: one run for each combination of a few settings, trained, evaluated and reported.

    sweep = read_sweep(Path("configs/sweeps/rope_base.yaml"))
    for arm in sweep.arms: print(arm.name, arm.overrides)
    run_locally(sweep)                              # on Slurm: submission.py

A sweep file names a run's config, settings for all arms, axes, and options of `evaluate` and of
`export-hf`, where arms are to be evaluated, or exported to ARM/hf. Every arm is a run folder of its
own, so that a sweep that was interrupted goes on arm by arm. Refuses (UserError) arms whose samples
would come in another order: they could not be compared.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import Config, load_config, short_number
from megatron_ext.config.files import read_text
from megatron_ext.config.yaml_text import read_mapping
from megatron_ext.data.corpora import check_corpora, fingerprint_of
from megatron_ext.errors import UserError
from megatron_ext.jobs.outcome import is_finished
from megatron_ext.study.demo import ROOT, StageFailed, run
from megatron_ext.training.status import read_status

_KEYS = {"config", "settings", "axes", "evaluate", "export", "folder"}
_ATTEMPTS = 2  # of a local arm that crashes


@dataclass(frozen=True)
class Arm:
    """One run of a sweep."""

    name: str
    run_dir: Path
    overrides: list[str]
    config: Config

    @property
    def exported(self) -> Path:
        """Its folder for transformers, there as a whole or not at all."""
        return self.run_dir / "hf"


@dataclass(frozen=True)
class Sweep:
    name: str
    file: Path
    """Config of the run that the arms vary."""
    folder: Path
    arms: list[Arm]
    evaluate: list[str] | None
    """Options of `megatron-ext evaluate`; None: the arms are not evaluated."""
    export: list[str] | None
    """Options of `megatron-ext export-hf`; None: the arms are not exported."""


def read_sweep(file: Path) -> Sweep:
    """Every arm's config read and checked, none of them started. Raises UserError."""
    given = read_mapping(read_text(file), str(file)).values
    if unknown := set(given) - _KEYS:
        wrong, known = ", ".join(sorted(unknown)), ", ".join(sorted(_KEYS))
        raise UserError(f"{file}: {wrong} is unknown: a sweep has {known}")
    axes = given.get("axes")
    if not isinstance(given.get("config"), str) or not isinstance(axes, dict) or not axes:
        raise UserError(
            f"{file} needs config: FILE, and axes with a list of values each, such as "
            "axes: {rope.base: [1e4, 5e5]}"
        )
    for key, values in axes.items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise UserError(f"{file}: axes.{key} must be a list of different values, not {values}")
    config = (file.parent / given["config"]).resolve()
    config = config.relative_to(Path.cwd()) if config.is_relative_to(Path.cwd()) else config
    folder = Path(given.get("folder") or f"runs/{file.stem}")
    common = [f"{key}={_text(value)}" for key, value in (given.get("settings") or {}).items()]
    arms = []
    for values in itertools.product(*axes.values()):
        pairs = dict(zip(axes, map(_text, values), strict=True))
        name = "-".join(f"{key.split('.')[-1]}_{value}" for key, value in pairs.items())
        run_dir = folder / name
        own = [f"{key}={value}" for key, value in pairs.items()]
        overrides = [*common, *own, f"training.run_dir={run_dir}"]
        arms.append(Arm(name, run_dir, overrides, load_config(config, overrides)))
    return Sweep(
        file.stem,
        config,
        folder,
        arms,
        _options(file, "evaluate", given.get("evaluate")),
        _options(file, "export", given.get("export")),
    )


def _options(file: Path, key: str, given: Any) -> list[str] | None:
    if given is not None and not isinstance(given, list):
        raise UserError(f"{file}: {key}: {given} must be a list of options: write {key}: []")
    return None if given is None else [str(word) for word in given]


def check_data_order(sweep: Sweep) -> None:
    """Arms that differ in rope alone read the same samples in the same order, and so do runs that
    exist already. Raises UserError naming two arms and the place."""
    seen: dict[str, tuple[str, Any]] = {}
    for arm in sweep.arms:
        check_corpora(arm.config)
        facts = json.loads(json.dumps(fingerprint_of(arm.config)))
        known = read_json(arm.run_dir / "data.json")
        if known is not None and known != facts:
            raise UserError(
                f"{arm.run_dir} was begun with other data ({_difference(known, facts)}): "
                "move it away, or bring the data back"
            )
        # What the axes themselves vary, a seed or a length, may differ; everything else may not.
        own = {
            key: facts[key] for key in ("seed", "sequence_length", "global_batch_size", "samples")
        }
        name, first = seen.setdefault(json.dumps(own), (arm.name, facts))
        if first != facts:
            raise UserError(
                f"arms {name} and {arm.name} would read other samples "
                f"({_difference(first, facts)}): vary rope, seed or lengths only"
            )


def run_locally(sweep: Sweep) -> list[str]:
    """Train, evaluate, export and report, one arm after the other; returns what is wrong with which
    arm. Raises StageFailed when the report ends with an error."""
    cli, failed = (sys.executable, "-m", "megatron_ext.cli"), []
    for arm in sweep.arms:
        if problem := _train(sweep, arm):
            failed.append(f"{arm.name}: {problem}")
            continue
        commands: list[list[Any]] = []
        if sweep.evaluate is not None:
            commands.append(["evaluate", arm.run_dir, *sweep.evaluate])
        if sweep.export is not None and not arm.exported.exists():
            commands.append(["export-hf", arm.run_dir, arm.exported, *sweep.export])
        for command in commands:
            try:
                run(*cli, *command)
            except StageFailed as error:
                failed.append(f"{arm.name}: {error}")
    done = [
        arm.run_dir for arm in sweep.arms if is_finished(arm.run_dir, arm.config.training.steps)
    ]
    if done:
        run(*cli, "report", *done, "--output", sweep.folder / "report.html")
    return failed


def _train(sweep: Sweep, arm: Arm) -> str:
    steps, ranks = arm.config.training.steps, arm.config.parallel.world_size
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command = [sys.executable, *(runner if ranks > 1 else []), ROOT / "pretrain.py"]
    for _ in range(_ATTEMPTS):
        if is_finished(arm.run_dir, steps):
            return ""
        try:
            run(*command, sweep.file, *arm.overrides, processes=ranks)
        except StageFailed:
            if not (read_status(arm.run_dir) or {}).get("requeue"):
                break
    status = read_status(arm.run_dir) or {}
    return "" if is_finished(arm.run_dir, steps) else str(status.get("reason") or "did not start")


def _text(value: Any) -> str:
    """As it would be written on a command line: 1e4 stays short."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) >= 10_000:
        short = short_number(value)
        return short if float(short) == value else str(value)
    return (
        json.dumps(value) if isinstance(value, (bool, list, dict)) or value is None else str(value)
    )


def _difference(one: Any, other: Any, place: str = "data") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return _difference(one.get(key), other.get(key), f"{place}.{key}")
    return f"{place}: {one} and {other}"


def read_json(file: Path) -> Any:
    """Its content; None when there is no such file, or no JSON in it."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
