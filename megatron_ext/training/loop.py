"""The loop: steps, log lines, validation, checkpoints, until the budget is spent or a signal comes.

done, stopped = train(config, model, optimizer, data, ..., watch, journal, guard, tasks)
"""

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.utils.data import Dataset

from megatron_ext.checkpoint import sharded
from megatron_ext.checkpoint.saving import Saver
from megatron_ext.config import Config
from megatron_ext.config.batch_sizes import BatchSizes
from megatron_ext.data.blend import Layout, micro_batches
from megatron_ext.data.documents import documents_of
from megatron_ext.training.guard import SPIKE, LossGuard, note_rollback
from megatron_ext.training.journal import Journal
from megatron_ext.training.step import (
    Batch,
    StepResult,
    evaluate_loss,
    on_any_rank,
    train_step,
)
from megatron_ext.training.supervision import Supervision
from megatron_ext.training.tasks import Tasks

log = logging.getLogger(__name__)


def train(
    config: Config,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    data: tuple[Dataset, Dataset],
    layout: Layout,
    saver: Saver,
    done_steps: int,
    watch: Supervision,
    journal: Journal,
    guard: LossGuard,
    tasks: Tasks,
) -> tuple[int, bool]:
    """Train from `done_steps` on; returns the steps done and whether a signal ended it before all
    steps and the last validation were.

    `saver.record` goes into every checkpoint. Raises Verdict: too many skipped steps in a row, or a
    last state that could not be saved.
    """
    steps, record = config.training.steps, saver.record
    batches = TimedIterator(micro_batches(data[0], config, layout, done_steps, steps), watch)
    validate = partial(validation, model, data[1], config, layout, journal, watch, tasks)
    asked = lambda: watch.stop_requested  # noqa: E731
    done, stop = done_steps, False
    if done:
        stop = validate(done)  # what a signal cut short before this start
    while done < steps and not stop:
        started, batches.waited = time.monotonic(), 0.0
        watch.phase("compute", step=done + 1)
        result = train_step(done, batches, model, optimizer, config, asked, guard.refuses)
        done, stop = done + 1, result.stop
        journal.step(done, result, time.monotonic() - started, batches.waited, saver.stall_s)

        if fault := guard.judge(result):
            state = (model, optimizer, record)
            answer_fault(fault, done, result, state, data[0], journal, guard, saver)
        stop = stop or validate(done)
        saver.poll()
        if done % config.checkpoint.interval == 0 or done == steps or stop:
            watch.phase("save")
            record.update(guard.state())
            saver.save(done, model, optimizer)
            if done < steps and not stop:
                stop = on_any_rank(watch.stop_requested)  # during the save
    watch.phase("save")
    if done == done_steps > saver.saved_step:  # nothing left to do after a roll back
        record.update(guard.state())
        saver.save(done, model, optimizer)
    saver.close(done)
    journal.close()
    return done, stop


def answer_fault(
    fault: str,
    done: int,
    result: StepResult,
    state: tuple[list[DistributedDataParallel], MegatronOptimizer, dict[str, Any]],
    dataset: Dataset,
    journal: Journal,
    guard: LossGuard,
    saver: Saver,
) -> None:
    """Write down a step that went wrong, with the documents of its batch; roll back if so wanted.
    Raises Verdict when there are too many of them."""
    config = saver.config
    action = "skipped" if result.skipped else "trained on"
    if fault.startswith(SPIKE) and config.faults.spike_action == "roll_back":
        saver.wait()
        back_to = sharded.restore(config, *state, at_most=done)
        if back_to:
            action = f"skipped, weights and optimizer of step {back_to}"
            if journal.here.is_main:
                note_rollback(config, back_to, done, guard)
    if journal.here.is_main:
        sizes = config.training.batch_sizes
        samples = range(sizes.before(done - 1), sizes.before(done))
        journal.fault(done, fault, action, documents_of(dataset, config, samples))
    guard.check(done, fault)


def validation(
    model: list[DistributedDataParallel],
    dataset: Dataset,
    config: Config,
    layout: Layout,
    journal: Journal,
    watch: Supervision,
    tasks: Tasks,
    done: int,
) -> bool:
    """Measure the validation loss and the tasks where they are due after `done` steps and not yet
    recorded; returns whether a signal cut it short."""
    settings, last = config.evaluation, done == config.training.steps
    due = last or done % settings.interval == 0
    if due and on_any_rank(journal.lacks(done, "validation_loss")):
        full = BatchSizes(config.training.global_batch_size)
        samples = micro_batches(dataset, config, layout, 0, settings.batches, full)
        held_out = TimedIterator(samples, watch, between="evaluate")
        stopped = lambda: watch.stop_requested  # noqa: E731
        loss = evaluate_loss(held_out, model, config, settings.batches, stopped)
        if loss is None:
            return True
        journal.validation(done, loss)
    return (last or done % settings.tasks_interval == 0) and tasks.measure(model, done)


class TimedIterator:
    """An iterator that adds up, in `waited`, the seconds spent waiting for items, and tells the
    watch of each: in the phase "load", and in `between` from then on."""

    def __init__(
        self, items: Iterator[Batch], watch: Supervision, between: str = "compute"
    ) -> None:
        self.items = items
        self.watch = watch
        self.between = between
        self.waited = 0.0

    def __iter__(self) -> "TimedIterator":
        return self

    def __next__(self) -> Batch:
        started = time.monotonic()
        self.watch.phase("load")
        try:
            return next(self.items)
        finally:
            self.watch.phase(self.between)
            self.waited += time.monotonic() - started
