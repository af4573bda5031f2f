"""What went in and what came out: PREFIX.receipt.json beside every .bin/.idx pair.

    receipt = read_receipt("corpus")          # or None
    receipt["counts"]["tokens"], receipt["tokenizer"]["hash"], receipt["outputs"]["pairs"][0]["bin"]

Keys that other programs read and that stay: inputs, tokenizer.{path,hash,vocab_size,eod_id,bos_id},
options, counts.{documents,tokens,characters,bytes,rejected,slices}, lengths, outputs, versions,
command. In `counts`, null says that it was not counted (a shard alone, a pair without a receipt).
The receipt is written last: where it is absent, the pair is not finished. Refuses a receipt that
lacks what is read here, which is then not asked for again elsewhere.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from data_tools import indexed
from data_tools.errors import UserError
from data_tools.files import read_json, write_json
from data_tools.tokenizer import Tokenizer

FORMAT = 1
BINS = 40  # powers of two of the histogram

# A type; a list of one shape; the keys that are needed (`str`: all there are); a tuple of choices.
_FILE = {"path": str, "size": int, "checksum": str}
_PAIR = {
    "prefix": str,
    "documents": int,
    "tokens": int,
    "bin": {**_FILE, "block_bytes": int, "blocks": [str]},
    "idx": _FILE,
}
_TOKENIZER = {
    "path": str,
    "hash": str,
    "vocab_size": int,
    "eod_id": (None, int),
    "bos_id": (None, int),
}
_SHAPE = {
    "wanted": {"inputs": [{"path": str, "size": int}], "tokenizer": dict, "options": dict},
    "inputs": [{"path": str, "checksum": str}],
    "tokenizer": (_TOKENIZER, {}),  # none where pairs without a receipt were merged
    "options": dict,
    "counts": {
        "documents": int,
        "tokens": int,
        "rejected": (None, {str: int}),
        "slices": (None, {str: {"documents": int, "tokens": int}}),
    },
    "lengths": [int],
    "outputs": {"dtype": str, "pairs": [_PAIR]},
}
_SHARD = {"number": int, "of": int, "counts": dict}


def receipt_path(prefix: str | os.PathLike[str]) -> Path:
    """Where the receipt of a prefix lies."""
    return Path(f"{os.fspath(prefix)}.receipt.json")


def read_receipt(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The receipt of a prefix, or None when there is none. Raises `UserError` when it is none of
    token files, or of another version, or damaged.
    """
    path = receipt_path(prefix)
    if not path.is_file():
        return None
    try:
        receipt = read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    except ValueError as error:
        receipt, problem = None, str(error)
    if receipt is not None:
        problem = _misfit(receipt, {"format": int, "kind": str}, "the receipt")
    if not problem and (receipt["format"], receipt["kind"]) != (FORMAT, "tokens"):
        problem = f"format {receipt['format']}, kind {receipt['kind']}"
    if not problem:
        shape = {**_SHAPE, "shard": _SHARD} if "shard" in receipt else _SHAPE
        problem = _misfit(receipt, shape, "the receipt")
    if problem:
        raise UserError(
            f"{path} is not a receipt of token files of this version ({problem}): "
            "bring back the one that was made with the files, or remove it"
        )
    return receipt


def _misfit(value: Any, shape: Any, name: str) -> str:
    """What in `value` is not as `shape` has it; "" when all is."""
    if isinstance(shape, tuple):
        found = [_misfit(value, choice, name) for choice in shape if choice != {} or value == {}]
        return "" if "" in found else found[-1]
    kind = shape if isinstance(shape, type | None) else type(shape)
    if (value is not None) if kind is None else (type(value) is not kind):
        return f"{name} is not {'null' if kind is None else kind.__name__}"
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, list):
        parts = [(entry, shape[0], f"{name}[{i}]") for i, entry in enumerate(value)]
    elif isinstance(shape, dict):
        wanted = dict.fromkeys(value, shape[str]) if str in shape else shape
        if missing := wanted.keys() - value.keys():
            return f"{name} has no {min(missing)}"
        parts = [(value[key], inner, key) for key, inner in wanted.items()]
    return next((problem for part in parts if (problem := _misfit(*part))), "")


def pairs_of(prefix: Path) -> list[Path]:
    """The pairs that a prefix stands for: itself, or the shards that its receipt lists."""
    receipt = None if indexed.paths(prefix)[1].exists() else read_receipt(prefix)
    if receipt is None:
        return [prefix]
    return [prefix.with_name(pair["prefix"]) for pair in receipt["outputs"]["pairs"]]


def write_receipt(prefix: str | os.PathLike[str], receipt: dict[str, Any]) -> dict[str, Any]:
    """Write a receipt with a checksum of itself; returns it."""
    receipt = {**receipt, "checksum": _own_checksum(receipt)}
    write_json(receipt_path(prefix), receipt)
    return receipt


def is_intact(receipt: dict[str, Any]) -> bool:
    """Whether a receipt says what it said when it was written."""
    return receipt.get("checksum") == _own_checksum(receipt)


def _own_checksum(receipt: dict[str, Any]) -> str:
    body = {key: value for key, value in receipt.items() if key != "checksum"}
    return f"xxh128:{xxhash.xxh3_128_hexdigest(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))}"


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as receipts name it."""
    return {
        "path": tokenizer.path,
        "kind": tokenizer.kind,
        "hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "bos_id": tokenizer.bos_id,
    }


def versions() -> dict[str, str]:
    """What produced the files."""
    found = {"python": platform.python_version()}
    for name in (
        "megatron-ext",
        "numpy",
        "sentencepiece",
        "tokenizers",
        "numba",
        "orjson",
        "zstandard",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command as it was typed."""
    import shlex

    return shlex.join(["data-tools", *sys.argv[1:]])


def histogram(lengths: np.ndarray) -> np.ndarray:
    """Documents by length: entry k counts lengths in [2^(k-1), 2^k), entry 0 counts length 0."""
    # frexp's exponent is exactly that k for every int32.
    exponents = np.frexp(lengths.astype(np.float64))[1]
    return np.bincount(exponents, minlength=BINS)[:BINS].astype(np.int64)
