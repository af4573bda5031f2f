"""What results come down to: how far a run retrieves, and how its loss falls with context.

    effective_context(results["lengths"], 0.8)      # tokens, with a 95% interval
    fit_power_law([128, 256, 512, 1024], [4.1, 3.9, 3.8, 3.75])      # alpha, beta, gamma

Needs neither torch nor matplotlib.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext.study.runs import Run

THRESHOLD = 0.8  # share of prompts answered right, unless the user says another
_Z = 1.959963984540054  # normal quantile of 97.5%
_LEAST_POINTS = 4  # of a law with three numbers: one more, or every fit is perfect


@dataclass(frozen=True)
class EffectiveContext:
    """The greatest measured length up to which every measured length has share >= threshold.

    0: the shortest measured length is below it already. `low` and `high` are the same of the lower
    and the upper ends of the shares' 95% intervals, so low <= tokens <= high.
    """

    tokens: int
    low: int
    high: int
    longest: int
    """Longest length measured: where `tokens` equals it, the true one may lie beyond."""


def effective_context(lengths: Sequence[dict[str, Any]], threshold: float) -> EffectiveContext:
    """From the `lengths` of a retrieval results file; all depths count alike."""
    entries = sorted(lengths, key=lambda entry: entry["length"])
    asked = [entry["length"] for entry in entries]
    counts = [pooled(entry) for entry in entries]
    intervals = [wilson(*count) for count in counts]

    def reach(shares: Sequence[float]) -> int:
        far = 0
        for length, share in zip(asked, shares, strict=True):
            if share < threshold:
                break
            far = length
        return far

    return EffectiveContext(
        tokens=reach([correct / samples for correct, samples in counts]),
        low=reach([low for low, _ in intervals]),
        high=reach([high for _, high in intervals]),
        longest=asked[-1],
    )


def pooled(entry: dict[str, Any]) -> tuple[int, int]:
    """Correct answers and prompts of one length, over all depths."""
    depths = entry["depths"]
    return sum(d["correct"] for d in depths), sum(d["samples"] for d in depths)


def wilson(correct: int, samples: int) -> tuple[float, float]:
    """95% score interval of a share: the p with |correct/samples - p| <= z sqrt(p (1-p) / samples)
    (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    share, z2 = correct / samples, _Z**2 / samples
    middle = share + z2 / 2
    half = _Z * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples))
    # Exact at the ends, where rounding would leave 0.9999999.
    low = 0.0 if correct == 0 else (middle - half) / (1 + z2)
    return low, 1.0 if correct == samples else (middle + half) / (1 + z2)


@dataclass(frozen=True)
class PowerLaw:
    """L(c) = (alpha / c)^beta + gamma: nats a token at a context of c tokens (arXiv 2309.16039)."""

    alpha: float
    """Tokens."""
    beta: float
    gamma: float
    """Nats a token that no context removes."""
    rms: float
    """Root mean square of what the law leaves, nats a token."""

    def at(self, context: Any) -> Any:
        return (self.alpha / np.asarray(context, dtype=float)) ** self.beta + self.gamma


class NoFit(ValueError):
    """Why the law was not fitted."""


def fit_power_law(context: Sequence[int], loss: Sequence[float]) -> PowerLaw:
    """Least squares with gamma >= 0. Raises NoFit.

    For a given beta the law is linear in alpha^beta and gamma, so beta alone is searched.
    """
    c, y = np.asarray(context, dtype=float), np.asarray(loss, dtype=float)
    if len(c) < _LEAST_POINTS:
        raise NoFit(
            f"{len(c)} lengths within the trained context; the law has 3 numbers and is fitted to "
            f"{_LEAST_POINTS} or more"
        )

    def solve(log_beta: float) -> tuple[float, float, float]:
        """Sum of squares, factor of (c0 / c)^beta, gamma."""
        x = (c[0] / c) ** math.exp(log_beta)
        centred = x - x.mean()
        factor = float(centred @ y / (centred @ centred))
        gamma = float(y.mean() - factor * x.mean())
        if gamma < 0:
            factor, gamma = float(x @ y / (x @ x)), 0.0
        return float(((factor * x + gamma - y) ** 2).sum()), factor, gamma

    tries = np.linspace(math.log(1e-3), math.log(20), 400)
    best = int(np.argmin([solve(b)[0] for b in tries]))
    if best in (0, len(tries) - 1):
        raise NoFit("the loss does not bend like a power of the context")
    low, high = float(tries[best - 1]), float(tries[best + 1])
    for _ in range(80):  # ternary search: each round keeps two thirds
        third = (high - low) / 3
        if solve(low + third)[0] < solve(high - third)[0]:
            high -= third
        else:
            low += third
    squares, factor, gamma = solve(low)
    if factor <= 0:
        raise NoFit("the loss does not fall with context")
    beta = math.exp(low)
    try:
        alpha = float(c[0] * factor ** (1 / beta))
    except OverflowError:
        raise NoFit("the loss does not bend like a power of the context") from None
    return PowerLaw(alpha, beta, gamma, math.sqrt(squares / len(c)))


def losses_within(run: Run) -> list[tuple[int, float]]:
    """Context length and loss, up to the trained context: beyond it no law is claimed."""
    entries = run.perplexity["lengths"] if run.perplexity else []
    most = run.config.training.sequence_length
    return [(e["length"], e["loss"]) for e in entries if e["length"] <= most]


def law_of(run: Run) -> PowerLaw | str:
    """The run's power law, or why it has none."""
    points = losses_within(run)
    try:
        return fit_power_law([length for length, _ in points], [loss for _, loss in points])
    except NoFit as error:
        return str(error)
