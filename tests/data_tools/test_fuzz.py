"""Mutated input: no exception but ours, no good document lost, every bad line accounted for.

The judge is Python's json module, line by line, and the tokenizer's own library.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import pytest
import zstandard

from data_tools.encoding import make_encoder
from data_tools.errors import Failure
from data_tools.options import Options
from data_tools.tokenization import tokenize
from data_tools.tokenizer import Tokenizer, load_tokenizer

from .conftest import documents

TEXTS = ["hello world", "naïve café 🙂", "a\nb\tc", "</s><s>", "x" * 40, " \u2581 ", "0123 45"]
SPLICES = [
    b"\n", b"\r", b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b'"', b"\\", b"{", b"}", b"[", b",",
    b"\\u0000", b"\\ud800", b"\\udc00", b"NaN", b"null", b"1e999", b'"text"', b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"\x1f\x8b", b"\n\n", b'{"text": "whole"}\n',
]  # fmt: skip
COMPRESS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def judge(line: bytes) -> str | None:
    """The text of a good line, None for a bad one."""
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
        text = value["text"] if isinstance(value, dict) else None
        if isinstance(text, str) and text:
            text.encode()
            return text
    except (ValueError, KeyError, RecursionError):
        pass
    return None


def corpus(rng: random.Random) -> bytes:
    lines = []
    for _ in range(rng.randrange(1, 9)):
        value = {"text": rng.choice(TEXTS), "meta": {"source": rng.choice(["c4", "", "x"])}}
        lines.append(json.dumps(value, ensure_ascii=rng.random() < 0.5).encode())
    return b"\n".join(lines) + (b"\n" if rng.random() < 0.8 else b"")


def mutate(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(made) + 1)
        kind = rng.randrange(5)
        if kind == 0 and made:
            made[place % len(made)] = rng.randrange(256)
        elif kind == 1:
            made[place:place] = rng.choice(SPLICES)
        elif kind == 2:
            del made[place : place + rng.randrange(1, 30)]
        elif kind == 3:
            made[place:place] = made[place : place + rng.randrange(1, 60)]
        else:
            made = made[:place]
    return bytes(made)


def read_archive(data: bytes, ending: str) -> bytes | None:
    """What an independent reader makes of an archive; None when it is broken."""
    try:
        if ending == ".gz":
            return gzip.decompress(data) if data else None
        new = {
            ".zst": zstandard.ZstdDecompressor().decompressobj,
            ".bz2": bz2.BZ2Decompressor,
            ".xz": lzma.LZMADecompressor,
        }[ending]
        whole, rest = b"", data
        while rest:
            one = new()
            whole += one.decompress(rest)
            if not one.eof:
                return None
            rest = one.unused_data
            while ending == ".xz" and rest.startswith(bytes(4)):
                rest = rest[4:]
        return whole if data else None
    except Exception:
        return None


def fuzz(rounds: int, seed: int, folder: Path, model: str, tokenizer: Tokenizer) -> dict[str, int]:
    """Run mutated inputs; returns what was seen. Asserts what the module promises."""
    rng = random.Random(seed)
    seen = dict.fromkeys(("inputs", "good", "bad", "broken archives"), 0)
    for k in range(rounds):
        ending = rng.choice(["", "", "", ".gz", ".zst", ".bz2", ".xz"])
        plain = mutate(corpus(rng), rng)
        if ending:
            data = COMPRESS[ending](plain)
            if rng.random() < 0.3:
                data += COMPRESS[ending](corpus(rng))
            if rng.random() < 0.5:
                data = mutate(data, rng)
        else:
            data = plain
        path, prefix = folder / f"{k}.jsonl{ending}", folder / f"{k}"
        path.write_bytes(data)
        seen["inputs"] += 1
        options = Options(part_bytes=rng.choice([1, 7, 64, 1 << 20]))
        content = read_archive(data, ending) if ending else data
        try:
            receipt = tokenize([str(path)], model, prefix, options, max_rejected="1.0")
        except Failure as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            # Cut or altered archives are refused, whole ones and plain files never.
            assert ending and path.name in refused, (k, data)
            assert content is None, (k, data)
            seen["broken archives"] += 1
            continue
        if ending and content is None:
            raise AssertionError(f"a broken archive was taken for whole: {data!r}")
        assert content is not None
        lines = content.split(b"\n")
        if lines[-1] == b"":
            lines.pop()
        texts = [judge(line) for line in lines]
        want = [[*tokenizer.encode(text).tolist(), 2] for text in texts if text is not None]
        assert documents(prefix) == want, (k, data)
        rejected = Path(f"{prefix}.rejected.jsonl")
        records = (
            [json.loads(r) for r in rejected.read_text().splitlines()] if rejected.exists() else []
        )
        bad = [i for i, text in enumerate(texts, 1) if text is None]
        assert [record["line"] for record in records] == bad, (k, data)
        for record in records:
            line = content[record["offset"] : record["offset"] + record["bytes"]]
            assert line == lines[record["line"] - 1]
        assert receipt["counts"]["lines"] == len(lines)
        seen["good"] += len(want)
        seen["bad"] += len(bad)
        for leftover in folder.glob(f"{k}.*"):
            leftover.unlink()
    return seen


@pytest.fixture(autouse=True)
def _one_encoder(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of tiny runs share the kernel and its cache; a run builds its own otherwise."""
    encoder = make_encoder(load_tokenizer(model))
    monkeypatch.setattr("data_tools.tokenization.make_encoder", lambda *_: encoder)


def test_mutated_inputs(model: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen = fuzz(300, 0, tmp_path, model, tokenizer)
    assert min(seen.values()) > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_mutated_inputs(model: str, tmp_path: Path, capsys) -> None:
    seen = fuzz(10_000, 1, tmp_path, model, load_tokenizer(model))
    with capsys.disabled():
        print("\nfuzz:", ", ".join(f"{count:,} {name}" for name, count in seen.items()))
