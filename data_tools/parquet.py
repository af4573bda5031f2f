"""Rows of a Parquet file as lines of JSON, so that everything after reading is the same.

    for line in read_rows(source, ("text",), max_line_bytes): ...

Line numbers are row numbers from 1; the offset is 0, rows have none. Needs pyarrow (extra `data`).
"""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from data_tools.corpus import Source
from data_tools.errors import Failure, UserError
from data_tools.lines import Line

_ROWS = 16  # decoded at once, or as many as hold about so many bytes of text:
_BYTES = 8 << 20
_USED = ("meta", "red_pajama_subset")


def read_rows(source: Source, text_keys: tuple[str, ...], max_line_bytes: int) -> Iterator[Line]:
    """One JSON line a row, with the text and the columns that name its slice."""
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
            source.path, buffer_size=1 << 20, pre_buffer=False
        ) as file:
            names = set(file.schema_arrow.names)
            columns = [name for name in (*text_keys, *_USED) if name in names]
            number = 0
            rows = _rows_at_once(file.metadata, columns)
            for batch in file.iter_batches(batch_size=rows, columns=columns):
                for row in _rows(batch):
                    number += 1
                    size = len(row)
                    yield Line(number, 0, size, row if size <= max_line_bytes else b"")
    except (pyarrow.ArrowException, OSError) as error:
        raise Failure(f"{source.path} is truncated or corrupt: {error}") from error


def _rows_at_once(metadata, columns: list[str]) -> int:
    size = sum(
        group.column(i).total_uncompressed_size
        for group in map(metadata.row_group, range(metadata.num_row_groups))
        for i in range(group.num_columns)
        if group.column(i).path_in_schema.split(".")[0] in columns
    )
    return max(1, min(_ROWS, _BYTES * metadata.num_rows // max(1, size)))


def _rows(batch) -> Iterator[bytes]:
    for i in range(batch.num_rows):
        row = {}
        try:
            for name in batch.schema.names:
                value = batch.column(name)[i].as_py()
                if isinstance(value, bytes):  # of the slice's name it may be anything
                    value = value.decode(errors="replace" if name in _USED else "strict")
                row[name] = value
            yield orjson.dumps(row, default=str)
        except UnicodeDecodeError:
            yield b"\xff"  # is rejected as invalid UTF-8, with its row
