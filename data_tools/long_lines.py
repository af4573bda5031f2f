# mypy: disable-error-code="call-arg,attr-defined,var-annotated"
"""A long line of JSONL to its document, its text straight to UTF-8.

    document = parse_long_line(line, ("text",))          # what documents.parse_line gives

A Python str of a book takes up to four bytes a character, and is written and read outside the
processor's cache: a third of the time that the ids take. So the string that is most of the line is
decoded here, the rest of the line by the JSON library; whatever is not valid goes there whole.
"""

from __future__ import annotations

import numpy as np
import orjson

from data_tools.compiled import compiled, load8, load64, store64, trailing_zeros
from data_tools.corpus import SUBSET, slice_of_document
from data_tools.documents import DEFAULT_TEXT_KEYS, Document, parse_line
from data_tools.signals import held_back

LONG = 1 << 16  # bytes of a line; below that the library is as quick
# What stands for the string in the rest of the line: an integer has only one spelling.
_STAND_IN = 0xF1E2D3C4B5A69788
_STAND_IN_BYTES = b"%d" % _STAND_IN

_ESCAPES = np.full(256, -1, dtype=np.int64)
for _letter, _meant in zip(b'"\\/bfnrt', b'"\\/\b\f\n\r\t', strict=True):
    _ESCAPES[_letter] = _meant
_QUOTE, _BACKSLASH, _U = b'"\\u'
_EVERY = 0x0101010101010101  # times a byte: eight of it
_ONES, _HIGH = np.uint64(_EVERY), np.uint64(0x80 * _EVERY)
_QUOTES, _BACKSLASHES = np.uint64(_QUOTE * _EVERY), np.uint64(_BACKSLASH * _EVERY)
_SPACES = np.uint64(0x20 * _EVERY)


def parse_long_line(line: bytes, text_keys: tuple[str, ...] = DEFAULT_TEXT_KEYS) -> Document:
    """`parse_line`, several times quicker and in less memory for long lines."""
    if len(line) < LONG:
        return parse_line(line, text_keys)
    decoded = np.empty(len(line), dtype=np.uint8)
    with held_back():  # the first call loads compiled code
        start, end, size, characters = _longest(np.frombuffer(line, dtype=np.uint8), decoded)
    rest = line[:start], line[end:]
    if start >= 0 and not any(_STAND_IN_BYTES in part for part in rest):
        try:
            value = orjson.loads(_STAND_IN_BYTES.join(rest))
        except orjson.JSONDecodeError:
            value = None
        if type(value) is dict:
            key = next((key for key in text_keys if key in value), None)
            if value.get(key) == _STAND_IN and key != SUBSET:  # whose value is the slice too
                text = decoded[:size].tobytes()
                return Document(text, slice_of_document(value), None, characters)
    return parse_line(line, text_keys)


@compiled
def _longest(line, out):
    """Where the string that is more than half of the line begins and ends, with its quotes, and how
    many bytes and characters of it were written to `out` (as long as the line); -1 for no such."""
    i = 0
    while i < len(line):
        if load8(line, i) != _QUOTE:
            i += 1
            continue
        end, size, characters = _decode(line, i + 1, out)
        if end < 0:
            break
        if 2 * (end - i) > len(line):
            return i, end, size, characters
        i = end
    return -1, -1, 0, 0


@compiled
def _decode(line, start, out):
    """Decode the string that begins at `start`, after its quote, to UTF-8 in `out`; returns the
    place after its closing quote (-1: not valid JSON, or a lone surrogate), bytes, characters."""
    i, at, characters = start, 0, 0
    while i < len(line):
        if i + 8 <= len(line):
            # The lowest bit that is set tells the first byte of a quote, a backslash, below 0x20 or
            # above 0x7F: a borrow makes false ones only above a true one.
            word = load64(line, i)
            quotes, backslashes = word ^ _QUOTES, word ^ _BACKSLASHES
            special = (quotes - _ONES) & ~quotes | (backslashes - _ONES) & ~backslashes
            special = (special | (word - _SPACES) & ~word | word) & _HIGH
            store64(out, at, word)  # what is written beyond the plain bytes is overwritten next
            plain = 8 if special == 0 else trailing_zeros(special) >> 3
            i, at, characters = i + plain, at + plain, characters + plain
            if plain == 8:
                continue
        byte = load8(line, i)
        if byte == _QUOTE:
            return i + 1, at, characters
        if byte == _BACKSLASH:
            i, code = _escaped(line, i)
        elif byte >= 0x80:
            i, code = _character(line, i)
        else:
            i, code = i + 1, byte if byte >= 0x20 else -1
        if code < 0:
            break
        at = _put(out, at, code)
        characters += 1
    return -1, 0, 0


@compiled
def _escaped(line, i):
    """The place after the escape at `i`, and its code point; -1 where there is none."""
    if i + 1 >= len(line):
        return i, -1
    if line[i + 1] != _U:
        return i + 2, _ESCAPES[line[i + 1]]
    code, i = _hexadecimal(line, i + 2), i + 6
    if code & 0xFC00 != 0xD800:
        return i, -1 if code & 0xFC00 == 0xDC00 else code
    if i + 1 >= len(line) or line[i] != _BACKSLASH or line[i + 1] != _U:
        return i, -1
    low, i = _hexadecimal(line, i + 2), i + 6
    return i, 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF) if low & 0xFC00 == 0xDC00 else -1


@compiled
def _hexadecimal(line, i):
    """The number of four digits at `i`; -1 where they are not that."""
    if i + 4 > len(line):
        return -1
    value = 0
    for k in range(i, i + 4):
        digit = np.int64(line[k])
        if 48 <= digit <= 57:
            value = value << 4 | digit - 48
        elif 97 <= digit | 32 <= 102:
            value = value << 4 | (digit | 32) - 87
        else:
            return -1
    return value


@compiled
def _character(line, i):
    """The place after the character of UTF-8 at `i`, not ASCII, and its code point; -1 for none."""
    first = np.int64(line[i])
    width = 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    if i + width > len(line) or first < 0xC2:
        return i, -1
    code = first & 0xFF >> width + 1
    for k in range(i + 1, i + width):
        if line[k] & 0xC0 != 0x80:
            return i, -1
        code = code << 6 | np.int64(line[k]) & 0x3F
    shortest = 0x80 if width == 2 else 0x800 if width == 3 else 0x10000
    if first > 0xF4 or code < shortest or code > 0x10FFFF or code & 0x1FF800 == 0xD800:
        return i, -1
    return i + width, code


@compiled
def _put(out, at, code):
    """Write a code point as UTF-8 to out[at:]; returns the next free place."""
    if code < 0x80:
        out[at] = code
        return at + 1
    width = 2 if code < 0x800 else 3 if code < 0x10000 else 4
    for k in range(width - 1, 0, -1):
        out[at + k] = 0x80 | code & 0x3F
        code >>= 6
    out[at] = 0xF00 >> width & 0xFF | code
    return at + width
