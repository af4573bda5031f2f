"""The progress line: rates count from the start of this run, and nothing that was done before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_tools import progress
from data_tools.tokenization import tokenize
from tests.data_tools.conftest import write_jsonl


@pytest.mark.parametrize("done_before", [0, 600])
def test_share_rate_and_time_left(
    capsys, monkeypatch: pytest.MonkeyPatch, done_before: int
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress("tokenize", total=1000) as shown:
        shown.update(done_before, 0)
        now += 20
        shown.update(done_before + 200, 40_000_000, documents=3, tokens=5000)
        now += 1  # not yet time for a line
        shown.update(done_before + 210, 41_000_000, documents=4, tokens=6000)
    left = "0:01:20" if done_before == 0 else "0:00:20"
    share = (done_before + 200) / 10
    assert capsys.readouterr().err == (
        f"tokenize: {share:.1f}%, 3 documents, 5,000 tokens, 2.0 MB/s, {left} left\n"
    )


def test_a_run_of_one_part_has_a_rate(
    model: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    source = write_jsonl(tmp_path / "x.jsonl", ["some words of text"] * 5000)
    tokenize([str(source)], model, tmp_path / "out", quiet=False)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tokenize: 100.0%, 5,000 documents, ")
    assert float(re.findall(r"([\d.]+) MB/s", last)[0]) > 0
