"""`merge`: the same bytes as one run, refusals, damage noticed on the way, flat memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools import indexed
from data_tools.errors import Failure, UserError
from data_tools.merge import find_prefixes, merge
from data_tools.options import Options
from data_tools.receipt import receipt_path
from data_tools.splitting import split
from data_tools.tokenization import tokenize
from data_tools.verification import verify

from .conftest import documents, write_jsonl

megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.fixture
def pairs(model: str, tmp_path: Path) -> list[str]:
    made = []
    for name in "abc":
        source = write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i} text" for i in range(30)])
        tokenize([str(source)], model, tmp_path / name)
        made.append(str(tmp_path / name))
    return made


def test_megatron_merges_to_the_same_bytes(pairs: list[str], tmp_path: Path) -> None:
    merge(pairs, tmp_path / "ours")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix in pairs:
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{ending}").read_bytes()
        assert (tmp_path / f"ours.{ending}").read_bytes() == theirs
    assert verify(tmp_path / "ours") == []


def test_what_megatron_wrote_can_be_merged(tmp_path: Path) -> None:
    for name in "ab":
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        builder.add_document(np.arange(70_000, 70_007), [7])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    merge([str(tmp_path / "*.idx")], tmp_path / "out")
    assert documents(tmp_path / "out") == [list(range(70_000, 70_007))] * 2


def test_mixtures_are_refused(
    pairs: list[str], model: str, huggingface: str, tmp_path: Path
) -> None:
    source = str(tmp_path / "a.jsonl")
    tokenize([source], huggingface, tmp_path / "other")
    with pytest.raises(UserError, match="tokenizer's hash"):
        merge([*pairs, str(tmp_path / "other")], tmp_path / "out")
    tokenize([source], model, tmp_path / "bare", Options(append_eod=False))
    with pytest.raises(UserError, match="append_eod"):
        merge([*pairs, str(tmp_path / "bare")], tmp_path / "out")
    with pytest.raises(UserError, match="twice"):
        merge([*pairs, pairs[0]], tmp_path / "out")
    with pytest.raises(UserError, match="matches none"):
        merge([str(tmp_path / "nothing*.idx")], tmp_path / "out")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "wide.bin"), dtype=np.int32)
    builder.add_document(np.arange(7), [7])
    builder.finalize(str(tmp_path / "wide.idx"))
    with pytest.raises(UserError, match="int32"):
        merge([*pairs, str(tmp_path / "wide")], tmp_path / "out")
    receipt_path(pairs[1]).unlink()
    with pytest.raises(UserError, match="receipt"):
        merge(pairs, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("change", ["new file", "new size"])
def test_tasks_that_saw_different_inputs_are_refused(
    model: str, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [f"{i} text" for i in range(30)])
    tokenize([str(folder)], model, tmp_path / "t0", Options(task=(0, 2)))
    name = "b" if change == "new file" else "a"
    write_jsonl(folder / f"{name}.jsonl", [f"{i} more" for i in range(40)])
    tokenize([str(folder)], model, tmp_path / "t1", Options(task=(1, 2)))
    with pytest.raises(UserError, match="different inputs"):
        merge([str(tmp_path / "t0"), str(tmp_path / "t1")], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("fault", ["flip", "cut", "grow", "pointer"])
def test_a_damaged_input_is_noticed(pairs: list[str], tmp_path: Path, fault: str) -> None:
    bin_path, idx_path = indexed.paths(pairs[1])
    data, index = bytearray(bin_path.read_bytes()), bytearray(idx_path.read_bytes())
    if fault == "flip":
        data[100] ^= 1
    elif fault == "cut":
        del data[-10:]
    elif fault == "grow":
        data += b"12"
    else:
        index[indexed.HEADER_BYTES + 30 * 4 + 8 * 5] ^= 2
    bin_path.write_bytes(data)
    idx_path.write_bytes(index)
    with pytest.raises(Failure, match=r"/b\."):
        merge(pairs, tmp_path / "out")
    assert not (tmp_path / "out.bin").exists()


def test_globs_are_sorted_and_a_second_run_does_nothing(pairs: list[str], tmp_path: Path) -> None:
    assert find_prefixes([str(tmp_path / "?.idx")]) == pairs
    assert merge(pairs, tmp_path / "out")["reused"] is False
    assert merge(pairs, tmp_path / "out")["reused"] is True
    with pytest.raises(UserError, match="--overwrite"):
        merge(pairs[:2], tmp_path / "out")


def test_a_touched_input_can_be_merged_again(pairs: list[str], tmp_path: Path) -> None:
    first = merge(pairs, tmp_path / "out")
    os.utime(indexed.paths(pairs[1])[0], ns=(1, 1))
    with pytest.raises(UserError, match="--overwrite"):
        merge(pairs, tmp_path / "out")
    again = merge(pairs, tmp_path / "out", overwrite=True)
    assert again["outputs"] == first["outputs"] and again["reused"] is False
    assert verify(tmp_path / "out") == []


def test_a_touched_pair_can_be_split_again(pairs: list[str]) -> None:
    shares = {"train": 0.5, "test": 0.5}
    first = split(pairs[0], shares)
    os.utime(indexed.paths(pairs[0])[0], ns=(1, 1))
    with pytest.raises(UserError, match="--overwrite"):
        split(pairs[0], shares)
    again = split(pairs[0], shares, overwrite=True)
    assert again["train"]["outputs"] == first["train"]["outputs"]


def test_memory_does_not_grow_with_documents(tmp_path: Path) -> None:
    """Three million documents take 60 MB of index; merging them takes a fixed amount."""
    peaks = []
    for count in (10_000, 3_000_000):
        prefix = tmp_path / f"n{count}"
        bin_path, idx_path = indexed.paths(prefix)
        np.ones(count, dtype=np.uint16).tofile(bin_path)
        with open(idx_path, "wb") as stream:
            indexed.write_index(stream, np.uint16, np.ones(count, dtype=np.int32))
        script = (
            "import sys\n"
            "from data_tools.merge import merge\n"
            "merge([sys.argv[1]], sys.argv[2])\n"
            "status = open('/proc/self/status').read()\n"
            "print(*(status.split(key)[1].split()[0] for key in ('RssAnon:', 'VmHWM:')))\n"
        )
        command = [sys.executable, "-c", script, str(prefix), f"{prefix}-out"]
        root = Path(__file__).parents[2]
        peaks.append(
            subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.split()
        )
    # Pages of memory-mapped input are the system's; ours stay below one chunk's 100 MB.
    assert int(peaks[1][0]) - int(peaks[0][0]) < 30_000
    assert int(peaks[1][1]) - int(peaks[0][1]) < 160_000
