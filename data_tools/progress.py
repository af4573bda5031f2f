"""One progress line: a bar on a terminal, a line an interval in a log.

with Progress("tokenize", total_bytes) as progress:
    progress.update(done_bytes, text_bytes, documents=..., tokens=...)
"""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

INTERVAL_S = 10.0


class Progress:
    """Speaks on standard error; `text_bytes` is what MB/s is counted in (1 MB = 10^6 bytes), `unit`
    what `total` and `done` are."""

    def __init__(self, name: str, total: int, quiet: bool = False, unit: str = "B") -> None:
        self.name, self.total, self.quiet = name, total, quiet
        self.started = self.last = time.monotonic()
        self.first: tuple[int, int] | None = None
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            # No monitor thread: worker processes are forked from a single-threaded process.
            tqdm.monitor_interval = 0
            self.bar = tqdm(total=total or None, desc=name, unit=unit, unit_scale=True, miniters=1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int, text_bytes: int, **counts: int) -> None:
        """Say how far it is, if it is time to; all numbers count from the very beginning."""
        if self.quiet:
            return
        if self.first is None:
            self.first = (done, text_bytes)  # a resumed run must not count what was there
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (text_bytes - self.first[1]) / seconds
        counted = "".join(f"{count:,} {what}, " for what, count in counts.items())
        words = f"{counted}{rate / 1e6:.1f} MB/s"
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(0)
        elif time.monotonic() - self.last >= INTERVAL_S:
            self.last = time.monotonic()
            speed = (done - self.first[0]) / seconds
            left = (
                f", {_duration((self.total - done) / speed)} left" if speed and self.total else ""
            )
            share = f"{100 * done / self.total:.1f}%, " if self.total else ""
            print(f"{self.name}: {share}{words}{left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
