"""What Slurm says about jobs of this user. Empty answers where there is no Slurm.

    jobs = waiting_and_running()        # by job id: {"12": Job("12", "RUNNING", ...)}
    last_word("11")                     # "TIMEOUT", for a job that has left the queue

Needs no torch. A controller that does not answer raises RuntimeError.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import named_run_dir

SCRIPT = "pretrain.sbatch"


@dataclass(frozen=True)
class Job:
    """A job in the queue."""

    id: str
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it waits: Resources, Priority, Dependency, BeginTime, ...; None once it runs."""
    folder: Path
    """From which it was submitted."""
    command: tuple[str, ...]
    """Script and arguments; arguments with spaces come in pieces."""


def waiting_and_running() -> dict[str, Job]:
    """The jobs of this user by id."""
    if not shutil.which("squeue"):
        return {}
    form = "--format=%i|%T|%r|%Z|%o"
    done = subprocess.run(
        ["squeue", "--noheader", f"--user={os.getuid()}", form],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"squeue does not answer: {done.stderr.strip()}")
    found = {}
    for line in done.stdout.splitlines():
        job, state, reason, folder, command = line.split("|", 4)
        found[job] = Job(job, state, reason, Path(folder), tuple(command.split()))
    return found


def run_folder(job: Job) -> Path | None:
    """Of a training job; None for others."""
    script = next((i for i, word in enumerate(job.command) if word.endswith(SCRIPT)), None)
    arguments = job.command[script + 1 :] if script is not None else ()
    if not arguments:
        return None
    return (job.folder / named_run_dir(job.folder / arguments[0], arguments[1:])).resolve()


def last_word(job: str) -> str:
    """State in which a job left the queue, such as CANCELLED; "" when Slurm has forgotten it."""
    for command, pattern in (
        (["scontrol", "show", "job", "--oneliner", job], r"JobState=(\w+)"),
        (["sacct", "--noheader", "-X", "--parsable2", f"--jobs={job}", "--format=State"], r"(\w+)"),
    ):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode == 0 and (match := re.search(pattern, done.stdout)):
                return match[1]
    return ""
