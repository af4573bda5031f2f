"""Rows of a Parquet file as documents.

    for line, document in read_rows(source, ("text",), max_line_bytes): ...

Line numbers are row numbers from 1, in what was asked for; the offset is 0, rows have none. A
row's size is that of its text, in bytes of UTF-8. Needs pyarrow (extra `data`).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from data_tools.corpus import LARGEST_WINDOW, SUBSET, Source, slice_of_document
from data_tools.documents import EMPTY, NO_TEXT, NOT_UTF8, TOO_LONG, WRONG_TYPE, Document
from data_tools.errors import Failure, UserError
from data_tools.lines import Line
from data_tools.parquet_pages import largest_pages, metadata_bytes, row_groups

_SMALLER_PAGES = "smaller pages (pyarrow: write_batch_size, use_dictionary=False)"
_MOST_ROWS = 16  # decoded at once, or as many as hold about so many bytes of text:
_MOST_BYTES = 8 << 20
_STEP = 1 << 20  # bytes of text at once
_OF_METADATA = 10  # times its size: the memory that reading it takes
_SLICE = (SUBSET, "meta.redpajama_set_name", "meta.source")


def read_rows(
    source: Source,
    text_keys: tuple[str, ...],
    max_line_bytes: int,
    start: int = 0,
    end: int | None = None,
) -> Iterator[tuple[Line, Document]]:
    """Every row of the row groups that begin in bytes [start, end) of the file, with its document
    or the reason why it gives none. The first of `text_keys` that is a column counts.

    Raises `UserError` where the file's metadata, or the pages of those row groups, need more than
    `source.window_bytes` of memory, before any row is read, and `Failure` for a damaged file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{source.path} is Parquet, which needs pyarrow: pip install 'megatron-ext[data]'"
        ) from error
    end = source.size if end is None else end
    try:
        held = _OF_METADATA * metadata_bytes(source.path)
        _check_held(source, "metadata", held, "fewer row groups")
        groups = enumerate(row_groups(source.path, (*text_keys, *_SLICE)))
        chosen = {i: group for i, group in groups if start <= group.begin < end}
        if not chosen and start > 0:  # of a long row group, say
            return
        # By default the whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(
            source.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        ) as file:
            schema = file.schema_arrow
            key = next((key for key in text_keys if key in schema.names), None)
            columns = [name for name in (key, *_SLICE) if name and _is_text(schema, name)]
            if schema.names.count(key) > 1:
                raise UserError(
                    f"{source.path} has several columns named {key}: write the file again with "
                    "one, or name another --text-key"
                )
            pages = largest_pages(source.path, list(chosen.values()), columns)
            _check_held(source, "metadata and pages", held + pages.held, _SMALLER_PAGES)
            # A dictionary may give one long value to many rows.
            at_once = max(1, min(_MOST_ROWS, _MOST_BYTES // max(1, pages.largest)))
            number = taken = 0
            for batch in file.iter_batches(at_once, list(chosen), columns, use_threads=False):
                taken += batch.nbytes
                if taken >= _MOST_BYTES:  # what decoding needed besides goes back now and then
                    pyarrow.default_memory_pool().release_unused()
                    taken = 0
                for i in range(batch.num_rows):
                    number += 1
                    yield _row(batch, i, number, key, max_line_bytes)
            if number != (rows := sum(group.rows for group in chosen.values())):
                raise ValueError(f"{number:,} rows can be read of {rows:,}")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Failure(f"{source.path} is truncated or corrupt: {error}") from error


def rows_before(source: Source, start: int) -> int:
    """How many rows there are in the row groups that begin before a byte of the file."""
    return sum(group.rows for group in row_groups(source.path, ()) if group.begin < start)


def _is_text(schema: Any, name: str) -> bool:
    """Whether a column, or a field of a structure, holds strings. Others are not read: a list may
    hold one long value many times in a row."""
    from pyarrow import types

    type_: Any = None
    for part in name.split(".") if name in _SLICE else [name]:
        found = schema.get_all_field_indices(part) if schema is not None else []
        if len(found) != 1:
            return False
        type_ = schema.field(found[0]).type
        schema = type_ if types.is_struct(type_) else None
    while types.is_dictionary(type_):
        type_ = type_.value_type
    type_ = getattr(type_, "storage_type", type_)  # of an extension, as JSON's
    return any(
        is_text(type_)
        for is_text in (
            types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
            types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary,
        )
    )  # fmt: skip


def _row(
    batch: Any, i: int, number: int, key: str | None, max_line_bytes: int
) -> tuple[Line, Document]:
    text: Any = batch.column(key)[i] if key in batch.schema.names else None
    while hasattr(text, "value"):  # of a dictionary, or of an extension
        text = text.value
    buffer = text.as_buffer() if text is not None else None
    line = Line(number, 0, buffer.size if buffer else 0, b"")
    if buffer is None:
        return line, Document(b"", None, WRONG_TYPE if key else NO_TEXT)
    if line.size > max_line_bytes:  # is not copied
        return line, Document(b"", None, TOO_LONG)
    content = buffer.to_pybytes()
    try:
        row = {name: batch.column(name)[i].as_py() for name in batch.schema.names if name != key}
        named, characters = slice_of_document(row), _characters(content)
    except UnicodeDecodeError:
        return line, Document(b"", None, NOT_UTF8)
    return line, Document(content, named, None if content else EMPTY, characters)


def _characters(text: bytes) -> int:
    """How many there are. As a string they would take up to four times the memory of the text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return sum(
        len(decoder.decode(text[at : at + _STEP], at + _STEP >= len(text)))
        for at in range(0, len(text), _STEP)
    )


def _check_held(source: Source, what: str, held: int, smaller: str) -> None:
    if held > source.window_bytes < LARGEST_WINDOW:
        raise UserError(
            f"{source.path} needs {held:,} bytes at once for its {what}, more than "
            f"--max-window-bytes {source.window_bytes}: write {min(held, LARGEST_WINDOW)}, or "
            f"write the file again with {smaller}"
        )
