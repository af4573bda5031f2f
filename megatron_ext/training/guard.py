"""Steps that had better not be taken: a non-finite loss or gradient, or a loss far above the last.

    done_steps, guard = resume(config, done_steps)
    result = train_step(..., refuse=guard.refuses)  # before the optimizer sees the gradient
    fault = guard.judge(result)                     # "" or what was wrong
    guard.check(done, fault)                        # Verdict after too many in a row

The loss of the global batch is the same on every rank, so all ranks decide alike without asking.
A spike is a loss more than faults.spike_sigma standard deviations above the mean of the last
faults.spike_window losses. The window and the number of steps skipped in a row stand in every
checkpoint (run.json), so that a run that was killed judges as the uninterrupted one would.

Rolling back takes the weights and the optimizer of the newest checkpoint, of step c, and goes on
with the step after the spike, s: steps, samples and learning rate stay where they are, and what the
batches c + 1 .. s taught is forgotten. rollbacks.json keeps (c, s): a run started again from c
goes on at s too.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from megatron_ext.checkpoint.manifest import checkpoint_dir, write_json
from megatron_ext.config import Config
from megatron_ext.errors import Verdict
from megatron_ext.training.step import StepResult

log = logging.getLogger(__name__)

SPIKE = "loss spike"
WINDOW, SKIPS = "loss_window", "skipped_in_a_row"  # their keys in run.json


class LossGuard:
    """The judge of a run's losses, the same on every rank."""

    def __init__(self, config: Config, state: Mapping[str, Any]) -> None:
        """state: what `state` gave before this start; {} at the beginning."""
        self.faults = config.faults
        self.window = deque(state.get(WINDOW, []), maxlen=config.faults.spike_window)
        self.skips: int = state.get(SKIPS, 0)

    def state(self) -> dict[str, Any]:
        """What a run that goes on has to know of the steps before."""
        return {WINDOW: list(self.window), SKIPS: self.skips}

    def refuses(self, loss: float) -> bool:
        """Whether the step is to be skipped for its loss."""
        return self.faults.spike_action != "warn" and self._is_spike(loss)

    def judge(self, result: StepResult) -> str:
        """What was wrong with a step, in words; "" for nothing."""
        if result.overflowed:  # fp16 looking for its loss scale: neither a fault nor a sound step
            return ""
        fault = ""
        if not (math.isfinite(result.grad_norm) and math.isfinite(result.loss)):
            fault = f"non-finite {'gradient' if math.isfinite(result.loss) else 'loss'}"
        elif self._is_spike(result.loss):
            mean, deviation = self._usual()
            fault = f"{SPIKE}: {result.loss:.4f} is above {mean:.4f} + "
            fault += f"{self.faults.spike_sigma:g} x {deviation:.4f}"
        if not result.skipped:
            self.window.append(result.loss)
        self.skips = self.skips + 1 if result.skipped else 0
        return fault

    def check(self, done: int, fault: str) -> None:
        """Raise Verdict when so many steps in a row, the last with `fault`, were skipped as
        faults.max_consecutive_skips does not allow."""
        if self.skips > self.faults.max_consecutive_skips:
            raise Verdict(
                f"{self.skips} steps in a row had a {fault.split(':')[0]}, the last at step {done}:"
                " look at data and learning rate, then go on from the last checkpoint"
            )

    def _is_spike(self, loss: float) -> bool:
        if self.faults.spike_sigma is None or len(self.window) < self.faults.spike_window:
            return False
        mean, deviation = self._usual()
        return loss > mean + self.faults.spike_sigma * deviation

    def _usual(self) -> tuple[float, float]:
        return statistics.fmean(self.window), statistics.pstdev(self.window)


def resume(config: Config, done_steps: int) -> tuple[int, LossGuard]:
    """After a checkpoint of `done_steps` was read: the steps that are done, which are more when the
    run had rolled back to it, and the guard as it was then. The same on every rank."""
    run_dir = config.training.run_dir
    for rolled in _rollbacks(config):
        if rolled["from"] == done_steps:
            return rolled["to"], LossGuard(config, rolled)
    try:
        saved = json.loads((checkpoint_dir(run_dir, done_steps) / "run.json").read_text())
    except OSError:  # the beginning
        saved = {}
    return done_steps, LossGuard(config, saved)


def note_rollback(config: Config, back_to: int, done: int, guard: LossGuard) -> None:
    """Keep that the run went from `done` steps back to the checkpoint of `back_to` (rank 0)."""
    kept = [rolled for rolled in _rollbacks(config) if rolled["from"] != back_to]
    noted = {"from": back_to, "to": done, **guard.state()}
    try:
        write_json(config.training.run_dir / "rollbacks.json", [*kept, noted])
    except OSError as error:
        log.warning("a run started again will not know of the roll back: %s", error)


def _rollbacks(config: Config) -> list[dict[str, Any]]:
    try:
        return json.loads((config.training.run_dir / "rollbacks.json").read_text())
    except OSError:
        return []
