"""Who is late, by heartbeats written by hand."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ext.training.hang import Stacks, judge
from megatron_ext.training.heartbeat import forget_heartbeats, heartbeat_file, read_heartbeats
from megatron_ext.training.watchdog import Watchdog

HANG_S, STARTUP_S = 60.0, 600.0


def beat(run_dir: Path, rank: int, ago: float, **different: Any) -> None:
    """The heartbeat of a rank of this very process, last written and without progress for `ago`."""
    written = {
        "rank": rank, "size": 2, "host": socket.gethostname(), "pid": os.getpid(),
        "created": psutil.Process().create_time(), "stack_fd": -1, "step": 7, "phase": "compute",
        "since": time.time() - ago, "time": time.time() - ago, **different,
    }  # fmt: skip
    heartbeat_file(run_dir, rank).parent.mkdir(exist_ok=True)
    heartbeat_file(run_dir, rank).write_text(json.dumps(written))


def watchdog(run_dir: Path, started_ago: float) -> Watchdog:
    dog = Watchdog(run_dir, HANG_S, STARTUP_S, time.time() - started_ago)
    dog._look()
    return dog


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_came_is_named_and_not_its_host_of_an_earlier_job(
    absent: int, tmp_path: Path
) -> None:
    beat(tmp_path, absent, ago=3600, host="of-the-earlier-job", phase="ended")
    beat(tmp_path, 1 - absent, ago=1, phase="meet", step=None)
    beats = watchdog(tmp_path, started_ago=700)._beats()
    assert judge(beats, Stacks(tmp_path), HANG_S) == (
        f"rank {absent} never came; 1 ranks wait",
        absent,
    )


def test_a_start_removes_the_heartbeats_of_the_one_before(tmp_path: Path) -> None:
    beat(tmp_path, 0, ago=1)
    beat(tmp_path, 1, ago=3600)
    forget_heartbeats(tmp_path, before=time.time() - 60)
    assert [left["rank"] for left in read_heartbeats(tmp_path)] == [0]


def test_the_rank_behind_by_a_step_is_late(tmp_path: Path) -> None:
    beat(tmp_path, 0, ago=1, since=time.time() - 90)
    beat(tmp_path, 1, ago=1, since=time.time() - 95, step=6)
    message, first = judge(watchdog(tmp_path, 700)._beats(), Stacks(tmp_path), HANG_S)
    assert first == 1
    assert message.startswith("no progress for 95 s. Late: rank 1 on") and "step 6" in message


def test_starting_up_has_a_time_of_its_own(tmp_path: Path) -> None:
    for phase, ago, late in [
        ("compute", HANG_S - 1, False),
        ("compute", HANG_S + 10, True),
        ("restore", HANG_S + 10, False),
        ("restore", STARTUP_S + 10, True),
    ]:
        beat(tmp_path, 0, ago=0, since=time.time() - ago, phase=phase)
        dog = watchdog(tmp_path, started_ago=2000)
        dog.awake_since -= 2000
        assert dog._is_late(dog.ranks[0][1]) == late, (phase, ago)


def test_a_host_that_was_suspended_gets_its_time_anew(tmp_path: Path) -> None:
    beat(tmp_path, 0, ago=3600)
    dog = watchdog(tmp_path, started_ago=7200)
    for asleep_s, late in [(HANG_S / 10, True), (3600, False)]:
        dog.awake_since, dog.looked_at = time.time() - 7200, time.time() - asleep_s
        dog._notice_pause()
        assert dog._is_late(dog.ranks[0][1]) == late
