"""B_m against 40-digit arithmetic, against the plain sum, and the paper's own counts."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from megatron_ext.rope.bound import (
    b_values,
    base_frequencies,
    distance_curve,
    first_failing_distance,
    judge,
    usable_context,
)


def exact_b(base: float, head_dim: int, m: int) -> float:
    """B_m by 40-digit arithmetic; nothing shared with our code."""
    with mp.workdps(40):
        b = mpf(base)
        return float(sum(mp.cos(m * b ** (mpf(-2 * i) / head_dim)) for i in range(head_dim // 2)))


@pytest.mark.parametrize(
    ("base", "head_dim", "m", "expected"),
    [
        (1e4, 128, 1, 62.093683805768),
        (1e4, 128, 100, 30.543454701491),
        (1e4, 128, 4095, -4.2523918099036),
        (1e6, 128, 32767, 16.852488883932),
        (500.0, 64, 32767, 1.8066823738e-5),  # nearly zero: float32 gets the sign by luck
    ],
)
def test_values_have_the_digits_of_high_precision(base, head_dim, m, expected):
    assert exact_b(base, head_dim, m) == pytest.approx(expected, abs=1e-12)
    assert b_values(base_frequencies(base, head_dim), m) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("base", [100.0, 1e4, 1e6, 5e8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_curve_is_right_to_1e_8_at_a_million(base, head_dim):
    curve = distance_curve(base_frequencies(base, head_dim), 1 << 20)
    rng = np.random.default_rng(1)
    for m in [0, 1, 1023, 1024, (1 << 20) - 1, *rng.integers(0, 1 << 20, 12).tolist()]:
        assert curve[m] == pytest.approx(exact_b(base, head_dim, m), abs=1e-8)


@given(
    theta=st.lists(st.floats(0, 3), min_size=1, max_size=8),
    start=st.integers(0, 5000),
    count=st.integers(1, 5000),
)
@settings(deadline=None, max_examples=50)
def test_the_curve_is_the_plain_sum_for_any_frequencies(theta, start, count):
    m = np.arange(start, start + count)
    plain = sum(np.cos(m * t) for t in theta)
    np.testing.assert_allclose(distance_curve(theta, start + count, start), plain, atol=1e-9)
    np.testing.assert_allclose(b_values(theta, m), plain, atol=1e-11)


@pytest.mark.parametrize(
    ("base", "first"), [(100, 59), (500, 171), (1e4, 1707), (2e5, 12122), (1e6, 27115)]
)
def test_first_failing_distances_of_the_papers_bases(base, first):
    inv_freq = base_frequencies(base, 128)
    assert first_failing_distance(inv_freq, 32768) == first
    assert exact_b(base, 128, first) < 0 <= exact_b(base, 128, first - 1)
    # Eq. 10 counts distances 0 .. L, all of them good.
    assert usable_context(inv_freq, 32768) == first - 1


def test_a_failing_distance_just_outside_the_context_does_not_count():
    inv_freq = base_frequencies(1e4, 128)
    assert judge(inv_freq, 1707).feasible
    assert not judge(inv_freq, 1708).feasible
    assert first_failing_distance(inv_freq, 1707) is None
    assert usable_context(inv_freq, 1707) is None


@pytest.mark.parametrize("context_length", [1, 2, 1024, 1025, 4096, 65536, 70001])
def test_a_verdict_summarises_the_whole_curve(context_length):
    inv_freq = base_frequencies(700.0, 80)
    plain = np.cos(np.arange(context_length)[:, None] * inv_freq).sum(1)
    verdict = judge(inv_freq, context_length)
    failing = np.flatnonzero(plain < 0)
    assert verdict.first_failing_distance == (failing[0] if len(failing) else None)
    assert verdict.min_b == pytest.approx(plain.min(), abs=1e-9)
    assert verdict.min_distance == plain.argmin()
    assert verdict.failing_share == len(failing) / context_length


def test_unrotated_pairs_each_add_one():
    whole, part = base_frequencies(1e4, 64), base_frequencies(1e4, 128, rotary_dim=64)
    np.testing.assert_allclose(distance_curve(part, 4096), distance_curve(whole, 4096) + 32)
    # With half the pairs left alone nothing can fail: -32 + 32 = 0 is the least there is.
    assert judge(base_frequencies(2.0, 128, rotary_dim=64), 1 << 16).feasible


def test_b_0_is_half_the_head():
    assert b_values(base_frequencies(123.4, 96), 0) == 48


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: judge(base_frequencies(1e4, 128), 0), "write 1 token or more"),
        (lambda: base_frequencies(1e4, 127), "write even numbers"),
        (lambda: base_frequencies(0.0, 128), "must be a positive number"),
        (lambda: base_frequencies(float("nan"), 128), "must be a positive number"),
        (lambda: b_values([1.0], -1), "write distances of 0 or more"),
        (lambda: distance_curve([1.0, float("inf")], 10), "write radians a token"),
        (lambda: distance_curve([[1.0]], 10), "write one vector"),
        (lambda: distance_curve([1.0], 10, 10), "write 0 <= start"),
    ],
)
def test_refuses_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def test_the_bound_needs_numpy_only():
    code = (
        "import sys, megatron_ext.rope.bound, megatron_ext.rope.frequencies, "
        "megatron_ext.rope.feasible, megatron_ext.rope.published, megatron_ext.rope.plot; "
        "heavy = {'torch', 'scipy', 'matplotlib', 'pydantic', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
