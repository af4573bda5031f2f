"""The loop: steps, log lines, validation, checkpoints, until the budget is spent or a signal comes.

done = train(config, here, model, optimizer, data, layout, record, done_steps, watch)
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.utils.data import Dataset

from megatron_ext.checkpoint.saving import Saver
from megatron_ext.config import Config
from megatron_ext.config.batch_sizes import BatchSizes
from megatron_ext.data.blend import Layout, micro_batches
from megatron_ext.errors import Verdict
from megatron_ext.training.journal import Journal
from megatron_ext.training.step import Batch, evaluate_loss, train_step
from megatron_ext.training.supervision import Supervision
from megatron_ext.world import World

log = logging.getLogger(__name__)


def train(
    config: Config,
    here: World,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    data: tuple[Dataset, Dataset],
    layout: Layout,
    record: dict[str, Any],
    done_steps: int,
    watch: Supervision,
) -> int:
    """Train from `done_steps` on; returns the steps done, all of them or those before a signal.

    `record` goes into every checkpoint. Raises Verdict: too many skipped steps in a row, or a last
    state that could not be saved.
    """
    steps = config.training.steps
    batches = TimedIterator(micro_batches(data[0], config, layout, done_steps, steps))
    journal = Journal(config, here, done_steps)
    saver = Saver(config, record, done_steps)
    done, skips, stop = done_steps, 0, False
    while done < steps and not stop:
        started, batches.waited = time.monotonic(), 0.0
        result = train_step(
            done, batches, model, optimizer, config, stop_requested=watch.stop_requested
        )
        done, stop = done + 1, result.stop
        journal.step(done, result, time.monotonic() - started, batches.waited, saver.stall_s)

        skips = skips + 1 if result.skipped else 0
        if skips > config.faults.max_consecutive_skips:
            raise Verdict(
                f"{skips} steps in a row had a non-finite gradient, the last at step {done}: "
                "look at data and learning rate, then go on from the last checkpoint"
            )
        if done == steps or (done % config.evaluation.interval == 0 and not stop):
            full = BatchSizes(config.training.global_batch_size)
            held_out = micro_batches(data[1], config, layout, 0, config.evaluation.batches, full)
            journal.validation(
                done, evaluate_loss(held_out, model, config, config.evaluation.batches)
            )
        saver.poll()
        if done % config.checkpoint.interval == 0 or done == steps or stop:
            saver.save(done, model, optimizer)
    saver.close(done)
    journal.close()
    return done


class TimedIterator:
    """An iterator that adds up, in `waited`, the seconds spent waiting for items."""

    def __init__(self, items: Iterator[Batch]) -> None:
        self.items = items
        self.waited = 0.0

    def __iter__(self) -> "TimedIterator":
        return self

    def __next__(self) -> Batch:
        started = time.monotonic()
        try:
            return next(self.items)
        finally:
            self.waited += time.monotonic() - started
