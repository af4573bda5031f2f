"""What reading a Parquet file takes of memory, from the headers of its pages: none is decompressed.

    pages = largest_pages(path, metadata, ("text", "meta.source"))
    pages.memory, pages.decoded        # bytes

A page is decompressed whole, and writers bound it in rows, not in bytes: one of pyarrow's holds
1,024 of them, however long. The metadata at the end of a file tells only the sum of a column's
pages, so the header before each page is read (Apache Parquet format, parquet.thrift: PageHeader,
in Thrift's compact protocol).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

_HEADER_BYTES = (1 << 10, 16 << 20)  # of nearly all; of one that holds long statistics
# Fields of PageHeader.
_TYPE, _DECODED, _STORED, _DICTIONARY_HEADER = 1, 2, 3, 7
_DICTIONARY_PAGE = 2
_ENTRY_BYTES = 16  # of an entry's address and length, as pyarrow keeps a dictionary

# Types of Thrift's compact protocol; 0 ends a structure.
_WIDTHS = {1: 0, 2: 0, 3: 1, 7: 8}  # true, false (the type is the value), a byte, a double
_INTEGERS, _BINARY, _STRUCT = (4, 5, 6), 8, 12


class Pages(NamedTuple):
    """`memory`: the most bytes that the pages of one row group take at a time, in all columns;
    `decoded`: bytes of the largest page, which no value exceeds."""

    memory: int
    decoded: int


def largest_pages(path: str, metadata: Any, columns: Sequence[str]) -> Pages:
    """Of a file with this metadata (pyarrow's), if these columns are read, which may be fields of
    structures ("meta.source"). Raises `ValueError` where a header is damaged."""
    memory = decoded = 0
    with open(path, "rb", buffering=0) as stream:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            together = 0
            for chunk in map(group.column, range(group.num_columns)):
                name = chunk.path_in_schema
                if any(name == column or name.startswith(f"{column}.") for column in columns):
                    dictionary = page = 0
                    for header in _headers(stream, chunk):
                        size = header[_DECODED]
                        decoded = max(decoded, size)
                        page = max(page, header[_STORED], size)
                        if header[_TYPE] == _DICTIONARY_PAGE:  # a copy of it is kept
                            entries = header.get(_DICTIONARY_HEADER, {}).get(1, 0)
                            dictionary = size + _ENTRY_BYTES * entries
                    together += dictionary + page
            memory = max(memory, together)
    return Pages(memory, decoded)


def _headers(stream: BinaryIO, chunk: Any) -> Iterator[dict[int, Any]]:
    """The page headers of a column chunk."""
    at = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    end = at + chunk.total_compressed_size
    while at < end and chunk.num_values:  # of none, the offsets may be anything
        header, size = _header(stream, at)
        if not {_TYPE, _DECODED, _STORED} <= header.keys() or header[_STORED] < 0:
            raise ValueError(f"no page begins at byte {at:,}")
        yield header
        at += size + header[_STORED]


def _header(stream: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """The header at a byte of the file, and its size in bytes."""
    for most in _HEADER_BYTES:
        stream.seek(at)
        try:
            return _struct(stream.read(most), 0)
        except (IndexError, RecursionError):  # it goes on behind what was read, or is none
            continue
    raise ValueError(f"no page header ends before byte {at + most:,}")


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Integers and structures by their field's number, and where the structure ends."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _integer(data, at)
        kind &= 15
        if kind in _INTEGERS:
            fields[number], at = _integer(data, at)
        elif kind == _STRUCT:
            fields[number], at = _struct(data, at)
        elif kind == _BINARY:
            size, at = _unsigned(data, at)
            at += size
        elif kind in _WIDTHS:
            at += _WIDTHS[kind]
        else:
            raise ValueError(f"a page header holds a field of type {kind}")
    return fields, at + 1


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a page header holds a number of more than 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """Zigzag: 0, -1, 1, -2, ... are 0, 1, 2, 3, ..."""
    value, at = _unsigned(data, at)
    return value >> 1 ^ -(value & 1), at
