"""How a life ended: at which step, of which start, and why.

The first error of a log is its cause, not what Slurm says of the tasks it ended afterwards.
"""

import json
from pathlib import Path

import pytest

from megatron_ext.jobs import __main__ as commands
from megatron_ext.jobs import journal
from megatron_ext.jobs.outcome import end_of, first_error
from megatron_ext.training.status import write_status

TRACEBACK = """\
2026-11-21 11:24:29 step 12/80  loss 5.6854
Traceback (most recent call last):
  File "pretrain.py", line 1, in <module>
torch.distributed.DistBackendError: [1] is setting up NCCL
srun: error: 127.0.0.2: task 1: Exited with exit code 1
"""
KILLED = """\
slurmstepd-127.0.0.1: error: *** STEP 4.1 ON 127.0.0.1 CANCELLED AT 2026-11-21T11:16:18 ***
srun: error: 127.0.0.1: task 0: Terminated
"""


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("error: rope.base=0 must be above 1\n", "rope.base=0 must be above 1"),
        (TRACEBACK, "torch.distributed.DistBackendError: [1] is setting up NCCL"),
        (KILLED, KILLED.splitlines()[0]),
        (
            "srun: error: 127.0.0.2: task 1: Out Of Memory\n" + KILLED,
            "127.0.0.2: task 1: Out Of Memory",
        ),
        ("all is well\n", ""),
    ],
    ids=["mistake", "traceback", "only ended", "out of memory", "nothing"],
)
def test_first_error(text: str, error: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: of an earlier life\n" + text)
    assert first_error(log, len("error: of an earlier life\n")) == error


def test_no_log_is_no_error(tmp_path: Path) -> None:
    assert first_error(tmp_path / "absent", 0) == ""


def begin(run_dir: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    journal.record(run_dir, "began", nodes=2, steps=100, step=0, log="/dev/null", log_start=0)


def test_a_step_between_two_logged_ones_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 10, "step_time_s": 1.0}) + "\n")
    for restart, step in enumerate((14, 18)):
        begin(tmp_path, monkeypatch, "7", restart)
        write_status(tmp_path, "running", "training", requeue=True, step=10)
        _, life = journal.before_this(tmp_path)
        assert end_of(tmp_path, life, code=1).step == 10  # killed: the log is all there is
        write_status(tmp_path, "failed", "rank 0 failed", requeue=True, step=step)
        assert end_of(tmp_path, life, code=1).step == step


def test_an_end_is_that_of_its_own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, monkeypatch, "7", 1)
    begin(tmp_path, monkeypatch, "8", 0)  # submitted beside it
    begin(tmp_path, monkeypatch, "7", 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert commands.main(["end", str(tmp_path), "--code", "1", "--signal", "USR1"]) == 75
    ended = {(life.job, life.restart): bool(life.ended) for life in journal.read(tmp_path)}
    assert ended == {("7", 1): True, ("8", 0): False, ("7", 2): False}
