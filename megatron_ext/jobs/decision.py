"""What comes after a job's end: nothing, because the run is finished; the queue again; or a stop.

    decision = decide(End(code=1, step=120, steps=1000, error="..."), read(run_dir))
    decision.action, decision.reason

A run goes on by itself as long as it gets anywhere. It stops when the same thing ends it twice at
the same step, for a third start would end there too; after five starts, however they ended, without
a newer checkpoint; and at once for what a person has to mend.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_ext.jobs.journal import Life

_ALL_BAD = 0.5  # when so large a share of nodes fails its check, the check's subject is not a node
_FRUITLESS = 3  # signals in a row without a step between them
_STARTS = 5  # in a row that leave no newer checkpoint


@dataclass(frozen=True)
class End:
    """How a life ended."""

    code: int
    """Of srun: the highest of all ranks."""
    step: int
    """Last step that is known to be done."""
    steps: int
    checkpoint: int = 0
    """Step of the newest one; 0 before the first."""
    finished: bool = False
    stopped: bool = False
    """By a signal, for which the run saved a checkpoint if it had begun."""
    hopeless: bool = False
    """The run itself says that starting it again is no use: the user's mistake, or a verdict."""
    error: str = ""
    """The first one, one line."""
    bad_nodes: tuple[str, ...] = ()
    nodes: int = 1


@dataclass(frozen=True)
class Decision:
    action: Literal["finished", "requeue", "stop"]
    reason: str


def decide(end: End, lives: list[Life]) -> Decision:
    """`lives` are those before this one, oldest first."""
    decision = _by_its_own_end(end, lives)
    starts = 1
    for ended in reversed([life.ended for life in lives if life.ended]):
        # A stop was somebody's turn to mend something: what came before it no longer counts.
        if ended["action"] != "requeue" or ended.get("checkpoint", -1) < end.checkpoint:
            break
        starts += 1
    if decision.action == "requeue" and starts >= _STARTS:
        return Decision(
            "stop", f"{starts} starts in a row left no checkpoint newer than step "
            f"{end.checkpoint}, lastly: {decision.reason}",
        )  # fmt: skip
    return decision


def _by_its_own_end(end: End, lives: list[Life]) -> Decision:
    if end.finished:
        return Decision("finished", f"all {end.steps} steps are done")
    if end.bad_nodes:
        names = ", ".join(end.bad_nodes)
        if len(end.bad_nodes) > max(1, _ALL_BAD * end.nodes) or end.nodes == 1:
            return Decision(
                "stop", f"{len(end.bad_nodes)} of {end.nodes} nodes failed their check ({names}): "
                "look at what they have in common, or set HEALTH_CHECK=no in slurm/site.env",
            )  # fmt: skip
        return Decision("requeue", f"without {names}, which failed the check of nodes")
    if end.hopeless:
        return Decision("stop", end.error or "the command or the config is wrong")
    return _after_signal(end, lives) if end.stopped else _after_failure(end, lives)


def _after_signal(end: End, lives: list[Life]) -> Decision:
    before = [life.ended for life in lives if life.ended]
    same = 1
    for ended in reversed(before):
        if not (ended["action"] == "requeue" and ended["step"] == end.step and ended["stopped"]):
            break
        same += 1
    if same >= _FRUITLESS:
        return Decision(
            "stop", f"{same} starts in a row were stopped at step {end.step} before another step: "
            "give the job more time (--time), or a partition that preempts less",
        )  # fmt: skip
    return Decision("requeue", f"stopped by a signal after step {end.step}")


def _after_failure(end: End, lives: list[Life]) -> Decision:
    what = end.error or f"exit code {end.code}"
    here = []
    for ended in reversed([life.ended for life in lives if life.ended]):
        if ended["stopped"] or ended["step"] != end.step:
            break
        here.append(ended["error"])
    if here and _alike(here[0], end.error):
        return Decision("stop", f"failed twice at step {end.step}: {what}")
    if len(here) + 1 >= _FRUITLESS:
        return Decision("stop", f"failed {len(here) + 1} times at step {end.step}, lastly: {what}")
    return Decision("requeue", f"failed at step {end.step}: {what}")


def _alike(one: str, other: str) -> bool:
    """The same error but for ports, ranks, addresses and times."""
    return re.sub(r"\d+", "#", one) == re.sub(r"\d+", "#", other)
