"""All documents of a source, whatever its format; what gives none is counted by reason.

    rejected = Counter()
    for line, document in read_documents(source, ("text",), rejected): ...

JSONL in every compression, Parquet, standard input; in memory that one line bounds. `tokenize` has
a reader of its own, which shares files out to workers and lists every rejected line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from data_tools.corpus import Source
from data_tools.documents import TOO_LONG, Document, parse_line
from data_tools.lines import MAX_LINE_BYTES, Line, read_lines
from data_tools.parquet import read_rows


def read_documents(
    source: Source, text_keys: tuple[str, ...], rejected: Counter[str]
) -> Iterator[tuple[Line, Document]]:
    """Documents with the line (of Parquet: the row) they stand in."""
    if source.compression == "parquet":
        lines = read_rows(source, text_keys, MAX_LINE_BYTES)
    else:
        lines = read_lines(source)
    for line in lines:
        if line.size > MAX_LINE_BYTES:
            rejected[TOO_LONG] += 1
            continue
        document = parse_line(line.data, text_keys)
        if document.reason is None:
            yield line, document
        else:
            rejected[document.reason] += 1


def rejected_words(rejected: dict[str, int]) -> str:
    """As the end of a printed line: ", 3 lines passed over (2 not JSON, 1 empty text)"."""
    if not rejected:
        return ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
    return f", {sum(rejected.values()):,} lines passed over ({reasons})"
