"""status.json and error.txt: one of many ranks tells."""

import subprocess
import sys
import time
from pathlib import Path

from megatron_ext.training.status import claim_error, read_status, write_status

CLAIM = """
import sys, time
from pathlib import Path
from megatron_ext.training.status import claim_error
while time.time() < float(sys.argv[2]):
    pass
print(claim_error(Path(sys.argv[1]), f"error of {sys.argv[3]}", 0.0))
"""


def test_one_of_many_processes_claims_the_error(tmp_path: Path) -> None:
    together = str(time.time() + 1.5)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, tmp_path, together, str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    answers = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
    assert sorted(answers) == ["False", "False", "False", "True"]
    told = (tmp_path / "error.txt").read_text()
    assert told == f"error of {answers.index('True')}"
    assert [p.name for p in tmp_path.iterdir()] == ["error.txt"]


def test_error_of_an_earlier_start_silences_nobody(tmp_path: Path) -> None:
    assert claim_error(tmp_path, "old", since=0)
    assert not claim_error(tmp_path, "same start", since=0)
    assert claim_error(tmp_path, "new", since=time.time() + 1)
    assert (tmp_path / "error.txt").read_text() == "new"


def test_steps_stay_when_only_the_state_changes(tmp_path: Path) -> None:
    write_status(tmp_path, "running", "training", requeue=True, step=5, first_step=5, steps=9)
    write_status(tmp_path, "failed", "rank 1 failed", requeue=True)
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["steps"]) == ("failed", 5, 9)


def test_folder_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    write_status(tmp_path / "nowhere", "failed", "anything", requeue=True)
    assert read_status(tmp_path / "nowhere") is None
    assert claim_error(tmp_path / "nowhere", "text", since=0)
