"""The watch over one process of a run: signals, the run's status, and how it ends. Needs no torch.

    with Supervision(config) as watch:
        watch.start()                   # from here on there is a run folder, and status.json in it
        watch.hold(first_step)          # from here on there is something to save
        ... watch.stop_requested        # after each step
        watch.ended(done)               # finished, or stopped by a signal with a checkpoint

An exception that passes through is told of once: the rank that meets it first writes error.txt and
status.json and prints it, and those that only lost the connection to that rank are silent.
"""

import math
import os
import socket
import sys
import time
import traceback
from types import TracebackType

import psutil

from megatron_ext.config import Config
from megatron_ext.errors import UserError, Verdict
from megatron_ext.launch import launched_as
from megatron_ext.training.status import State, claim_error, forget_error, write_status
from megatron_ext.training.watch import StopSignals

# How long a rank that lost its connection waits for the one that knows why to say so, in seconds.
_PATIENCE_S = 5.0


class Supervision:
    """Signals and status of this process, from before torch is imported until it ends."""

    def __init__(self, config: Config) -> None:
        self.run_dir = config.training.run_dir
        self.steps = config.training.steps
        self.rank, self.size, self.local_rank = launched_as()
        self.signals = StopSignals(self._stopped_before_the_first_step)
        self.step: int | None = None  # steps done, once training has begun
        self._since = psutil.Process().create_time()
        minutes = config.training.exit_duration_in_mins
        self._until = math.inf if minutes is None else self._since + 60 * minutes
        self._started = False

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
        if isinstance(error, KeyboardInterrupt):
            self._write("stopped", "SIGINT twice: steps after the last checkpoint are lost", True)
        elif isinstance(error, Exception) and self._started:
            self.report(error)
            raise SystemExit(2 if isinstance(error, UserError) else 1)

    @property
    def stop_requested(self) -> bool:
        """Whether this process was sent a signal to stop, or is as old as it may become."""
        return self.signals.received is not None or time.time() >= self._until

    def start(self) -> None:
        """Make the run folder and say that the run is starting."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._started = True
        if self.rank == 0:
            forget_error(self.run_dir, self._since)
            self._write("starting", "imports, data, model, checkpoint", requeue=True)

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

    def ended(self, done: int) -> str:
        """Say that the run ended after `done` steps and a checkpoint; returns how, in words."""
        self.step = done
        state: State = "finished" if done == self.steps else "stopped"
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
        if self.rank == 0:
            self._write(state, reason, requeue=state == "stopped")
        return reason

    def report(self, error: Exception) -> None:
        """Print an exception and write it down, unless another rank has told of its own."""
        if _lost_connection(error):
            time.sleep(_PATIENCE_S)  # the rank that knows the cause speaks first
        plain = isinstance(error, (UserError, Verdict))
        text = str(error) if plain else "".join(traceback.format_exception(error))
        if self._started and not claim_error(self.run_dir, text, self._since):
            return
        first = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "type": type(error).__name__,
            "message": str(error),
        }
        reason = str(error) if plain else f"rank {self.rank} failed: {type(error).__name__}"
        self._write("failed", reason, requeue=not plain, error=first)
        where = f"rank {self.rank} of {self.size} on {first['host']}: " if self.size > 1 else ""
        print(f"error: {text}" if plain else where + text, file=sys.stderr, flush=True)

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
        # Not by an exception: leaving the process groups could wait for ranks that hang.
        os._exit(0)


def _lost_connection(error: Exception) -> bool:
    """Whether the error is that of a rank whose peer is gone: torch's own classes for it, and
    gloo's plain RuntimeError, which names its source file."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or "gloo" in str(error)
