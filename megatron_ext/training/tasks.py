"""The tasks of `megatron-ext evaluate`, asked of the model while it trains.

    tasks = Tasks(config, here, watch, journal)     # refuses what could not be measured
    stopped = tasks.measure(model, done)            # every `evaluation.tasks_interval` steps

The results are those that `evaluate` would write for the same weights, in the same format, in
RUN/evaluation/in_training/step_N/; the journal gets one figure for each length. A signal ends a
measurement after the length at hand; the next start takes it up again.
"""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from numpy.typing import NDArray

from megatron_ext.config import Config
from megatron_ext.evaluation import perplexity, retrieval
from megatron_ext.evaluation.scoring import Scorer, Scores
from megatron_ext.evaluation.subject import Subject
from megatron_ext.training.journal import Journal
from megatron_ext.training.step import on_any_rank
from megatron_ext.training.supervision import Supervision
from megatron_ext.world import World


class Stopped(Exception):
    """Some rank was asked to stop."""


class Tasks:
    """Measures `evaluation.tasks`; every rank calls it alike."""

    def __init__(self, config: Config, here: World, watch: Supervision, journal: Journal) -> None:
        """Raises UserError."""
        self.config, self.here, self.watch, self.journal = config, here, watch, journal
        if not here.is_main:  # which says for all what the plans have to remark
            logging.getLogger("megatron_ext.evaluation").setLevel(logging.ERROR)
        self._plans(done=0)  # a length that is too short is told of now, not in a week

    def measure(self, model: list[DistributedDataParallel], done: int) -> bool:
        """Measure what the journal lacks after `done` steps; returns whether a signal cut it
        short."""
        for chunk in model:
            chunk.eval()
        scorer = _WatchedScorer([chunk.module for chunk in model], self.here, self.watch)
        try:
            for plan in self._plans(done):
                first = f"{plan.header['task']}/{min((*plan.done, *plan.missing))}"
                if on_any_rank(self.journal.lacks(done, first)):
                    self.journal.task(done, _figures(_results(plan, scorer)))
        except Stopped:
            return True
        finally:
            for chunk in model:
                chunk.train()
        return False

    def _plans(self, done: int) -> list[perplexity.Plan | retrieval.Plan]:
        run_dir = self.config.training.run_dir
        subject = Subject(
            self.config,
            run_dir,
            run_dir / "evaluation" / "in_training" / f"step_{done:08d}",
            {"step": done, "in_training": True},
            bos=None,  # as in the sequences that it is trained on
        )
        return [
            perplexity.make_plan(subject)
            if task == "perplexity"
            else retrieval.make_plan(subject, task)
            for task in self.config.evaluation.tasks
        ]


def _results(plan: perplexity.Plan | retrieval.Plan, scorer: Scorer) -> dict[str, Any]:
    # All lengths anew: ranks on several nodes may see different states of a file just written.
    plan = replace(plan, done={}, missing=sorted((*plan.done, *plan.missing)))
    if isinstance(plan, perplexity.Plan):
        return perplexity.measure(plan, scorer)
    return retrieval.measure(plan, scorer)


class _WatchedScorer(Scorer):
    """Tells the watch of each forward pass, and leaves between lengths when a rank shall stop."""

    def __init__(self, chunks: list[Any], here: World, watch: Supervision) -> None:
        super().__init__(chunks, here)
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
