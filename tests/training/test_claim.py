"""One start of a run at a time, whatever became of the one before."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.training.claim import refuse_second_start
from megatron_ext.training.heartbeat import heartbeat_file, read_heartbeat
from megatron_ext.training.status import read_status
from tests.conftest import metrics, pretrain
from tests.training.test_resume import LONG, kill_all, start, wait_for_step

HOLD = """
import sys, time
from pathlib import Path
from megatron_ext.training.claim import refuse_second_start
from megatron_ext.training.heartbeat import Heartbeat
while time.time() < float(sys.argv[2]):
    pass
refuse_second_start(Path(sys.argv[1]), 0, 1, patience_s=0.0)
Heartbeat(Path(sys.argv[1]), 0, 1, every_s=0.2).start()
print("holds", flush=True)
time.sleep(600)
"""


def hold(run_dir: Path, at: float = 0.0) -> subprocess.Popen:
    """A process that is rank 0 of a run, from a time on."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, run_dir, str(at)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def holder(tmp_path: Path):
    process = hold(tmp_path)
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()


def test_second_start_is_refused_and_disturbs_nothing(config_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = start(config_file, *LONG)
    wait_for_step(first, run_dir, 3)
    status = read_status(run_dir)
    for processes, code in ((1, 2), (2, 1)):  # torchrun makes 1 of every exit code
        printed = pretrain(config_file, processes=processes, code=code)
        assert printed.count(f"is in use: rank 0 of 1 runs on {socket.gethostname()}") == 1
        assert f"(pid {first.pid}); wait for it, end it (kill {first.pid})" in printed
        assert processes > 1 or printed.count("\n") == 1
    wait_for_step(first, run_dir, metrics(run_dir)[-1]["step"] + 5)
    assert read_status(run_dir) == status
    kill_all(first)
    refuse_second_start(run_dir, 0, 1, 0.0)  # no longer
    assert not heartbeat_file(run_dir, 0).exists()  # and there is room for a new rank 0


def test_start_on_another_host_is_seen_by_its_heartbeat_alone(
    holder: subprocess.Popen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    for rank, size in ((0, 1), (0, 4), (3, 4)):
        with pytest.raises(UserError, match=f"pid {holder.pid}"):
            refuse_second_start(tmp_path, rank, size, 0.0)
    holder.kill()
    refuse_second_start(tmp_path, 3, 4, 0.0)
    # Rank 0 of the own start may come while others still look at what its predecessor left.
    file = heartbeat_file(tmp_path, 0)
    ours = {**read_heartbeat(file), "size": 4, "pid": 1, "time": time.time()}
    threading.Timer(0.5, file.write_text, [json.dumps(ours)]).start()
    refuse_second_start(tmp_path, 3, 4, 0.0)
    assert read_heartbeat(file) == ours


def test_earlier_life_of_the_same_job_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = hold(tmp_path)
    assert before.stdout.readline() == "holds\n"
    with pytest.raises(UserError, match=r"job 7\); wait for it, end it \(scancel 7\)"):
        refuse_second_start(tmp_path, 0, 1, patience_s=60.0)  # of the same life: not waited for
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(1.0, before.kill).start()
    refuse_second_start(tmp_path, 0, 1, patience_s=60.0)
    assert before.wait() != 0


def test_a_heartbeat_torn_by_a_power_cut_is_in_nobodys_way(tmp_path: Path) -> None:
    file = heartbeat_file(tmp_path, 0)
    file.parent.mkdir()
    file.write_text("")
    again = hold(tmp_path)
    assert again.stdout.readline() == "holds\n"
    again.kill()


@pytest.mark.parametrize("before", ["nothing", "a start that is over"])
def test_of_two_starts_of_one_moment_one_stays(tmp_path: Path, before: str) -> None:
    if before != "nothing":
        dead = hold(tmp_path)
        dead.stdout.readline()
        dead.kill()
        dead.wait()
    together = time.time() + 1.5
    started = [hold(tmp_path, together) for _ in range(4)]
    said = [process.stdout.readline() for process in started]
    assert sorted(said) == ["", "", "", "holds\n"]
    for process, line in zip(started, said, strict=True):
        if line:
            process.kill()
        else:
            refused = process.communicate()[1]
            assert "FileExistsError" in refused or "is in use" in refused
