"""What became of a run, for a launcher and for a person: runs/NAME/status.json. Needs no torch.

    write_status(run_dir, "stopped", "SIGUSR1, checkpoint saved", requeue=True, step=1200)
    read_status(run_dir)["requeue"]       # whether to start the same command again

An exit code cannot say this: torchrun makes 1 of every failure. The file holds

    state       starting, running, finished, stopped, failed or hung
    requeue     whether the same command, started again, goes on: true when stopped by a signal,
                hung or crashed, false when finished, refused as a mistake, or judged hopeless
    reason      one sentence
    step        steps done; first_step: those done when this start began; steps: those of the run
    error       the first error: rank, host, type, message; null when there was none. Its traceback
                is in error.txt
    host, pid   who wrote it; time: when, in UTC

A process that is killed writes nothing: `running` with no process left means start it again.
"""

import contextlib
import json
import os
import socket
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from megatron_ext.checkpoint.manifest import write_json

State = Literal["starting", "running", "finished", "stopped", "failed", "hung"]

STATUS = "status.json"
ERROR = "error.txt"
_KEPT = ("step", "first_step", "steps")  # of the file that is replaced, unless given anew


def write_status(
    run_dir: Path,
    state: State,
    reason: str,
    *,
    requeue: bool,
    error: dict[str, Any] | None = None,
    **steps: int,
) -> None:
    """Replace status.json, whole or not at all. `steps`: step, first_step, steps, where they
    changed. A folder that cannot be written is passed over: the end of a run must not fail."""
    before = read_status(run_dir) or {}
    content = {
        "state": state,
        "requeue": requeue,
        "reason": reason,
        **{name: steps.get(name, before.get(name)) for name in _KEPT},
        "error": error,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }
    with contextlib.suppress(OSError):
        write_json(run_dir / STATUS, content)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of status.json, or None when there is none."""
    try:
        content = json.loads((run_dir / STATUS).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def ended_since(run_dir: Path, start: float) -> dict[str, Any] | None:
    """The status, if it tells of an end after `start` (seconds since the epoch)."""
    status = read_status(run_dir)
    if status is None or status["state"] in ("starting", "running"):
        return None
    return status if datetime.fromisoformat(status["time"]).timestamp() >= start else None


def claim_error(run_dir: Path, text: str, since: float) -> bool:
    """Whether this process is the first of its run to tell of an error, whose text then becomes
    error.txt; the others had better be silent. An error.txt of before `since` (seconds since the
    epoch, the start of this process) belongs to an earlier start and is replaced."""
    final = run_dir / ERROR
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{ERROR}.", dir=run_dir)
    except OSError:
        return True  # no run folder, so nobody else can have said it there
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        forget_error(run_dir, since)
        os.link(temporary, final)  # fails when it exists: one of many wins, on any file system
    except FileExistsError:
        return False
    except OSError:
        return True
    finally:
        Path(temporary).unlink(missing_ok=True)
    return True


def forget_error(run_dir: Path, before: float) -> None:
    """Remove an error.txt that was written before a time, in seconds since the epoch."""
    with contextlib.suppress(OSError):
        if (run_dir / ERROR).stat().st_mtime < before:
            (run_dir / ERROR).unlink()
