"""One line of JSONL to one document, or the reason why not.

    document = parse_line(b'{"text": "hello", "meta": {}}', ("text", "raw_content"))
    document.text, document.slice                      # or: document.reason

Never raises on any bytes. A line is good when Python's own json module reads it as an object
whose text is encodable: orjson is tried first because it is quicker and stricter (NaN in `meta`).
"""

from __future__ import annotations

import json
from typing import NamedTuple

import orjson

from data_tools.corpus import slice_of_document

# Why a line gives no document. The first two hold no text, so nothing is lost with them.
BLANK = "blank line"
EMPTY = "empty text"
NOT_UTF8 = "invalid UTF-8"
NOT_JSON = "not JSON"
NOT_OBJECT = "not a JSON object"
NO_TEXT = "no text key"
WRONG_TYPE = "text is not a string"
SURROGATE = "lone surrogate in text"
TOO_LONG = "line too long"
TOO_SHORT = "fewer than --min-tokens tokens"
UNCUT = "more than --max-uncut-bytes in one piece"
HARMLESS = frozenset({BLANK, EMPTY, TOO_SHORT})

DEFAULT_TEXT_KEYS = ("text", "raw_content")  # RedPajama v1, v2
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """`text` in UTF-8 (b"" when rejected), the slice it names itself, the reason of a rejection,
    and its length in characters."""

    text: bytes
    slice: str | None = None
    reason: str | None = None
    characters: int = 0


def parse_line(line: bytes, text_keys: tuple[str, ...] = DEFAULT_TEXT_KEYS) -> Document:
    """A document, or the reason of its rejection; the first of `text_keys` that is present
    counts.
    """
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = _parse_leniently(line)
        if isinstance(value, Document):
            return value
    if type(value) is not dict:
        return Document(b"", None, NOT_OBJECT)
    for key in text_keys:
        if key in value:
            text = value[key]
            break
    else:
        return Document(b"", None, NO_TEXT)
    if type(text) is not str:
        return Document(b"", None, WRONG_TYPE)
    if not text:
        return Document(b"", slice_of_document(value), EMPTY)
    try:
        return Document(text.encode(), slice_of_document(value), None, len(text))
    except UnicodeEncodeError:
        return Document(b"", None, SURROGATE)


def _parse_leniently(line: bytes) -> object:
    line = line.removeprefix(_BOM)
    if not line.strip():
        return Document(b"", None, BLANK)
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Document(b"", None, NOT_UTF8)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return Document(b"", None, NOT_JSON)
