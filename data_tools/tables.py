"""What the fast kernel must know of a vocabulary, derived from the tokenizer's own file.

    tables = load_tables(tokenizer)         # or raises Unsuitable, with the reason

Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1): a text starts as single
characters and the adjacent pair of best rank merges, leftmost first, until no pair is in the
vocabulary. No merge can ever span two neighbouring bytes that are neighbours in no piece: there
the text may be cut, and each unit between cuts be encoded alone, with the same ids. That is the
whole proof, and `cuts` below is read from the vocabulary, not assumed.

The space mark U+2581 is held as the byte 0x20 here, as it is in the text.
Unsuitable are: Unigram models, a real normaliser, removal of extra white space, user-defined or
unused pieces, pre-tokenisers (GPT-2's and LLaMA 3's byte-level ones), a vocabulary without byte
fallback. They are encoded by their own library.
"""

from __future__ import annotations

import contextlib
import zipfile
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from data_tools import space_marks
from data_tools.files import atomic_write, cache_folder
from data_tools.space_marks import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX_ALWAYS,
    PREFIX_NEVER,
    SPACE_MARK,
    UNKNOWN,
    Unsuitable,
    huggingface_prefix,
    parse_model,
)
from data_tools.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

NO_SYMBOL = -1


@dataclass(frozen=True)
class Tables:
    """Arrays the kernel reads. A symbol is a piece's id, or vocab_size + k for the k-th character
    that occurs only inside longer pieces and so may merge but is no piece itself."""

    vocab_size: int
    prefix: str
    cuts: np.ndarray  # bool [65536], at 256 a + b: no piece holds a then b across characters
    characters: np.ndarray  # int32 [0x110000], code point -> symbol or NO_SYMBOL
    pair_keys: np.ndarray  # uint64 [slots], left << 32 | right, all ones when free
    pair_values: np.ndarray  # uint64 [slots], rank << 32 | merged symbol
    symbol_bytes: np.ndarray  # int32 [symbols], length in UTF-8 bytes (space mark = 1)
    byte_ids: np.ndarray  # int32 [256], ids of <0x00> ... <0xFF>


def build_tables(tokenizer: Tokenizer) -> Tables:
    """Tables of a sentencepiece BPE model or its Hugging Face twin. Raises `Unsuitable`."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _from_huggingface(tokenizer)
    raise Unsuitable(f"{tokenizer.kind} tokenizers have no fast path")


def load_tables(tokenizer: Tokenizer) -> Tables:
    """`build_tables`, kept in the user's cache folder: building takes a third of a second."""
    # The key holds the text of the files with the rules: changed ones never meet old tables.
    sources = [Path(__file__), Path(space_marks.__file__)]
    rules = xxhash.xxh3_64_hexdigest(b"".join(source.read_bytes() for source in sources))
    name = f"{tokenizer.hash.removeprefix('sha256:')[:32]}-{rules}.npz"
    path = cache_folder("tables") / name
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        with np.load(path, allow_pickle=False) as stored:
            values = {field.name: stored[field.name] for field in fields(Tables)}
        values["vocab_size"], values["prefix"] = int(values["vocab_size"]), str(values["prefix"])
        return Tables(**values)
    tables = build_tables(tokenizer)
    with contextlib.suppress(OSError), atomic_write(path) as stream:
        np.savez(stream, **{field.name: getattr(tables, field.name) for field in fields(Tables)})
    return tables


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Tables:
    model = parse_model(tokenizer.model_bytes)
    if model.model_type != BPE:
        raise Unsuitable("the model is not BPE")
    if model.charsmap or model.rules:
        raise Unsuitable("the model normalises its text")
    if model.remove_extra_whitespaces or not model.escape_whitespaces or model.whitespace_suffix:
        raise Unsuitable("the model changes white space")
    if not model.byte_fallback:
        raise Unsuitable("the model has no byte fallback")
    pieces: dict[str, int] = {}
    scores: dict[str, float] = {}
    bytes_: dict[str, int] = {}
    for number, (piece, score, kind) in enumerate(model.pieces):
        if kind == NORMAL:
            pieces[piece], scores[piece] = number, score
        elif kind == BYTE:
            bytes_[piece] = number
        elif kind not in (UNKNOWN, CONTROL):
            raise Unsuitable("the model has user-defined or unused pieces")
    # Equal scores share a rank: the leftmost pair goes first among them.
    rank = {s: r for r, s in enumerate(sorted(set(scores.values()), reverse=True))}
    symbols = dict(pieces)
    for character in sorted({c for piece in pieces if len(piece) > 1 for c in piece} - set(pieces)):
        symbols[character] = len(model.pieces) + len(symbols) - len(pieces)
    merges = [
        (symbols[piece[:cut]], symbols[piece[cut:]], rank[scores[piece]], number)
        for piece, number in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in symbols and piece[cut:] in symbols
    ]
    prefix = PREFIX_ALWAYS if model.add_dummy_prefix else PREFIX_NEVER
    return _tables(len(model.pieces), prefix, symbols, merges, bytes_)


def _from_huggingface(tokenizer: HuggingFaceTokenizer) -> Tables:
    spec, model = tokenizer.json, tokenizer.json["model"]
    if model.get("type") != "BPE":
        raise Unsuitable("the model is not BPE")
    if model.get("dropout") or model.get("ignore_merges"):
        raise Unsuitable("the model drops or ignores merges")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Unsuitable("the model marks parts of words")
    if not model.get("byte_fallback"):
        raise Unsuitable("the model has no byte fallback")
    if any(not token.get("special") for token in spec.get("added_tokens", [])):
        raise Unsuitable("the model has user-defined tokens")
    prefix = huggingface_prefix(spec)
    vocabulary: dict[str, int] = model["vocab"]
    bytes_ = {
        f"<0x{b:02X}>": vocabulary[f"<0x{b:02X}>"]
        for b in range(256)
        if f"<0x{b:02X}>" in vocabulary
    }
    merges = []
    reached = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right not in vocabulary or left not in vocabulary or right not in vocabulary:
            raise Unsuitable(f"the merge {left} {right} is not in the vocabulary")
        if left in bytes_ or right in bytes_:
            raise Unsuitable("byte pieces merge")
        merges.append((vocabulary[left], vocabulary[right], rank, vocabulary[left + right]))
        reached[left + right] = vocabulary[left + right]
    symbols = {piece: number for piece, number in vocabulary.items() if len(piece) == 1} | reached
    return _tables(tokenizer.vocab_size, prefix, symbols, merges, bytes_)


def _tables(
    vocab_size: int,
    prefix: str,
    symbols: dict[str, int],
    merges: list[tuple[int, int, int, int]],
    bytes_: dict[str, int],
) -> Tables:
    if len(bytes_) != 256:
        raise Unsuitable("the vocabulary lacks byte pieces")
    if SPACE_MARK not in symbols or symbols[SPACE_MARK] >= vocab_size:
        raise Unsuitable("the vocabulary lacks the space mark")
    if any(" " in piece for piece in symbols):
        raise Unsuitable("a piece holds a real space")
    cuts = np.ones((256, 256), dtype=bool)
    cuts[:, 0x80:0xC0] = False  # never inside a character
    characters = np.full(0x110000, NO_SYMBOL, dtype=np.int32)
    lengths = np.zeros(max(symbols.values()) + 1, dtype=np.int32)
    for piece, symbol in symbols.items():
        data = piece.replace(SPACE_MARK, " ").encode()
        lengths[symbol] = len(data)
        if len(piece) == 1:
            characters[ord(piece.replace(SPACE_MARK, " "))] = symbol
        for a, b in pairwise(data):
            cuts[a, b] = False
    keys, values = _hash_pairs(merges)
    byte_ids = np.array([bytes_[f"<0x{b:02X}>"] for b in range(256)], dtype=np.int32)
    return Tables(vocab_size, prefix, cuts.reshape(-1), characters, keys, values, lengths, byte_ids)


FREE = np.uint64(0xFFFFFFFFFFFFFFFF)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth, multiplicative hashing)


def _hash_pairs(merges: list[tuple[int, int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Open addressing with linear probing, at most half full; a pair said twice keeps its best
    rank.
    """
    table = np.array(merges, dtype=np.uint64).reshape(-1, 4)
    bits = max(4, len(table).bit_length() + 1)
    order = np.argsort(table[:, 2], kind="stable")
    pair_keys = (table[order, 0] << np.uint64(32)) | table[order, 1]
    pair_values = (table[order, 2] << np.uint64(32)) | table[order, 3]
    _, first = np.unique(pair_keys, return_index=True)
    pair_keys, pair_values = pair_keys[first], pair_values[first]
    keys = np.full(1 << bits, FREE)
    values = np.zeros(1 << bits, dtype=np.uint64)
    slots = (pair_keys * MULTIPLIER) >> np.uint64(64 - bits)
    # All pairs try their slot at once; those that lose it try the next, until none is left.
    while len(pair_keys):
        slots = slots & np.uint64((1 << bits) - 1)
        candidates = np.flatnonzero(keys[slots] == FREE)
        _, winners = np.unique(slots[candidates], return_index=True)
        winners = candidates[winners]
        keys[slots[winners]] = pair_keys[winners]
        values[slots[winners]] = pair_values[winners]
        left = np.ones(len(pair_keys), dtype=bool)
        left[winners] = False
        pair_keys, pair_values, slots = (
            pair_keys[left],
            pair_values[left],
            slots[left] + np.uint64(1),
        )
    return keys, values
