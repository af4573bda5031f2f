"""One start of a run at a time: two that write the same folder would destroy each other's work.

    refuse_second_start(run_dir, rank, size, patience_s)     # every rank, before it writes anything

The heartbeats are the lock, since they go on exactly as long as their process lives. A lock file
would outlive a node that dies, and not every shared file system has locks that reach beyond one
node. A rank looks at what stands where its own heartbeat belongs, which another start of the same
size left there, and at rank 0's, of a start of another size:

    phase ended                         that start is over
    process of this host                alive or not: the kernel knows
    process of another host             alive if it writes again while we look; a heartbeat that is
                                        older than clocks of one cluster differ needs no look

Slurm may start a job again before it could reach the node of its earlier life: what is left of the
same job is waited for. Rank 0 then makes its heartbeat by a link, which of two starts of the same
moment only one can do, on a file system that has links. Needs no torch.
"""

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.training.heartbeat import (
    ENDED,
    heartbeat_file,
    is_alive,
    process_of,
    read_heartbeat,
    this_life,
)

log = logging.getLogger(__name__)

Beat = dict[str, Any]

_STALE_S = 600.0  # munge, without which no job starts, allows clocks to differ by 300


def refuse_second_start(run_dir: Path, rank: int, size: int, patience_s: float) -> None:
    """Raise UserError when another start of the run is alive, `patience_s` later if it is of an
    earlier life of the same Slurm job, which Slurm is about to end. Makes way for the heartbeat of
    a new rank 0."""
    for number in dict.fromkeys((rank, 0)):
        file = heartbeat_file(run_dir, number)
        beat = read_heartbeat(file)
        if beat is None and rank == 0:
            file.unlink(missing_ok=True)  # torn by a power cut: nobody writes half a heartbeat
        if beat is None or (number != rank and beat["size"] == size):
            continue  # rank 0 of this very start may have come first
        earlier_life = this_life()["job"] is not None and (
            this_life()["job"] == beat.get("job") and this_life()["life"] != beat.get("life")
        )
        deadline = time.monotonic() + (patience_s if earlier_life else 0.0)
        if earlier_life and rank == 0:
            log.warning("waiting for what is left of this job's earlier life on %s", beat["host"])
        while _goes_on(file, beat):
            beat = read_heartbeat(file) or beat
            if time.monotonic() >= deadline:
                raise UserError(_in_use(run_dir, beat))
            time.sleep(0.2)
        if rank == 0:
            _make_way(run_dir, file, beat)


def _make_way(run_dir: Path, file: Path, beat: Beat) -> None:
    """Remove this very heartbeat; raise UserError when another start of the moment did so first and
    put its own there."""
    aside = file.with_suffix(f".{os.getpid()}.old")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return
    found = read_heartbeat(aside)
    if found is not None and found != beat and found["pid"] != beat["pid"]:
        aside.rename(file)
        raise UserError(_in_use(run_dir, found))
    aside.unlink()


def _in_use(run_dir: Path, beat: Beat) -> str:
    """Who trains there, in words."""
    job = f", job {beat['job']}" if beat.get("job") else ""
    end = f"scancel {beat['job']}" if beat.get("job") else f"kill {beat['pid']}"
    return (
        f"training.run_dir={run_dir} is in use: rank {beat['rank']} of {beat['size']} runs on "
        f"{beat['host']} (pid {beat['pid']}{job}); wait for it, end it ({end}), or choose another "
        "training.run_dir"
    )


def _goes_on(file: Path, beat: Beat) -> bool:
    if beat["phase"] == ENDED:
        return False
    if beat["host"] == socket.gethostname():
        process = process_of(beat)
        return process is not None and is_alive(process)
    if time.time() - beat["time"] > _STALE_S:
        return False
    until = time.monotonic() + 3 * beat.get("every_s", 5.0) + 2
    while time.monotonic() < until:
        now = read_heartbeat(file) or beat
        if now["time"] != beat["time"]:
            # Rank 0 of our own start may have come meanwhile.
            return now["pid"] == beat["pid"] and now["phase"] != ENDED
        time.sleep(0.1)
    return False
