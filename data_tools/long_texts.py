r"""Cutting a long text where the tokenizer cuts it anyway, so that its ids can be had by pieces: of
what it is given at once, a library takes 40 (sentencepiece) or 160 (Hugging Face) bytes of memory
a character.

    place = huggingface_place(tokenizer_json)        # or sentencepiece_place(model)
    pieces = cut(text, place) if place else [text]

Places are spaces before a letter, and single newlines where that can be shown too. Which of them
are exact is read from the tokenizer's own file; what cannot be shown is given whole.

**Regular expressions** (Hugging Face: GPT-2, GPT-NeoX, OLMo, StarCoder 2, Falcon, Llama 3, Phi-4,
OLMo 2, Qwen, GPT-4o, gpt-oss, Llama 4, Tekken, BLOOM, DeepSeek). A pattern is a list of
alternatives. Of all that are known here it holds that
- a space is only the first character of a match or among white space: no match goes over a place
  between a visible character and a space;
- what lies beyond a match counts (`(?!\S)`, `$`) only after white space: none that ends before the
  place depends on what follows, and from there on the text is matched as if it began there.

And one of `_CUTTING` matches at every place, so that no text between matches spans it either:
`\s+` does whatever follows; BLOOM's needs the character after the space, which a step before
could have taken away. The same holds after a newline that follows a visible character and precedes
a letter: no match takes a newline before a letter, and that one newline is one match with and
without what follows. Only DeepSeek's first patterns (Coder, V2) have `\s?` before letters, and
their letters are a list: there places are spaces before ASCII letters.

**Space marks** (sentencepiece BPE; Llama 2, Mistral, Gemma in Hugging Face form). Nothing cuts the
text before the merges, but no merge goes over a place when no piece holds its last character
followed by the mark. Where every text gets a space in front, the piece after a place is given
without its own.

Given whole: Unigram models, whose scores add up in float32 over the whole text, so that a tie may
fall another way; other models, normalisers (but NFC, which joins neither side) and patterns; added
tokens that reach over a place; and a text without a place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from data_tools.space_marks import (
    BPE,
    PREFIX_ALWAYS,
    PREFIX_NEVER,
    SPACE_MARK,
    Model,
    Unsuitable,
    huggingface_prefix,
    steps_of,
)

PIECE = 1 << 18  # characters
# What a place matches belongs to neither piece.
_LETTER = r"[^\W\d_]"
_SPACES = re.compile(rf"(?<=\S)(?= {_LETTER})|(?<=\S\n)(?={_LETTER})")
_ASCII_SPACES = re.compile(r"(?<=\S)(?= [A-Za-z])")

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_ENDING = f"(?i:{'|'.join(_ENDINGS)})"
_WORD = r"[^\r\n\p{L}\p{N}]?"
# DeepSeek's first letters: ranges, the ASCII ones and others beyond, so that none holds a space.
_LIST = r"\s?[A-Za-z...]+"
_LISTED = re.compile(r"\\s\?\[A-Za-z(?:[^\x00-\x7f]|-)*\]\+")
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_CUTTING = {r"\s+", r"\s?\p{L}+", _LIST, _BLOOM}
_KNOWN = _CUTTING | {
    *_ENDINGS,
    _ENDING,
    r" ?\p{L}+",
    rf"{_WORD}\p{{L}}+",
    rf"{_WORD}[\p{{L}}\p{{M}}]+",
    *(rf"{_WORD}{_UPPER}*{_LOWER}+{ending}" for ending in ("", f"{_ENDING}?")),
    *(rf"{_WORD}{_UPPER}+{_LOWER}*{ending}" for ending in ("", f"{_ENDING}?")),
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"\p{N}",
    r" ?\p{N}",
    r"[0-9][0-9][0-9]",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    r"\s?\p{P}+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[一-龥ࠀ-一가-퟿]+",
    r"[\r\n]",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+$",
}
_CLASS = r"\[(?:\\.|\[[^\]]*\]|[^\]\\])*\]"
_ALTERNATIVE = re.compile(rf"(?:\\.|{_CLASS}|\((?:\\.|{_CLASS}|[^()\[\\])*\)|[^|\[(\\])+")


def cut(text: str, place: re.Pattern[str], size: int = PIECE) -> Iterator[str]:
    """Pieces of about `size` characters, longer where there is no place."""
    start = 0
    while len(text) - start > size and (found := place.search(text, start + size)):
        yield text[start : found.start()]
        start = found.end()
    yield text[start:]


def huggingface_place(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Where the tokenizer of this tokenizer.json lets a text be cut; None: nowhere."""
    model, added = spec.get("model") or {}, spec.get("added_tokens", [])
    if model.get("type") != "BPE" or any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return None
    # Special tokens are text, but the library looks for them, and they hide others.
    if any(
        token.get(name)
        for token in added
        if not token.get("special")
        for name in ("lstrip", "rstrip", "single_word")
    ):
        return None
    steps = steps_of(spec.get("pre_tokenizer"), "pretokenizers")
    if all(step["type"] == "NFC" for step in steps_of(spec.get("normalizer"), "normalizers")):
        place = _pattern_place(steps)
        if place is not None:
            crossed = any(re.search(r"\S |\n\S", token["content"]) for token in added)
            return None if crossed else place
    return _huggingface_mark_place(spec)


def _pattern_place(steps: list[dict[str, Any]]) -> re.Pattern[str] | None:
    """The place that every step leaves alone or cuts, if one cuts before bytes are mapped."""
    place, cuts = _SPACES, False
    for step in steps:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            cuts |= bool(step.get("use_regex", True))  # GPT-2's pattern
            if not cuts:
                return None
        elif step["type"] == "Split":
            # Matches apart and what lies between them too, or what lies between them away.
            if (step.get("behavior"), step.get("invert")) not in (
                ("Isolated", False),
                ("Removed", True),
            ):
                return None
            alternatives = _alternatives(step["pattern"].get("Regex", ""))
            if not alternatives or not alternatives <= _KNOWN:  # none: a string, not a pattern
                return None
            cuts |= bool(alternatives & (_CUTTING if step is steps[0] else _CUTTING - {_BLOOM}))
            if any(one.startswith(r"\s?") for one in alternatives) or (
                alternatives & {r"\s+(?!\S)", r"\s+$"} and r"\s+" not in alternatives
            ):
                place = _ASCII_SPACES
        elif step["type"] == "Punctuation":
            if step.get("behavior", "Isolated") not in ("Isolated", "Contiguous"):
                return None
        elif step["type"] != "Digits":
            return None
    return place if cuts else None


def _alternatives(pattern: str) -> set[str]:
    """Top-level alternatives of a regular expression, with what makes no difference made one."""
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    found = _ALTERNATIVE.findall(pattern)
    if "|".join(found) != pattern:
        return {pattern}
    found = [re.sub(r"\\p\{N\}(\+|\{1(,\d)?\})$", r"\\p{N}", one) for one in found]
    return {_LIST if _LISTED.fullmatch(one) else one for one in found}


def _huggingface_mark_place(spec: dict[str, Any]) -> re.Pattern[str] | None:
    model, added = spec["model"], spec.get("added_tokens", [])
    pre = spec.get("pre_tokenizer") or {}
    if pre.get("type") == "Metaspace":
        pre = pre | {"split": False}  # if it splits, then at marks
    elif (pre.get("type"), pre.get("pattern")) == ("Split", {"String": " "}):
        pre = {}  # Gemma's, which finds none
    try:
        prefix = huggingface_prefix(spec | {"pre_tokenizer": pre})
    except Unsuitable:
        return None
    # A token at the beginning of a piece would take the prefix away from it.
    text_tokens = [token for token in added if not token.get("special")]
    if model.get("ignore_merges") or (prefix == PREFIX_ALWAYS and text_tokens):
        return None
    # Without a token for unknown characters they are left out, and their neighbours meet.
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    if SPACE_MARK not in vocabulary or not unknown:
        return None
    # Merges may begin with what an unknown character becomes.
    becomes = re.compile(f"(<0x..>|{re.escape(unknown)}){SPACE_MARK}")
    if any(map(becomes.search, vocabulary)):
        return None
    pieces = [*vocabulary, *(token["content"].replace(" ", SPACE_MARK) for token in added)]
    lines = prefix == PREFIX_NEVER and "\n" in vocabulary
    return _mark_place(pieces, drop=prefix == PREFIX_ALWAYS, lines=lines)


def _mark_place(pieces: list[str], drop: bool, lines: bool) -> re.Pattern[str] | None:
    """Spaces after any character that no piece holds before the mark, dropped if `drop`; newlines
    too, if `lines` and no piece goes on after one.
    """
    before = {a for piece in pieces for a, b in pairwise(piece) if b == SPACE_MARK}
    left = rf"(?<=[^\s{re.escape(''.join(sorted(before | {SPACE_MARK})))}])"
    right = rf"[^\s{SPACE_MARK}]"
    place = rf"{left} (?={right})" if drop else rf"{left}(?= {right})"
    if lines and not any(re.search(r"\n\S", piece) for piece in pieces):
        place += rf"|(?<=\S\n)(?={_LETTER})"
    return re.compile(place)


def sentencepiece_place(model: Model) -> re.Pattern[str] | None:
    """Where this model lets a text be cut; None: nowhere."""
    pieces = [piece for piece, _, _ in model.pieces]
    drop = model.add_dummy_prefix
    if (
        model.model_type != BPE
        or model.charsmap
        or model.rules
        or SPACE_MARK not in pieces  # unknown, it would be one with an unknown neighbour
        or model.whitespace_suffix
        or not model.escape_whitespaces
        or (model.remove_extra_whitespaces and not drop)  # would take a piece's first space
        or any(" " in piece for piece in pieces)
    ):
        return None
    return _mark_place(pieces, drop, lines=not drop and "\n" in pieces)
