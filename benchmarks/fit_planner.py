"""Fit the planner's constants on published measurements, and say how well they predict others.

    python benchmarks/fit_planner.py ../shared/planner/fit_rows.csv            # errors
    python benchmarks/fit_planner.py ../shared/planner/fit_rows.csv --write    # and constants.json

Errors are |predicted / measured - 1|, on rows that the fit did not see: each fifth of the rows,
drawn by a hash of row_id, by a fit to the rest, and each source left out in turn (then its factor
is 1, as for anybody's machine). Outliers by rule: see megatron_ext/planning/sources.py; none is
dropped for its error.
The fit: Gauss-Newton on log(measured / predicted) with Huber's loss, priors on every constant and
source factors drawn to 1. Numpy only; half a minute on one core.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from data_tools.files import write_file
from megatron_ext.planning import memory as planner_memory
from megatron_ext.planning.memory import MemoryConstants, peak_memory
from megatron_ext.planning.prediction import Constants, predict
from megatron_ext.planning.sources import reading, usable_for_time
from megatron_ext.planning.throughput import TimeConstants, step_time
from megatron_ext.planning.workload import Workloads, from_rows

HUBER = 0.05  # relative error from which a row pulls with constant force
SOURCE_WEIGHT = -0.15  # a row of a source with n rows weighs n to this power
CONSTANT_PRIOR = (0.3, 0.003)  # spread of log(constant / default), weight
SOURCE_PRIOR_TIME = (0.2, 0.01)  # the same of the source factors: stacks differ more in time
SOURCE_PRIOR_MEMORY = (0.15, 0.01)
CONSTANTS_FILE = Path(__file__).parents[1] / "megatron_ext" / "planning" / "constants.json"


@dataclass(frozen=True)
class Measured:
    """Workloads with what was measured; nan where it was not, or may not be used."""

    work: Workloads
    seconds: Any
    memory: Any

    def where(self, chosen: Any) -> "Measured":
        return Measured(self.work.where(chosen), self.seconds[chosen], self.memory[chosen])


def read(path: Path) -> Measured:
    """Rows of the table, with times and memory only where `use` and the rules allow them."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    work = from_rows(rows)

    def column(name: str, use: str) -> Any:
        return np.array([float(r[name]) if r[name] and use in r["use"] else np.nan for r in rows])

    seconds = np.where(usable_for_time(work), column("step_time_s", "time"), np.nan)
    return Measured(work, seconds, column("mem_gb", "mem"))


def fit(rows: Measured) -> Constants:
    """Constants of time and memory, with a factor for each source."""
    timed = rows.where(np.isfinite(rows.seconds))
    time, source_time = _fit(
        TimeConstants(),
        lambda c: step_time(timed.work, c).total,
        timed.seconds,
        timed.work.source_id,
        SOURCE_PRIOR_TIME,
    )
    held = rows.where(np.isfinite(rows.memory))
    unit = reading(held.work)[1]
    memory, source_memory = _fit(
        MemoryConstants(),
        lambda c: peak_memory(held.work, c)[1] / unit,
        held.memory,
        held.work.source_id,
        SOURCE_PRIOR_MEMORY,
    )
    return Constants(time, memory, source_time, source_memory)


def _fit(
    default: Any,
    predicted: Callable[[Any], Any],
    measured: Any,
    source: Any,
    source_prior: tuple[float, float],
) -> tuple[Any, dict[str, float]]:
    names = [f.name for f in fields(default)]
    start = np.log([getattr(default, name) for name in names])
    sources, which = np.unique(source, return_inverse=True)
    weight = np.bincount(which)[which] ** SOURCE_WEIGHT
    n = len(names)
    spread = np.concatenate([np.full(n, CONSTANT_PRIOR[0]), np.full(len(sources), source_prior[0])])
    trust = np.concatenate([np.full(n, CONSTANT_PRIOR[1]), np.full(len(sources), source_prior[1])])
    prior = np.sqrt(trust) / spread
    centre = np.concatenate([start, np.zeros(len(sources))])

    def constants(x: Any) -> Any:
        return replace(default, **dict(zip(names, np.exp(x[:n]).tolist(), strict=True)))

    def residual(x: Any) -> Any:
        return np.log(measured / predicted(constants(x))) - x[n:][which]

    def loss(x: Any) -> float:
        size = np.abs(residual(x))
        robust = np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2))
        return float((weight * robust).sum() + ((prior * (x - centre)) ** 2).sum() / 2)

    x, damping = centre.copy(), 1e-2
    best = loss(x)
    for _ in range(80):
        now = residual(x)
        slope = np.zeros((len(now), len(x)))
        for j in range(n):
            shifted = x.copy()
            shifted[j] += 1e-3
            slope[:, j] = (residual(shifted) - now) / 1e-3
        slope[np.arange(len(now)), n + which] = -1
        pull = weight * np.minimum(1, HUBER / np.maximum(np.abs(now), 1e-12))
        matrix = (slope * pull[:, None]).T @ slope + np.diag(prior**2)
        gradient = (slope * pull[:, None]).T @ now + prior**2 * (x - centre)
        before = best
        for _ in range(10):
            step = np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), -gradient)
            trial = x + np.clip(step, -0.5, 0.5)
            if (value := loss(trial)) < best:
                x, best, damping = trial, value, max(damping / 5, 1e-6)
                break
            damping *= 4
        if before - best <= 1e-5 * before:
            break
    factors = dict(zip(sources.tolist(), np.exp(x[n:]).tolist(), strict=True))
    return constants(x), factors


def errors(rows: Measured, using: Constants) -> dict[str, Any]:
    """Relative errors of time and memory by row, nan where nothing was measured."""
    answer = predict(rows.work, using)
    return {
        "time": np.abs(answer.step_time_s / rows.seconds - 1),
        "memory": np.abs(answer.memory_gb / rows.memory - 1),
        "fits": np.where(np.isfinite(rows.memory), answer.fits, np.nan),
        "a100": np.char.startswith(rows.work.gpu_name, "a100"),
        "source": rows.work.source_id,
    }


def by_others(rows: Measured, group: Any) -> dict[str, Any]:
    """Errors of the rows of every group, predicted by a fit to the other groups."""
    parts = []
    for one in np.unique(group):
        part = errors(rows.where(group == one), fit(rows.where(group != one)))
        parts.append({**part, "group": group[group == one]})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def fifths(rows: Measured) -> Any:
    """0 to 4, by a hash of row_id."""
    return np.array([zlib.crc32(str(i).encode()) % 5 for i in rows.work.row_id])


def bands(rows: Measured, using: Constants) -> str:
    """Memory of nanotron's sweep by the rule that says where tensors wait, by none, and by the
    better of both answers for each row."""
    of_sweep = (rows.work.framework == "nanotron") & np.isfinite(rows.memory)

    def predicted(ahead: bool) -> Any:
        with patch.object(planner_memory, "runs_ahead", lambda w, _: np.full(len(w), ahead)):
            return predict(rows.work, using).memory_gb

    def of(name: str, error: Any) -> str:
        every = errors(rows, using)["memory"]
        every[of_sweep] = error[of_sweep]
        return (
            f"{name} {(error[of_sweep] > 0.15).sum()} of {of_sweep.sum()} beyond 15%, p95 of all "
            f"{np.nanquantile(every, 0.95):.1%}"
        )

    low, high, rule = predicted(False), predicted(True), predict(rows.work, using).memory_gb
    without, with_all, by_rule = (np.abs(p / rows.memory - 1) for p in (low, high, rule))
    apart = of_sweep & (high > 1.3 * low)
    right = ((with_all < without) == (rule > low))[apart]
    answers = (
        of("by rule", by_rule),
        of("without", without),
        of("if known", np.minimum(without, with_all)),
        f"the rule is right for {right.mean():.0%} of {apart.sum()} rows where they are 30% apart",
    )
    return "bands of nanotron's memory: " + "; ".join(answers)


def slowdown(rows: Measured, using: Constants) -> Any:
    """Measured time of the layout predicted to be fastest over that of the fastest one, minus 1,
    for each model, batch and number of GPUs that a source ran with several layouts."""
    work, chosen = rows.work, np.isfinite(rows.seconds)
    predicted = predict(work, using).step_time_s
    model = ("num_layers", "hidden", "heads", "kv_heads", "ffn", "vocab")
    shape = (*model, "seq_len", "gpus", "global_batch")
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in np.flatnonzero(chosen):
        key: tuple[Any, ...] = (
            work.source_id[i], work.framework[i], work.gpu_name[i], work.precision[i],
        )  # fmt: skip
        key = (*key, *(getattr(work, name)[i] for name in shape))
        groups.setdefault(key, []).append(int(i))
    several = [np.array(members) for members in groups.values() if len(members) > 1]
    return np.array(
        [rows.seconds[m][predicted[m].argmin()] / rows.seconds[m].min() - 1 for m in several]
    )


def table(columns: dict[str, dict[str, Any]]) -> str:
    """Markdown: median / 95th percentile and number of rows, by source and over all."""

    def cell(of: dict[str, Any], quantity: str, chosen: Any) -> str:
        values = of[quantity][chosen & np.isfinite(of[quantity])]
        if not len(values):
            return ""
        return f"{np.median(values):.1%} / {np.quantile(values, 0.95):.1%} ({len(values)})"

    every = [(quantity, name) for quantity in ("time", "memory") for name in columns]
    lines = ["| rows | " + " | ".join(f"{q}, {n}" for q, n in every) + " |"]
    lines.append("| --- |" + " --- |" * len(every))
    groups: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("**all A100**", lambda of: of["a100"]),
        ("**all others**", lambda of: ~of["a100"]),
        ("**all**", lambda of: of["a100"] | True),
    ]
    sources = sorted({str(s) for of in columns.values() for s in of["source"]})
    groups += [(s, lambda of, s=s: of["source"] == s) for s in sources]  # type: ignore[misc]
    for name, chosen in groups:
        cells = [cell(columns[n], q, chosen(columns[n])) for q, n in every]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: Path, using: Constants, table_file: Path) -> None:
    """constants.json, whole or not at all."""

    def rounded(values: Any) -> dict[str, float]:
        pairs = values.items() if isinstance(values, dict) else vars(values).items()
        return {name: float(f"{value:.4g}") for name, value in sorted(pairs)}

    stored = {
        "_about": "Fitted by benchmarks/fit_planner.py --write; docs/planner.md explains them.",
        "provenance": {
            "table": table_file.name,
            "table_sha256": hashlib.sha256(table_file.read_bytes()).hexdigest(),
            "date": date.today().isoformat(),
            "numpy": np.__version__,
            "huber": HUBER,
            "source_weight": SOURCE_WEIGHT,
            "constant_prior": CONSTANT_PRIOR,
            "source_prior_time": SOURCE_PRIOR_TIME,
            "source_prior_memory": SOURCE_PRIOR_MEMORY,
        },
        "time": rounded(using.time),
        "memory": rounded(using.memory),
        "source_time": rounded(using.source_time),
        "source_memory": rounded(using.source_memory),
    }
    write_file(path, json.dumps(stored, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="CSV of measured rows")
    parser.add_argument("--write", action="store_true", help="store the fit to all rows")
    parser.add_argument("--quick", action="store_true", help="do not leave each source out")
    options = parser.parse_args()
    rows = read(options.table)
    whole = fit(rows)
    columns = {"fitted": errors(rows, whole), "held out": by_others(rows, fifths(rows))}
    if not options.quick:
        columns["source left out"] = by_others(rows, rows.work.source_id)
    print(table(columns) + "\n")
    held = columns["held out"]
    for fifth in range(5):
        of = {key: values[held["group"] == fifth] for key, values in held.items()}
        time, memory = of["time"][of["a100"]], of["memory"]
        print(
            f"held out, fifth {fifth}: time on A100 {np.nanmedian(time):.1%} / "
            f"{np.nanquantile(time, 0.95):.1%}, memory {np.nanmedian(memory):.1%} / "
            f"{np.nanquantile(memory, 0.95):.1%}"
        )
    fits = held["fits"]
    print(f"fit or not, held out: {np.nanmean(fits):.1%} of {np.isfinite(fits).sum()} rows right")
    lost = slowdown(rows, whole)
    print(
        f"layout chosen against the best measured: {lost.mean():.2%} slower in the mean of "
        f"{len(lost)} choices"
    )
    print(bands(rows, whole))
    print(f"constants: {whole.time}\n{whole.memory}")
    if options.write:
        write(CONSTANTS_FILE, whole, options.table)
        print(f"wrote {CONSTANTS_FILE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
