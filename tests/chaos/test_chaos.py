"""A short round of what `make chaos ROUNDS=100` does at length."""

from pathlib import Path

import pytest

from tests.chaos.rounds import chaos, write_config


def test_killed_while_saving_and_in_a_step_nothing_is_lost(tmp_path: Path, corpus: Path) -> None:
    plan = [("SIGKILL rank", "save"), ("SIGKILL launcher", "step")]
    report = chaos(tmp_path, write_config(tmp_path, corpus), len(plan), seed=1, plan=plan)
    assert report.ok, report.text()
    assert report.struck.total() == 2 and report.finished == 1 and report.compared > 60


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, corpus: Path) -> None:
    report = chaos(tmp_path, write_config(tmp_path, corpus), rounds=12, seed=2)
    assert report.ok, report.text()
