"""Where the row groups of a Parquet file lie, and what reading them takes of memory, from the
headers of their pages: none is decompressed.

    groups = row_groups(path, ("text", "meta"))
    pages = largest_pages(path, groups, ("text", "meta.source"))
    pages.held, pages.largest          # bytes

A page is decompressed whole, and writers bound it in rows, not in bytes: one of pyarrow's holds
1,024 of them, however long. The metadata at the end of a file tells only the sum of a column's
pages, so the header before each page is read (Apache Parquet format, parquet.thrift, in Thrift's
compact protocol). The metadata is read here too: pyarrow ends the process where that of a column is
damaged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

_HEADER_BYTES = (1 << 10, 1 << 14, 1 << 18, 16 << 20)  # tried in turn: statistics can be long
# Fields by their numbers: FileMetaData, RowGroup, ColumnChunk, ColumnMetaData,
_ROWS, _ROW_GROUPS, _CHUNKS, _METADATA = 3, 4, 1, 3  # rows: of the file, and of a group
_PATH, _VALUES, _CHUNK_BYTES, _FIRST_PAGE, _FIRST_DICTIONARY = 3, 5, 7, 9, 11
# PageHeader, DictionaryPageHeader.
_TYPE, _DECODED, _STORED, _DICTIONARY_HEADER, _ENTRIES = 1, 2, 3, 7, 1
_DICTIONARY_PAGE = 2  # a type
_ENTRY_BYTES = 16  # of an entry's address and length, as pyarrow keeps a dictionary
# Types of Thrift's compact protocol; 0 ends a structure.
_BOOLEANS, _INTEGERS, _BINARY, _LISTS, _STRUCT = (1, 2), (4, 5, 6), 8, (9, 10), 12
_WIDTHS = {1: 1, 2: 1, 3: 1, 7: 8}  # in bytes: booleans in a list, a byte, a double

_Struct = dict[int, Any]
# The fields of a structure to keep, and those of the structures in them.
_Wanted = dict[int, "_Wanted"]
_OF_CHUNK: _Wanted = {
    number: {} for number in (_PATH, _VALUES, _CHUNK_BYTES, _FIRST_PAGE, _FIRST_DICTIONARY)
}
_OF_FILE: _Wanted = {_ROWS: {}, _ROW_GROUPS: {_CHUNKS: {_METADATA: _OF_CHUNK}, _ROWS: {}}}
_OF_PAGE: _Wanted = {_TYPE: {}, _DECODED: {}, _STORED: {}, _DICTIONARY_HEADER: {_ENTRIES: {}}}


class Chunk(NamedTuple):
    """A column of a row group: its name ("meta.source"), how many values, first byte and bytes."""

    column: str
    values: int
    begin: int
    size: int


class RowGroup(NamedTuple):
    """`begin`: its first byte, or that of a group before it where that is later, so that ranges of
    bytes hold row groups in their order. `chunks`: of the columns that were asked for."""

    begin: int
    rows: int
    chunks: list[Chunk]


class Pages(NamedTuple):
    """`held`: the most bytes that the pages of a row group take while its rows are read, one of
    each column and its dictionary (while a page is decoded, it comes on top as it is stored);
    `largest`: bytes of the largest page, which no value exceeds."""

    held: int
    largest: int


def row_groups(path: str, columns: tuple[str, ...]) -> list[RowGroup]:
    """Of a file, in order; `columns` may be structures, or their fields ("meta.source"). Raises
    `ValueError` where its metadata is damaged."""
    stat = os.stat(path)
    return _row_groups(path, stat.st_size, stat.st_mtime_ns, columns)


@lru_cache(maxsize=2)  # a worker gets many parts of one file, and may count rows too
def _row_groups(path: str, size: int, mtime_ns: int, columns: tuple[str, ...]) -> list[RowGroup]:
    with _damage_told(), open(path, "rb", buffering=0) as stream:
        begin, end = _metadata_place(stream)
        stream.seek(begin)
        metadata, _ = _read_struct(stream.read(end - begin), 0, _OF_FILE)
        return _groups_of(metadata, size, columns)


def metadata_bytes(path: str) -> int:
    """Of a file, as its last bytes say."""
    with open(path, "rb", buffering=0) as stream:
        begin, end = _metadata_place(stream)
        return end - begin


def _metadata_place(stream: BinaryIO) -> tuple[int, int]:
    end = stream.seek(-8, os.SEEK_END)
    begin = end - int.from_bytes(stream.read(4), "little")
    if begin < 0:
        raise ValueError("its metadata begins before the file does")
    return begin, end


def _groups_of(metadata: _Struct, size: int, columns: tuple[str, ...]) -> list[RowGroup]:
    groups: list[RowGroup] = []
    begin = 0
    for group in metadata[_ROW_GROUPS]:
        chunks = [_chunk(chunk[_METADATA]) for chunk in group[_CHUNKS]]
        # Without values, offsets may be anything.
        begin = max(begin, min((c.begin for c in chunks if c.values), default=begin))
        if begin >= size:
            raise ValueError(f"a row group begins at byte {begin:,}, behind the file's end")
        if group[_ROWS] < 0:
            raise ValueError(f"a row group has {group[_ROWS]:,} rows")
        groups.append(RowGroup(begin, group[_ROWS], [c for c in chunks if _is_of(c, columns)]))
    if (rows := sum(group.rows for group in groups)) != metadata[_ROWS]:
        raise ValueError(f"its row groups have {rows:,} rows and not {metadata[_ROWS]:,}")
    return groups


def _chunk(metadata: _Struct) -> Chunk:
    first = metadata[_FIRST_PAGE]
    return Chunk(
        b".".join(metadata[_PATH]).decode(errors="replace"),
        metadata[_VALUES],
        min(first, metadata.get(_FIRST_DICTIONARY) or first),
        metadata[_CHUNK_BYTES],
    )


def largest_pages(path: str, groups: Sequence[RowGroup], columns: Sequence[str]) -> Pages:
    """Of these row groups, if these columns are read, which may be fields of structures
    ("meta.source"). Raises `ValueError` where headers are damaged."""
    with _damage_told(), open(path, "rb", buffering=0) as stream:
        pages = [_of_group(stream, group, columns) for group in groups]
    return Pages(*map(max, zip(Pages(0, 0), *pages, strict=True)))


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError("its metadata, or the header of a page, cannot be read") from error


def _of_group(stream: BinaryIO, group: RowGroup, columns: Sequence[str]) -> Pages:
    held = largest = 0
    for chunk in group.chunks:
        if _is_of(chunk, columns):
            dictionary = page = 0
            for header in _headers(stream, chunk):
                page = max(page, header[_STORED], header[_DECODED])
                largest = max(largest, header[_DECODED])
                if header[_TYPE] == _DICTIONARY_PAGE:  # a copy of it is kept
                    entries = header[_DICTIONARY_HEADER][_ENTRIES]
                    dictionary = header[_DECODED] + _ENTRY_BYTES * entries
            held += dictionary + page
    return Pages(held, largest)


def _is_of(chunk: Chunk, columns: Sequence[str]) -> bool:
    return any(f"{chunk.column}.".startswith(f"{column}.") for column in columns)


def _headers(stream: BinaryIO, chunk: Chunk) -> Iterator[_Struct]:
    """The page headers of a column chunk."""
    if not chunk.values:
        return
    at, end = chunk.begin, chunk.begin + chunk.size
    while at < end:
        header, size = _header(stream, at)
        if header[_STORED] < 0:
            raise ValueError(f"no page begins at byte {at:,}")
        yield header
        at += size + header[_STORED]


def _header(stream: BinaryIO, at: int) -> tuple[_Struct, int]:
    """The header at a byte of the file, and its size in bytes."""
    for most in _HEADER_BYTES:
        stream.seek(at)
        try:
            return _read_struct(stream.read(most), 0, _OF_PAGE)
        except IndexError:  # it goes on behind what was read, or is none
            continue
    raise ValueError(f"no page header ends before byte {at + most:,}")


def _read_struct(data: bytes, at: int, wanted: _Wanted) -> tuple[_Struct, int]:
    """Fields of the structure at `at` by their numbers, and where it ends; IndexError where it
    goes on behind the data."""
    fields: _Struct = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _read_integer(data, at)
        kind = head & 15
        if kind not in _BOOLEANS:  # in a structure, their type is the value
            value, at = _read(data, at, kind, wanted.get(number, {}))
            if number in wanted:
                fields[number] = value
    return fields, at + 1


def _read(data: bytes, at: int, kind: int, wanted: _Wanted) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _read_integer(data, at)
    if kind == _BINARY:
        size, at = _read_unsigned(data, at)
        if at + size > len(data):
            raise IndexError
        return data[at : at + size], at + size
    if kind == _STRUCT:
        return _read_struct(data, at, wanted)
    if kind in _LISTS:
        size, kind = data[at] >> 4, data[at] & 15
        at += 1
        if size == 15:
            size, at = _read_unsigned(data, at)
        values = []
        for _ in range(size):
            value, at = _read(data, at, kind, wanted)
            values.append(value)
        return values, at
    if kind in _WIDTHS:
        end = at + _WIDTHS[kind]
        return data[end - 1], end  # of no interest
    raise ValueError(f"a page header or the metadata holds a field of type {kind}")


def _read_unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a page header or the metadata holds a number of more than 64 bits")


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    """Zigzag: 0, -1, 1, -2, ... are 0, 1, 2, 3, ..."""
    value, at = _read_unsigned(data, at)
    return value >> 1 ^ -(value & 1), at
