"""Signals: asked to stop, a run finishes its step, saves and leaves.

    with StopSignals() as signals:
        ...                             # starting up: a signal ends the process, nothing is lost
        signals.hold()
        ... signals.received            # None, or the name of the first signal

A second SIGINT (Ctrl-C) ends the process at once.
"""

import os
import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Answers SIGTERM, SIGINT and SIGUSR1 while it is open; remembers the first once it holds."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._holding = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on there is something to save: the loop looks at `received` after each step."""
        self._holding = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self._holding:
            # Not by an exception: leaving the process groups could wait for ranks that hang.
            print(f"stopped by {signal.Signals(number).name} before the first step", flush=True)
            os._exit(0)
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name
