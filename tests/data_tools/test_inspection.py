"""inspect, lengths, peek and split on a pair whose content is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.errors import Failure, UserError
from data_tools.inspection import context_lengths, peek, summary
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
