"""Cutting a long text where a Hugging Face pre-tokenizer cuts it anyway, so that its ids can be had
piece by piece: the library takes 160 bytes a character of what it is given at once.

    if cuts_at_words(tokenizer_json):                # else it has to be given whole
        ids = [encode(piece) for piece in cut(text)]

The place is between an ASCII letter and a space before another. The pre-tokenizers that are known
here (GPT-2's; Llama 3's and Qwen's, whatever number of digits they take) let no match go over it:
letters end one match, and a space with the letters after it is another. No normaliser but NFC is
allowed, which joins neither side, and no added token with a space.
"""

from __future__ import annotations

import re
from typing import Any

PIECE = 1 << 20  # characters
_PLACE = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cuts_at_words(tokenizer: dict[str, Any]) -> bool:
    """Whether `cut` changes no id of this tokenizer.json."""
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    return (
        model.get("type") == "BPE"
        and not any(
            model.get(name)
            for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        )
        and (normalizer is None or normalizer.get("type") == "NFC")
        and all(map(_leaves_words, steps))
        and any(map(_cuts_at_words, steps))
        and not any(
            re.search(r"\s", token["content"])
            or any(token.get(name) for name in ("lstrip", "rstrip", "single_word"))
            for token in tokenizer.get("added_tokens", [])
            if not token.get("special")  # those are text
        )
    )


def cut(text: str, size: int = PIECE) -> list[str]:
    """Pieces of about `size` characters, longer where there is no place."""
    pieces, start = [], 0
    while len(text) - start > size:
        place = _PLACE.search(text, start + size)
        if place is None:
            break
        pieces.append(text[start : place.start()])
        start = place.start()
    return [*pieces, text[start:]]


def _leaves_words(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer's step puts nothing in, and joins nothing over the place."""
    if step.get("type") == "ByteLevel":
        return not step.get("add_prefix_space")
    if step.get("type") == "Split":
        pattern = re.sub(r"\\p\{N\}\{1,\d\}", r"\\p{N}", step["pattern"].get("Regex", ""))
        known = pattern in (_WORDS, r"\p{N}")
        return known and step.get("behavior") == "Isolated" and not step.get("invert")
    return step.get("type") == "Digits"


def _cuts_at_words(step: dict[str, Any]) -> bool:
    if step.get("type") == "ByteLevel":
        return bool(step.get("use_regex", True))
    return step.get("type") == "Split" and len(step["pattern"]["Regex"]) > len(r"\p{N}{1,2}")
