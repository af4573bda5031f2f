"""Ranks that hang, crash, are killed or are sent a signal: real processes, as srun starts them, but
with nobody to end the others."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ext.training.heartbeat import heartbeat_file, read_heartbeat
from megatron_ext.training.status import read_status
from tests.conftest import ROOT, environment, free_ports, metrics, pretrain

# A long run whose steps are quick; the first ones come soon.
LONG = ["training.steps=2000", "schedule.type=constant", "checkpoint.interval=1000"]
QUICK = ["faults.hang_timeout_s=4"]


class Ranks:
    """The processes of one run, started as `srun` does; what they print goes into one file."""

    def __init__(self, size: int, folder: Path, *command: object) -> None:
        self.log = folder / "printed"
        [port] = free_ports(1)
        self.processes = []
        with self.log.open("w") as out:
            for rank in range(size):
                slurm = {
                    "SLURM_PROCID": str(rank),
                    "SLURM_LOCALID": str(rank),
                    "SLURM_STEP_NUM_TASKS": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        env={**environment(), **slurm, "PYTHONPATH": str(ROOT)},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        self.family: set[psutil.Process] = set()

    def wait_for(self, run_dir: Path, rank: int, phase: str = "", step: int = 0) -> None:
        """Until the rank's heartbeat tells of the phase and at least of the step."""
        deadline = time.monotonic() + 120
        while True:
            beat = read_heartbeat(heartbeat_file(run_dir, rank)) or {"phase": "", "step": 0}
            if beat["phase"].startswith(phase) and (beat["step"] or 0) >= step and beat["phase"]:
                break
            assert all(p.poll() is None for p in self.processes), self.log.read_text()
            assert time.monotonic() < deadline, beat
            time.sleep(0.02)
        self.look()

    def look(self) -> None:
        """Note every process of the run that there is: ranks, loaders, watchdog."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                member = psutil.Process(process.pid)
                self.family |= {member, *member.children(recursive=True)}

    def end(self, within: float, since: Path | None = None) -> tuple[list[int], str, float]:
        """Exit codes, what was printed, seconds until the last process was gone since now, or since
        the file was written; fails when that takes longer than `within`."""
        started = time.time()
        while any(process.poll() is None for process in self.processes):
            self.look()
            assert time.time() - started < 120, self.log.read_text()
            time.sleep(0.05)
        _, left = psutil.wait_procs(self.family, timeout=within)
        seconds = time.time() - (since.stat().st_mtime if since else started)
        assert not left and seconds < within
        return [process.returncode for process in self.processes], self.log.read_text(), seconds


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator:
    """Starts the ranks of one run, and leaves none of them behind if the test fails."""
    started: list[Ranks] = []

    def start(size: int, *command: object) -> Ranks:
        started.append(Ranks(size, tmp_path, *command))
        return started[-1]

    yield start
    for group in started:
        for process in [*group.family, *group.processes]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def report(name: str, seconds: float) -> None:
    """A figure for docs/training.md: shown by pytest -rP."""
    print(f"{name}: {seconds:.1f} s")


def test_stopped_rank_is_named_and_ends_the_run(ranks, config_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    group = ranks(2, "pretrain.py", config_file, *LONG, *QUICK, "data.num_workers=1")
    group.wait_for(run_dir, 1, step=3)
    os.kill(group.processes[1].pid, signal.SIGSTOP)
    codes, printed, seconds = group.end(within=4 + 20)
    report("SIGSTOP to one rank of two, faults.hang_timeout_s=4", seconds)
    assert codes == [-signal.SIGKILL] * 2
    late = f"Late: rank 1 on {socket.gethostname()} (pid {group.processes[1].pid})"
    assert printed.count(late) == 1 and "the process is stopped" in printed
    status = read_status(run_dir)
    assert (status["state"], status["requeue"]) == ("hung", True)
    assert late in status["reason"] and status["error"]["rank"] == 1
    assert "in train_step" in (run_dir / "stacks" / "rank_00000.txt").read_text()


@pytest.mark.slow
def test_rank_asleep_in_python_is_named_with_its_line(
    ranks, config_file: Path, tmp_path: Path
) -> None:
    group = ranks(2, ROOT / "tests/training/misbehaving.py", "sleep", config_file, *LONG, *QUICK)
    group.wait_for(tmp_path / "run", 1, step=3)
    codes, printed, seconds = group.end(within=4 + 20)
    report("one rank of two asleep, faults.hang_timeout_s=4", seconds)
    assert codes == [-signal.SIGKILL] * 2
    assert "Late: rank 1 on" in printed and re.search(r"misbehaving.py:\d+ in step", printed)
    assert read_status(tmp_path / "run")["state"] == "hung"


def test_error_of_one_rank_is_shown_once_and_ends_all(
    ranks, config_file: Path, tmp_path: Path
) -> None:
    group = ranks(4, ROOT / "tests/training/misbehaving.py", "raise", config_file, *LONG)
    codes, printed, seconds = group.end(within=30, since=tmp_path / "run" / "error.txt")
    report("an exception on one rank of four", seconds)
    assert codes == [1] * 4
    assert printed.count("Traceback") == 1
    assert printed.count("ValueError: the third step is beyond rank 1") == 1
    assert f"rank 1 of 4 on {socket.gethostname()}: Traceback" in printed
    status = read_status(tmp_path / "run")
    assert (status["state"], status["requeue"], status["step"]) == ("failed", True, 2)
    assert status["error"]["rank"] == 1 and status["error"]["type"] == "ValueError"
    assert "beyond rank 1" in (tmp_path / "run" / "error.txt").read_text()


@pytest.mark.slow
def test_killed_rank_is_named_and_ends_all(ranks, config_file: Path, tmp_path: Path) -> None:
    group = ranks(4, "pretrain.py", config_file, *LONG)
    group.wait_for(tmp_path / "run", 2, step=3)
    group.processes[2].kill()
    codes, printed, seconds = group.end(within=30)
    report("SIGKILL to one rank of four", seconds)
    assert codes[2] == -signal.SIGKILL and 0 not in codes
    assert "Traceback" not in printed and printed.count("ended without a word") == 1
    assert f"rank 2 (pid {group.processes[2].pid})" in read_status(tmp_path / "run")["reason"]


@pytest.mark.slow
def test_signal_to_one_rank_in_a_validation_stops_all_and_the_validation_is_made_up_for(
    ranks, config_file: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    short = ["training.steps=4", "evaluation.interval=2", "evaluation.batches=40"]
    group = ranks(2, "pretrain.py", config_file, *short, *QUICK)
    group.wait_for(run_dir, 1, step=2)
    while len(metrics(run_dir)) < 2:
        time.sleep(0.01)
    group.processes[1].send_signal(signal.SIGUSR1)
    codes, printed, seconds = group.end(within=20)
    report("signal to one rank of two in a validation", seconds)
    assert codes == [0, 0], printed
    assert "stopped by another rank's signal after step 2, checkpoint saved" in printed
    assert [record["step"] for record in metrics(run_dir)] == [1, 2]
    assert read_status(run_dir)["state"] == "stopped"

    pretrain(config_file, *short)
    told = [(r["step"], "validation_loss" in r) for r in metrics(run_dir)]
    assert told == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert read_status(run_dir)["state"] == "finished"


def test_signal_to_one_rank_while_starting_ends_all(
    ranks, config_file: Path, tmp_path: Path
) -> None:
    # Rank 0 waits for rank 1, which is held before they meet.
    group = ranks(2, "pretrain.py", config_file, *LONG, *QUICK)
    group.wait_for(tmp_path / "run", 1)
    group.processes[1].send_signal(signal.SIGSTOP)
    group.wait_for(tmp_path / "run", 0, "meet")
    group.processes[0].send_signal(signal.SIGTERM)
    group.processes[1].send_signal(signal.SIGCONT)
    codes, printed, seconds = group.end(within=20)
    report("signal to one rank of two in start-up", seconds)
    assert codes == [0, 0], printed
    assert printed == "stopped by SIGTERM before the first step\n"
    status = read_status(tmp_path / "run")
    assert (status["state"], status["requeue"]) == ("stopped", True)
    beat = json.loads(heartbeat_file(tmp_path / "run", 0).read_text())
    assert set(beat) >= {"rank", "host", "pid", "step", "phase", "since", "time"}
