"""The entry point: the run folder it leaves, and what it refuses before anything heavy."""

import json
from pathlib import Path

from megatron_ext.config import load_config
from megatron_ext.training.status import read_status
from tests.conftest import metrics, pretrain

METRICS = {
    "step", "tokens", "loss", "lr", "grad_norm", "step_time_s", "step_time_p50_s",
    "step_time_p95_s", "tokens_per_s", "tflops_per_gpu", "mfu", "mfu_causal",
    "memory_gb", "data_wait_s", "checkpoint_stall_s", "skipped",
}  # fmt: skip


def test_run_folder_explains_itself(config_file: Path, tmp_path: Path) -> None:
    settings = ["logging.tensorboard=true", "checkpoint.interval=10", "logging.interval=5"]
    printed = pretrain(config_file, *settings)
    run_dir = tmp_path / "run"
    assert "finished: 20 steps" in printed
    assert printed.count("kernels: backend torch, attention sdpa, optimizer torch") == 1
    assert {p.name for p in run_dir.iterdir()} == {
        "config.yaml", "environment.json", "data.json", "metrics.jsonl", "tensorboard",
        "checkpoints", "status.json", "heartbeat",
    }  # fmt: skip
    assert load_config(run_dir / "config.yaml") == load_config(config_file, settings)
    steps = [r for r in metrics(run_dir) if "loss" in r]
    assert [r["step"] for r in steps] == [5, 10, 15, 20]
    assert all(set(r) == METRICS for r in steps)
    assert steps[-1]["tokens"] == 20 * 8 * 64
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert environment["variables"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"  # also without Slurm
    assert environment["variables"]["OMP_NUM_THREADS"] == "1"
    assert json.loads((run_dir / "data.json").read_text())["seed"] == 1234
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert kept == ["step_00000010", "step_00000020"]
    assert any(run_dir.joinpath("tensorboard").iterdir())
    status = read_status(run_dir)
    assert (status["state"], status["requeue"], status["error"]) == ("finished", False, None)
    assert (status["step"], status["first_step"], status["steps"]) == (20, 0, 20)


def test_kernels_that_cannot_be_had_are_refused_before_anything_is_built(
    config_file: Path, tmp_path: Path
) -> None:
    printed = pretrain(config_file, "kernels.attention=flash_attn", code=2)
    assert printed.startswith("error: kernels.attention=flash_attn cannot be had (no GPU): ")
    assert printed.count("\n") == 1
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_finished_run_started_again_does_nothing(config_file: Path, tmp_path: Path) -> None:
    pretrain(config_file, "training.steps=2")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "finished: 2 steps" in pretrain(config_file, "training.steps=2")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_loss_falls(config_file: Path, tmp_path: Path) -> None:
    pretrain(config_file, "optimizer.lr=3e-3", "training.steps=60")
    losses = [r["loss"] for r in metrics(tmp_path / "run") if "loss" in r]
    assert 6.0 < losses[0] < 6.5  # ln(512) = 6.24
    assert losses[-1] < 0.85 * losses[0]


def test_non_finite_steps_are_skipped_then_the_run_stops(config_file: Path, tmp_path: Path) -> None:
    # A spread of 1e30 overflows float32 in the first matrix product.
    settings = ["model.init_std=1e30", "faults.max_consecutive_skips=3"]
    printed = pretrain(config_file, *settings, code=1)
    assert "4 steps in a row had a non-finite loss" in printed
    records = metrics(tmp_path / "run")
    assert [r["skipped"] for r in records if "skipped" in r] == [True] * 4
    status = read_status(tmp_path / "run")
    assert (status["state"], status["requeue"]) == ("failed", False)
    assert "4 steps in a row" in status["reason"] and "Traceback" not in printed
    assert records[0]["grad_norm"] is None  # JSON knows no NaN


def test_init_from_nothing_is_refused(config_file: Path, tmp_path: Path) -> None:
    printed = pretrain(config_file, f"training.init_from={tmp_path / 'nowhere'}", code=2)
    assert "nowhere is neither a checkpoint nor a run folder" in printed
    assert "Traceback" not in printed


def test_run_dir_that_is_a_file_is_refused(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    printed = pretrain(config_file, f"training.run_dir={tmp_path / 'file'}", code=2)
    assert "is no folder; choose another training.run_dir" in printed
    assert "Traceback" not in printed
