"""Steps that are refused, their documents, and rolling back, with real runs."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import read_index
from megatron_ext.config import load_config
from megatron_ext.training.guard import LossGuard
from megatron_ext.training.status import read_status
from megatron_ext.training.step import StepResult
from tests.conftest import metrics, pretrain
from tests.training.test_resume import kill_all, numbers, start, wait_for_step

FINE = StepResult(loss=2.0, grad_norm=1.0, lr=1e-3, skipped=False, stop=False)
# At this rate the loss of the tiny model jumps up and down by itself.
NOISY = [
    "optimizer.lr=3e-2",
    "schedule.type=constant",
    "training.steps=24",
    "checkpoint.interval=8",
]
SPIKES = ["faults.spike_sigma=0.7", "faults.spike_window=4", "faults.max_consecutive_skips=20"]


def guard(config_file: Path, *settings: str) -> LossGuard:
    return LossGuard(load_config(config_file, list(settings)), {})


def test_a_spike_is_so_many_deviations_above_the_mean_of_the_window(config_file: Path) -> None:
    settings = ["faults.spike_sigma=3", "faults.spike_window=50", "faults.spike_action=skip"]
    judge = guard(config_file, *settings)
    losses = [random.Random(0).gauss(2.0, 0.1) for _ in range(50)]
    for loss in losses[:-1]:
        assert not judge.refuses(100.0)  # too few to know
        assert judge.judge(replace(FINE, loss=loss)) == ""
    judge.judge(replace(FINE, loss=losses[-1]))
    limit = np.mean(losses) + 3 * np.std(losses)
    assert judge.refuses(limit + 1e-9) and not judge.refuses(limit - 1e-9)


def test_a_skipped_loss_does_not_move_the_window(config_file: Path) -> None:
    judge = guard(config_file, "faults.spike_sigma=1", "faults.spike_window=2")
    judge.judge(FINE)
    assert judge.judge(replace(FINE, loss=math.nan, grad_norm=math.nan, skipped=True))
    assert list(judge.window) == [2.0]


def test_faulty_step_names_its_documents(config_file: Path, tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    pretrain(config_file, "model.init_std=1e30", "faults.max_consecutive_skips=0", code=1)
    record = metrics(run_dir)[-1]
    assert (record["fault"], record["action"]) == ("non-finite loss", "skipped")
    batch = json.loads(Path(record["batch"]).read_text())["batch"]
    assert [sample["sample"] for sample in batch] == list(range(8))
    assert {sample["path"] for sample in batch} == {str(corpus)}
    # The documents named hold the very tokens: their lengths cover the sample's 65 tokens.
    lengths = read_index(corpus).lengths
    for sample in batch:
        assert sum(lengths[document] for document in sample["documents"]) >= 65


def test_skipped_spikes_leave_the_weights_as_they_were(config_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = [*NOISY, *SPIKES, "training.global_batch_size=2"]
    pretrain(config_file, *settings, "faults.spike_action=skip")
    steps = [record for record in metrics(run_dir) if "loss" in record]
    skipped = [record["step"] for record in steps if record["skipped"]]
    faults = [record for record in metrics(run_dir) if "fault" in record]
    assert skipped and [record["step"] for record in faults] == skipped
    assert all(record["fault"].startswith("loss spike") for record in faults)
    saved = json.loads((run_dir / "checkpoints/step_00000024/run.json").read_text())
    assert saved["optimizer_steps"] == 24 - len(skipped)


def test_steps_skipped_before_a_restart_count_for_the_verdict(
    config_file: Path, tmp_path: Path
) -> None:
    """Or a run that can only skip, started again and again, would never come to its end."""
    hopeless = ["model.init_std=1e30", "faults.max_consecutive_skips=1"]
    one_step = "training.exit_duration_in_mins=0.001"
    assert "after step 1, checkpoint saved" in pretrain(config_file, *hopeless, one_step)
    printed = pretrain(config_file, *hopeless, code=1)
    assert "2 steps in a row had a non-finite loss, the last at step 2" in printed
    assert read_status(tmp_path / "run")["requeue"] is False


@pytest.mark.slow
def test_roll_back_is_repeated_by_a_run_that_was_killed(config_file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = [*NOISY, *SPIKES, "training.global_batch_size=2", "faults.spike_action=roll_back"]
    pretrain(config_file, *settings, f"training.run_dir={whole}")
    back = [r for r in metrics(whole) if "weights and optimizer of step" in r.get("action", "")]
    assert back, "no spike behind a checkpoint: choose another sigma"
    first = back[0]["step"]
    process = start(config_file, *settings, f"training.run_dir={killed}")
    wait_for_step(process, killed, first)
    kill_all(process)
    pretrain(config_file, *settings, f"training.run_dir={killed}")
    assert numbers(killed) == numbers(whole)


@pytest.mark.slow
def test_last_state_is_saved_though_the_run_went_back_to_an_older_one(
    config_file: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = ["training.steps=2", "checkpoint.interval=1"]
    pretrain(config_file, *settings)
    last = run_dir / "checkpoints/step_00000002"
    shutil.rmtree(last)  # as if killed after the roll back of step 2, before its save
    rolled = [{"from": 1, "to": 2, "loss_window": []}]
    (run_dir / "rollbacks.json").write_text(json.dumps(rolled))
    assert "finished" in pretrain(config_file, *settings)
    assert (last / "manifest.json").is_file()
