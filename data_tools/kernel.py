# mypy: disable-error-code="call-arg,attr-defined,var-annotated"
"""The fast path: text to exact BPE ids, a unit at a time, with a cache; compiled by Numba.

    encoder = Kernel(tables)                       # tables: tables.build_tables
    ids, lengths = encoder.encode(buffer, ends)    # many documents in one buffer of UTF-8

A unit is the text between two exact cuts (see tables), mostly one word with its space.
Units of up to 32 bytes are looked up in a direct-mapped cache whose line holds the key and the
ids (one 64-byte line of the processor's cache); others, and misses, are merged pair by pair, text
without cuts a window at a time.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from data_tools.compiled import compiled, load8, load64, store64
from data_tools.tables import FREE, MULTIPLIER, Tables

PAD = 32  # readable bytes after the text: keys are loaded eight bytes at a time
KEY_BYTES = 32
# A cache line, 64 bytes: 4 words of key, 1 of sizes, 3 of ids (12 of 16 bits or 6 of 32).
SHORT = 48  # characters; longer units keep their pairs in a heap
WINDOW = 1 << 16  # bytes of a unit that are merged at once: 40 bytes of memory each
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)

_M1, _M2, _M3 = (np.uint64(c) for c in (0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB))


@compiled(inline="always")
def _find_pair(keys, values, shift, left, right):
    """rank << 32 | merged symbol of a pair, or FREE when the pair does not merge."""
    if left < 0 or right < 0:
        return FREE
    key = (np.uint64(left) << np.uint64(32)) | np.uint64(right)
    slot = np.int64((key * MULTIPLIER) >> shift)
    mask = len(keys) - 1
    while True:
        found = keys[slot]
        if found == key:
            return values[slot]
        if found == FREE:
            return FREE
        slot = (slot + 1) & mask


@compiled
def _symbols_of(text, start, end, characters, symbols, widths):
    """The unit's characters as symbols and their widths in bytes; returns how many."""
    count, i = 0, start
    while i < end:
        b = np.int64(text[i])
        if b < 0x80:
            code, width = b, 1
        elif b < 0xE0:
            code, width = (b & 0x1F) << 6 | np.int64(text[i + 1]) & 0x3F, 2
        elif b < 0xF0:
            code = (
                (b & 0xF) << 12 | (np.int64(text[i + 1]) & 0x3F) << 6 | np.int64(text[i + 2]) & 0x3F
            )
            width = 3
        else:
            code = (
                (b & 7) << 18
                | (np.int64(text[i + 1]) & 0x3F) << 12
                | (np.int64(text[i + 2]) & 0x3F) << 6
                | np.int64(text[i + 3]) & 0x3F
            )
            width = 4
        symbols[count] = characters[code]
        widths[count] = width
        count += 1
        i += width
    return count


@compiled
def _merge_short(symbols, widths, count, keys, values, shift, ranks):
    """Merge in place by scanning for the best pair; quickest for a word. Returns how many are
    left.
    """
    for i in range(count - 1):
        ranks[i] = _find_pair(keys, values, shift, symbols[i], symbols[i + 1])
    while count > 1:
        best, at = FREE, 0
        for i in range(count - 1):
            # Equal ranks come with their symbols in the low half: compare ranks only.
            if (ranks[i] >> np.uint64(32)) < (best >> np.uint64(32)):
                best, at = ranks[i], i
        if best == FREE:
            break
        symbols[at] = np.int32(best & np.uint64(0xFFFFFFFF))
        widths[at] += widths[at + 1]
        count -= 1
        for i in range(at + 1, count):
            symbols[i], widths[i] = symbols[i + 1], widths[i + 1]
        for i in range(at + 1, count - 1):
            ranks[i] = ranks[i + 1]
        if at > 0:
            ranks[at - 1] = _find_pair(keys, values, shift, symbols[at - 1], symbols[at])
        if at < count - 1:
            ranks[at] = _find_pair(keys, values, shift, symbols[at], symbols[at + 1])
    return count


@compiled
def _sift(heap, size, key, down_from):
    """Place `key` at `down_from` or below it."""
    at = down_from
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = key


@compiled
def _merge_long(symbols, widths, count, keys, values, shift):
    """The same merges with a heap of rank << 32 | position, O(n log n); for units without cuts."""
    following = np.arange(1, count + 1, dtype=np.int32)
    previous = np.arange(-1, count - 1, dtype=np.int32)
    ranks = np.full(count, np.int32(-1))  # of the pair that begins here; -1: none
    heap = np.empty(count + 64, dtype=np.int64)
    size = 0
    for i in range(count - 1):
        found = _find_pair(keys, values, shift, symbols[i], symbols[i + 1])
        if found != FREE:
            ranks[i] = np.int32(found >> np.uint64(32))
            heap[size] = np.int64(found >> np.uint64(32)) << 32 | i
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        _sift(heap, size, heap[i], i)
    while size > 0:
        top = heap[0]
        size -= 1
        if size > 0:
            _sift(heap, size, heap[size], 0)
        at, rank = top & 0xFFFFFFFF, np.int32(top >> 32)
        if ranks[at] != rank:
            continue  # the pair is gone or another one now
        right = following[at]
        found = _find_pair(keys, values, shift, symbols[at], symbols[right])
        symbols[at] = np.int32(found & np.uint64(0xFFFFFFFF))
        widths[at] += widths[right]
        symbols[right] = -2
        ranks[right] = -1
        following[at] = following[right]
        if following[at] < count:
            previous[following[at]] = at
        for left in (previous[at], np.int32(at)):
            if left < 0:
                continue
            ranks[left] = -1
            if following[left] >= count:
                continue
            found = _find_pair(keys, values, shift, symbols[left], symbols[following[left]])
            if found == FREE:
                continue
            ranks[left] = np.int32(found >> np.uint64(32))
            if size == len(heap):
                grown = np.empty(size + size // 2, dtype=np.int64)
                grown[:size] = heap
                heap = grown
            key = np.int64(found >> np.uint64(32)) << 32 | np.int64(left)
            child = size
            size += 1
            while child > 0 and heap[(child - 1) // 2] > key:
                heap[child] = heap[(child - 1) // 2]
                child = (child - 1) // 2
            heap[child] = key
    kept = 0
    for i in range(count):
        if symbols[i] != -2:
            symbols[kept], widths[kept] = symbols[i], widths[i]
            kept += 1
    return kept


@compiled
def _merge(text, start, end, tables, symbols, widths, ranks):
    """The symbols of text[start:end] after all merges and their widths in bytes; returns how many.

    `symbols` and `widths` have end - start places, or more.
    """
    characters, keys, values, shift = tables[:4]
    count = _symbols_of(text, start, end, characters, symbols, widths)
    if count <= SHORT:
        return _merge_short(symbols, widths, count, keys, values, shift, ranks)
    return _merge_long(symbols, widths, count, keys, values, shift)


@compiled
def _write(text, start, tables, symbols, widths, count, out, at):
    """Ids of the first `count` symbols to out[at:]; returns the ends in text and in out."""
    vocab_size, byte_ids = tables[4:]
    for i in range(count):
        symbol, end = symbols[i], start + widths[i]
        if 0 <= symbol < vocab_size:
            out[at] = symbol
            at += 1
        else:  # a character that is no piece: byte fallback
            for k in range(start, end):
                out[at] = byte_ids[text[k]]
                at += 1
        start = end
    return start, at


@compiled
def _encode_windows(text, start, end, window, tables, out, at, symbols, widths, ranks):
    """As `_encode_unit`, with memory for `window` bytes only; -1 where that is not enough.

    Merges go by rank, then by place. Two symbols that stay apart when their text is merged alone
    stay apart in any text, unless something is merged over their outer ends; so where all
    neighbours do, no merge over a border can be the first. A window is merged, and its last eighth,
    which may depend on what follows, is dropped: the next window begins there. The ids are exact
    when the two symbols at each such border stay apart.
    """
    pair_symbols, pair_widths = np.empty(window, np.int32), np.empty(window, np.int32)
    position, before = start, start  # where the next and the last written symbol begin
    while True:
        stop = min(position + window, end)
        while stop < end and text[stop] & 0xC0 == 0x80:  # within a character
            stop -= 1
        count = _merge(text, position, stop, tables, symbols, widths, ranks)
        kept = count if stop == end else count - 1 - count // 8
        if kept < 1:
            return -1
        if position > start:
            then = position + widths[0]
            if then - before > window:
                return -1
            parts = _merge(text, before, then, tables, pair_symbols, pair_widths, ranks)
            if parts != 2 or pair_widths[0] != position - before:
                return -1
        position, at = _write(text, position, tables, symbols, widths, kept, out, at)
        if stop == end:
            return at
        before = position - widths[kept - 1]


@compiled
def _encode_unit(text, start, end, window, tables, out, at, symbols, widths, ranks):
    """Write the ids of text[start:end] to out[at:]; returns the next free place.

    `symbols` and `widths` have `window` places.
    """
    while end - start > window:
        then = _encode_windows(text, start, end, window, tables, out, at, symbols, widths, ranks)
        if then >= 0:
            return then
        window *= 2
        symbols, widths = np.empty(window, np.int32), np.empty(window, np.int32)
    count = _merge(text, start, end, tables, symbols, widths, ranks)
    return _write(text, start, tables, symbols, widths, count, out, at)[1]


@compiled
def _encode(text, ends, cuts, singles, window, tables, cache, packed, before, after, out, lengths):
    """All documents of `text`; `before` and `after` are ids put around each (-1: none)."""
    symbols, widths = np.empty(window, np.int32), np.empty(window, np.int32)
    ranks = np.empty(SHORT, dtype=np.uint64)
    slot_mask = np.uint64(len(cache) // 64 - 1)
    bits = np.uint64(16 if packed == 4 else 32)  # of one id in a cache line
    most = 3 * packed
    at = np.int64(0)
    position = np.int64(0)
    for document in range(len(ends)):
        first = at
        end = ends[document]
        if before >= 0:
            out[at] = before
            at += 1
        while position < end:
            start = position
            previous = load8(text, position)
            position += 1
            while position < end:
                current = load8(text, position)
                if load8(cuts, previous << 8 | current):
                    break
                previous = current
                position += 1
            size = position - start
            if size == 1:
                store64(out, at, singles[previous])
                at += 1
                continue
            if size > KEY_BYTES:
                at = _encode_unit(
                    text, start, position, window, tables, out, at, symbols, widths, ranks
                )
                continue
            k1 = k2 = k3 = np.uint64(0)
            k0 = load64(text, start)
            if size <= 8:
                k0 &= _ALL >> np.uint64(64 - 8 * size)
            else:
                k1 = load64(text, start + 8)
                if size <= 16:
                    k1 &= _ALL >> np.uint64(128 - 8 * size)
                else:
                    k2 = load64(text, start + 16)
                    if size <= 24:
                        k2 &= _ALL >> np.uint64(192 - 8 * size)
                    else:
                        k3 = load64(text, start + 24) & (_ALL >> np.uint64(256 - 8 * size))
            mixed = (k0 ^ np.uint64(size)) * MULTIPLIER + k1 * _M1 + k2 * _M2 + k3 * _M3
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _M2
            line = np.int64((mixed >> np.uint64(32)) & slot_mask) << 6  # byte offset in the cache
            head = load64(cache, line + 32)
            if (
                load64(cache, line) == k0
                and (head & np.uint64(0xFF)) == np.uint64(size)
                and (
                    size <= 8
                    or (
                        load64(cache, line + 8) == k1
                        and load64(cache, line + 16) == k2
                        and load64(cache, line + 24) == k3
                    )
                )
            ):
                # Whole words are copied: what they hold beyond the last id is overwritten next.
                store64(out, at, load64(cache, line + 40))
                count = np.int64(head >> np.uint64(8))
                if count > packed:
                    store64(out, at + packed, load64(cache, line + 48))
                    store64(out, at + 2 * packed, load64(cache, line + 56))
                at += count
                continue
            then = _encode_unit(
                text, start, position, window, tables, out, at, symbols, widths, ranks
            )
            if then - at <= most:
                store64(cache, line, k0)
                store64(cache, line + 8, k1)
                store64(cache, line + 16, k2)
                store64(cache, line + 24, k3)
                head = np.uint64(then - at) << np.uint64(8) | np.uint64(size)
                store64(cache, line + 32, head)
                for word in range(3):
                    value = np.uint64(0)
                    for i in range(packed * word, min(packed * (word + 1), then - at)):
                        value |= np.uint64(out[at + i]) << (np.uint64(i - packed * word) * bits)
                    store64(cache, line + 40 + 8 * word, value)
            at = then
        if after >= 0:
            out[at] = after
            at += 1
        lengths[document] = at - first
    return at


def _large_array(size: int) -> np.ndarray:
    """Zeros on huge pages where the system has them: random access then misses the TLB less."""
    # Private: forked workers must not share it, or they would read each other's half-written lines.
    memory = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    return array[-array.ctypes.data % (2 << 20) :][:size]


class Kernel:
    """Tables, a cache of `cache_lines` units (64 bytes each, a power of two), and the bytes of a
    longer unit that are merged at once."""

    pad = PAD

    def __init__(self, tables: Tables, cache_lines: int = 1 << 20, window: int = WINDOW) -> None:
        self.tables = tables
        small = tables.vocab_size <= 65536
        self.dtype = np.dtype(np.uint16 if small else np.int32)
        self._packed = 4 if small else 2
        self._cache = _large_array(64 * cache_lines)
        self._window = np.int64(window)
        self._cuts = tables.cuts.view(np.uint8)
        shift = np.uint64(64 - (len(tables.pair_keys).bit_length() - 1))
        self._tables = (
            tables.characters,
            tables.pair_keys,
            tables.pair_values,
            shift,
            np.int64(tables.vocab_size),
            tables.byte_ids,
        )
        # One ASCII character between two cuts, nearly half of all units in code, needs no cache.
        alone = tables.characters[:256].copy()
        fallback = (alone < 0) | (alone >= tables.vocab_size)
        self._singles = np.where(fallback, tables.byte_ids, alone).astype(np.uint64)

    def encode(
        self, text: np.ndarray, ends: np.ndarray, before: int = -1, after: int = -1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the documents that end at `ends` in `text`, and how many each has.

        text: uint8, valid UTF-8, then `PAD` bytes of anything; ends: int64 [documents], ascending.
        The prefix space and U+2581 are the caller's affair. Returns ids [tokens] of `self.dtype`
        and int32 [documents], `before` and `after` included.
        """
        out = np.empty(len(text) + 2 * len(ends) + 16, dtype=self.dtype)
        lengths = np.empty(len(ends), dtype=np.int32)
        count = _encode(
            text, ends, self._cuts, self._singles, self._window, self._tables, self._cache,
            self._packed, before, after, out, lengths,
        )  # fmt: skip
        return out[:count], lengths
