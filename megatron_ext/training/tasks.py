"""The tasks of `megatron-ext evaluate`, asked of the model while it trains.

    tasks = Tasks(plan_tasks(config), here, watch, journal)
    stopped = tasks.measure(model, done)            # every `evaluation.tasks_interval` steps

The results are those that `evaluate` would write for the same weights, in the same format, in
RUN/evaluation/in_training/step_N/; the journal gets one figure for each length. A signal ends a
measurement after the length at hand; the next start takes it up again.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from numpy.typing import NDArray

from megatron_ext.checkpoint.chunks import bare, gather_weights
from megatron_ext.checkpoint.manifest import write_json
from megatron_ext.evaluation import perplexity, retrieval
from megatron_ext.evaluation.in_training import TaskPlan, at_step
from megatron_ext.evaluation.scoring import Scorer, Scores
from megatron_ext.training.journal import Journal
from megatron_ext.training.step import on_any_rank
from megatron_ext.training.supervision import Supervision
from megatron_ext.world import World

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Some rank was asked to stop."""


class Tasks:
    """Measures what is planned; every rank calls it alike."""

    def __init__(
        self, plans: Sequence[TaskPlan], here: World, watch: Supervision, journal: Journal
    ) -> None:
        self.plans, self.here, self.watch, self.journal = plans, here, watch, journal

    def measure(self, model: list[DistributedDataParallel], done: int) -> bool:
        """Measure what the journal lacks after `done` steps; returns whether a signal cut it
        short."""
        lacking = [plan for plan in self.plans if on_any_rank(self._lacks(plan, done))]
        if not lacking:
            return False
        gather_weights(model)  # ranks differ in how many forward passes they make, if any
        for chunk in model:
            chunk.eval()
        scorer = _WatchedScorer(bare(model), self.here, self.watch)
        try:
            for plan in lacking:
                self._record(at_step(plan, done), done, scorer)
        except Stopped:
            return True
        finally:
            for chunk in model:
                chunk.train()
        return False

    def _lacks(self, plan: TaskPlan, done: int) -> bool:
        return self.journal.lacks(done, f"{plan.header['task']}/{min(plan.missing)}")

    def _record(self, plan: TaskPlan, done: int, scorer: Scorer) -> None:
        if isinstance(plan, perplexity.Plan):
            results = perplexity.measure(plan, scorer)
        else:
            results = retrieval.measure(plan, scorer)
        if self.here.is_main:
            try:
                plan.output.parent.mkdir(parents=True, exist_ok=True)
                write_json(plan.output, results)
            except OSError as error:  # a full disk ends no training
                log.warning("%s could not be written: %s", plan.output, error)
        self.journal.task(done, _figures(results))


class _WatchedScorer(Scorer):
    """Tells the watch of each forward pass, and leaves between lengths when a rank shall stop."""

    def __init__(self, chunks: list[Any], here: World, watch: Supervision) -> None:
        super().__init__(chunks, here)
        self.is_main = False  # neither progress lines nor files, which `Tasks` writes
        self.watch = watch

    def score(self, tokens: NDArray[Any], last: int | None = None) -> Scores:
        self.watch.phase("evaluate")
        return super().score(tokens, last)

    def total(self, parts: NDArray[np.float64]) -> NDArray[np.float64]:
        whole = super().total(parts)  # once for each length, on every rank
        if on_any_rank(self.watch.stop_requested):
            raise Stopped
        return whole


def _figures(results: dict[str, Any]) -> dict[str, float]:
    """One number for each length, named TASK/LENGTH."""
    key = "token_weighted_perplexity" if results["task"] == "perplexity" else "accuracy"
    return {f"{results['task']}/{entry['length']}": entry[key] for entry in results["lengths"]}
