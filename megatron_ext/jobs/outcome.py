"""How a job's life ended: what the run itself says in status.json, and, where a kill or a failure
before its start left it nothing to say, the metrics and the job's log. Needs no torch."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.manifest import find_checkpoints, step_of
from megatron_ext.jobs.decision import End
from megatron_ext.jobs.journal import Life
from megatron_ext.training.status import read_status

_ERROR = re.compile(
    r"error: (?P<mistake>.+)"  # pretrain.py's one sentence; srun and slurmstepd say "error:" too
    r"|(?P<exception>(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Skips|Interrupt|Hang\w*)\b.*)"
)
_AFTERMATH = re.compile(r"\*\*\* |task \d+: (Terminated|Killed|Exited)|tasks? [\d,-]+: Terminated")
_MISTAKE = 2  # exit code of pretrain.py for what the user has to mend
_TAIL = 4 << 20  # bytes of a life's log that are looked at


def end_of(
    run_dir: Path, life: Life, code: int, signal: str = "", bad_nodes: tuple[str, ...] = ()
) -> End:
    """How `life` ended with exit code `code`, after `signal` came to its script ("" if none)."""
    status = read_status(run_dir) or {}
    if not _of_life(status, life):
        status = {}  # of an earlier start: this one ended before there was a run
    state = status.get("state")
    said = (status.get("error") or {}).get("message") or ""
    # Finer than the log, but while the run goes on it holds the step of its start.
    step = status.get("step") if state in ("stopped", "failed", "hung") else None
    checkpoints = find_checkpoints(run_dir)
    log = Path(life.began["log"])
    told = said or status.get("reason", "") if state in ("failed", "hung") else ""
    error = told or (first_error(log, life.began["log_start"]) if code and not bad_nodes else "")
    return End(
        code=code,
        step=last_step(run_dir) if step is None else step,
        steps=life.began["steps"],
        checkpoint=step_of(checkpoints[0]) if checkpoints else 0,
        finished=is_finished(run_dir, life.began["steps"]),
        stopped=state == "stopped" or (bool(signal) and state not in ("failed", "hung")),
        hopeless=code == _MISTAKE or (state == "failed" and not status["requeue"]),
        error=" ".join(error.split())[:300],
        bad_nodes=bad_nodes,
        nodes=life.began["nodes"],
    )


def _of_life(status: dict[str, Any], life: Life) -> bool:
    try:
        written = datetime.fromisoformat(status["time"]).timestamp()
    except (KeyError, ValueError):
        return False
    return written >= life.began["time"]


def is_finished(run_dir: Path, steps: int) -> bool:
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
