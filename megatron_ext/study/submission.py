"""A sweep as Slurm jobs: each arm trained, then evaluated and exported, at the end one report.

    planned = submission(sweep, ["--nodes=4", "--partition=gpu"])   # what is not there or waits
    ids = submit(planned)

The jobs of an arm wait for its training; their ids stand in the arm's jobs.jsonl.
"""

import argparse
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.jobs import journal, queue
from megatron_ext.jobs.outcome import is_finished
from megatron_ext.study.demo import StageFailed
from megatron_ext.study.sweep import Arm, Sweep, read_json


@dataclass(frozen=True)
class Submission:
    """One job to submit."""

    arm: Arm | None
    what: str
    """train, evaluate, export or report."""
    run_dir: Path
    """The run whose journal keeps its id; of a report the first arm's."""
    words: list[str]
    """Arguments of sbatch; $job_2 stands for the id of the second submission's job."""

    def command(self, number: int) -> str:
        """A line of shell that submits it and keeps its job id for those that wait for it."""
        words = [word if "$job_" in word else shlex.quote(word) for word in self.words]
        return f"job_{number}=$(sbatch --parsable {' '.join(words)})"


def submission(sweep: Sweep, options: Sequence[str]) -> list[Submission]:
    """What is to be given to sbatch, in this order. The n-th one's job id is written $job_n.
    Raises UserError for options that are not one word each."""
    if bare := [word for word in options if not re.match(r"--\w|-\w.", word)]:
        raise UserError(
            f"--sbatch: {' '.join(bare)} needs its option and value in one word: write --nodes=4"
        )
    found: list[Submission] = []
    jobs = queue.waiting_and_running()

    def add(arm: Arm | None, what: str, *words: object) -> str:
        parts = [sweep.name, arm.name if arm else "", "" if what == "train" else what]
        name = f"--job-name={'-'.join(filter(None, parts))}"
        run_dir = (arm or sweep.arms[0]).run_dir
        found.append(Submission(arm, what, run_dir, [name, *map(str, words)]))
        return f"$job_{len(found)}"

    def known(ids: Sequence[str]) -> str:
        return next((job for job in reversed(ids) if job in jobs), "")

    last = []
    for arm in sweep.arms:
        train = known([life.job for life in journal.read(arm.run_dir)])
        if not train and not is_finished(arm.run_dir, arm.config.training.steps):
            train = add(arm, "train", *options, "slurm/pretrain.sbatch", sweep.file, *arm.overrides)
        after = [f"--dependency=afterok:{train}", "--kill-on-invalid-dep=yes"] if train else []
        # Jobs that wait for an earlier training of the arm are not for this one.
        submitted = {} if train.startswith("$") else journal.submitted(arm.run_dir)

        if sweep.export is not None and not arm.exported.exists():
            words = [*_without_gpus(options), "slurm/export.sbatch", arm.run_dir, arm.exported]
            if not known(submitted.get("export", [])):
                add(arm, "export", *after, *words, *sweep.export)
        evaluate = known(submitted.get("evaluate", []))
        if sweep.evaluate is not None and not evaluate:
            words = [*_of_one_node(options), "slurm/evaluate.sbatch", arm.run_dir]
            if train or not _evaluated(arm, sweep.evaluate):
                evaluate = add(arm, "evaluate", *after, *words, *sweep.evaluate)
        last += [evaluate or train] if evaluate or train else []

    reports = journal.submitted(sweep.arms[0].run_dir).get("report", [])
    if not found and known(reports):
        return []
    after = [f"--dependency=afterany:{':'.join(last)}"] if last else []
    runs = [arm.run_dir for arm in sweep.arms]
    words = ["slurm/report.sbatch", *runs, "--output", sweep.folder / "report.html"]
    add(None, "report", *after, *_without_gpus(options), *words)
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
        # 8, a100:8 or a100
        if match := re.match(
            r"(?:--gpus[\w-]*=|-G|--gres=gpu:?)(?:([a-zA-Z][^:]*):?)?(\d*)$", word
        ):
            kind = f"{match[1]}:" if match[1] else ""
            word = "--gpus-per-node=0" if match[2] == "0" else f"--gpus-per-node={kind}1"
        found.append(word)
    return found


def _without_gpus(options: Sequence[str]) -> list[str]:
    return [word for word in _of_one_node(options) if not word.startswith("--gpus")]


def _evaluated(arm: Arm, options: Sequence[str]) -> bool:
    """Whether the results of the last step hold every length that the task can have; False where
    options leave it open."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", default="perplexity")
    parser.add_argument("--lengths", default="")
    asked, _ = parser.parse_known_args(list(options))
    if not asked.lengths:
        return False
    lengths = {int(length) for length in asked.lengths.split(",")}
    for task in asked.tasks.split(","):
        results = read_json(arm.run_dir / "evaluation" / f"{task}.json") or {}
        known = {entry["length"] for entry in results.get("lengths", [])}
        step = (results.get("checkpoint") or {}).get("step") or 0
        # Shortest first, and without those that the task's own text overfills, are retrieval's.
        least = 0 if task == "perplexity" else min(known, default=0)
        if not {n for n in lengths if n >= least} <= known or step < arm.config.training.steps:
            return False
    return True
