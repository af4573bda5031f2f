"""A small real tokenizer of both kinds, made once, and helpers to write corpora."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_tools import indexed
from data_tools.tokenization import tokenize
from data_tools.tokenizer import Tokenizer, load_tokenizer
from data_tools.tokenizer_training import train_tokenizer
from data_tools.twin import write_twin

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def library_text() -> list[str]:
    """Real text that every machine has: modules of the interpreter's library."""
    folder = Path(json.__file__).parent.parent
    names = ("argparse.py", "ast.py", "difflib.py", "inspect.py", "typing.py", "_pydecimal.py")
    return [(folder / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(autouse=True)
def _without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests survive processes, not power cuts: waiting for the disk would be most of their time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentencepiece model of 1,000 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = library_text()
    texts.append("Größe naïve café — “quotes” … 東京 日本語 привет мир 🙂\n" * 40)
    corpus = write_jsonl(folder / "train.jsonl", texts)
    train_tokenizer([str(corpus)], folder / "tokenizer.model", 1000)
    return str(folder / "tokenizer.model")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some 300 documents of 1 to 5,000 characters, with every kind of newline and letter."""
    rng = random.Random(5)
    source = "\n".join(library_text()[:3]) + "東京 naïve 🙂\r\n\u2028" * 30
    made = []
    for _ in range(300):
        start = rng.randrange(len(source) - 5000)
        made.append(source[start : start + int(10 ** rng.uniform(0, 3.7))])
    return made


@pytest.fixture(scope="session")
def reference(texts: list[str], model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run in one piece."""
    folder = tmp_path_factory.mktemp("reference")
    write_jsonl(folder / "c4.jsonl", texts)
    tokenize([str(folder / "c4.jsonl")], model, folder / "out")
    return folder


@pytest.fixture(scope="session")
def huggingface(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same vocabulary as a Hugging Face folder, the way LLaMA's is converted."""
    folder = tmp_path_factory.mktemp("huggingface")
    write_twin(model, folder)
    return str(folder)


@pytest.fixture
def tokenizer(model: str) -> Tokenizer:
    return load_tokenizer(model)


def write_jsonl(path: Path, texts: Iterable[str], **fields: object) -> Path:
    """Documents in RedPajama's schema, plain or compressed by the name's ending."""
    data = b"".join(
        json.dumps({"text": text, "meta": {}, **fields}).encode() + b"\n" for text in texts
    )
    write_compressed(path, data)
    return path


def write_compressed(path: Path, data: bytes) -> None:
    import bz2
    import lzma

    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    path.write_bytes(compress.get(path.suffix, bytes)(data))


def documents(prefix: Path | str) -> list[list[int]]:
    """All documents of a pair, through our reader (test_indexed compares it with Megatron's)."""
    index = indexed.read_index(prefix)
    tokens = np.asarray(indexed.open_tokens(prefix, index))
    return [tokens[slice(*index.span(k))].tolist() for k in range(index.documents)]


def expected(tokenizer: Tokenizer, texts: Iterable[str], eod: bool = True) -> list[list[int]]:
    """What the tokenizer's own library says."""
    tail = [tokenizer.eod_id] if eod else []
    return [[*tokenizer.encode(text).tolist(), *tail] for text in texts]


def shared(*parts: str) -> Path:
    """A file of the shared data, or skip."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def flip_a_bit(path: Path, at: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def read_lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outputs(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_name(prefix.name + ".bin").read_bytes(), prefix.with_name(
        prefix.name + ".idx"
    ).read_bytes()
