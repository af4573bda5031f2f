"""Which bytes of which source this task encodes, in parts that do not depend on the workers.

    shares = share_out(sources, options)      # contiguous: tasks 0 .. n-1 merged give the whole

Plain files and Parquet are cut at any byte (a line, or a row group, belongs to the share where it
begins); compressed files and standard input go to one task whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from data_tools.corpus import Source, first_window
from data_tools.options import Options
from data_tools.parts import Part

RANGES, WHOLE, SPOOLED = "ranges", "whole", "spooled"
_SMALL_BYTES = 8 << 20  # a compressed file of this size is a fraction of a second's work
_SMALL_WINDOW = 8 << 20  # zstd -19's; .zst with wider ones are decompressed one at a time
_MANY = 64  # so many compressed files keep every worker busy with whole ones


@dataclass(frozen=True)
class Share:
    """Bytes [start, end) of source number `source`, and how they become parts."""

    source: int
    start: int
    end: int
    mode: str

    def parts(self, part_bytes: int) -> Iterator[Part]:
        """The parts of a share that is not spooled."""
        if self.mode == WHOLE:
            yield Part(self.source, 0, self.start, self.end)
            return
        for number, start in enumerate(range(self.start, self.end, part_bytes)):
            yield Part(self.source, number, start, min(start + part_bytes, self.end))

    def part_count(self, part_bytes: int) -> int:
        return 1 if self.mode == WHOLE else -(-(self.end - self.start) // part_bytes)


def share_out(sources: Sequence[Source], options: Options) -> list[Share]:
    """The shares of task `options.task`, in input order; empty files give none."""
    task, tasks = options.task
    total = sum(source.size for source in sources)
    low, high = total * task // tasks, total * (task + 1) // tasks
    shares, begin = [], 0
    for number, source in enumerate(sources):
        end = begin + source.size
        if source.divisible:
            start, stop = max(begin, low), min(end, high)
            if start < stop:
                shares.append(Share(number, start - begin, stop - begin, RANGES))
        # Midpoints fall into exactly one task's interval; standard input has no size.
        elif low <= (begin + end) // 2 < high or (source.path == "-" and task == 0):
            shares.append(Share(number, 0, source.size, SPOOLED))
        begin = end
    many = sum(share.mode == SPOOLED for share in shares) >= _MANY
    return [replace(s, mode=WHOLE) if _goes_whole(sources, s, many) else s for s in shares]


def _goes_whole(sources: Sequence[Source], share: Share, many: bool) -> bool:
    source = sources[share.source]
    if share.mode != SPOOLED or source.path == "-":
        return False
    return (source.size <= _SMALL_BYTES or many) and first_window(source) <= _SMALL_WINDOW
