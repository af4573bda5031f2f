"""What a run is told to expect of the GPUs that it finds itself on, and where it says so."""

import json
import logging
from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.planning.layout import workload
from megatron_ext.planning.memory import memory
from megatron_ext.planning.plan import expected_on, make_plan
from megatron_ext.planning.prediction import constants


def test_the_drivers_name_says_which_gpu_and_a_plan_that_fails_stops_nothing(
    config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(config_file)
    small, large = "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"
    assert expected_on("cpu (2 cores)", config, 2) is None
    expected = [expected_on(name, config, 2) or {} for name in (small, large)]
    assert [found["gpu"] for found in expected] == ["a100_40gb", "a100_80gb"]
    assert expected[0]["step_time_s"] == make_plan(config, 2, "a100_40gb").step_time_s
    assert not caplog.records
    assert expected_on(large, config, 3) is None  # 3 do not divide the batch of 8
    assert "no prediction for 3 x a100_80gb" in caplog.text


def test_the_journal_has_the_prediction_beside_what_it_measured(
    config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch")
    from megatron_ext.training.journal import Journal
    from megatron_ext.training.step import StepResult
    from megatron_ext.training.utilization import Peak
    from megatron_ext.world import World

    config = load_config(config_file)
    config.training.run_dir.mkdir(parents=True)
    expected = expected_on("NVIDIA A100-SXM4-80GB", config, 1) or {}
    here = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    fine = StepResult(loss=2.0, grad_norm=1.0, lr=1e-3, skipped=False, stop=False)
    # A step as long as predicted has the predicted MFU, also of another peak than the plan's.
    starts = [(312.0, expected), (100.0, expected), (312.0, None)]
    with caplog.at_level(logging.INFO):
        for done, (peak, predicted) in enumerate(starts):
            journal = Journal(config, here, done, Peak(peak, "any"), predicted)
            journal.step(done + 1, fine, seconds=expected["step_time_s"], data_wait=0.0)
            journal.close()
    file = config.training.run_dir / "metrics.jsonl"
    sheet, own, without = map(json.loads, file.read_text().splitlines())
    assert sheet["predicted_mfu"] == pytest.approx(expected["mfu"])
    assert [r["mfu"] for r in (sheet, own)] == [
        pytest.approx(r["predicted_mfu"]) for r in (sheet, own)
    ]
    work = workload(config, 1, "a100_80gb")
    tensors = memory(work, 0, constants().memory)
    assert sheet["predicted_memory_gb"] == pytest.approx(
        (tensors.total - tensors.allocator)[0] / 1e9
    )
    assert "predicted_mfu" not in without
    said = [r.getMessage() for r in caplog.records if "predicted" in r.getMessage()]
    assert len(said) == 2 and "MFU" in said[0]
