"""The first error of a log is its cause, not what Slurm says of the tasks it ended afterwards."""

from pathlib import Path

import pytest

from megatron_ext.jobs.outcome import first_error

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
