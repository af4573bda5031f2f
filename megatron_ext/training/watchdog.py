"""A process beside the ranks of a node that ends them when they hang or one of them is gone.

    python -m megatron_ext.training.watchdog RUN_DIR --hang-timeout 600 ...

Local rank 0 starts it. It is a process and not a thread, because a rank that is stopped, or whose
interpreter is blocked in a collective, runs no thread of its own; and one a node, because signals,
stacks and SIGKILL reach no further. It looks at the heartbeats of its own host only, until one is
late. Then it makes the ranks dump their stacks into RUN_DIR/stacks, looks at the heartbeats of all
hosts, writes down and prints which ranks are late and where they stand (once for all nodes), and
kills the ranks of its node. Needs no torch.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil

from megatron_ext.training.hang import Beat, Stacks, judge
from megatron_ext.training.heartbeat import (
    DUMP_SIGNAL,
    ENDED,
    STARTING,
    beat_interval,
    heartbeat_file,
    is_alive,
    process_of,
    read_heartbeat,
    read_heartbeats,
)
from megatron_ext.training.status import State, claim_error, ended_since, write_status

# A signal to the whole job is the ranks' to answer; this process only looks more often for their
# end, and local rank 0 sends it one when it leaves.
ANSWERED_BY_RANKS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, DUMP_SIGNAL}
# Seconds that ranks have to leave by themselves once one of them has failed; once they have said
# that they leave, which takes a busy machine a while; and after a good end.
GRACE_S = 10.0
LEAVING_S = 25.0
TIDY_S = 60.0
# Seconds in which the watchdogs of all nodes dump their stacks, before one of them judges.
DUMPS_S = 3.0


class Watchdog:
    """The watch over the ranks of this host; `since`: start of the run, seconds of the epoch."""

    def __init__(
        self, run_dir: Path, hang_timeout_s: float, startup_timeout_s: float, since: float
    ) -> None:
        self.run_dir = run_dir
        self.hang_timeout_s = hang_timeout_s
        self.startup_timeout_s = startup_timeout_s
        self.since = since
        self.host = socket.gethostname()
        self.ranks: dict[int, tuple[psutil.Process, Beat]] = {}  # every rank ever seen alive here
        self.looked_at = self.awake_since = time.time()

    def run(self) -> None:
        """Until no rank of this host is left."""
        every_s = min(beat_interval(self.hang_timeout_s), 1.0)
        ended_at, ended_well, hurried = None, False, False
        while True:
            self._notice_pause()
            gone = self._look()
            alive = [beat for process, beat in self.ranks.values() if is_alive(process)]
            if self.ranks and not alive and not gone:
                return
            if ended_at is None and (status := ended_since(self.run_dir, self.since)):
                ended_at = time.monotonic()
                ended_well = status["state"] in ("finished", "stopped")
            if ended_at is None and gone:
                self._tell_of_gone(gone)
                ended_at = time.monotonic()
            if ended_at is None and any(self._is_late(beat) for beat in alive):
                self._end_hang()
                return
            if not alive:
                return
            leaving = all(beat["phase"] == ENDED for beat in alive)
            grace_s = TIDY_S if ended_well else LEAVING_S if leaving else GRACE_S
            if ended_at is not None and time.monotonic() - ended_at > grace_s:
                self._kill()
                return
            hurried |= bool(signal.sigtimedwait(ANSWERED_BY_RANKS, 0.05 if hurried else every_s))

    def _look(self) -> list[Beat]:
        """Read the heartbeats of this host; returns those of ranks that ended without a word."""
        if not self.ranks or any(b["phase"] in STARTING for _, b in self.ranks.values()):
            beats = read_heartbeats(self.run_dir)  # ranks may still arrive
        else:
            files = (heartbeat_file(self.run_dir, rank) for rank in self.ranks)
            beats = [beat for file in files if (beat := read_heartbeat(file))]
        for beat in beats:
            if beat["host"] == self.host and (process := process_of(beat)):
                self.ranks[beat["rank"]] = (process, beat)
        gone = []
        for rank, (process, beat) in self.ranks.items():
            if not is_alive(process):
                # Its last word may have come since it was read above.
                last = read_heartbeat(heartbeat_file(self.run_dir, rank)) or beat
                if last["phase"] != ENDED:
                    gone.append(last)
        return gone

    def _notice_pause(self) -> None:
        """A host that was suspended, this process with it, gets its whole time anew."""
        now = time.time()
        if now - self.looked_at > self.hang_timeout_s / 4:
            self.awake_since = now
        self.looked_at = now

    def _is_late(self, beat: Beat) -> bool:
        starting = beat["phase"] in STARTING
        limit = self.startup_timeout_s if starting else self.hang_timeout_s
        # Progress is written down with that much delay.
        since = max(beat["since"], self.awake_since)
        return time.time() - since > limit + beat_interval(self.hang_timeout_s)

    def _tell_of_gone(self, gone: list[Beat]) -> None:
        names = ", ".join(f"rank {beat['rank']} (pid {beat['pid']})" for beat in gone)
        message = (
            f"{names} on {self.host} ended without a word in step {gone[0]['step']}, "
            f"{gone[0]['phase']}: killed from outside, or by the kernel for want of memory"
        )
        self._tell("failed", message, gone[0]["rank"], "Killed")

    def _end_hang(self) -> None:
        """Dump stacks, wait for those of other nodes, judge, kill."""
        stacks = Stacks(self.run_dir)
        for process, _ in self.ranks.values():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.send_signal(DUMP_SIGNAL)
        time.sleep(DUMPS_S / 3)
        for process, beat in self.ranks.values():
            stacks.keep(beat, process)
        time.sleep(DUMPS_S * 2 / 3)
        message, first = judge(self._beats(), stacks, self.hang_timeout_s)
        self._tell("hung", message, first, "Hang")
        self._kill()

    def _beats(self) -> list[Beat]:
        """The heartbeats of all hosts, without those that an earlier start has left: rank 0, which
        removes them, may be the one that never came."""
        return [
            beat
            for beat in read_heartbeats(self.run_dir)
            if beat["time"] >= self.since or beat["rank"] in self.ranks
        ]

    def _tell(self, state: State, message: str, rank: int, kind: str) -> None:
        if not claim_error(self.run_dir, message + "\n", self.since):
            return
        error = {"rank": rank, "host": self.host, "type": kind, "message": message}
        begun = [beat["step"] for _, beat in self.ranks.values() if beat["step"] is not None]
        steps = {"step": min(begun) - 1} if begun else {}
        write_status(self.run_dir, state, message, requeue=True, error=error, **steps)
        print(f"{state}: {message}", file=sys.stderr, flush=True)

    def _kill(self) -> None:
        """SIGKILL to the ranks of this host and to their loaders: they may not answer less."""
        family = []
        for process, _ in self.ranks.values():
            with contextlib.suppress(psutil.Error):
                family += [*process.children(recursive=True), process]
        for member in family:
            if member.pid != os.getpid():
                with contextlib.suppress(psutil.Error):
                    member.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--hang-timeout", type=float, required=True)
    parser.add_argument("--startup-timeout", type=float, required=True)
    parser.add_argument("--since", type=float, required=True)
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, ANSWERED_BY_RANKS)
    Watchdog(options.run_dir, options.hang_timeout, options.startup_timeout, options.since).run()


if __name__ == "__main__":
    main()
