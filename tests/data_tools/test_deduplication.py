"""`dedup`: what is reported, what is removed, what is left alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_tools.deduplication import deduplicate, normalise
from data_tools.errors import UserError

from .conftest import library_text, write_jsonl


def report_of(path: Path) -> list[tuple[str, int, str, int]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        (
            Path(r["file"]).name,
            r["line"],
            Path(r["duplicate_of"]["file"]).name,
            r["duplicate_of"]["line"],
        )
        for r in records
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "a.jsonl", ["One two, three.", "unique", "ONE  two\nthree"])
    write_jsonl(data / "b.jsonl.gz", ["other", "one two three!", "Unique"])
    return data


def test_exact_duplicates_are_reported_first_kept(folder: Path, tmp_path: Path) -> None:
    found = deduplicate([str(folder)], tmp_path / "report.jsonl")
    assert report_of(tmp_path / "report.jsonl") == [
        ("a.jsonl", 3, "a.jsonl", 1),
        ("b.jsonl.gz", 2, "a.jsonl", 1),
        ("b.jsonl.gz", 3, "a.jsonl", 2),
    ]
    assert (found["documents"], found["duplicates"], found["removed"]) == (6, 3, False)


def test_removing_leaves_the_inputs_and_keeps_every_other_line(
    folder: Path, tmp_path: Path
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with open(folder / "a.jsonl", "ab") as stream:
        stream.write(b"not json\n")
    before["a.jsonl"] += b"not json\n"
    deduplicate([str(folder)], tmp_path / "report.jsonl", output=tmp_path / "clean")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    lines = (tmp_path / "clean" / "a.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["text"] for line in lines[:2]] == ["One two, three.", "unique"]
    assert lines[2:] == [b"not json"]
    (line,) = (tmp_path / "clean" / "b.jsonl").read_bytes().splitlines()
    assert json.loads(line)["text"] == "other"
    with pytest.raises(UserError, match="overwrite an input"):
        deduplicate([str(folder / "a.jsonl")], tmp_path / "r", output=folder)


def test_normalising_looks_at_words_only() -> None:
    assert normalise("Ｈello,\tWORLD… x²") == ["hello", "world", "x2"]


def test_documents_without_words_are_compared_as_they_are(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["🙂🙂", "!!!", "🙂🙂", "— …", "word", "?"])
    for near in (False, True):
        if near:
            pytest.importorskip("datasketch")
        deduplicate([str(tmp_path / "x.jsonl")], tmp_path / "report.jsonl", near=near)
        assert report_of(tmp_path / "report.jsonl") == [("x.jsonl", 3, "x.jsonl", 1)]


def test_near_duplicates(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    rng = random.Random(0)
    texts = [text[:6000] for text in library_text()]
    changed = []
    for text in texts[:3]:
        words = text.split(" ")
        words[rng.randrange(len(words))] = "changed"
        changed.append(" ".join(words))
    write_jsonl(tmp_path / "x.jsonl", [*texts, *changed])
    report = tmp_path / "report.jsonl"
    assert deduplicate([str(tmp_path / "x.jsonl")], report)["duplicates"] == 0
    found = deduplicate([str(tmp_path / "x.jsonl")], report, near=True)
    assert found["near"] == 3
    n = len(texts)
    assert report_of(report) == [("x.jsonl", n + 1 + i, "x.jsonl", 1 + i) for i in range(3)]
