"""What a tokenizer's own file says of how it marks spaces, and the rest that decides its ids.

    model = parse_model(data)                # a sentencepiece .model file
    prefix = huggingface_prefix(spec)        # of the tokenizer.json of such a model

Read from the file itself, because the libraries tell neither the rules of a normaliser nor what
kind of model it is. Raises `Unsuitable` for a tokenizer.json that marks spaces in another way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SPACE_MARK = "\u2581"
BPE = 2
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
# Prefix rules: a space before every document, only before one that begins with none, or never.
PREFIX_ALWAYS, PREFIX_UNLESS_SPACE, PREFIX_NEVER = "always", "unless space", "never"


class Unsuitable(Exception):
    """Why this tokenizer is left to its own library."""


@dataclass
class Model:
    """The fields of sentencepiece_model.proto that decide the ids, with the proto's defaults.

    Pieces are (text, score, type); `charsmap` and `rules` say whether the text is normalised.
    """

    pieces: list[tuple[str, float, int]]
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_suffix: bool = False
    charsmap: bool = False
    rules: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def parse_model(data: bytes) -> Model:
    model = Model([])
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            model.pieces.append((bytes(piece.get(1, b"")).decode(), score, piece.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_fields(value))
            model.model_type = trainer.get(3, 1)
            model.byte_fallback = bool(trainer.get(35, False))
            model.whitespace_suffix = bool(trainer.get(24, False))
        elif field == 3:
            normalizer = dict(_fields(value))
            model.charsmap = bool(normalizer.get(2))
            model.rules = bool(normalizer.get(6))
            model.add_dummy_prefix = bool(normalizer.get(3, True))
            model.remove_extra_whitespaces = bool(normalizer.get(4, True))
            model.escape_whitespaces = bool(normalizer.get(5, True))
    return model


def steps_of(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokeniser of a tokenizer.json; `name` is what a sequence
    calls them. Each has a "type", which the library does not ask for."""
    if step is None:
        return []
    return [{"type": None, **one} for one in step.get(name, [step])]


def huggingface_prefix(spec: dict[str, Any]) -> str:
    """How the tokenizer.json of a sentencepiece twin maps spaces. Raises `Unsuitable`."""
    steps = steps_of(spec.get("normalizer"), "normalizers")
    prefix, replaced = PREFIX_NEVER, False
    for step in steps:
        first = prefix == PREFIX_NEVER
        if step["type"] == "Prepend" and step["prepend"] == SPACE_MARK and first:
            prefix = PREFIX_ALWAYS
        elif (
            step["type"] == "Replace"
            and step["pattern"] == {"String": " "}
            and step["content"] == SPACE_MARK
        ):
            replaced = True
        else:
            raise Unsuitable(f"the model has the normaliser {step['type']}")
    for pre in steps_of(spec.get("pre_tokenizer") or None, "pretokenizers"):
        plain = (
            pre["type"] == "Metaspace"
            and pre["replacement"] == SPACE_MARK
            and pre.get("split") is False
        )
        if not plain or steps:
            raise Unsuitable(f"the model has the pre-tokeniser {pre['type']}")
        replaced = True
        never = pre.get("prepend_scheme", "always") == "never"
        prefix = PREFIX_NEVER if never else PREFIX_UNLESS_SPACE
    if not replaced:
        raise Unsuitable("the model does not mark spaces")
    return prefix


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protobuf message (wire types 0, 1, 2 and 5)."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        yield tag >> 3, data[position : position + length]
        position += length
