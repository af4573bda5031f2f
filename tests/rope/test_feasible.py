"""Feasible bases against 40-digit arithmetic and against dense scans of the plain criterion."""

import re

import numpy as np
import pytest
from mpmath import mp, mpf

from megatron_ext.rope.bound import b_values, base_frequencies, judge
from megatron_ext.rope.feasible import (
    _guard,
    _Head,
    always_feasible,
    always_feasible_base,
    feasible_intervals,
    smallest_feasible,
    smallest_feasible_base,
)
from megatron_ext.rope.published import TABLE_2
from tests.conftest import ROOT

SHAPES = [(1024, 128), (4096, 128), (16384, 128), (1024, 64), (4096, 80), (2048, 96), (4096, 256)]
LONG = pytest.param(1 << 20, 128, marks=pytest.mark.slow)  # a minute each


def exact_b(base: mpf, head_dim: int, m: int) -> mpf:
    return mp.fsum(mp.cos(m * base ** (mpf(-2 * i) / head_dim)) for i in range(head_dim // 2))


def near_critical(base: float, head_dim: int, context_length: int) -> list[int]:
    """Distances that float64 cannot settle, or nearly not."""
    found = []
    for start in range(0, context_length, 1 << 14):
        m = np.arange(start, min(start + (1 << 14), context_length))
        b = np.cos(m[:, None] * base_frequencies(base, head_dim)).sum(1)
        found += m[b < 1e-6].tolist()
    return found


@pytest.mark.parametrize(("context_length", "head_dim"), [*SHAPES, LONG])
def test_the_smallest_base_is_a_zero_crossing_in_high_precision(context_length, head_dim):
    least = smallest_feasible(context_length, head_dim)
    with mp.workdps(40):
        base = mpf(least.base)
        below = exact_b(base * (1 - mpf("1e-11")), head_dim, least.active_distance)
        assert below < 0
        above = base * (1 + mpf("1e-11"))
        for m in near_critical(least.base, head_dim, context_length):
            assert exact_b(above, head_dim, m) >= 0
    assert judge(base_frequencies(least.base, head_dim), context_length).feasible


@pytest.mark.parametrize(("context_length", "head_dim"), [*SHAPES, LONG])
def test_the_always_feasible_base_is_a_zero_crossing_in_high_precision(context_length, head_dim):
    last = always_feasible(context_length, head_dim)
    with mp.workdps(40):
        base = mpf(last.base)
        assert exact_b(base * (1 - mpf("1e-11")), head_dim, last.active_distance) < 0
        assert exact_b(base * (1 + mpf("1e-11")), head_dim, last.active_distance) > 0


@pytest.mark.parametrize(("context_length", "head_dim"), SHAPES[:2] + SHAPES[3:5])
def test_a_dense_scan_finds_no_smaller_base_and_no_larger_failure(context_length, head_dim):
    least = smallest_feasible_base(context_length, head_dim)
    last = always_feasible_base(context_length, head_dim)
    for base in np.geomspace(1.001, least * (1 - 1e-9), 600):
        assert not judge(base_frequencies(base, head_dim), context_length).feasible
    for base in np.geomspace(last * (1 + 1e-9), 100 * last, 600):
        assert judge(base_frequencies(base, head_dim), context_length).feasible


def test_the_published_values_at_1k_are_the_islands_start():
    intervals = feasible_intervals(1024, 128)
    expected = [(4293.4376, 4330.3233), (5602.1786, 5644.3521), (6018.2809, np.inf)]
    np.testing.assert_allclose(intervals, expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("context_length", "count"), [(4096, 16), pytest.param(16384, 72, marks=pytest.mark.slow)]
)
def test_the_number_of_islands(context_length, count):
    intervals = feasible_intervals(context_length, 128)
    assert len(intervals) == count
    assert intervals[0][0] == pytest.approx(smallest_feasible_base(context_length, 128), rel=1e-12)
    assert intervals[-1][0] == always_feasible_base(context_length, 128)


def test_islands_agree_with_a_dense_scan():
    bases = np.geomspace(1e4, 2.5e4, 2500)
    intervals = feasible_intervals(2048, 128, 1e4, 2.5e4)
    inside = np.zeros(len(bases), bool)
    for start, stop in intervals:
        inside |= (bases >= start) & (bases <= stop)
    feasible = [judge(base_frequencies(base, 128), 2048).feasible for base in bases]
    assert inside.tolist() == feasible


def test_a_range_clips_the_islands():
    assert feasible_intervals(1024, 128, 10, 1e3) == []
    assert feasible_intervals(1024, 128, 4300, 4310) == [(4300.0, 4310.0)]
    assert feasible_intervals(1024, 128, 1e5, 2e5) == [(1e5, 2e5)]
    with pytest.raises(ValueError, match="write 1 <= low < high"):
        feasible_intervals(1024, 128, 20, 10)


def test_longer_contexts_never_need_smaller_bases():
    lengths = [3, 8, 100, 777, 1024, 1500, 4096]
    least = [smallest_feasible_base(length, 128) for length in lengths]
    last = [always_feasible_base(length, 128) for length in lengths]
    assert least == sorted(least)
    assert last == sorted(last)
    assert all(a <= b * (1 + 1e-12) for a, b in zip(least, last, strict=True))


def test_one_distance_more_or_less_does_not_move_the_table():
    # Eq. 11 says 0 .. L, a context of L tokens has 0 .. L-1.
    for length in (1024, 4096):
        assert smallest_feasible_base(length + 1, 128) == pytest.approx(
            smallest_feasible_base(length, 128), rel=1e-12
        )


def rows_of_the_page():
    """(head dim, context, listing, smallest feasible base, always feasible above, active m)."""
    head_dim = 0
    number = r"([\d.e+]+)"
    pattern = rf"\| (\d+)k \|.*\| {number} \| {number} \| {number} \| (\d+) \|"
    for line in (ROOT / "docs" / "bound.md").read_text().splitlines():
        if heading := re.fullmatch(r"### Head dim (\d+)", line):
            head_dim = int(heading[1])
        if row := re.fullmatch(pattern, line):
            yield head_dim, 1024 * int(row[1]), *map(float, row.groups()[1:4]), int(row[5])


def test_every_entry_of_the_page_holds_for_distances_up_to_l_and_up_to_l_less_one():
    rows = list(rows_of_the_page())
    assert len(rows) == 55
    for head_dim, length, listed, least, always, active in rows:
        inv_freq = base_frequencies(least, head_dim)
        assert judge(inv_freq, length).feasible
        assert b_values(inv_freq, active) == pytest.approx(0, abs=1e-4)
        # Distance L excludes neither the least base nor any base from `always` up, where the page
        # rounds bases up by less than 1e-9: so allowing it changes neither.
        assert b_values(inv_freq, length) > 1e-3
        assert b_values(base_frequencies(always, head_dim), length) > 1e-3
        head, top = _Head.of(length + 1, head_dim, 1.0), np.log(always)
        while not head.surely_feasible(top):
            top += 0.05
        assert _guard(head, top, np.log(always), length, -1) is None
        theta = np.float32(listed) ** (-np.arange(0, head_dim, 2, np.float32) / head_dim)
        assert np.cos(np.float32(length) * theta.astype(np.float32)).sum() > 0  # as the listing
    for length, base in TABLE_2.items():
        below, up_to = (judge(base_frequencies(base, 128), length + more) for more in (0, 1))
        assert below.first_failing_distance == up_to.first_failing_distance
        assert below.min_b == pytest.approx(up_to.min_b, abs=1e-9)


def test_a_guard_bounds_its_cells_from_below():
    head = _Head.of(4096, 128, 1.0)
    rng = np.random.default_rng(3)
    p = rng.integers(1, 4000, 200).astype(float)
    q = p + rng.integers(0, 60, 200)
    a = rng.uniform(5, 12, 200)
    b = a + rng.uniform(0, 0.02, 200)
    bound = head.lower_bound(p, q, a, b)
    for _ in range(50):
        m, x = rng.uniform(p, q), rng.uniform(a, b)
        assert (head.value(m, x) >= bound - 1e-12).all()


def test_a_guard_stops_at_the_first_violation_from_either_side():
    head = _Head.of(1024, 128, 1.0)
    up = _guard(head, np.log(5610), np.log(6500), 1, 1)
    down = _guard(head, np.log(7000), np.log(5610), 1, -1)
    assert up is not None and down is not None
    assert np.exp(up[0]) == pytest.approx(5644.3521, rel=1e-8)
    assert np.exp(down[0]) == pytest.approx(6018.2809, rel=1e-8)
    assert _guard(head, np.log(6100), np.log(60000), 1, 1) is None


def test_half_rotated_heads_have_no_bound():
    assert smallest_feasible(4096, 128, 0.5).base == 1.0
    assert smallest_feasible(4096, 128, 0.5).active_distance is None
    partly = smallest_feasible_base(4096, 128, 0.75)
    assert 1 < partly < smallest_feasible_base(4096, 128)
    assert judge(base_frequencies(partly, 128, 96), 4096).feasible
    assert not judge(base_frequencies(partly * (1 - 1e-9), 128, 96), 4096).feasible
