"""The state of a run, from its folder and from Slurm.

    for run in states([Path("runs/rope_base")]):        # a run folder, or a folder of them
        print(run.name, run.state, run.step, run.eta_s, run.reason)

Needs no torch. Refuses (UserError) a folder that holds no run and for which no job waits.
"""

import socket
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_ext.config import load_config
from megatron_ext.errors import UserError
from megatron_ext.jobs import journal, outcome, queue
from megatron_ext.training.status import read_status

_MARKS = (journal.FILE, "config.yaml", "status.json")  # a folder with one of these is a run's
_RECENT = 50  # logged steps whose median time the rest is reckoned with

Word = Literal["queued", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class RunState:
    """One run."""

    name: str
    folder: str
    state: Word
    step: int
    """Last logged step."""
    steps: int | None
    """Of the whole run; None before it began."""
    eta_s: float | None
    """Seconds to the last step at the recent pace, while it runs."""
    job: str | None
    """Newest Slurm job."""
    starts: int
    """How often a job of the run has begun."""
    reason: str
    """Why it waits, stopped or failed: the first error."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def states(folders: Sequence[Path]) -> list[RunState]:
    """Of every run in `folders`, each a run's own or one that holds run folders."""
    jobs = queue.waiting_and_running()
    queued = {run: job for job in jobs.values() if (run := queue.run_folder(job))}
    found = []
    for folder in folders:
        here = (
            [folder] if _is_run(folder) or folder.resolve() in queued else _inside(folder, queued)
        )
        if not here:
            raise UserError(f"{folder} holds no run and no job waits for it: name runs/NAME")
        found += [state_of(run, jobs, queued.get(run.resolve())) for run in here]
    return found


def state_of(folder: Path, jobs: dict[str, queue.Job], waiting: queue.Job | None) -> RunState:
    """Of one run; `waiting` is its job if the queue's own words told of one."""
    lives = journal.read(folder)
    job = waiting or next((jobs[life.job] for life in reversed(lives) if life.job in jobs), None)
    steps = next((life.began["steps"] for life in reversed(lives) if life.began), None)
    if steps is None and (folder / "config.yaml").is_file():
        steps = load_config(folder / "config.yaml").training.steps
    step, eta = outcome.last_step(folder), None
    state: Word
    if steps is not None and outcome.is_finished(folder, steps):
        state, reason = "finished", ""
    elif job is not None and job.state == "PENDING":
        before = lives[-1].ended.get("reason", "") if lives else ""
        state, reason = "queued", f"{job.reason}; {before}" if before else job.reason
    elif job is not None:
        state, reason = "running", ""
    else:
        state, reason = _without_a_job(folder, lives)
    if state == "running" and steps is not None:
        recent = outcome.last_records(folder, _RECENT)
        if recent:
            eta = (steps - step) * statistics.median(record["step_time_s"] for record in recent)
    return RunState(
        name=folder.resolve().name,
        folder=str(folder),
        state=state,
        step=step,
        steps=steps,
        eta_s=eta,
        job=job.id if job else (lives[-1].job if lives else None),
        starts=sum(bool(life.began) for life in lives),
        reason=reason,
    )


def _without_a_job(folder: Path, lives: list[journal.Life]) -> tuple[Word, str]:
    """Of a run that Slurm does not know (any more)."""
    status = read_status(folder) or {}
    state, reason = status.get("state"), str(status.get("reason", ""))
    last = lives[-1] if lives else None
    if state in ("starting", "running") and _has_process(status):
        return "running", ""
    if last is not None and last.ended.get("action") == "stop":
        return "failed", last.ended["reason"]
    if last is not None and not last.began:
        return "stopped", f"job {last.job} was submitted and left the queue before it began"
    if state in ("failed", "hung"):
        return "failed", str((status.get("error") or {}).get("message") or reason)
    if state == "stopped":
        return "stopped", reason
    if last is not None:
        word = queue.last_word(last.job) or "no longer known to Slurm"
        return "failed", f"job {last.job} ended without a word of its own: {word}"
    if state is None:
        return "stopped", "not started"
    return "stopped", f"its process on {status['host']} is gone: start it again"


def _has_process(status: dict[str, Any]) -> bool:
    return status["host"] == socket.gethostname() and psutil.pid_exists(status["pid"])


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _inside(folder: Path, queued: dict[Path, queue.Job]) -> list[Path]:
    here = {path.resolve() for path in folder.glob("*") if path.is_dir() and _is_run(path)}
    return sorted(here | {run for run in queued if run.parent == folder.resolve()})
