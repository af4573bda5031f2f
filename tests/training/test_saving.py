"""Saving while training: nothing changes, nothing is lost, and a full disk ends no run."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ext.checkpoint.manifest import find_checkpoints, step_of, verify
from megatron_ext.training.status import read_status
from tests.conftest import metrics, pretrain
from tests.training.test_resume import LONG, numbers, start, wait_for_step

RARELY = ["evaluation.interval=1000"]


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)


def end(process: subprocess.Popen) -> str:
    """Stop it by a signal; returns what it printed."""
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return printed


def saved_steps(run_dir: Path) -> list[int]:
    return [step_of(folder) for folder in find_checkpoints(run_dir)]


def leftovers(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("*.unfinished"))


@pytest.mark.slow
def test_saving_in_the_background_changes_no_number(config_file: Path, tmp_path: Path) -> None:
    runs = {}
    for way in ("true", "false"):
        runs[way] = tmp_path / way
        often = ["checkpoint.interval=1", f"checkpoint.async_save={way}"]
        pretrain(config_file, *often, f"training.run_dir={runs[way]}")
    assert numbers(runs["true"]) == numbers(runs["false"])
    assert all("checkpoint_stall_s" in r for r in metrics(runs["true"]) if "loss" in r)
    assert saved_steps(runs["true"]) == saved_steps(runs["false"]) == [20, 19]


def test_failed_write_is_a_warning_and_the_run_goes_on(config_file: Path, tmp_path: Path) -> None:
    """The kernel refuses files beyond 1 MB, as a quota would; the checkpoint has 2.5 MB."""
    run_dir = tmp_path / "run"
    process = start(config_file, *LONG, *RARELY)
    wait_for(lambda: saved_steps(run_dir) == [10], process)
    limit = psutil.Process(process.pid)
    limit.rlimit(psutil.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    wait_for_step(process, run_dir, 45)
    assert saved_steps(run_dir)[-1] == 10 and verify(find_checkpoints(run_dir)[-1]) == []
    failed_from = saved_steps(run_dir)[0]
    limit.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for(lambda: saved_steps(run_dir)[0] > max(failed_from, 40), process)
    assert leftovers(run_dir) == []
    printed = end(process)
    assert "NOT SAVED, training goes on: rank 0" in printed and "Traceback" not in printed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB: four checkpoints and a little."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True
    )
    if made.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_leaves_old_checkpoints_and_the_run_alive(
    config_file: Path, small_disk: Path
) -> None:
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    ballast.write_bytes(bytes(8_000_000))  # room for one checkpoint
    process = start(config_file, *LONG, *RARELY, f"training.run_dir={run_dir}")
    wait_for_step(process, run_dir, 25)
    assert saved_steps(run_dir) == [10] and leftovers(run_dir) == []
    assert verify(find_checkpoints(run_dir)[0]) == []
    ballast.unlink()
    wait_for(lambda: len(saved_steps(run_dir)) == 2, process)
    printed = end(process)
    assert "checkpoint of step 20 NOT SAVED, training goes on: it takes 0.00" in printed
    # With the disk full at the very end the run says that its last state is lost.
    ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 1_000_000))
    for old in find_checkpoints(run_dir)[1:]:
        assert verify(old) == []
    done = step_of(find_checkpoints(run_dir)[0])
    again = start(config_file, *LONG, *RARELY, f"training.run_dir={run_dir}")
    wait_for_step(again, run_dir, done + 2)
    again.send_signal(signal.SIGTERM)
    printed, _ = again.communicate(timeout=120)
    assert again.returncode == 1 and "could not be saved" in printed and "Traceback" not in printed
    assert saved_steps(run_dir)[0] == done


@pytest.mark.parametrize(
    "free",
    # Room for nothing at all, and for what tells of the run but not for its index of samples.
    [0, pytest.param(100_000, marks=pytest.mark.slow)],
)
def test_full_disk_at_the_start_is_told_in_one_sentence(
    free: int, config_file: Path, small_disk: Path
) -> None:
    run_dir, cache = small_disk / "run", small_disk / "cache"
    ballast = bytes(os.statvfs(small_disk).f_bavail * 4096 - free)
    (small_disk / "ballast").write_bytes(ballast)
    places = [f"training.run_dir={run_dir}", f"data.cache_dir={cache}"]
    printed = pretrain(config_file, *places, code=1)
    (told,) = [line for line in printed.splitlines() if "data: " not in line]
    assert told.startswith("error: a disk is full: ")
    assert told.endswith("and data.cache_dir, then run the same command again")
    assert not cache.exists() or not list(cache.iterdir())
    assert free == 0 or read_status(run_dir)["state"] == "failed"
    if free:  # what is left there is in nobody's way
        (small_disk / "ballast").unlink()
        pretrain(config_file, *places, "training.steps=2")
