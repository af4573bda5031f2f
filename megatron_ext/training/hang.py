"""Which ranks a hung run waits for: a judgement over heartbeats and stacks. Needs no torch.

    message, first_rank = judge(read_heartbeats(run_dir), Stacks(run_dir), hang_timeout_s=600)

Most ranks of a hung run only wait for others. Late are, in this order of certainty: those whose
process does not answer (no heartbeat at all), those that are behind by step or by phase, those
whose stack does not stand in a collective or in Megatron-Core.
"""

import contextlib
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from megatron_ext.training.heartbeat import STARTING, beat_interval

Beat = dict[str, Any]

# In the order in which a step meets them.
_PHASES = (*STARTING, "load", "compute", "evaluate", "save")
# Where the innermost frame of a rank that waits for others lies.
_WAITING = ("/torch/distributed/", "/megatron/core/", "/torch/autograd/", "_sum_over_ranks")
_FRAME = re.compile(r'File "(.+)", line (\d+) in (.+)')
_SHOWN = 8  # ranks named one by one


class Stacks:
    """The stacks of the last hang: RUN_DIR/stacks/rank_00000.txt."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "stacks"

    def keep(self, beat: Beat, process: psutil.Process) -> None:
        """Copy what a rank of this host dumped, or what state its process is in, into the run."""
        text = ""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{beat['pid']}/fd/{beat['stack_fd']}").read_text(errors="replace")
        if not text:
            with contextlib.suppress(psutil.Error):
                text = f"no stack: the process is {process.status()}\n"
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"rank_{beat['rank']:05d}.txt").write_text(text)

    def place(self, rank: int) -> str:
        """Innermost frame of the rank's main thread, as `file.py:12 in function`."""
        with contextlib.suppress(OSError):
            text = (self.folder / f"rank_{rank:05d}.txt").read_text()
            # The main thread is the first one made, and the last one dumped.
            frames = _FRAME.findall(re.split(r"^(?:Current t|T)hread ", text, flags=re.M)[-1])
            if frames:
                file, line, function = frames[0]
                return f"{file}:{line} in {function}"
            return text.strip().split("\n")[0]
        return ""


def judge(beats: list[Beat], stacks: Stacks, hang_timeout_s: float) -> tuple[str, int]:
    """What a hung run waits for, in words, and the first late rank."""
    now = time.time()
    missing = sorted(set(range(beats[0]["size"])) - {beat["rank"] for beat in beats})
    if missing:
        ranks = ", ".join(str(rank) for rank in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return f"rank {ranks}{more} never came; {len(beats)} ranks wait", missing[0]
    last_sign = now - 3 * beat_interval(hang_timeout_s) - 2
    late = _late(beats, stacks, last_sign)
    named = late or beats
    told = "; ".join(_describe(beat, stacks, now) for beat in named[:_SHOWN])
    if len(named) > _SHOWN:
        told += f"; and ranks {', '.join(str(beat['rank']) for beat in named[_SHOWN:])}"
    longest = now - min((b["since"] for b in beats if b["time"] >= last_sign), default=now)
    message = f"no progress for {longest:.0f} s. "
    if late:
        others = len(beats) - len(late)
        message += f"Late: {told}. The other {others} of {len(beats)} ranks wait"
    else:
        message += f"No rank stands out: {told}"
    return f"{message}. Stacks of all ranks are in {stacks.folder}", named[0]["rank"]


def _late(beats: list[Beat], stacks: Stacks, last_sign: float) -> list[Beat]:
    """The ranks that the others wait for; empty when none stands out."""
    tests = (
        [beat for beat in beats if beat["time"] < last_sign],
        _lowest(beats, [beat["step"] or 0 for beat in beats]),
        _lowest(beats, [_PHASES.index(b["phase"]) if b["phase"] in _PHASES else 0 for b in beats]),
        [
            beat
            for beat in beats
            if (place := stacks.place(beat["rank"])) and not any(w in place for w in _WAITING)
        ],
    )
    return next((found for found in tests if 0 < len(found) < len(beats)), [])


def _lowest(beats: list[Beat], values: Iterable[int]) -> list[Beat]:
    values = list(values)
    return [beat for beat, value in zip(beats, values, strict=True) if value == min(values)]


def _describe(beat: Beat, stacks: Stacks, now: float) -> str:
    text = f"rank {beat['rank']} on {beat['host']} (pid {beat['pid']})"
    text += "" if beat["step"] is None else f", step {beat['step']}"
    text += f", {beat['phase']} for {now - beat['since']:.0f} s"
    place = stacks.place(beat["rank"])
    return f"{text}, {place}" if place else text
