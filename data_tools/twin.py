"""The Hugging Face tokenizer.json that gives the ids of a sentencepiece BPE model.

    write_twin("tokenizer.model", "folder/")     # tokenizer.json, tokenizer_config.json

Every pair of pieces that makes a piece is a merge, ordered by the score of what it makes: the same
merges in the same order. Refuses models that are not BPE with byte fallback.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.files import write_json
from data_tools.space_marks import SPACE_MARK, Unsuitable
from data_tools.tables import build_tables
from data_tools.tokenizer import SentencePieceTokenizer, load_tokenizer


def huggingface_twin(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of tokenizer.json for a .model file. Raises `UserError`."""
    tokenizer = load_tokenizer(str(path))
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise UserError(f"{path} is not a sentencepiece model: name a .model file")
    try:
        tables = build_tables(tokenizer)  # refuses what has no such twin
    except Unsuitable as reason:
        raise UserError(f"{path} has no Hugging Face twin ({reason}): use it as it is") from reason
    model = tokenizer.processor
    vocabulary = {model.id_to_piece(i): i for i in range(tokenizer.vocab_size)}
    control = tokenizer.control_tokens()
    scores = {
        piece: model.get_score(i)
        for piece, i in vocabulary.items()
        if piece not in control and not model.is_byte(i)
    }
    merges = sorted(
        (-score, vocabulary[piece], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": True}
            for token, number in control.items()
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [prepend, replace] if tables.prefix == "always" else [replace],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ][: 4 if tables.prefix == "always" else 3],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[left, right] for _, _, left, right in merges],
        },
    }


def write_twin(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json for a .model file into `folder`."""
    tokenizer = load_tokenizer(str(path))
    named = {
        key: next(token for token, i in tokenizer.control_tokens().items() if i == number)
        for key, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eod_id))
        if number is not None
    }
    write_json(Path(folder) / "tokenizer.json", huggingface_twin(path))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    write_json(Path(folder) / "tokenizer_config.json", config)
