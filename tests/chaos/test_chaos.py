"""A short round of what `make chaos ROUNDS=100` does at length."""

import itertools
import random
import time
from pathlib import Path

import pytest

from tests.chaos import rounds
from tests.chaos.rounds import MOMENTS, STRIKES, Run, chaos, draw, write_config


def test_what_a_rank_has_started_is_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank of the real run has started the watchdog; to kill that is another thing."""
    family = "(sleep 60 & wait) & (sleep 60 & wait) & wait"
    monkeypatch.setattr(rounds, "launch", lambda *_, **__: ["bash", "-c", family])
    run = Run(tmp_path / "none.yaml", tmp_path / "run")
    deadline = time.monotonic() + 30
    while len(run.members()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [rank.ppid() for rank in run.ranks()] == [run.process.pid] * 2
    members = run.members()
    run.sweep()
    assert not any(member.is_running() for member in members)


def test_every_strike_comes_at_every_moment_before_one_comes_again() -> None:
    pairs = set(itertools.product(STRIKES, MOMENTS))
    assert set(draw(len(pairs), random.Random(1))) == pairs
    assert len(draw(100, random.Random(1))) == 100
    assert len(set(draw(10, random.Random(1)))) == 10


def test_killed_while_saving_nothing_is_lost(tmp_path: Path, corpus: Path) -> None:
    plan = [("SIGKILL rank", "save")]
    config = write_config(tmp_path, corpus, steps=24)
    report = chaos(tmp_path, config, len(plan), seed=1, plan=plan)
    assert report.ok, report.text()
    assert report.struck.total() == 1 and report.finished == 1 and report.compared > 12


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, corpus: Path) -> None:
    report = chaos(tmp_path, write_config(tmp_path, corpus), rounds=12, seed=2)
    assert report.ok, report.text()
