"""A compressed file or standard input in chunks of whole lines, so that many workers can share it.

    for part in spool_parts(source, 0, options, folder, needed=lambda k: True): ...

A chunk closes at the first line end `part_bytes` or more after its beginning: the same content
gives the same chunks, which is what a resumed run relies on. Bounded in memory and on disk: an
over-long line is cut after `max_line_bytes + 1` bytes, by which the worker knows and rejects it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from data_tools.corpus import Source, read_blocks
from data_tools.options import Options
from data_tools.parts import Part


def spool_parts(
    source: Source, number: int, options: Options, folder: Path, needed: Callable[[int], bool]
) -> Generator[Part, None, int]:
    """Parts of source number `number`; those that are not `needed` are read past, not written.

    Returns (as a generator does) how many parts the source has.
    """
    chunk = _Chunk(folder, number, options)
    with contextlib.ExitStack() as stack:
        raw = None if source.path == "-" else stack.enter_context(open(source.path, "rb"))
        for block in read_blocks(source, raw=raw):
            chunk.consumed = raw.tell() if raw else 0
            at = 0
            while at < len(block):
                if chunk.empty:
                    chunk.open(needed)
                at, closed = chunk.take(block, at)
                if closed:
                    yield from chunk.close()
    if not chunk.empty:
        yield from chunk.close()
    return chunk.number


class _Chunk:
    """The chunk being written; positions are bytes of the decompressed stream."""

    def __init__(self, folder: Path, number: int, options: Options) -> None:
        self.folder, self.source, self.options = folder, number, options
        self.limit = options.max_line_bytes + 1
        self.number = self.start = self.position = self.line_start = self.dropped = 0
        self.consumed = 0  # bytes of the compressed file so far
        self.stream: BinaryIO | None = None

    @property
    def empty(self) -> bool:
        return self.position == self.start

    def open(self, needed: Callable[[int], bool]) -> None:
        # The process number keeps a worker that outlived its killed parent from reading our file.
        self.path = self.folder / f"{self.source:06d}-{self.number:08d}-{os.getpid()}.spool"
        self.stream = open(self.path, "wb", buffering=0) if needed(self.number) else None  # noqa: SIM115

    def take(self, block: bytes, at: int) -> tuple[int, bool]:
        """Take bytes from block[at:]; returns where it stopped and whether the chunk is
        complete.
        """
        # A line that loses bytes must be the last of its chunk: its newline closes it.
        full = self.start + self.options.part_bytes - 1 - self.position
        newline = block.find(b"\n", at if self.dropped else at + max(0, full))
        end = newline if newline >= 0 else len(block)
        last = block.rfind(b"\n", at, end)
        if last >= 0:
            self.line_start = self.position + last + 1 - at
        keep = min(end, at + max(0, self.line_start + self.limit - self.position))
        self.dropped += end - keep
        if newline >= 0:
            end += 1
            keep += 0 if self.dropped else 1
        if self.stream is not None:
            self.stream.write(memoryview(block)[at:keep])
        self.position += end - at
        return end, newline >= 0

    def close(self) -> Iterator[Part]:
        if self.stream is not None:
            self.stream.close()
            yield Part(
                self.source,
                self.number,
                self.start,
                self.position,
                str(self.path),
                self.dropped,
                self.consumed,
            )
        self.stream = None
        self.number += 1
        self.start = self.line_start = self.position
        self.dropped = 0
