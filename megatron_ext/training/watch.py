"""Signals: asked to stop, a run finishes its step, saves and leaves.

    with StopSignals() as signals:
        ...                             # starting up: a signal ends the process, nothing is lost
        signals.hold()
        ... signals.received            # None, or the name of the first signal

A second SIGINT (Ctrl-C) ends the process at once.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Answers SIGTERM, SIGINT and SIGUSR1 while it is open; remembers the first once it holds."""

    def __init__(self, before_hold: Callable[[str], None] | None = None) -> None:
        """before_hold: what to do, given the signal's name, while there is nothing to save; it does
        not return. Unset: say so and end with exit code 0."""
        self._before_hold = before_hold or _end
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
            self._before_hold(signal.Signals(number).name)
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name


def _end(name: str) -> None:
    print(f"stopped by {name} before the first step", flush=True)
    os._exit(0)
