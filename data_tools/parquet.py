"""Rows of a Parquet file as documents.

    for line, document in read_rows(source, ("text",), max_line_bytes): ...

Line numbers are row numbers from 1; the offset is 0, rows have none. A row's size is that of its
text, in bytes of UTF-8. Needs pyarrow (extra `data`).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from data_tools.corpus import LARGEST_WINDOW, Source, slice_of_document
from data_tools.documents import EMPTY, NO_TEXT, NOT_UTF8, TOO_LONG, WRONG_TYPE, Document
from data_tools.errors import Failure, UserError
from data_tools.lines import Line
from data_tools.parquet_pages import largest_pages

_ROWS = 16  # decoded at once, or as many as hold about so many bytes of text:
_BYTES = 8 << 20
_DECODED = 1 << 20  # bytes of text at once
_SLICE = ("red_pajama_subset", "meta.redpajama_set_name", "meta.source")


def read_rows(
    source: Source, text_keys: tuple[str, ...], max_line_bytes: int
) -> Iterator[tuple[Line, Document]]:
    """Every row, with its document or the reason why it gives none. The first of `text_keys` that
    is a column counts.

    Raises `UserError` for a file whose pages need more than `source.window_bytes` of memory, before
    any row is read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{source.path} is Parquet, which needs pyarrow: pip install 'megatron-ext[data]'"
        ) from error
    try:
        # By default the whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(
            source.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        ) as file:
            names = set(file.schema_arrow.names)
            key = next((key for key in text_keys if key in names), "")
            columns = [key, *_SLICE]
            pages = largest_pages(source.path, columns)
            if pages.memory > source.window_bytes < LARGEST_WINDOW:
                raise _too_wide(source, pages.memory)
            # A dictionary may give one long value to many rows.
            rows = max(1, min(_ROWS, _BYTES // max(1, pages.decoded)))
            number = 0
            for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                pyarrow.default_memory_pool().release_unused()  # what decoding took
                for i in range(batch.num_rows):
                    number += 1
                    yield _row(batch, i, number, key, max_line_bytes)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Failure(f"{source.path} is truncated or corrupt: {error}") from error


def _row(batch: Any, i: int, number: int, key: str, max_line_bytes: int) -> tuple[Line, Document]:
    text: Any = batch.column(key)[i] if key else None
    while hasattr(text, "value"):  # of a dictionary, or of an extension as JSON's
        text = text.value
    buffer = text.as_buffer() if hasattr(text, "as_buffer") else None
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
        len(decoder.decode(text[at : at + _DECODED], at + _DECODED >= len(text)))
        for at in range(0, len(text), _DECODED)
    )


def _too_wide(source: Source, memory: int) -> UserError:
    return UserError(
        f"{source.path} has pages that need {memory:,} bytes of memory to be read, more than "
        f"--max-window-bytes {source.window_bytes}: write {min(memory, LARGEST_WINDOW)}, or write "
        "the file again with smaller pages (pyarrow: write_batch_size, use_dictionary=False)"
    )
