"""Which bases keep B_m >= 0 over a whole context: the least of them, and all of them.

    smallest_feasible_base(32768, head_dim=128)          # 629978.26..: base_L of Eq. 11
    always_feasible_base(32768, head_dim=128)            # every larger base is feasible
    feasible_intervals(1024, 128, low=1e3, high=1e5)     # [(4293.4.., 4330.3..), ..]

The feasible set is not an interval: islands of feasible bases lie below larger infeasible ones, so
a bisection is wrong and a grid steps over islands. Here nothing is stepped over. With x = ln base
and s_i = 2i/d, B_m(x) = sum_i cos(m e^(-s_i x)), and for every x' >= x

    |B_m''(x')| <= M_m(x) = sum_i (s_i m theta_i)^2 + s_i^2 m theta_i        (theta_i falls in x)

*Climbing* through infeasible bases: a witness m with B_m(x) < 0 excludes every base up to
x + delta, where B_m + B_m' delta + M_m delta^2/2 reaches 0. From there the next witness excludes
the next stretch, until no distance fails. *Guarding* feasible stretches: cells (distances p..q) x
(x in a..b) are bounded from below, each cosine by its least value over its range of phases, and
are halved until all are non-negative or a violation is pinned down.

Certified to the rounding error of float64, 4e-15 x context_length in B (the phases are m theta_i):
an island narrower than that allows is not seen, about 1e-13 of its base at short contexts and
1.3e-12 at a million tokens. Bases are at least 1. A context of L tokens has distances 0 .. L-1;
Eq. 11 says 0 .. L, which changes no value of docs/bound.md.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from megatron_ext.rope.bound import Floats, base_frequencies, distance_curve, judge
from megatron_ext.rope.frequencies import rotary_dimensions

_CELLS = 1 << 13  # cells bounded at once: [cells, d/2] temporaries that stay in cache


@dataclass(frozen=True)
class Boundary:
    """A base at which feasibility changes, and the distance that decides it."""

    base: float
    """The base itself; for a lower boundary `judge` calls it feasible."""
    active_distance: int | None
    """The m whose B_m crosses zero there; None when every base from 1 up is feasible."""


def smallest_feasible_base(
    context_length: int, head_dim: int, rotary_fraction: float = 1.0
) -> float:
    """base_L of Eq. 11: the least base with B_m >= 0 at every distance of `context_length` tokens.

    0.2 s at 4k tokens, 2 s at 32k, 40 s at a million; answers are kept for the process.
    """
    return smallest_feasible(context_length, head_dim, rotary_fraction).base


def always_feasible_base(context_length: int, head_dim: int, rotary_fraction: float = 1.0) -> float:
    """The greatest base that still fails (its limit): every larger base is feasible."""
    return always_feasible(context_length, head_dim, rotary_fraction).base


def feasible_intervals(
    context_length: int,
    head_dim: int,
    low: float = 1.0,
    high: float | None = None,
    rotary_fraction: float = 1.0,
) -> list[tuple[float, float]]:
    """Every maximal stretch of feasible bases within [low, high], in rising order.

    high: None is no limit, and the last stretch then ends at infinity.
    """
    if low < 1 or (high is not None and high <= low):
        raise ValueError(f"low={low:g}, high={high} is no range of bases: write 1 <= low < high")
    head = _Head.of(context_length, head_dim, rotary_fraction)
    least = smallest_feasible(context_length, head_dim, rotary_fraction)
    always = always_feasible(context_length, head_dim, rotary_fraction).base
    limit = math.inf if high is None else float(high)
    if least.base >= limit:
        return []
    intervals: list[tuple[float, float]] = []
    start = max(float(low), least.base)  # nothing below the least feasible base needs a look
    end = min(always * (1 - 1e-12), limit)  # two ways of finding one zero differ in the last digits
    while start < end:
        x, active = _climb(head, math.log(start))
        if active is not None:
            start = math.exp(_zero(head, x, active))
        if start >= end:
            break
        violation = _guard(head, x, math.log(end), 1, 1)
        if violation is None:
            intervals.append((start, end))
            break
        x, failing = violation
        intervals.append((start, math.exp(_zero(head, x, failing))))
        # Past the zero far enough that the failing distance fails beyond all doubt.
        start = math.exp(_cross(head, x, np.array([float(failing)]), side=-1))
    if limit > always:
        intervals.append((max(float(low), always), limit))
    return intervals


@functools.lru_cache(maxsize=256)
def smallest_feasible(context_length: int, head_dim: int, rotary_fraction: float = 1.0) -> Boundary:
    """`smallest_feasible_base` with the distance that holds it there."""
    head = _Head.of(context_length, head_dim, rotary_fraction)
    if context_length <= 2:
        return Boundary(1.0, None)  # B_0 and B_1 alone: cos(theta) > 0 for every theta <= 1
    # What a shorter context rules out, a longer one does too: its answer is where to start.
    shorter = smallest_feasible(context_length // 2, head_dim, rotary_fraction)
    x, active = _climb(head, math.log(shorter.base))
    if active is None:
        return shorter
    base, nudge = math.exp(_zero(head, x, active)), 2**-50
    while not judge(head.inv_freq(base), context_length).feasible:
        base, nudge = base * (1 + nudge), 2 * nudge  # exp() rounds; the base we name must pass
    return Boundary(base, active)


@functools.lru_cache(maxsize=256)
def always_feasible(context_length: int, head_dim: int, rotary_fraction: float = 1.0) -> Boundary:
    """`always_feasible_base` with the distance that fails just below it."""
    head = _Head.of(context_length, head_dim, rotary_fraction)
    if context_length <= 2:
        return Boundary(1.0, None)
    # Above the answer for half the context only the other half's distances are left to look at.
    shorter = always_feasible(context_length // 2, head_dim, rotary_fraction)
    floor = math.log(shorter.base)
    top = floor
    while not head.surely_feasible(top):
        top += 0.05
    violation = _guard(head, top, floor, context_length // 2, -1)
    if violation is None:
        return shorter
    return Boundary(math.exp(_zero(head, *violation)), violation[1])


@dataclass(frozen=True)
class _Head:
    """B_m as a function of x = ln base, for one context and one shape of head."""

    context_length: int
    head_dim: int
    exponents: Floats  # s_i = 2i/d of the rotated pairs
    unrotated: int  # pairs left alone: each adds 1
    tolerance: float  # what float64 may be wrong by in B

    @classmethod
    def of(cls, context_length: int, head_dim: int, rotary_fraction: float) -> _Head:
        if context_length < 1:
            raise ValueError(
                f"context_length={context_length} has no distance in it: write 1 token or more"
            )
        dim = rotary_dimensions(head_dim, rotary_fraction)
        return cls(
            context_length=context_length,
            head_dim=head_dim,
            exponents=np.arange(0, dim, 2) / dim,
            unrotated=(head_dim - dim) // 2,
            tolerance=4e-15 * context_length + 1e-12,
        )

    def inv_freq(self, base: float) -> Floats:
        return base_frequencies(base, self.head_dim, 2 * len(self.exponents))

    def value(self, m: Floats, x: Floats | float) -> Floats:
        """B_m(x) for vectors m and x of one length."""
        return np.cos(self._phases(m, x)).sum(1) + self.unrotated

    def taylor(self, m: Floats, x: Floats | float) -> tuple[Floats, Floats, Floats]:
        """B_m, B_m' and the bound M_m on |B_m''| at x and everywhere above it."""
        phases = self._phases(m, x)
        slopes = self.exponents * phases
        return (
            np.cos(phases).sum(1) + self.unrotated,
            (slopes * np.sin(phases)).sum(1),
            (slopes * slopes + self.exponents * slopes).sum(1),
        )

    def lower_bound(self, p: Floats, q: Floats, a: Floats, b: Floats) -> Floats:
        """A number below B_m(x) for every real m in p..q and x in a..b; vectors of cells."""
        least, most = self._phases(p, b), self._phases(q, a)
        # A trough at (2k+1) pi within least..most makes the cosine's least value -1.
        trough = np.floor((most - np.pi) / (2 * np.pi)) * (2 * np.pi) + np.pi >= least
        return np.where(trough, -1.0, np.minimum(np.cos(least), np.cos(most))).sum(1) + (
            self.unrotated
        )

    def surely_feasible(self, x: float) -> bool:
        """Whether the cosines within their first half-turn outweigh all the others at their worst,
        for every distance of the context; if so it holds for every larger base too."""
        phases = self.context_length * np.exp(-self.exponents * x)
        worst = np.where(phases < np.pi, np.cos(np.minimum(phases, np.pi)), -1.0)
        return bool(worst.sum() + self.unrotated > 0)

    def _phases(self, m: Floats, x: Floats | float) -> Floats:
        return m[:, None] * np.exp(-self.exponents * np.reshape(x, (-1, 1)))


def _climb(head: _Head, x: float) -> tuple[float, int | None]:
    """(x', m): the least feasible x' >= x and the distance that failed just below; m is None when
    x itself is feasible."""
    witness = np.zeros(0)
    reach, crossed = 0.01, True
    while True:
        dips = _failing_dips(head, x, reach)
        if not len(dips) and crossed:
            return x, int(witness[0]) if len(witness) else None
        if len(dips):
            reach = float(_excluded(head, x, dips).max())
        if not len(dips) or reach < 1e-14 * max(x, 1.0):
            # The exclusions of this witness have converged to its zero, from below.
            witness = dips[:1] if len(dips) else witness
            x, reach, crossed = _cross(head, x, witness), 1e-9, True
            continue
        x, witness, reach = _follow(head, x, dips, reach)
        crossed, reach = False, max(0.3 * reach, 1e-9)


def _follow(head: _Head, x: float, dips: Floats, reach: float) -> tuple[float, Floats, float]:
    """Climb from x as far as these dips of the curve, and what becomes of them, exclude bases in
    strides that are worth it: (x', the last witness, the usual stride)."""
    around = np.arange(-3.0, 4.0)  # dips drift as x grows
    few = dips[:8]
    while True:
        near = (few[:, None] + around).ravel()
        near = np.unique(np.clip(near, 1, head.context_length - 1))
        reaches = _excluded(head, x, near)
        if reaches.max() < 0.1 * reach:
            reaches, near = _excluded(head, x, dips), dips
        order = np.argsort(-reaches)
        witness, delta = near[order[:1]], float(reaches[order[0]])
        if delta < 0.1 * reach:
            return x, witness, reach
        reach = max(0.5 * reach, delta)
        few = np.unique(np.concatenate((near[order[:4]], few[:4])))
        while True:
            x += delta
            further = float(_excluded(head, x, witness)[0])
            if further < 0.4 * delta:
                break
            delta = further


def _excluded(head: _Head, x: float, m: Floats) -> Floats:
    """How far above x each distance m fails for certain: delta with B + B' delta + M delta^2/2 = 0
    (0 where it does not fail)."""
    value, slope, curvature = head.taylor(m, x)
    value = np.minimum(value + head.tolerance, 0.0)
    delta = (np.sqrt(slope * slope - 2 * curvature * value) - slope) / curvature
    return np.where(value < 0, delta, 0.0)


def _failing_dips(head: _Head, x: float, enough: float) -> Floats:
    """Up to 64 distances at which the curve at x dips below zero, farthest reaching first.

    Looks from near to far, in stretches that double, and stops when one reaches `enough`: the
    near ones usually reach farthest. Empty means that every distance was looked at in float64.
    """
    theta = head.inv_freq(math.exp(x))
    # float32 is right to 1e-4: a quick look that finds every dip but the shallowest.
    for dtype, depth in ((np.float32, 1e-3), (np.float64, head.tolerance)):
        found = np.zeros(0)
        start, stretch = 0, max(1 << 14, head.context_length // 8)
        while start < head.context_length:
            curve = distance_curve(theta, min(start + stretch, head.context_length), start, dtype)
            failing = np.flatnonzero(curve < -depth)
            if len(failing):
                before = curve[np.maximum(failing - 1, 0)]
                after = curve[np.minimum(failing + 1, len(curve) - 1)]
                dips = failing[(curve[failing] <= before) & (curve[failing] <= after)]
                dips = dips[np.argsort(curve[dips] / (start + dips) ** 2)[:64]]
                found = np.concatenate((found, start + dips))
                reaches = _excluded(head, x, found)
                order = np.argsort(-reaches)[:64]
                found = found[order]
                if reaches[order[0]] >= enough:
                    return found
            start, stretch = start + stretch, 2 * stretch
        if len(found):
            return found
    return found


def _cross(head: _Head, x: float, witness: Floats, side: int = 1) -> float:
    """Just above a zero of the witness at x: the least step, 1e-13 or so, after which B is on the
    other side of zero (1: positive, -1: negative) by more than rounding."""
    value, slope, _ = head.taylor(witness, x)
    rise = max(side * float(slope[0]), 1e-3)
    return x + max(2 * (head.tolerance - side * float(value[0])) / rise, 4e-16 * max(x, 1.0))


def _zero(head: _Head, x: float, m: int) -> float:
    """The zero of B_m next to x, which is within 1e-12 of it already."""
    for _ in range(3):
        value, slope, _ = head.taylor(np.array([float(m)]), x)
        x -= float(value[0]) / float(slope[0])
    return x


def _guard(
    head: _Head, start: float, end: float, nearest: int, direction: int
) -> tuple[float, int] | None:
    """The first x from `start` towards `end` at which a distance nearest .. L-1 fails, and that
    distance; None when there is none. direction: 1 upwards, -1 downwards."""
    width = 0.02 if direction < 0 else 1e-5
    x = start
    while direction * (end - x) > 0:
        edge = direction * min(direction * (x + direction * width), direction * end)
        violation = _guard_slab(head, min(x, edge), max(x, edge), nearest, direction)
        if violation is not None:
            return violation
        x, width = edge, min(2 * width, 0.02)
    return None


def _guard_slab(
    head: _Head, low: float, high: float, nearest: int, direction: int
) -> tuple[float, int] | None:
    edges = np.unique(np.round(np.geomspace(nearest, head.context_length, 129)))
    p, q = edges[:-1], edges[1:] - 1
    a, b = np.full(len(p), low), np.full(len(p), high)
    best, best_m = direction * math.inf, 0
    while len(p):
        parts = [slice(i, i + _CELLS) for i in range(0, len(p), _CELLS)]
        bounds = [head.lower_bound(p[i], q[i], a[i], b[i]) for i in parts]
        open_ = np.concatenate(bounds) < -head.tolerance
        p, q, a, b = p[open_], q[open_], a[open_], b[open_]
        # Try one distance of every cell at its near edge: an early violation cuts the rest off.
        middle, near = np.floor((p + q) / 2), a if direction > 0 else b
        single = p == q
        far = np.where(single, b if direction > 0 else a, near)
        for x in (near, far):
            parts = [slice(i, i + _CELLS) for i in range(0, len(p), _CELLS)]
            fails = [head.value(middle[i], x[i]) < -head.tolerance for i in parts]
            for i in np.flatnonzero(np.concatenate(fails)) if fails else ():
                if direction * (best - x[i]) > 0:
                    best, best_m = float(x[i]), int(middle[i])
        # A single distance is bounded by its slope and curvature: far tighter than by phases.
        safe = np.zeros(len(p), bool)
        if single.any():
            value, slope, curvature = head.taylor(p[single], a[single])
            w = b[single] - a[single]
            safe[single] = value + np.minimum(0, slope * w - curvature * w * w / 2) >= (
                -head.tolerance
            )
        beyond = a >= best if direction > 0 else b <= best
        left = ~(safe | beyond | (b - a < 1e-14))
        p, q, a, b = p[left], q[left], a[left], b[left]
        a, b = (a, np.minimum(b, best)) if direction > 0 else (np.maximum(a, best), b)
        # Halve the side that widens the phases more.
        by_distance = (q > p) & ((q - p + 1) / (q + p) > 0.2 * (b - a))
        m, x = np.floor((p + q) / 2), (a + b) / 2
        p, q, a, b = (
            np.concatenate((p, np.where(by_distance, m + 1, p))),
            np.concatenate((np.where(by_distance, m, q), q)),
            np.concatenate((a, np.where(by_distance, a, x))),
            np.concatenate((np.where(by_distance, b, x), b)),
        )
    return None if math.isinf(best) else (best, best_m)
