"""A sweep: one run for each combination of a few settings, trained, evaluated and reported.

    sweep = read_sweep(Path("configs/sweeps/rope_base.yaml"))
    for arm in sweep.arms: print(arm.name, arm.overrides)
    submit(submission(sweep, ["--nodes=4"]))        # or run_locally(sweep)

A sweep file names a run's config, settings for all arms, axes, and options of `evaluate`. Every arm
is a run folder of its own, so that a sweep that was interrupted goes on arm by arm. Refuses
(UserError) arms whose samples would come in another order: they could not be compared.
"""

import argparse
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import Config, load_config, short_number
from megatron_ext.config.files import read_text
from megatron_ext.config.yaml_text import read_mapping
from megatron_ext.data.corpora import check_corpora, fingerprint_of
from megatron_ext.errors import UserError
from megatron_ext.jobs import journal, queue
from megatron_ext.jobs.outcome import is_finished
from megatron_ext.study.demo import ROOT, StageFailed, run
from megatron_ext.training.status import read_status

_KEYS = {"config", "settings", "axes", "evaluate", "folder"}
_ATTEMPTS = 2  # of a local arm that crashes


@dataclass(frozen=True)
class Arm:
    """One run of a sweep."""

    name: str
    run_dir: Path
    overrides: list[str]
    config: Config


@dataclass(frozen=True)
class Submission:
    """One job to submit."""

    arm: Arm | None
    what: str
    """train, evaluate or report."""
    run_dir: Path
    """The run whose journal keeps its id; of a report the first arm's."""
    words: list[str]
    """Arguments of sbatch; $job_2 stands for the id of the second submission's job."""

    def command(self, number: int) -> str:
        """A line of shell that submits it and keeps its job id for those that wait for it."""
        words = [word if "$job_" in word else shlex.quote(word) for word in self.words]
        return f"job_{number}=$(sbatch --parsable {' '.join(words)})"


@dataclass(frozen=True)
class Sweep:
    name: str
    file: Path
    """Config of the run that the arms vary."""
    folder: Path
    arms: list[Arm]
    evaluate: list[str] | None
    """Options of `megatron-ext evaluate`; None: the arms are not evaluated."""


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
    evaluate = given.get("evaluate")
    return Sweep(
        file.stem,
        config,
        folder,
        arms,
        None if evaluate is None else [str(word) for word in evaluate],
    )


def check_data_order(sweep: Sweep) -> None:
    """Arms that differ in rope alone read the same samples in the same order, and so do runs that
    exist already. Raises UserError naming two arms and the place."""
    seen: dict[str, tuple[str, Any]] = {}
    for arm in sweep.arms:
        check_corpora(arm.config)
        facts = json.loads(json.dumps(fingerprint_of(arm.config)))
        known = _json(arm.run_dir / "data.json")
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
    """Train, evaluate and report, one arm after the other; returns what is wrong with which arm.

    Raises StageFailed when the report ends with an error."""
    failed = []
    for arm in sweep.arms:
        if problem := _train(sweep, arm):
            failed.append(f"{arm.name}: {problem}")
        elif sweep.evaluate is not None:
            words = ["-m", "megatron_ext.cli", "evaluate", arm.run_dir, *sweep.evaluate]
            try:
                run(sys.executable, *words)
            except StageFailed as error:
                failed.append(f"{arm.name}: {error}")
    done = [
        arm.run_dir for arm in sweep.arms if is_finished(arm.run_dir, arm.config.training.steps)
    ]
    if done:
        page = sweep.folder / "report.html"
        run(sys.executable, "-m", "megatron_ext.cli", "report", *done, "--output", page)
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


def submission(sweep: Sweep, options: Sequence[str]) -> list[Submission]:
    """What is to be given to sbatch, in this order. The n-th one's job id is written $job_n.
    Raises UserError for options that are not one word each."""
    if bare := [word for word in options if not re.match(r"--\w|-\w.", word)]:
        raise UserError(
            f"--sbatch: {' '.join(bare)} needs its option and value in one word: write --nodes=4"
        )
    found: list[Submission] = []
    jobs = queue.waiting_and_running()
    last = []

    def add(arm: Arm | None, what: str, name: str, words: Sequence[str]) -> str:
        keeper = (arm or sweep.arms[0]).run_dir
        found.append(Submission(arm, what, keeper, [f"--job-name={sweep.name}-{name}", *words]))
        return f"$job_{len(found)}"

    for arm in sweep.arms:
        lives, job = journal.read(arm.run_dir), ""
        if lives and lives[-1].job in jobs:
            job = lives[-1].job
        elif not is_finished(arm.run_dir, arm.config.training.steps):
            words = [*options, "slurm/pretrain.sbatch", str(sweep.file), *arm.overrides]
            job = add(arm, "train", arm.name, words)
        waiting = [job for job in journal.submitted(arm.run_dir, "evaluate") if job in jobs]
        if waiting and not job.startswith("$"):
            job = waiting[-1]
        elif sweep.evaluate is not None and (job or not _evaluated(arm, sweep.evaluate)):
            after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"] if job else []
            words = [*after, *_of_one_node(options), "slurm/evaluate.sbatch", str(arm.run_dir)]
            job = add(arm, "evaluate", f"{arm.name}-evaluate", [*words, *sweep.evaluate])
        last += [job] if job else []
    first = sweep.arms[0].run_dir
    if not found and any(job in jobs for job in journal.submitted(first, "report")):
        return []
    after = [f"--dependency=afterany:{':'.join(last)}"] if last else []
    after += [word for word in _of_one_node(options) if not word.startswith("--gpus")]
    runs = [str(arm.run_dir) for arm in sweep.arms]
    to = ["--output", str(sweep.folder / "report.html")]
    add(None, "report", "report", [*after, "slurm/report.sbatch", *runs, *to])
    return found


def submit(submissions: Sequence[Submission]) -> list[str]:
    """Give them to sbatch; returns their job ids. Raises StageFailed with what sbatch says; jobs
    that were submitted before it stay."""
    ids: list[str] = []
    for one in submissions:
        words = [_filled(word, ids) for word in one.words]
        done = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True)
        if done.returncode:
            raise StageFailed(f"sbatch {shlex.join(words)}: {done.stderr.strip()}")
        ids.append(done.stdout.strip().split(";")[0])
        journal.record(one.run_dir, "submitted", job=ids[-1], what=one.what)
    return ids


def _filled(word: str, ids: Sequence[str]) -> str:
    return re.sub(r"\$job_(\d+)", lambda match: ids[int(match[1]) - 1], word)


def _of_one_node(options: Sequence[str]) -> list[str]:
    """For a job of one node and one GPU, or none, of the kind that the training gets."""
    found = []
    for word in options:
        if re.match(r"--nodes=|--ntasks|-[Nn]", word):
            continue
        if match := re.match(r"(?:--gpus[\w-]*=|-G|--gres=gpu:?)(?:([^:]*):)?(\d*)$", word):
            kind = f"{match[1]}:" if match[1] else ""
            word = "--gpus-per-node=0" if match[2] == "0" else f"--gpus-per-node={kind}1"
        found.append(word)
    return found


def _evaluated(arm: Arm, options: Sequence[str]) -> bool:
    """Whether the results of the last step hold every length; False where options leave it open."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", default="perplexity")
    parser.add_argument("--lengths", default="")
    asked, _ = parser.parse_known_args(list(options))
    lengths = set(asked.lengths.split(","))
    for task in asked.tasks.split(","):
        results = _json(arm.run_dir / "evaluation" / f"{task}.json") or {}
        known = {str(entry["length"]) for entry in results.get("lengths", [])}
        step = (results.get("checkpoint") or {}).get("step") or 0
        if not lengths <= known or step < arm.config.training.steps:
            return False
    return True


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


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
