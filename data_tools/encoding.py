"""Many documents to exact token ids: by the compiled kernel where proved, else by the library.

    encoder = make_encoder(tokenizer)
    ids, lengths = encoder.encode([b"text", ...], before=-1, after=eod)
    encoder.note             # "" or why the fast path is not used, and what to do about it

The kernel is used only for vocabularies whose cuts are exact (tables.py), after it gave the ids of
the library on `probe_texts`; afterwards `audit` compares a sample of the real documents.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash

from data_tools.errors import Failure
from data_tools.signals import held_back
from data_tools.space_marks import PREFIX_ALWAYS, PREFIX_NEVER, Unsuitable
from data_tools.tables import load_tables
from data_tools.tokenizer import Tokenizer

AUDIT_EVERY = (
    4096  # documents; and only those of at most AUDIT_BYTES, or the library would take over
)
AUDIT_BYTES = 32 << 10
_MARK = re.compile("\u2581".encode())  # searched in half the time of bytes.find


class Encoder(Protocol):
    """Texts are UTF-8 and not empty; `before` and `after` are ids put around each (-1: none)."""

    note: str
    batch_bytes: int  # of text that it is best given at once

    def encode(
        self, texts: Sequence[bytes], before: int = -1, after: int = -1
    ) -> tuple[np.ndarray, np.ndarray]: ...


@held_back()
def make_encoder(tokenizer: Tokenizer, fast: bool = True) -> Encoder:
    """The fastest encoder that is exact for this tokenizer."""
    if not fast:
        return LibraryEncoder(tokenizer, "the fast path is switched off")
    try:
        tables = load_tables(tokenizer)
    except Unsuitable as reason:
        return LibraryEncoder(tokenizer, f"{reason}: ids come from the tokenizer's own library")
    try:
        from data_tools.kernel import Kernel
    except ImportError:
        return LibraryEncoder(
            tokenizer,
            "numba is not installed, so ids come from the tokenizer's own library, some 20 times "
            "slower: pip install 'megatron-ext[data]'",
        )
    texts = probe_texts()
    known = [tokenizer.encode(text) for text in texts]
    # Once more as text without a place to cut is: these texts are shorter than the usual window.
    # Small caches: workers fork with what is touched here.
    for probed in (Kernel(tables, cache_lines=1 << 10), Kernel(tables, cache_lines=2, window=16)):
        ids, lengths = KernelEncoder(probed, tables.prefix).encode(
            [text.encode() for text in texts]
        )
        found = np.split(ids, np.cumsum(lengths)[:-1])
        for text, wanted, got in zip(texts, known, found, strict=True):
            if not np.array_equal(wanted, got):
                return LibraryEncoder(
                    tokenizer, f"the fast path differs from the library on {text[:20]!r}"
                )
    return KernelEncoder(Kernel(tables), tables.prefix)


class LibraryEncoder:
    """The tokenizer's own library, for every document."""

    batch_bytes = 1 << 18  # whose encodings a library holds together

    def __init__(self, tokenizer: Tokenizer, note: str) -> None:
        self.note = note
        self._tokenizer = tokenizer

    def encode(
        self, texts: Sequence[bytes], before: int = -1, after: int = -1
    ) -> tuple[np.ndarray, np.ndarray]:
        head = np.array([before] if before >= 0 else [], dtype=np.int32)
        tail = np.array([after] if after >= 0 else [], dtype=np.int32)
        pieces: list[np.ndarray] = []
        lengths = np.empty(len(texts), dtype=np.int32)
        for i, ids in enumerate(self._tokenizer.encode_batch([text.decode() for text in texts])):
            pieces += (head, ids, tail)
            lengths[i] = len(head) + len(ids) + len(tail)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32), lengths


class KernelEncoder:
    """The compiled kernel."""

    note = ""
    batch_bytes = 2 << 20  # fits the processor's last cache

    def __init__(self, kernel, prefix: str) -> None:
        self._kernel = kernel
        self._prefix = prefix

    def encode(
        self, texts: Sequence[bytes], before: int = -1, after: int = -1
    ) -> tuple[np.ndarray, np.ndarray]:
        pieces: list[bytes] = []
        ends = np.empty(len(texts), dtype=np.int64)
        end = 0
        for i, text in enumerate(texts):
            # The library does not tell a space from the mark in its place.
            text = _MARK.sub(b" ", text)
            if self._prefix == PREFIX_ALWAYS or (self._prefix != PREFIX_NEVER and text[:1] != b" "):
                pieces.append(b" ")
                end += 1
            pieces.append(text)
            end += len(text)
            ends[i] = end
        pieces.append(bytes(self._kernel.pad))
        return self._kernel.encode(
            np.frombuffer(b"".join(pieces), dtype=np.uint8), ends, before, after
        )


def audit(
    tokenizer: Tokenizer,
    texts: Sequence[bytes],
    ids: np.ndarray,
    ends: np.ndarray,
    head: int,
    tail: int,
) -> None:
    """Compare one document in `AUDIT_EVERY` with the library; `head` and `tail` ids are put around.

    Raises `Failure` when they differ: then the files are not to be trusted, and we want to know.
    """
    for i, text in enumerate(texts):
        if len(text) > AUDIT_BYTES or xxhash.xxh3_64_intdigest(text) % AUDIT_EVERY:
            continue
        start = int(ends[i - 1]) if i else 0
        found = ids[start + head : int(ends[i]) - tail]
        if not np.array_equal(found, tokenizer.encode(text.decode())):
            raise Failure(
                f"the fast path and {tokenizer.path} give different ids for the document that "
                f"begins {text[:40]!r}: run again with --no-fast and report it"
            )


def probe_texts() -> list[str]:
    """What has broken tokenizers before, and seeded random text over many alphabets."""
    rng = random.Random(0)
    alphabets = [
        "abcdefghijklmnopqrstuvwxyz     ,.\n",
        "ETAOINSHRDLU etaoinshrdlu''\"-;:!?()\n",
        "0123456789+-*/=<>{}[]();:_ \t\n    ",
        "àéîõüßøåčřžñ ¿¡«»€ ",
        "абвгдежзийклмно ",
        "中文字符混排测试，。 日本語テキストかなカナ 한국어",
        "🙂👩\u200d👩\u200d👧🏽🇫🇷✈️\u0301\u0308",
        "\x00\x01\x07\x0b\x0c\x1b\x7f\x85\xa0\u2028\ufeff\ufffd",
        "\u2581 \u2581a ",
        "\U0010ffff\ud7ff\ue000\U00010000",
    ]
    texts = [
        " ", "  ", "\n", "\t", "a", " a", "a ", "\u2581", " \u2581", "\x00", "<s>", "</s>", "<unk>",
        "<0x0A>", "<s></s> <unk><pad>", "a</s>b", " " * 300, "\n" * 300, "=" * 300, "a" * 500,
        "-" * 49 + " " * 49, "    def f(x):\n        return x  # 1234567890\r\n", "don't it's I'm",
        "x" * 31, "x" * 32, "x" * 33, " " * 31 + "y", " " * 32 + "y", "\u0301" * 40,
    ]  # fmt: skip
    for alphabet in alphabets:
        for size in (3, 20, 60, 200):
            texts += ["".join(rng.choices(alphabet, k=size)) for _ in range(4)]
    mixed = "".join(alphabets)
    return texts + ["".join(rng.choices(mixed, k=120)) for _ in range(20)]
