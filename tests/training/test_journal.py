"""A journal whose records cannot be written goes on, and says so once."""

import logging
from pathlib import Path

import pytest
import torch

from megatron_ext.config import load_config
from megatron_ext.training.guard import LossGuard, note_rollback
from megatron_ext.training.journal import Journal
from megatron_ext.training.step import StepResult
from megatron_ext.training.utilization import Peak
from megatron_ext.world import World

FINE = StepResult(loss=2.0, grad_norm=1.0, lr=1e-3, skipped=False, stop=False)
FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, where no byte has room")
def test_a_full_disk_costs_records_and_not_the_run(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").symlink_to(FULL)
    (run_dir / "faults").touch()  # no folder can be made there
    (run_dir / "rollbacks.json").mkdir()  # and no file renamed to it
    config = load_config(config_file)
    with caplog.at_level(logging.WARNING):
        here = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        journal = Journal(config, here, 0, Peak(1.0, "any"))
        for done in (1, 2):
            journal.step(done, FINE, seconds=1.0, data_wait=0.0)
        journal.fault(2, "loss spike", "skipped", [])
        note_rollback(config, 1, 2, LossGuard(config, {}))
        journal.close()
    told = [record.getMessage() for record in caplog.records]
    assert sum("No space left on device" in line for line in told) == 1
    assert sum("its documents could not be written" in line for line in told) == 1
    assert "will not know of the roll back" in told[-1]
