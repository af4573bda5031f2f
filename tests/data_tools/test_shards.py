"""Shards and the tasks of an array job: the same bytes and counts when they are merged."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.merge import merge
from data_tools.options import Options
from data_tools.receipt import read_receipt
from data_tools.tokenization import tokenize
from data_tools.verification import verify

from .conftest import (
    outputs,
    read_lines_of,
    write_jsonl,
)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("tasks", [2, 5])
def test_tasks_merge_to_the_same_bytes_and_counts(
    reference: Path, texts: list[str], model: str, tmp_path: Path, ending: str, tasks: int
) -> None:
    for i in range(4):
        write_jsonl(tmp_path / f"{i}-c4.jsonl{ending}", texts[75 * i : 75 * (i + 1)])
    for i in range(tasks):
        tokenize([str(tmp_path)], model, tmp_path / f"t{i}", Options(task=(i, tasks)))
    receipt = merge([str(tmp_path / f"t{i}") for i in range(tasks)], tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(reference / "out")
    whole = read_receipt(reference / "out")
    assert whole is not None
    assert receipt["counts"] == whole["counts"]
    assert receipt["lengths"] == whole["lengths"]
    with pytest.raises(UserError, match="missing"):
        merge([str(tmp_path / f"t{i}") for i in range(1, tasks)], tmp_path / "part")
    with pytest.raises(UserError, match="order"):
        merge([str(tmp_path / f"t{i}") for i in reversed(range(tasks))], tmp_path / "part")


def test_shards_merge_to_the_same_bytes(reference: Path, model: str, tmp_path: Path) -> None:
    options = Options(shard_tokens=20_000, part_bytes=4096)
    receipt = tokenize([str(reference / "c4.jsonl")], model, tmp_path / "out", options)
    pairs = receipt["outputs"]["pairs"]
    assert len(pairs) > 3
    assert all(pair["tokens"] >= 20_000 for pair in pairs[:-1])
    assert verify(tmp_path / "out") == []
    assert verify(tmp_path / pairs[1]["prefix"]) == []
    merge([str(tmp_path / pair["prefix"]) for pair in pairs], tmp_path / "merged")
    assert outputs(tmp_path / "merged") == outputs(reference / "out")


def test_a_merge_of_shards_has_a_true_receipt(reference: Path, model: str, tmp_path: Path) -> None:
    options = Options(shard_tokens=20_000, part_bytes=4096)
    whole = tokenize([str(reference / "c4.jsonl")], model, tmp_path / "out", options)
    names = [str(tmp_path / pair["prefix"]) for pair in whole["outputs"]["pairs"]]
    merged = merge(names, tmp_path / "merged")
    for key in ("inputs", "counts", "lengths"):
        assert merged[key] == whole[key]
    # Characters and slices of some shards alone are nowhere counted: null, not zero.
    some = merge(names[:2], tmp_path / "some")
    assert {key for key, value in some["counts"].items() if value is not None} == {
        "documents", "tokens",
    }  # fmt: skip
    assert some["counts"]["documents"] == sum(
        pair["documents"] for pair in whole["outputs"]["pairs"][:2]
    )
    assert some["inputs"] == whole["inputs"]


def test_a_glob_that_misses_a_shard_is_refused(
    reference: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(shard_tokens=20_000, part_bytes=4096)
    tokenize([str(reference / "c4.jsonl")], model, tmp_path / "out", options)
    globs = [str(tmp_path / f"out-0000{numbers}.idx") for numbers in ("[01]", "[2-9]")]
    merge(globs, tmp_path / "all")
    for file in tmp_path.glob("out-00001.*"):
        file.unlink()
    with pytest.raises(UserError, match=r"out-00001 is missing of the \d+ shards of"):
        merge(globs, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
    assert capsys.readouterr().err == ""
    merge([str(tmp_path / "out-00000"), str(tmp_path / "out-00002")], tmp_path / "merged")
    assert "out-00001 is missing of the" in capsys.readouterr().err


def test_a_merge_of_shards_has_the_rejected_lines_once(
    reference: Path, model: str, tmp_path: Path
) -> None:
    source = tmp_path / "c4.jsonl"
    source.write_bytes((reference / "c4.jsonl").read_bytes() + b"no json\n")
    options = Options(shard_tokens=20_000, part_bytes=4096)
    receipt = tokenize([str(source)], model, tmp_path / "out", options, max_rejected="1")
    names = [str(tmp_path / pair["prefix"]) for pair in receipt["outputs"]["pairs"]]
    merge(names, tmp_path / "merged")
    listed = read_lines_of(tmp_path / "merged.rejected.jsonl")
    assert listed == read_lines_of(tmp_path / "out.rejected.jsonl")
    assert len(listed) == 1


def test_shards_do_not_replace_files_that_are_none_of_theirs(
    reference: Path, model: str, tmp_path: Path
) -> None:
    (tmp_path / "out-00001.bin").write_bytes(b"precious")
    options = Options(shard_tokens=20_000)
    with pytest.raises(UserError, match=r"out-00001\.bin exists"):
        tokenize([str(reference / "c4.jsonl")], model, tmp_path / "out", options)
    assert (tmp_path / "out-00001.bin").read_bytes() == b"precious"
    tokenize([str(reference / "c4.jsonl")], model, tmp_path / "out", options, overwrite=True)
    assert verify(tmp_path / "out") == []


def test_overwriting_shards_leaves_none_of_the_old(
    reference: Path, model: str, tmp_path: Path
) -> None:
    source = [str(reference / "c4.jsonl")]
    tokenize(source, model, tmp_path / "out", Options(shard_tokens=20_000))
    (tmp_path / "out-other.bin").write_bytes(b"not ours")
    few = tokenize(source, model, tmp_path / "out", Options(shard_tokens=60_000), overwrite=True)
    kept = {pair["prefix"] for pair in few["outputs"]["pairs"]}
    found = {path.name.split(".")[0] for path in tmp_path.glob("out*")}
    assert found == kept | {"out", "out-other"}
    assert verify(tmp_path / "out") == []
    # Shards merged under their own name are inputs, and stay.
    merge([str(tmp_path / name) for name in sorted(kept)], tmp_path / "out", overwrite=True)
    assert all((tmp_path / f"{name}.bin").exists() for name in kept)
    tokenize(source, model, tmp_path / "out", Options(shard_tokens=60_000), overwrite=True)
    tokenize(source, model, tmp_path / "out", overwrite=True)
    assert {path.name for path in tmp_path.glob("out*")} == {
        "out.bin", "out.idx", "out.receipt.json", "out-other.bin",
    }  # fmt: skip
