"""Where each rank is, in a file: runs/NAME/heartbeat/rank_00000.json. Needs no torch.

    heart = Heartbeat(run_dir, rank, size, every_s=2.0)
    heart.phase("compute", step=12)       # a thread writes it down
    read_heartbeats(run_dir)[0]["phase"]

    step, phase, since     the step at hand, what it does, and when the rank got there: progress
    time                   when the thread last wrote: the process is alive and not frozen
    size                   ranks of the run
    host, pid, created     the process; `created` (seconds since the epoch) tells it from a later
                           one of the same pid
    job, life, every_s     its Slurm job, how often that was requeued, seconds between two writings
    stack_fd               descriptor of the open file that SIGUSR2 makes it dump its stacks into

A rank that waits for others keeps writing with an old `since`; one that is stopped, or whose
interpreter is blocked in foreign code, no longer writes at all.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

DUMP_SIGNAL = signal.SIGUSR2
# The phases of starting up, in which one rank may work for long while the others wait.
STARTING = ("imports", "meet", "data", "model", "restore")
ENDED = "ended"


class Heartbeat:
    """The heartbeat of this process; `beside` is called after each writing, in the same thread."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        size: int,
        every_s: float,
        beside: Callable[[], None] | None = None,
    ) -> None:
        self.file = heartbeat_file(run_dir, rank)
        self.every_s = every_s
        self._beside = beside
        self._about = {
            "rank": rank,
            "size": size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "created": psutil.Process().create_time(),
            **this_life(),
            "every_s": every_s,
        }
        self._now: tuple[int | None, str, float] = (None, STARTING[0], time.time())
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat; the first beat is written when this returns. Raises OSError when it cannot
        be, and FileExistsError when there is a rank 0 already: `claim.py` removes one that is over.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115, open as long as the process lives
        self._about["stack_fd"] = self._stacks.fileno()
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._write(first=True)
        self._thread.start()

    def phase(self, name: str, step: int | None = None) -> None:
        """The rank got somewhere; an unset step stays what it was."""
        self._now = (self._now[0] if step is None else step, name, time.time())

    def end(self) -> bool:
        """Say that this process leaves, as it should, and stop beating. False when it could not."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
            self.phase(ENDED)
            return self._write()
        return False

    def _beat(self) -> None:
        while not self._ending.wait(self.every_s):
            self._write()
            if self._beside:
                self._beside()

    def _write(self, first: bool = False) -> bool:
        step, phase, since = self._now
        place = {"step": step, "phase": phase, "since": round(since, 3)}
        content = {**self._about, **place, "time": round(time.time(), 3)}
        temporary = self.file.with_suffix(f".{os.getpid()}.tmp")
        try:
            # Not synced: after a power cut nobody asks where the rank was.
            temporary.write_text(json.dumps(content) + "\n")
            if first and self._about["rank"] == 0:
                _link(temporary, self.file)
                temporary.unlink()
            else:
                temporary.replace(self.file)
            return True
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if first:
                raise
            return False  # a disk that is full later ends no run


def this_life() -> dict[str, str | None]:
    """The Slurm job that this process belongs to, if any, and how often it was requeued."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return {"job": os.environ.get("SLURM_JOB_ID"), "life": restarts}


def heartbeat_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes."""
    return run_dir / "heartbeat" / f"rank_{rank:05d}.json"


def beat_interval(hang_timeout_s: float) -> float:
    """Seconds between two writings: many within the timeout, few for the file system."""
    return min(max(hang_timeout_s / 20, 0.2), 5.0)


def read_heartbeat(file: Path) -> dict[str, Any] | None:
    """What a rank wrote last; None when it is not there."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def read_heartbeats(run_dir: Path) -> list[dict[str, Any]]:
    """The heartbeats of all ranks that left one, by rank."""
    files = sorted((run_dir / "heartbeat").glob("rank_*.json"))
    return [beat for file in files if (beat := read_heartbeat(file))]


def forget_heartbeats(run_dir: Path, before: float) -> None:
    """Remove those of an earlier start, last written before a time (seconds since the epoch). A
    rank of this start that came first writes its own anew."""
    for beat in read_heartbeats(run_dir):
        if beat["time"] < before:
            heartbeat_file(run_dir, beat["rank"]).unlink(missing_ok=True)


def process_of(beat: dict[str, Any]) -> psutil.Process | None:
    """The process that wrote the heartbeat, on this host, if it is still there and no later one of
    its pid."""
    try:
        process = psutil.Process(beat["pid"])
        return process if abs(process.create_time() - beat["created"]) < 0.1 else None
    except psutil.Error:
        return None


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs or could; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _link(source: Path, target: Path) -> None:
    """Raises FileExistsError when the target is there, which replacing it would not."""
    try:
        os.link(source, target)
    except FileExistsError:
        if not source.samefile(target):  # NFS may lose the answer to a link that was made
            raise
    except OSError:  # a file system without links
        if target.exists():
            raise FileExistsError(target) from None
        shutil.copyfile(source, target)
