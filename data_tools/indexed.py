"""Megatron's indexed token files: PREFIX.bin holds ids, PREFIX.idx says where each document lies.

    index = read_index("corpus")                   # memory-mapped; index.lengths, index.pointers
    tokens = open_tokens("corpus", index)          # memory-mapped ids
    with atomic_write("corpus.idx") as stream: write_index(stream, np.uint16, lengths)

Layout of .idx (little endian): b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, sequences u64,
documents + 1 u64, lengths i32[sequences] in tokens, pointers i64[sequences] in bytes, document
boundaries i64[documents + 1]. We write one sequence a document.
Refuses files that are not of this layout, naming what is wrong.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.errors import UserError

HEADER = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
_CODES: dict[int, Any] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32,
    5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
CHUNK = 1 << 20  # documents held in memory at once while an index is written


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Megatron's own rule (`DType.optimal_dtype`): uint16 below 65,500 ids, int32 from there on."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass(frozen=True)
class Index:
    """A .idx file, memory-mapped."""

    dtype: np.dtype
    lengths: np.ndarray  # int32 [sequences], tokens
    pointers: np.ndarray  # int64 [sequences], byte offset in .bin
    boundaries: np.ndarray  # int64 [documents + 1], sequence number where each document starts

    @property
    def documents(self) -> int:
        return len(self.boundaries) - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def span(self, document: int) -> tuple[int, int]:
        """First token and one past the last token of a document."""
        first, last = int(self.boundaries[document]), int(self.boundaries[document + 1])
        if first == last:
            return 0, 0
        start = int(self.pointers[first]) // self.dtype.itemsize
        return start, start + int(self.lengths[first:last].sum(dtype=np.int64))


def prefix(given: str | os.PathLike[str], flag: str = "") -> Path:
    """What commands take for PREFIX; PREFIX.bin and PREFIX.idx are understood too.

    Raises `UserError`, naming the `flag`, for what names no files: an empty name, a folder.
    """
    text = _bare(given)
    path = Path(text)
    if (
        text
        and path.is_dir()
        and not any(Path(text + end).exists() for end in (".idx", ".receipt.json"))
    ):
        raise UserError(
            f"{flag}{os.fspath(given)} is a folder: write the beginning of the files' names, such "
            f"as {path / 'all'}"
        )
    if not path.name or path.name == ".." or text.endswith(os.sep):
        raise UserError(
            f"{flag}{os.fspath(given) or repr('')} names no token files: write the beginning of "
            "their names, such as tokens/all for tokens/all.bin and tokens/all.idx"
        )
    if not text.isprintable():
        raise UserError(f"{flag}{text!r} cannot be printed or is not UTF-8: choose another name")
    return path


def paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx; a prefix given with either ending is understood."""
    text = _bare(prefix)
    return Path(text + ".bin"), Path(text + ".idx")


def _bare(given: str | os.PathLike[str]) -> str:
    text = os.fspath(given)
    while text.endswith((".bin", ".idx")):
        text = text[:-4]
    return text


def bin_size(prefix: str | os.PathLike[str]) -> int:
    """Bytes of PREFIX.bin. Raises `UserError` when it is missing."""
    path, _ = paths(prefix)
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the prefix of a .bin/.idx pair")
    return path.stat().st_size


def read_index(prefix: str | os.PathLike[str]) -> Index:
    """Memory-map PREFIX.idx. Raises `UserError` when it is missing or not of the layout above."""
    _, path = paths(prefix)
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the prefix of a .bin/.idx pair")
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream:
            head = stream.read(HEADER_BYTES)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: make it readable") from error
    if head[:9] != HEADER[: len(head[:9])] or size < HEADER_BYTES:
        raise UserError(
            f"{path} is not a Megatron index: its first {min(size, 9)} bytes are not MMIDIDX"
        )
    version, code, sequences, entries = struct.unpack("<QBQQ", head[9:])
    if version != 1 or code not in _CODES:
        raise UserError(
            f"{path} has version {version} and dtype code {code}: only version 1, codes 1-8 exist"
        )
    wanted = HEADER_BYTES + 12 * sequences + 8 * entries
    # A multimodal index carries one more byte a sequence.
    if size not in (wanted, wanted + sequences) or entries < 1:
        raise UserError(
            f"{path} has {size:,} bytes where {sequences:,} sequences and {entries:,} boundaries "
            f"take {wanted:,}: the file is truncated or damaged"
        )
    raw = np.memmap(path, mode="r")
    lengths_end = HEADER_BYTES + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    return Index(
        np.dtype(_CODES[code]),
        raw[HEADER_BYTES:lengths_end].view(np.int32),
        raw[lengths_end:pointers_end].view(np.int64),
        raw[pointers_end : pointers_end + 8 * entries].view(np.int64),
    )


def open_tokens(prefix: str | os.PathLike[str], index: Index) -> np.ndarray:
    """Memory-map the ids of PREFIX.bin, read-only (empty files give an empty array)."""
    path, _ = paths(prefix)
    count = bin_size(prefix) // index.dtype.itemsize
    if not count:
        return np.empty(0, dtype=index.dtype)
    try:
        return np.memmap(path, dtype=index.dtype, mode="r", shape=(count,))
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: make it readable") from error


def index_bytes(dtype: Any, lengths: Any, documents: int) -> Iterator[bytes]:
    """The content of a .idx file, in pieces of bounded size.

    `lengths()` gives a fresh iterator over int32 arrays, in order; it is called twice, so that the
    lengths of 1e9 documents never have to be in memory at once.
    """
    code = next(code for code, known in _CODES.items() if np.dtype(known) == np.dtype(dtype))
    yield HEADER + struct.pack("<QBQQ", 1, code, documents, documents + 1)
    for chunk in lengths():
        yield np.ascontiguousarray(chunk, dtype=np.int32).tobytes()
    size, start = np.dtype(dtype).itemsize, 0
    for chunk in lengths():
        ends = np.cumsum(chunk, dtype=np.int64)
        ends *= size
        ends += start
        yield (ends - chunk.astype(np.int64) * size).tobytes()
        start = int(ends[-1]) if len(ends) else start
    for first in range(0, documents + 1, CHUNK):
        yield np.arange(first, min(first + CHUNK, documents + 1), dtype=np.int64).tobytes()


def write_index(stream: BinaryIO, dtype: Any, lengths: np.ndarray | Iterable[np.ndarray]) -> None:
    """Write a .idx for documents of these lengths (tokens), one sequence a document."""
    chunks = [lengths] if isinstance(lengths, np.ndarray) else list(lengths)
    for piece in index_bytes(dtype, lambda: iter(chunks), sum(len(chunk) for chunk in chunks)):
        stream.write(piece)
