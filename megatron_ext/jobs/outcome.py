"""How far a run got and what went wrong, from its folder and its job's log. Needs no torch."""

import json
import re
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.manifest import find_checkpoints, step_of

_ERROR = re.compile(
    r"error: (?P<mistake>.+)"  # pretrain.py's one sentence; srun and slurmstepd say "error:" too
    r"|(?P<exception>(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Skips|Interrupt|Hang\w*)\b.*)"
)
_AFTERMATH = re.compile(r"\*\*\* |task \d+: (Terminated|Killed|Exited)|tasks? [\d,-]+: Terminated")
_TAIL = 4 << 20  # bytes of a life's log that are looked at


def finished(run_dir: Path, steps: int) -> bool:
    """Whether a checkpoint of the last step is there."""
    return any(step_of(checkpoint) >= steps for checkpoint in find_checkpoints(run_dir))


def last_records(run_dir: Path, number: int = 1) -> list[dict[str, Any]]:
    """The last logged steps, oldest first."""
    file = run_dir / "metrics.jsonl"
    found: list[dict[str, Any]] = []
    for line in reversed(file.read_text().splitlines() if file.is_file() else []):
        try:
            record = json.loads(line)
        except ValueError:  # the line that a kill cut short
            continue
        if "step_time_s" in record:
            found.append(record)
        if len(found) == number:
            break
    return found[::-1]


def last_step(run_dir: Path) -> int:
    """The last step that was logged; 0 before the first."""
    return next((record["step"] for record in last_records(run_dir)), 0)


def first_error(log: Path, start: int) -> str:
    """The first line of `log` after byte `start` that tells of an error, in at most 300 characters;
    "" when none does. What Slurm adds about tasks that it ended comes after the cause."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read(_TAIL).decode(errors="replace").splitlines()
    except OSError:
        return ""
    aftermath = ""
    for line in lines:
        if match := _ERROR.search(line):
            if not _AFTERMATH.search(line):
                return (match["mistake"] or match["exception"]).strip()[:300]
            aftermath = aftermath or line.strip()[:300]
    return aftermath
