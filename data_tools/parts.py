"""The step of work: one part of the input to one part file, written whole or not at all.

    encode_part(part, options, worker)       # in a worker process
    result = read_part(path)                 # in the writer: result.stats, result.ids(), ...

Parts depend only on inputs and `part_bytes`, never on the number of workers. A part of a plain
file holds the lines that begin in its byte range, one of Parquet the row groups; a compressed file
is either one part ("whole") or comes in chunks that the main process decompresses to spool files
(spool.py).
"""

from __future__ import annotations

import os
import struct
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import xxhash

from data_tools import indexed
from data_tools.corpus import Source
from data_tools.documents import TOO_SHORT, UNCUT, Document, parse_line
from data_tools.encoding import Encoder, audit
from data_tools.errors import Failure
from data_tools.files import COPY_BYTES
from data_tools.lines import Line, read_lines, split_lines
from data_tools.options import Options
from data_tools.parquet import read_rows
from data_tools.reading import Parse, parse_lines
from data_tools.receipt import BINS, histogram
from data_tools.tokenizer import Tokenizer

# Bytes of ids, of lengths, of rejects, of statistics; xxh3 of all of them; magic.
_TRAILER = struct.Struct("<QQQQ8s8s")
_MAGIC = b"DTPART2\0"
_EXPANSION = 18  # characters that a Unicode normal form makes of one, at most
COUNTED = ("documents", "characters", "bytes", "tokens")


@dataclass(frozen=True)
class Part:
    """Lines, or row groups, that begin in bytes [start, end) of a source; `spool` holds the lines
    of a compressed one.
    """

    source: int  # number of the source
    number: int  # of the part within the source
    start: int
    end: int
    spool: str = ""
    dropped: int = 0  # bytes of an over-long last line that were not spooled
    consumed: int = 0  # bytes of the compressed file read by its end, for the progress line

    def file(self, folder: Path) -> Path:
        return folder / f"{self.source:06d}-{self.number:08d}.part"


@dataclass
class Worker:
    """What a worker process needs to encode parts."""

    sources: list[Source]
    tokenizer: Tokenizer
    encoder: Encoder
    folder: Path

    @cached_property
    def control_tokens(self) -> list[bytes]:
        """Their literal spelling, which must stay text."""
        return [token.encode() for token in self.tokenizer.control_tokens()]

    @cached_property
    def parse(self) -> Parse:
        """How a line becomes a document; where the kernel runs, the compiled way does."""
        if self.encoder.note:
            return parse_line
        from data_tools.long_lines import parse_long_line  # needs Numba

        return parse_long_line


def encode_part(part: Part, options: Options, worker: Worker) -> Part:
    """Encode one part to its file in `worker.folder`; returns the part, for the writer."""
    source = worker.sources[part.source]
    final = part.file(worker.folder)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    rejects = temporary.with_suffix(".rejects")
    try:
        with open(temporary, "wb") as stream, open(rejects, "w+b") as reject_stream:
            collector = _Collector(worker, options, source, stream, reject_stream)
            try:
                # Neither here nor below does a variable hold a line while the next one is read.
                deque(
                    starmap(collector.take, _documents_of(part, source, options, worker.parse)),
                    maxlen=0,
                )
            except ValueError as error:  # a file cut short under our hands
                raise Failure(f"{source.path} cannot be read: {error}") from error
            collector.finish(part.consumed)
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
        rejects.unlink(missing_ok=True)
    if part.spool:
        Path(part.spool).unlink(missing_ok=True)
    return part


class _Collector:
    """Lines in; ids, lengths, rejected lines and statistics out."""

    def __init__(
        self, worker: Worker, options: Options, source: Source, stream: BinaryIO, rejects: BinaryIO
    ) -> None:
        self.worker, self.options, self.source = worker, options, source
        self.stream, self.rejects = stream, rejects
        self.digest = xxhash.xxh3_64()
        tokenizer = worker.tokenizer
        self.before = (
            tokenizer.bos_id if options.prepend_bos and tokenizer.bos_id is not None else -1
        )
        self.after = tokenizer.eod_id if options.append_eod and tokenizer.eod_id is not None else -1
        self.around = (self.before >= 0) + (self.after >= 0)
        self.dtype = indexed.token_dtype(tokenizer.vocab_size)
        self.control = worker.control_tokens
        self.texts: list[bytes] = []
        self.slices: list[str] = []
        self.characters: list[int] = []
        self.places: list[Line] = []
        self.batch_bytes = 0
        self.lines = 0
        self.lengths: list[np.ndarray] = []
        self.reasons: Counter[str] = Counter()
        self.literal: Counter[str] = Counter()
        self.counts: dict[str, list[int]] = {}
        self.histogram = np.zeros(BINS, dtype=np.int64)

    def take(self, line: Line, document: Document) -> None:
        self.lines += 1
        if document.reason is not None:
            self.reject(line, document.reason)
            return
        most = self.options.max_uncut_bytes
        if 0 < most < _EXPANSION * len(document.text) and (
            self.worker.tokenizer.gets_more(document.text.decode(), most)
        ):
            self.reject(line, UNCUT)
            return
        self.texts.append(document.text)
        self.slices.append(document.slice or self.source.slice)
        self.characters.append(document.characters)
        self.places.append(line)
        self.batch_bytes += len(document.text)
        if self.batch_bytes >= self.worker.encoder.batch_bytes:
            self.encode()

    def reject(self, line: Line, reason: str) -> None:
        self.reasons[reason] += 1
        # The line number counts from this part's first line; the writer knows how many came before.
        record = {
            "file": self.source.path,
            "line": line.number,
            "offset": line.offset,
            "bytes": line.size,
            "reason": reason,
        }
        self.rejects.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def encode(self) -> None:
        """Encode the gathered texts and write their ids."""
        if not self.texts:
            return
        ids, lengths = self.worker.encoder.encode(self.texts, self.before, self.after)
        ends = np.cumsum(lengths, dtype=np.int64)
        audit(
            self.worker.tokenizer,
            self.texts,
            ids,
            ends,
            int(self.before >= 0),
            int(self.after >= 0),
        )
        kept = np.ones(len(lengths), dtype=bool)
        if self.options.min_tokens:
            kept = lengths - self.around >= self.options.min_tokens
            if not kept.all():
                for i in np.flatnonzero(~kept):
                    self.reject(self.places[i], TOO_SHORT)
                ids, lengths = ids[np.repeat(kept, lengths)], lengths[kept]
        self.write(ids.astype(self.dtype, copy=False))
        self.lengths.append(lengths)
        self.histogram += histogram(lengths)
        self.count(kept, lengths)
        for token, found in _count_literal(self.texts, self.control).items():
            self.literal[token] += found
        self.texts, self.slices, self.characters, self.places = [], [], [], []
        self.batch_bytes = 0

    def count(self, kept: np.ndarray, lengths: np.ndarray) -> None:
        """Add the batch to the counts of its slices."""
        names = [self.slices[i] for i in np.flatnonzero(kept)]
        table = np.empty((len(names), 4), dtype=np.int64)
        table[:, 0] = 1
        table[:, 1] = np.array(self.characters, dtype=np.int64)[kept]
        table[:, 2] = np.array([len(text) for text in self.texts], dtype=np.int64)[kept]
        table[:, 3] = lengths
        for name in set(names):
            rows = table if len(set(names)) == 1 else table[[n == name for n in names]]
            total = self.counts.setdefault(name, [0] * len(COUNTED))
            self.counts[name] = [int(a + b) for a, b in zip(total, rows.sum(axis=0), strict=True)]

    def finish(self, consumed: int) -> None:
        """Encode what is left and complete the part file."""
        self.encode()
        ids_bytes = self.stream.tell()
        lengths = np.concatenate([np.empty(0, np.int32), *self.lengths]).astype(np.int32)
        self.write(lengths)
        rejects_bytes = self.rejects.tell()
        self.rejects.seek(0)
        while block := self.rejects.read(COPY_BYTES):
            self.write(block)
        statistics = orjson.dumps(
            {
                "lines": self.lines,
                "consumed": consumed,
                "rejected": dict(self.reasons),
                "literal_control_tokens": dict(self.literal),
                "slices": self.counts,
                "histogram": self.histogram.tolist(),
            }
        )
        self.write(statistics)
        sizes = (ids_bytes, lengths.nbytes, rejects_bytes, len(statistics))
        self.stream.write(_TRAILER.pack(*sizes, self.digest.digest(), _MAGIC))

    def write(self, data: bytes | np.ndarray) -> None:
        view = np.frombuffer(data, dtype=np.uint8).data
        self.digest.update(view)
        for start in range(0, len(view), COPY_BYTES):
            self.stream.write(view[start : start + COPY_BYTES])


def _count_literal(texts: list[bytes], control: list[bytes]) -> dict[str, int]:
    """How often control tokens stand in the texts as plain text."""
    if not control:
        return {}
    joined = b"\n".join(texts)
    # One vectorised look for the first bytes is much quicker than a search for every token.
    view = np.frombuffer(joined, dtype=np.uint8)
    found: dict[str, int] = {}
    for first in {token[0] for token in control}:
        places = np.flatnonzero(view == first)
        for token in (t for t in control if t[0] == first):
            hits = places[places <= len(view) - len(token)]
            for i in range(1, len(token)):
                hits = hits[view[hits + i] == token[i]]
            if len(hits):
                found[token.decode()] = len(hits)
    return found


def _documents_of(
    part: Part, source: Source, options: Options, parse: Parse
) -> Iterator[tuple[Line, Document]]:
    """What the lines of a part hold; they are numbered from 1 within it, with offsets in the
    decompressed source."""
    if part.spool:
        lines = _spooled_lines(part, options)
    elif source.compression == "parquet":
        return read_rows(source, options.text_keys, options.max_line_bytes, part.start, part.end)
    elif source.divisible and (part.start > 0 or part.end < source.size):
        lines = _lines_in_range(part, source, options)
    else:
        lines = read_lines(source, options.max_line_bytes)
    return parse_lines(lines, options.text_keys, options.max_line_bytes, parse)


def _spooled_lines(part: Part, options: Options) -> Iterator[Line]:
    with open(part.spool, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size

        def placed(line: Line) -> Line:
            dropped = part.dropped if line.offset + line.size == size else 0
            return line._replace(offset=line.offset + part.start, size=line.size + dropped)

        blocks = iter(lambda: stream.read(1 << 20), b"")
        yield from map(placed, split_lines(blocks, options.max_line_bytes))


def _lines_in_range(part: Part, source: Source, options: Options) -> Iterator[Line]:
    with open(source.path, "rb", buffering=0) as stream:
        position = part.start
        if part.start > 0:
            # A line begins here only if the byte before is a newline: look for the first one.
            position = part.start - 1
            while True:
                stream.seek(position)
                block = stream.read(min(1 << 20, part.end - position))
                if not block:
                    return
                found = block.find(b"\n")
                if found >= 0:
                    position += found + 1
                    break
                position += len(block)
        if position >= part.end:
            return
        stream.seek(position)
        blocks = iter(lambda: stream.read(1 << 20), b"")
        lines = split_lines(blocks, options.max_line_bytes)

        def placed(line: Line) -> Line:
            return line._replace(offset=line.offset + position)

        yield from takewhile(lambda line: line.offset < part.end, map(placed, lines))


@dataclass(frozen=True)
class PartResult:
    """A finished part file."""

    path: Path
    ids_bytes: int
    lengths: np.ndarray
    rejects: bytes
    stats: dict[str, Any]

    def ids(self) -> Iterator[bytes]:
        with open(self.path, "rb", buffering=0) as stream:
            left = self.ids_bytes
            while left:
                block = stream.read(min(left, COPY_BYTES))
                left -= len(block)
                yield block


def read_part(path: Path, verify: bool = False) -> PartResult | None:
    """Open a part file, or None when it is not whole. Parts are not synced: what a power cut left
    of those of an earlier run shows only when all bytes are read (`verify`)."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(0, size - _TRAILER.size))
            ids, lengths, rejects, statistics, digest, magic = _TRAILER.unpack(
                stream.read(_TRAILER.size)
            )
            if magic != _MAGIC or ids + lengths + rejects + statistics + _TRAILER.size != size:
                return None
            stream.seek(0)
            if verify and _digest(stream, size - _TRAILER.size) != digest:
                return None
            stream.seek(ids)
            return PartResult(
                path,
                ids,
                np.frombuffer(stream.read(lengths), dtype=np.int32),
                stream.read(rejects),
                orjson.loads(stream.read(statistics)),
            )
    except (OSError, struct.error, orjson.JSONDecodeError):
        return None


def _digest(stream: BinaryIO, size: int) -> bytes:
    digest = xxhash.xxh3_64()
    while size and (block := stream.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.digest()
