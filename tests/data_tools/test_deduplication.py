"""`dedup`: what is reported, what is removed, what is left alone."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.deduplication import deduplicate, normalise
from data_tools.errors import UserError
from data_tools.lock import exclusive

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
    with pytest.raises(UserError, match="is an input"):
        deduplicate([str(folder / "a.jsonl")], tmp_path / "r", output=folder)


@pytest.mark.parametrize(
    ("report", "output", "words"),
    [
        ("data/a.jsonl", None, "is an input"),
        ("data/../link.jsonl", None, "is an input"),
        ("mine/a.jsonl", "mine", "report and a cleaned file"),
        ("r", "kept", "kept/a.jsonl exists"),
        ("kept/a.jsonl", None, "kept/a.jsonl exists"),
        ("kept/a.jsonl/r", None, "cannot be written"),
        ("r", "kept/a.jsonl/x", "cannot be written"),
    ],
)
def test_no_file_that_is_there_is_replaced_unasked(
    folder: Path, tmp_path: Path, report: str, output: str | None, words: str, capsys
) -> None:
    (tmp_path / "link.jsonl").symlink_to(folder / "a.jsonl")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.jsonl").write_text("precious")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    command = ["dedup", str(folder), "--report", str(tmp_path / report)]
    command += ["--output", str(tmp_path / output)] if output else []
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_asked_for_what_is_there_is_replaced_but_never_an_input(
    folder: Path, tmp_path: Path
) -> None:
    for overwrite in (False, True):
        deduplicate([str(folder)], tmp_path / "r", output=tmp_path / "clean", overwrite=overwrite)
    assert len(report_of(tmp_path / "r")) == 3
    with pytest.raises(UserError, match="is an input"):
        deduplicate([str(folder)], folder / "b.jsonl.gz", overwrite=True)


def test_a_second_dedup_on_the_same_files_is_refused(folder: Path, tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / ".r.lock", "--report r"),
        pytest.raises(UserError, match="another data-tools is writing"),
    ):
        deduplicate([str(folder)], tmp_path / "r")
    deduplicate([str(folder)], tmp_path / "r")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["r"]


def test_what_another_dedup_wrote_meanwhile_is_not_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def after_another(path: Path, output: str) -> Iterator[None]:
        (tmp_path / "r").write_text("its report")
        yield

    monkeypatch.setattr("data_tools.deduplication.exclusive", after_another)
    with pytest.raises(UserError, match="exists"):
        deduplicate([str(folder)], tmp_path / "r")
    assert (tmp_path / "r").read_text() == "its report"


def test_a_line_too_long_to_copy_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("deduplication", "reading", "lines"):
        monkeypatch.setattr(f"data_tools.{module}.MAX_LINE_BYTES", 200, raising=False)
    write_jsonl(folder / "z.jsonl", ["x" * 300])
    with pytest.raises(UserError, match=r"too many to copy: leave --output out"):
        deduplicate([str(folder)], tmp_path / "r", output=tmp_path / "clean")
    assert not (tmp_path / "r").exists() and not list((tmp_path / "clean").rglob("*.jsonl"))


def test_lines_without_a_document_are_counted(folder: Path, tmp_path: Path, capsys) -> None:
    with open(folder / "a.jsonl", "ab") as stream:
        stream.write(b"not json\n{}\n\n")
    assert main(["dedup", str(folder), "--report", str(tmp_path / "r")]) == 0
    words = "3 lines passed over (1 not JSON, 1 no text key, 1 blank line)"
    assert words in capsys.readouterr().out


def test_parquet_and_standard_input_are_reported_and_not_rewritten(
    tmp_path: Path, monkeypatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "x.parquet")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "Two"}\n')))
    inputs = [str(tmp_path / "x.parquet"), "-"]
    with pytest.raises(UserError, match="--output"):
        deduplicate(inputs, tmp_path / "r", output=tmp_path / "clean")
    deduplicate(inputs, tmp_path / "r")
    assert report_of(tmp_path / "r") == [("-", 1, "x.parquet", 2)]


@pytest.mark.parametrize("threshold", [0, 0.99, 1, 1.1, float("nan")])
def test_similarities_that_cannot_be_searched_for_are_refused(
    folder: Path, tmp_path: Path, threshold: float
) -> None:
    with pytest.raises(UserError, match="--threshold"):
        deduplicate([str(folder)], tmp_path / "r", near=True, threshold=threshold)


def test_normalising_looks_at_words_only() -> None:
    assert normalise("Ｈello,\tWORLD… x²") == ["hello", "world", "x2"]


def test_documents_without_words_are_compared_as_they_are(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["🙂🙂", "!!!", "🙂🙂", "— …", "word", "?"])
    for near in (False, True):
        if near:
            pytest.importorskip("datasketch")
        source, report = str(tmp_path / "x.jsonl"), tmp_path / "report.jsonl"
        deduplicate([source], report, near=near, overwrite=near)
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
    found = deduplicate([str(tmp_path / "x.jsonl")], report, near=True, overwrite=True)
    assert found["near"] == 3
    n = len(texts)
    assert report_of(report) == [("x.jsonl", n + 1 + i, "x.jsonl", 1 + i) for i in range(3)]
