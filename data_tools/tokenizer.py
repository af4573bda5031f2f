"""sentencepiece and Hugging Face tokenizers behind one small protocol.

    tokenizer = load_tokenizer("tokenizer.model")   # or tokenizer.json, or their folder
    ids = tokenizer.encode("some text")               # int32 array, no BOS, no EOD
    tokenizer.decode(ids)

Literal control tokens in the text (`<s>`, `</s>`, `<|endoftext|>`) are text: they never become
control ids. Refuses a file that is no tokenizer, and a special token that the vocabulary lacks.
"""

from __future__ import annotations

import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from data_tools.errors import UserError
from data_tools.long_texts import PIECE, cut, huggingface_place, sentencepiece_place
from data_tools.space_marks import parse_model

_NORMALIZED = 1 << 16  # characters at once
# What Hugging Face folders call the token that ends a document.
_HF_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


class Tokenizer(Protocol):
    """What the data tools and the evaluation need of a tokenizer. Ids are int32."""

    kind: str  # "sentencepiece" or "huggingface"
    path: str
    hash: str  # "sha256:..." of the tokenizer file
    vocab_size: int  # largest id + 1, control tokens included
    eod_id: int | None
    bos_id: int | None

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def gets_more(self, text: str, most: int) -> bool:
        """Whether the library is given a piece of it of more than `most` bytes of UTF-8, or one
        that its normaliser makes more than `most` characters of."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...

    def control_tokens(self) -> dict[str, int]: ...


def load_tokenizer(
    path: str | Path, *, eod_token: str | None = None, bos_token: str | None = None
) -> Tokenizer:
    """Load a tokenizer; `eod_token` and `bos_token` name pieces that replace what the files say.

    Raises `UserError` when the path holds no tokenizer or a named token is not in the vocabulary.
    """
    file = _tokenizer_file(Path(path))
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file, eod_token, bos_token)
    return SentencePieceTokenizer(file, eod_token, bos_token)


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"{path} holds neither tokenizer.json nor tokenizer.model: name a folder or file "
            "that does"
        )
    if not path.is_file():
        raise UserError(
            f"tokenizer {path} does not exist: name a .model file, a tokenizer.json or their folder"
        )
    return path


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except PermissionError as error:
        raise UserError(f"tokenizer {file} cannot be read: make it readable") from error


class _InPieces(ABC):
    """`encode` and `encode_batch` of a library that is not given long texts at once."""

    @property
    @abstractmethod
    def _place(self) -> re.Pattern[str] | None:
        """Where they may be cut; None: nowhere."""

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The library's ids of each text, int32."""

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if all(len(text) <= PIECE for text in texts):
            return self._encode(texts)
        return [
            np.concatenate([self._encode([piece])[0] for piece in self._pieces(text)])
            for text in texts
        ]

    def gets_more(self, text: str, most: int) -> bool:
        return any(
            len(piece.encode()) > most or self._normalized_size(piece) > most
            for piece in self._pieces(text)
        )

    def _normalized_size(self, piece: str) -> int:
        """Characters that the library's memory depends on."""
        return len(piece)

    def _pieces(self, text: str) -> Iterable[str]:
        if len(text) <= PIECE or self._place is None:
            return [text]
        return cut(text, self._place)


class SentencePieceTokenizer(_InPieces):
    """A sentencepiece `.model` file."""

    kind = "sentencepiece"

    def __init__(self, file: Path, eod_token: str | None, bos_token: str | None) -> None:
        import sentencepiece

        self.path = str(file)
        self.model_bytes = _read(file)
        self.hash = f"sha256:{hashlib.sha256(self.model_bytes).hexdigest()}"
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            # An empty buffer loads without an error and crashes the process at the first call.
            if not self.model_bytes:
                raise RuntimeError("empty")
            self.processor.LoadFromSerializedProto(self.model_bytes)
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"{file} is not a sentencepiece model: name a .model file, a tokenizer.json or "
                "their folder"
            ) from error
        self.vocab_size = int(self.processor.vocab_size())
        self.eod_id = self._id(eod_token, self.processor.eos_id())
        self.bos_id = self._id(bos_token, self.processor.bos_id())

    def _id(self, token: str | None, default: int) -> int | None:
        if token is None:
            return default if default >= 0 else None
        found = self.processor.piece_to_id(token)
        if self.processor.id_to_piece(found) != token:
            raise UserError(
                f"token {token!r} is not in the vocabulary of {self.path}: name one that is"
            )
        return int(found)

    @functools.cached_property
    def _place(self) -> re.Pattern[str] | None:
        return sentencepiece_place(parse_model(self.model_bytes))

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if len(texts) == 1:  # starts no threads: seven times quicker for a short one
            return [np.array(self.processor.encode(texts[0]), dtype=np.int32)]
        return [np.array(ids, dtype=np.int32) for ids in self.processor.encode(list(texts))]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.processor.decode([int(i) for i in ids])

    def control_tokens(self) -> dict[str, int]:
        model = self.processor
        return {
            model.id_to_piece(i): i
            for i in range(self.vocab_size)
            if model.is_control(i) or model.is_unknown(i)
        }


class HuggingFaceTokenizer(_InPieces):
    """A Hugging Face `tokenizer.json`, with EOD and BOS from the configuration files beside it."""

    kind = "huggingface"

    def __init__(self, file: Path, eod_token: str | None, bos_token: str | None) -> None:
        import tokenizers

        self.path = str(file)
        content = _read(file)
        self.hash = f"sha256:{hashlib.sha256(content).hexdigest()}"
        try:
            self.json: dict[str, Any] = orjson.loads(content)
            self.processor = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{file} is not a Hugging Face tokenizer.json: name a .model file, a "
                "tokenizer.json or their folder"
            ) from error
        self.processor.no_truncation()
        self.processor.no_padding()
        # Control tokens in the text stay text: by default the library turns "</s>" into the id of
        # EOD.
        self.processor.encode_special_tokens = True
        vocabulary = self.processor.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        configs = _read_configs(file.parent)
        self.eod_id = self._id(eod_token or configs.get("eos_token"), vocabulary)
        self.bos_id = self._id(bos_token or configs.get("bos_token"), vocabulary)

    def _id(self, token: str | None, vocabulary: dict[str, int]) -> int | None:
        if token is None:
            return None
        if token not in vocabulary:
            raise UserError(
                f"token {token!r} is not in the vocabulary of {self.path}: name one that is"
            )
        return vocabulary[token]

    @functools.cached_property
    def _place(self) -> re.Pattern[str] | None:
        return huggingface_place(self.json)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The batch call has no offsets to build and releases the interpreter lock.
        encodings = self.processor.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _normalized_size(self, piece: str) -> int:
        if (normalizer := self.processor.normalizer) is None:
            return len(piece)
        # In parts, for normalising takes many times the text; a space may be put before each.
        parts = (piece[at : at + _NORMALIZED] for at in range(0, len(piece), _NORMALIZED))
        return sum(len(normalizer.normalize_str(part)) - 1 for part in parts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.processor.decode([int(i) for i in ids], skip_special_tokens=False)

    def control_tokens(self) -> dict[str, int]:
        return {
            t["content"]: t["id"] for t in self.json.get("added_tokens", []) if t.get("special")
        }


def _read_configs(folder: Path) -> dict[str, str]:
    """EOS and BOS as the files beside tokenizer.json name them; the first file that says so
    wins.
    """
    found: dict[str, str] = {}
    for name in _HF_CONFIGS:
        if not (folder / name).is_file():
            continue
        try:
            values = orjson.loads((folder / name).read_bytes())
        except orjson.JSONDecodeError as error:
            raise UserError(f"{folder / name} is not JSON: mend it or remove it") from error
        for key in ("eos_token", "bos_token"):
            token = values.get(key)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                found.setdefault(key, token)
    return found
