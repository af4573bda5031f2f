"""All documents of a source, whatever its format; what gives none is counted by reason.

    rejected = Counter()
    for line, document in read_documents(source, ("text",), rejected): ...

JSONL in every compression, Parquet, standard input; in memory that one line bounds. `tokenize`
shares files out to workers (parts.py) and lists every rejected line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from data_tools.corpus import Source
from data_tools.documents import TOO_LONG, Document, parse_line
from data_tools.lines import MAX_LINE_BYTES, Line, read_lines
from data_tools.parquet import read_rows

Parse = Callable[[bytes, tuple[str, ...]], Document]  # documents.parse_line, or as good


def read_documents(
    source: Source, text_keys: tuple[str, ...], rejected: Counter[str]
) -> Iterator[tuple[Line, Document]]:
    """Documents with the line (of Parquet: the row) they stand in."""
    if source.compression == "parquet":
        found = read_rows(source, text_keys, MAX_LINE_BYTES)
    else:
        found = parse_lines(read_lines(source, MAX_LINE_BYTES), text_keys, MAX_LINE_BYTES)
    for line, document in found:
        if document.reason is None:
            yield line, document
        else:
            rejected[document.reason] += 1


def parse_lines(
    lines: Iterable[Line],
    text_keys: tuple[str, ...],
    max_line_bytes: int,
    parse: Parse = parse_line,
) -> Iterator[tuple[Line, Document]]:
    """What each line holds; the line comes without its data."""

    def parsed(line: Line) -> tuple[Line, Document]:
        if line.size > max_line_bytes:
            return line, Document(b"", None, TOO_LONG)
        return line._replace(data=b""), parse(line.data, text_keys)

    return map(parsed, lines)  # unlike a loop, it does not hold the last one


def rejected_words(rejected: dict[str, int]) -> str:
    """As the end of a printed line: ", 3 lines passed over (2 not JSON, 1 empty text)"."""
    if not rejected:
        return ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
    return f", {sum(rejected.values()):,} lines passed over ({reasons})"
