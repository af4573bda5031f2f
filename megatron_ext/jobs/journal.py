"""RUN/jobs.jsonl: one line whenever a job of the run is submitted, begins or ends.

    record(run_dir, "began", log="slurm/logs/pretrain-12.out", step=1000)
    lives = read(run_dir)                    # every start of every job, in order

A line names event, time (seconds since 1970), job id and restart (0 in a job's first life). Jobs
that evaluate or export the run are written down too, and what they do. Needs no torch.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "jobs.jsonl"


@dataclass(frozen=True)
class Life:
    """One start of a job, from its first line of script to its last."""

    job: str
    restart: int
    began: dict[str, Any] = field(default_factory=dict)
    """Empty when it was submitted and has not begun, or when its config could not be read."""
    ended: dict[str, Any] = field(default_factory=dict)
    """Empty while it runs, and for ever when Slurm or a dead node ended it."""


def record(run_dir: Path, event: str, job: str | None = None, **facts: Any) -> None:
    """Append a line about `job`, or else the job that this process runs in."""
    run_dir.mkdir(parents=True, exist_ok=True)
    own, restart = _this()
    line = {
        "event": event,
        "time": round(time.time(), 3),
        "job": job or own,
        "restart": restart,
        **facts,
    }
    with (run_dir / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def refuse(run_dir: Path, reason: str) -> None:
    """Append that this job ended before it could begin, for somebody has to mend its config. A
    folder that cannot be made is passed over: its name may be what is wrong."""
    with contextlib.suppress(OSError):
        record(run_dir, "ended", code=2, action="stop", reason=reason)


def read(run_dir: Path) -> list[Life]:
    """All lives, oldest first. A line that a power cut left half written is passed over."""
    lives: dict[tuple[str, int], Life] = {}
    for line in _lines(run_dir):
        if line.get("what", "train") != "train":
            continue
        key = (line["job"], line["restart"])
        life = lives.get(key, Life(*key))
        began = line if line["event"] == "began" else life.began
        ended = line if line["event"] == "ended" else life.ended
        lives[key] = Life(*key, began, ended)
    return list(lives.values())


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    file, found = run_dir / FILE, []
    for text in file.read_text().splitlines() if file.is_file() else []:
        try:
            line = json.loads(text)
            if {"event", "job", "restart"} <= set(line):
                found.append(line)
        except (ValueError, TypeError):
            continue
    return found


def submitted(run_dir: Path) -> dict[str, list[str]]:
    """Ids of the jobs submitted for the run, oldest first, by kind, such as evaluate."""
    found: dict[str, list[str]] = {}
    for line in _lines(run_dir):
        if "what" in line:
            found.setdefault(line["what"], []).append(line["job"])
    return found


def before_this(run_dir: Path) -> tuple[list[Life], Life]:
    """The lives that began before the one this process runs in, oldest first, and that one."""
    lives = [life for life in read(run_dir) if life.began]
    place = next(i for i, life in enumerate(lives) if (life.job, life.restart) == _this())
    return lives[:place], lives[place]


def _this() -> tuple[str, int]:
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return os.environ.get("SLURM_JOB_ID", "none"), restart
