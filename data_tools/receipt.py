"""What went in and what came out: PREFIX.receipt.json beside every .bin/.idx pair.

    receipt = read_receipt("corpus")          # or None
    receipt["counts"]["tokens"], receipt["tokenizer"]["hash"], receipt["outputs"]["pairs"][0]["bin"]

Keys that other programs read and that stay: inputs, tokenizer.{path,hash,vocab_size,eod_id,bos_id},
options, counts.{documents,tokens,characters,bytes,rejected,slices}, lengths, outputs, versions,
command. In `counts`, null says that it was not counted (a shard alone, a pair without a receipt).
The receipt is written last: where it is absent, the pair is not finished.
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

from data_tools.errors import UserError
from data_tools.files import read_json, write_json
from data_tools.tokenizer import Tokenizer

FORMAT = 1
BINS = 40  # powers of two of the histogram


def receipt_path(prefix: str | os.PathLike[str]) -> Path:
    """Where the receipt of a prefix lies."""
    return Path(f"{os.fspath(prefix)}.receipt.json")


def read_receipt(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The receipt of a prefix, or None when there is none. Raises `UserError` when it is
    unreadable.
    """
    path = receipt_path(prefix)
    if not path.is_file():
        return None
    try:
        receipt = read_json(path)
        if receipt["format"] != FORMAT:
            raise ValueError(f"format {receipt['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a receipt of this version ({error}): remove it or make it anew"
        ) from error
    return receipt


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
