"""Step time and memory of any workload, with the fitted constants.

    answer = predict(read_rows(Path("rows.csv")))
    answer.step_time_s, answer.tokens_per_s_per_gpu, answer.memory_gb, answer.fits

constants.json holds the constants with their provenance; benchmarks/fit_planner.py writes it.
A source that was fitted has one factor of its own, any other has 1. Needs numpy, not torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np

from megatron_ext.planning.memory import MemoryConstants, peak_memory
from megatron_ext.planning.sources import GIB, reading
from megatron_ext.planning.throughput import TimeConstants, step_time
from megatron_ext.planning.workload import Column, Names, Workloads


@dataclass(frozen=True)
class Constants:
    """Everything that was fitted."""

    time: TimeConstants = field(default_factory=TimeConstants)
    memory: MemoryConstants = field(default_factory=MemoryConstants)
    source_time: Mapping[str, float] = field(default_factory=dict)
    """Measured over predicted step time, by source."""
    source_memory: Mapping[str, float] = field(default_factory=dict)
    """Printed over predicted memory, by source: some print what the driver holds."""


@dataclass(frozen=True)
class Prediction:
    """One value a row."""

    step_time_s: Column
    tokens_per_s_per_gpu: Column
    memory_gb: Column
    """Of the rank and in the unit that the row's source prints; else the fullest rank's GiB."""
    fits: Any
    """Whether the fullest rank fits the GPU."""

    def records(self, row_id: Names) -> list[dict[str, Any]]:
        """One dictionary a row, for JSON."""
        return [
            {
                "row_id": str(row_id[i]),
                "step_time_s": float(f"{self.step_time_s[i]:.6g}"),
                "tokens_per_s_per_gpu": float(f"{self.tokens_per_s_per_gpu[i]:.6g}"),
                "memory_gb": float(f"{self.memory_gb[i]:.5g}"),
                "fits": bool(self.fits[i]),
            }
            for i in range(len(row_id))
        ]


@lru_cache(maxsize=1)
def constants() -> Constants:
    """Those of constants.json."""
    stored = json.loads(resources.files(__package__).joinpath("constants.json").read_text())
    return Constants(
        TimeConstants(**stored["time"]),
        MemoryConstants(**stored["memory"]),
        stored["source_time"],
        stored["source_memory"],
    )


def predict(work: Workloads, using: Constants | None = None) -> Prediction:
    """All rows at once; `using` replaces the stored constants."""
    c = using or constants()
    seconds = step_time(work, c.time).total * of_source(work, c.source_time)
    fullest, read = peak_memory(work, c.memory)
    return Prediction(
        step_time_s=seconds,
        tokens_per_s_per_gpu=work.tokens / seconds / work.gpus,
        memory_gb=read * of_source(work, c.source_memory) / reading(work)[1],
        fits=fullest <= work.gpu.memory_gib * GIB,
    )


def of_source(work: Workloads, factors: Mapping[str, float]) -> Column:
    """Each row's factor; 1 for a source that was not fitted."""
    return np.array([factors.get(str(source), 1.0) for source in work.source_id])
