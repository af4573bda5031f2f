"""Signals: asked to stop, a run finishes its step, saves and leaves.

    with StopSignals() as signals:
        ...                             # starting up: a signal ends the process, nothing is lost
        signals.hold()
        ... signals.received            # None, or the name of the first signal

A second SIGINT (Ctrl-C) ends the process at once.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Answers SIGTERM, SIGINT and SIGUSR1 while it is open; remembers the first."""

    def __init__(self, before_hold: Callable[[str], None] | None = None) -> None:
        """before_hold: what to do, given the signal's name, while there is nothing to save; it does
        not return, and is called by another thread. Unset: say so and end with exit code 0."""
        self._before_hold = before_hold or _end
        self.received: str | None = None
        self.received_at = math.inf  # time.monotonic() of the first
        self.holding = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python answers a signal between two lines of the main thread, which may wait for long in
        # a collective; a thread that reads the numbers of signals from a pipe answers at once.
        self._numbers, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        threading.Thread(target=self._answer, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # which ends the thread

    def hold(self) -> None:
        """From now on there is something to save: the loop looks at `received` after each step."""
        self.holding = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.holding and self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.received_at = signal.Signals(number).name, time.monotonic()

    def _answer(self) -> None:
        while arrived := os.read(self._numbers, 16):
            asked = [number for number in arrived if number in STOP_SIGNALS]
            if asked and not self.holding:
                self._before_hold(signal.Signals(asked[0]).name)
        os.close(self._numbers)


def _end(name: str) -> None:
    # Not by an exception: leaving the process groups could wait for ranks that hang.
    print(f"stopped by {name} before the first step", flush=True)
    os._exit(0)
