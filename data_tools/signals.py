"""Ctrl-C and SIGTERM, where an exception of theirs would be lost.

with held_back():        # they come when it is over
    compile_something()
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """SIGINT and SIGTERM do what they would have done once this is left, whatever it raises.

    For LLVM at work: it calls back into Python, and an exception there is printed and forgotten.
    Blocking them (`pthread_sigmask`) is not enough, as the threads of numpy still take them.
    """
    came: list[int] = []
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # no other one may set handlers
            for one in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(one) is not None:  # else not Python's, and cannot be put back
                    before[one] = signal.signal(one, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
