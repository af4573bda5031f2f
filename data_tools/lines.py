"""Lines of a source with their place: number, byte offset in the decompressed stream.

    for line in read_lines(source): line.number, line.offset, line.data      # data without "\\n"

Memory is bounded by `max_line_bytes`: a longer line comes with `data` b"" and its true size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data_tools.corpus import Source, read_blocks

MAX_LINE_BYTES = 32 << 20


class Line(NamedTuple):
    number: int  # from 1
    offset: int  # of its first byte
    size: int  # bytes, newline excluded
    data: bytes


def read_lines(source: Source, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """All lines of a source; one that is longer than `max_line_bytes` has data b"" and its
    true size.
    """
    return split_lines(read_blocks(source), max_line_bytes)


def split_lines(blocks: Iterable[bytes], max_line_bytes: int) -> Iterator[Line]:
    """Cut a stream of blocks at newlines. The last line needs none."""
    number, offset, size = 1, 0, 0  # of the line being gathered
    pieces: list[bytes] = []
    for block in blocks:
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            size += end - start
            pieces.append(block[start:end])
            yield Line(number, offset, size, _joined(pieces, size, max_line_bytes))
            number, offset, size = number + 1, offset + size + 1, 0
            start = end + 1
        size += len(block) - start
        pieces.append(block[start:])
        if size > max_line_bytes:
            pieces.clear()
    if size:
        yield Line(number, offset, size, _joined(pieces, size, max_line_bytes))


def _joined(pieces: list[bytes], size: int, most: int) -> bytes:
    """What was gathered, which then is held no longer: the line is at work for a while."""
    data = b"".join(pieces) if size <= most else b""
    pieces.clear()
    return data
