"""What `status` says of runs on this machine; those on Slurm are in tests/slurm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.checkpoint.manifest import checkpoint_dir, write_manifest
from megatron_ext.config import load_config, save_config
from megatron_ext.errors import UserError
from megatron_ext.jobs import __main__ as commands
from megatron_ext.jobs import journal
from megatron_ext.jobs.state import RunState, states
from megatron_ext.training.status import write_status
from tests.conftest import ROOT


@pytest.fixture
def run_dir(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 20 steps that is training in this very process, at step 5."""
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm here
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    save_config(load_config(config_file), folder / "config.yaml")
    records = [{"step": step, "loss": 6.0, "step_time_s": 2.0} for step in range(1, 6)]
    records.insert(3, {"step": 3, "validation_loss": 6.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_status(folder, "running", "training", requeue=True, step=0, first_step=0, steps=20)
    return folder


def state(folder: Path) -> RunState:
    (found,) = states([folder])
    return found


def test_a_running_one_has_a_step_and_an_end_in_sight(run_dir: Path) -> None:
    found = state(run_dir)
    assert (found.state, found.step, found.steps, found.eta_s) == ("running", 5, 20, 15 * 2.0)
    assert states([run_dir.parent]) == [found]  # a folder of runs


def test_a_running_one_without_its_process_was_killed(run_dir: Path) -> None:
    status = json.loads((run_dir / "status.json").read_text())
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    (run_dir / "status.json").write_text(json.dumps({**status, "pid": ended.pid}))
    found = state(run_dir)
    assert found.state == "stopped" and "is gone: start it again" in found.reason


def test_a_failed_one_tells_its_first_error(run_dir: Path) -> None:
    error = {"rank": 3, "host": "n2", "type": "OSError", "message": "disk full"}
    write_status(run_dir, "failed", "rank 3 failed: OSError", requeue=True, error=error)
    assert (state(run_dir).state, state(run_dir).reason) == ("failed", "disk full")


def test_a_finished_one_has_its_last_checkpoint(run_dir: Path) -> None:
    last = checkpoint_dir(run_dir, 20)
    last.mkdir(parents=True)
    write_manifest(last, {})
    assert (state(run_dir).state, state(run_dir).eta_s) == ("finished", None)


def test_a_submitted_one_that_slurm_has_forgotten_never_began(run_dir: Path) -> None:
    (run_dir / "status.json").unlink()
    journal.record(run_dir, "submitted", job="77")
    journal.record(run_dir, "submitted", job="78", what="evaluate")
    found = state(run_dir)
    assert (found.state, found.job, found.starts) == ("stopped", "77", 0)


def test_a_config_that_cannot_be_read_is_told_where_its_run_would_be(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    file = run_dir.parent / "typo.yaml"
    file.write_text(f"optimizer: {{lrr: 1}}\ntraining: {{run_dir: {run_dir.parent / 'two'}}}\n")
    assert commands.main(["begin", str(file)]) == 2
    found = state(run_dir.parent / "two")
    assert (found.state, found.job, found.starts) == ("failed", "9", 0)
    assert "optimizer.lrr" in found.reason and "optimizer.lrr" in capsys.readouterr().err
    # Beside a run that trains it is no news of that run.
    assert commands.main(["begin", str(file), f"training.run_dir={run_dir}"]) == 2
    assert state(run_dir).state == "running"


def test_half_a_line_of_the_journal_is_passed_over(run_dir: Path) -> None:
    journal.record(run_dir, "began", job="5", steps=20)
    with (run_dir / journal.FILE).open("a") as file:
        file.write('{"event": "ended", "job"')
    assert [life.job for life in journal.read(run_dir)] == ["5"]


def test_a_folder_without_runs_is_refused_and_a_table_printed(run_dir: Path) -> None:
    with pytest.raises(UserError, match="holds no run and no job waits for it"):
        states([run_dir / "checkpoints"])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext.cli", "status", run_dir.parent],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    head, row = done.stdout.splitlines()
    assert head.split() == ["RUN", "STATE", "STEP", "ETA", "JOB", "STARTS"]
    assert row.split() == ["one", "running", "5/20", "0:00:30", "0"]
