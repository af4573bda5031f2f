"""inspect, lengths, peek and split on a pair whose content is known."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.errors import Failure, UserError
from data_tools.inspection import context_lengths, peek, summary
from data_tools.merge import merge
from data_tools.receipt import histogram
from data_tools.splitting import split
from data_tools.tokenization import tokenize
from data_tools.verification import verify

from .conftest import documents, flip_a_bit, library_text, write_jsonl


@pytest.fixture(scope="module")
def texts() -> list[str]:
    text = library_text()[0]
    return [text[i * 37 : i * 37 + 1 + i * 9] for i in range(200)]


@pytest.fixture(scope="module")
def prefix(texts: list[str], model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_jsonl(folder / "arxiv.jsonl", texts)
    tokenize([str(folder / "arxiv.jsonl")], model, folder / "out")
    return folder / "out"


def test_summary_counts_what_is_there(prefix: Path) -> None:
    lengths = np.array([len(d) for d in documents(prefix)])
    found = summary(prefix)
    assert (found["documents"], found["tokens"]) == (200, lengths.sum())
    assert found["longest"] == lengths.max()
    assert found["percentiles"]["50"] == np.percentile(lengths, 50)
    assert sum(found["histogram"]) == 200
    assert found["slices"]["arxiv"]["documents"] == 200


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 1023, 1024, 2**31 - 1])
def test_histogram_bins_are_powers_of_two(length: int) -> None:
    assert histogram(np.array([length], dtype=np.int32))[length.bit_length()] == 1


def test_context_lengths(prefix: Path) -> None:
    lengths = [len(d) for d in documents(prefix)]
    for row in context_lengths(prefix, [10, 100, 10**6]):
        longer = [n for n in lengths if n > row["context"]]
        assert row["documents_longer"] == len(longer)
        assert row["share_of_tokens"] == pytest.approx(sum(longer) / sum(lengths))
        beyond = sum(n - row["context"] for n in longer)
        assert row["share_of_tokens_beyond"] == pytest.approx(beyond / sum(lengths))


def test_peek_gives_the_text_back(prefix: Path, texts: list[str]) -> None:
    found = peek(prefix, [0, 7, -1])
    assert [one["document"] for one in found] == [0, 7, 199]
    # sentencepiece writes EOD as nothing.
    assert [one["text"] for one in found] == [texts[0], texts[7], texts[199]]
    assert peek(prefix, sample=5, seed=3) == peek(prefix, sample=5, seed=3)
    with pytest.raises(UserError, match="200"):
        peek(prefix, [200])


def test_peek_refuses_another_tokenizer(prefix: Path, huggingface: str) -> None:
    with pytest.raises(UserError, match="is not the one"):
        peek(prefix, [0], tokenizer=huggingface)


def test_commands_print_text_and_json(prefix: Path, capsys) -> None:
    for command in ("inspect", "lengths", "peek", "verify"):
        assert main([command, str(prefix)]) == 0
        assert capsys.readouterr().out.strip()
        assert main([command, str(prefix), "--json"]) == 0
        json.loads(capsys.readouterr().out)


def test_either_file_of_a_pair_stands_for_it(prefix: Path, capsys) -> None:
    for command in (["inspect"], ["peek"], ["lengths"], ["verify"]):
        printed = set()
        for ending in ("", ".bin", ".idx"):
            assert main([*command, f"{prefix}{ending}", "--json"]) == 0
            printed.add(capsys.readouterr().out)
            assert main([*command, f"{prefix}{ending}"]) == 0
            assert "no receipt" not in capsys.readouterr().out
        assert len(printed) == 1


def test_shards_are_looked_into_as_one(prefix: Path, model: str, tmp_path: Path, capsys) -> None:
    source, shards = str(prefix.with_name("arxiv.jsonl")), tmp_path / "sh"
    command = ["tokenize", source, "--tokenizer", model, "--output", str(shards), "--workers", "1"]
    assert main([*command, "--shard-tokens", "30000", "--quiet"]) == 0
    printed = capsys.readouterr().out
    for word in (f"{shards}-00000.bin/.idx to {shards}-0000", "pairs): written, 200 documents"):
        assert word in printed
    whole, found = summary(prefix), summary(shards)
    for key in ("documents", "tokens", "bytes", "longest", "percentiles", "histogram", "slices"):
        assert found[key] == whole[key]
    assert context_lengths(shards) == context_lengths(prefix)
    numbers = [0, 60, 120, 180, -1]
    assert peek(shards, numbers, sample=9) == peek(prefix, numbers, sample=9)
    merge([str(shards)], tmp_path / "merged")
    assert (tmp_path / "merged.bin").read_bytes() == Path(f"{prefix}.bin").read_bytes()
    with pytest.raises(UserError, match="merge"):
        split(shards, {"train": 0.5, "test": 0.5})


def test_text_cannot_command_the_terminal(
    model: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["caf\u0119 \x1b[31mred\x9b\n\tend"])
    tokenize([str(tmp_path / "x.jsonl")], model, tmp_path / "x")
    assert main(["peek", str(tmp_path / "x")]) == 0
    assert "caf\u0119 \\x1b[31mred\\x9b\n\tend" in capsys.readouterr().out
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", latin)
    assert main(["peek", str(tmp_path / "x")]) == 0
    latin.seek(0)
    assert "caf\\u0119 " in latin.read()


def test_a_document_beyond_the_end_of_bin_is_no_document(prefix: Path, tmp_path: Path) -> None:
    for ending in ("bin", "idx", "receipt.json"):
        shutil.copy(f"{prefix}.{ending}", tmp_path)
    os.truncate(tmp_path / "out.bin", 1000)
    assert peek(tmp_path / "out", [0])
    with pytest.raises(Failure, match="document 199"):
        peek(tmp_path / "out", [-1])


def test_what_may_not_be_read_is_named(prefix: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def refuse(path: object, *rest: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    assert main(["inspect", str(prefix)]) == 2
    assert "out.idx cannot be read" in capsys.readouterr().err


def test_split_is_disjoint_complete_and_stable(
    prefix: Path, texts: list[str], model: str, tmp_path: Path
) -> None:
    shares = {"train": 0.6, "valid": 0.2, "test": 0.2}
    write_jsonl(tmp_path / "old.jsonl", texts)
    write_jsonl(tmp_path / "new.jsonl", [*(f"new {t}" for t in texts), *texts, *texts[:50]])
    sets: dict[str, dict[str, list]] = {}
    for name in ("old", "new"):
        tokenize([str(tmp_path / f"{name}.jsonl")], model, tmp_path / name)
        receipts = split(tmp_path / name, shares)
        assert all(verify(tmp_path / f"{name}-{s}") == [] for s in shares)
        sets[name] = {s: documents(tmp_path / f"{name}-{s}") for s in shares}
        total = sum(receipt["counts"]["documents"] for receipt in receipts.values())
        assert total == len(documents(tmp_path / name))
    assert sorted(d for one in sets["old"].values() for d in one) == sorted(
        documents(tmp_path / "old")
    )
    for one in shares:
        assert len(sets["old"][one]) == pytest.approx(shares[one] * 200, abs=35)
        assert all(document in sets["new"][one] for document in sets["old"][one])
        for other in set(shares) - {one}:
            there = {tuple(d) for d in sets["new"][other]}
            assert not any(tuple(d) in there for d in sets["new"][one])
    with pytest.raises(UserError, match="add up to 1"):
        split(tmp_path / "old", {"train": 0.9})


def test_split_of_a_damaged_pair_is_refused(texts: list[str], model: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", texts)
    tokenize([str(tmp_path / "docs.jsonl")], model, tmp_path / "docs")
    flip_a_bit(tmp_path / "docs.bin", at=1000)
    with pytest.raises(Failure, match=r"docs\.bin differs from the checksum"):
        split(tmp_path / "docs", {"train": 0.9, "valid": 0.1})
    assert not list(tmp_path.glob("docs-*.bin"))
