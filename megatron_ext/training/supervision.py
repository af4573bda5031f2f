"""The watch over one process of a run: signals, heartbeat, the run's status, and how it ends.

    with Supervision(config) as watch:
        watch.start()                   # from here on there is a run folder, and status.json in it
        watch.hold(first_step)          # from here on there is something to save
        watch.phase("compute", step=12) # where this rank is, for its heartbeat
        ... watch.stop_requested        # after each step
        watch.ended(done)               # finished, or stopped by a signal with a checkpoint

An exception that passes through is told of once: the rank that meets it first writes error.txt and
status.json and prints it; those that only lost the connection to that rank are silent, and those
that do not notice, as they wait in a collective, see status.json and leave. Local rank 0 of each
node starts the watchdog, which ends those that cannot. Needs no torch.
"""

import errno
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from types import TracebackType

import psutil

from megatron_ext.config import Config
from megatron_ext.errors import UserError, Verdict
from megatron_ext.launch import launched_as
from megatron_ext.training.claim import refuse_second_start
from megatron_ext.training.heartbeat import Heartbeat, beat_interval, forget_heartbeats
from megatron_ext.training.status import (
    State,
    claim_error,
    ended_since,
    forget_error,
    write_status,
)
from megatron_ext.training.watch import StopSignals

# How long the heartbeat's thread leaves the main thread to end by itself, in seconds.
_LEAVING_S = 2.0
# How long a rank that lost its connection waits for the one that knows why to say so, in seconds.
_PATIENCE_S = 5.0


class Supervision:
    """Signals and status of this process, from before torch is imported until it ends."""

    def __init__(self, config: Config) -> None:
        self.run_dir = config.training.run_dir
        self.steps = config.training.steps
        self.faults = config.faults
        self.rank, self.size, self.local_rank = launched_as()
        self.signals = StopSignals(self._stopped_before_the_first_step)
        self.step: int | None = None  # steps done, once training has begun
        self._since = psutil.Process().create_time()
        minutes = config.training.exit_duration_in_mins
        self._until = math.inf if minutes is None else self._since + 60 * minutes
        self._started = False
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._ended_at = math.inf  # when this process saw that the run had ended
        self._heart = Heartbeat(
            self.run_dir,
            self.rank,
            self.size,
            beat_interval(self.faults.hang_timeout_s),
            self._follow,
        )

    def __enter__(self) -> "Supervision":
        self.signals.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.signals.__exit__()
        if self._started:
            self._leave()
        if isinstance(error, KeyboardInterrupt):
            self._write("stopped", "SIGINT twice: steps after the last checkpoint are lost", True)
        elif isinstance(error, Exception) and (self._started or _full_disk(error)):
            self.report(error)
            raise SystemExit(2 if isinstance(error, UserError) else 1)

    @property
    def stop_requested(self) -> bool:
        """Whether this process was sent a signal to stop, or is as old as it may become."""
        return self.signals.received is not None or time.time() >= self._until

    def start(self) -> None:
        """Make the run folder and say that the run is starting. Raises UserError, having written
        nothing, when another start of the run is alive."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        refuse_second_start(self.run_dir, self.rank, self.size, self.faults.startup_timeout_s)
        try:
            self._heart.start()
        except FileExistsError:  # by another start of the same moment
            refuse_second_start(self.run_dir, self.rank, self.size, 0.0)
            raise
        self._started = True
        if self.rank == 0:
            forget_error(self.run_dir, self._since)
            forget_heartbeats(self.run_dir, self._since)
            self._write("starting", "imports, data, model, checkpoint", requeue=True)
        if self.local_rank == 0:
            self._watchdog = subprocess.Popen(
                [
                    *(sys.executable, "-m", "megatron_ext.training.watchdog", str(self.run_dir)),
                    *("--hang-timeout", str(self.faults.hang_timeout_s)),
                    *("--startup-timeout", str(self.faults.startup_timeout_s)),
                    *("--since", str(self._since)),
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it
            )

    def phase(self, name: str, step: int | None = None) -> None:
        """This rank got somewhere; an unset step stays what it was. Costs a microsecond."""
        if step is not None:
            self.step = step - 1  # those done
        self._heart.phase(name, step)

    def hold(self, first_step: int) -> None:
        """Training begins after `first_step` steps: from now on a signal is remembered."""
        self.step = first_step
        self.signals.hold()
        if self.rank == 0:
            write_status(
                self.run_dir,
                "running",
                "training",
                requeue=True,
                step=first_step,
                first_step=first_step,
                steps=self.steps,
            )

    def ended(self, done: int, stopped: bool) -> str:
        """Say that the run ended after `done` steps and a checkpoint; returns how, in words."""
        self.step = done
        state: State = "stopped" if stopped else "finished"
        if state == "finished":
            reason = f"finished: {done} steps in {self.run_dir}"
        else:
            cause = self.signals.received or (
                "training.exit_duration_in_mins"
                if time.time() >= self._until
                else "another rank's signal"
            )
            reason = f"stopped by {cause} after step {done}, checkpoint saved: "
            reason += "run the same command to go on"
            if self.signals.received:
                waited = time.monotonic() - self.signals.received_at
                reason += f" ({waited:.1f} s after the signal)"
        if self.rank == 0:
            self._write(state, reason, requeue=state == "stopped")
        return reason

    def report(self, error: Exception) -> None:
        """Print an exception and write it down, unless another rank has told of its own."""
        if _lost_connection(error):
            # The rank that knows the cause speaks first, or the watchdog of a rank that was killed.
            patience = time.monotonic() + _PATIENCE_S
            while not (ended := ended_since(self.run_dir, self._since)):
                if time.monotonic() > patience:
                    break
                time.sleep(0.1)
            if ended and ended["state"] == "stopped":  # another rank, before its first step
                os._exit(0)
        plain = isinstance(error, (UserError, Verdict))
        text = str(error) if plain else "".join(traceback.format_exception(error))
        full = _full_disk(error)
        if full:
            text = f"a disk is full: {full}; make room for training.run_dir={self.run_dir} and "
            text += "data.cache_dir, then run the same command again"
        if self._started and not claim_error(self.run_dir, text, self._since):
            return
        first = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "type": type(error).__name__,
            "message": text if full else str(error),
        }
        reason = text if plain or full else f"rank {self.rank} failed: {type(error).__name__}"
        self._write("failed", reason, requeue=not plain, error=first)
        where = f"rank {self.rank} of {self.size} on {first['host']}: " if self.size > 1 else ""
        told = f"error: {text}" if plain or full else where + text
        print(told, file=sys.stderr, flush=True)

    def _follow(self) -> None:
        """In the heartbeat's thread: leave a run that has ended elsewhere, for the main thread may
        wait for a rank that is gone. A run that stops with a checkpoint ends by itself."""
        status = ended_since(self.run_dir, self._since)
        if not status or (status["pid"], status["host"]) == (os.getpid(), socket.gethostname()):
            return
        before_first_step = status["state"] == "stopped" and not self.signals.holding
        if not before_first_step and status["state"] not in ("failed", "hung"):
            return
        self._ended_at = min(self._ended_at, time.monotonic())
        if time.monotonic() - self._ended_at >= _LEAVING_S:  # which is time to leave tidily
            sys.stdout.flush()
            os._exit(0 if before_first_step else 1)

    def _leave(self) -> None:
        told = self._heart.end()
        if self._watchdog:
            # It looks for our end at once; on a full disk it would take it for a violent one.
            self._watchdog.send_signal(signal.SIGTERM if told else signal.SIGKILL)

    def _write(
        self, state: State, reason: str, requeue: bool, error: dict[str, object] | None = None
    ) -> None:
        if self._started:
            steps = {} if self.step is None else {"step": self.step}
            write_status(self.run_dir, state, reason, requeue=requeue, error=error, **steps)

    def _stopped_before_the_first_step(self, name: str) -> None:
        reason = f"stopped by {name} before the first step"
        self._write("stopped", reason, requeue=True)
        print(reason, flush=True)
        os._exit(0)


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error of a disk, or of its user's share of it, that is full, if there is one among the
    causes. NumPy says only how many elements it wrote."""
    while error is not None:
        if isinstance(error, OSError) and (
            error.errno in (errno.ENOSPC, errno.EDQUOT) or "requested and" in str(error)
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def _lost_connection(error: Exception) -> bool:
    """Whether the error is that of a rank whose peer is gone: torch's own classes for it, and
    gloo's plain RuntimeError, which names its source file."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or "gloo" in str(error)
