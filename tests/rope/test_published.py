"""The paper's printed numbers: which of them our code gives again, and which it cannot."""

import numpy as np
import pytest

from megatron_ext.rope.bound import base_frequencies, distance_curve, judge
from megatron_ext.rope.published import (
    LISTING_GRID,
    TABLE_2,
    listing_first_failing,
    method_1,
    method_2,
    paper_listing,
    paper_listings,
)


def test_method_1_and_method_2_fail_as_often_as_section_5_5_says():
    def failures(inv_freq, context_length):
        return int((distance_curve(inv_freq, context_length) < 0).sum())

    assert [failures(method_1(), k * 1024) for k in (15, 30)] == [0, 0]
    assert [failures(method_2(), k * 1024) for k in (15, 30)] == [97, 2554]


def test_method_2_is_continuous_where_its_halves_meet():
    theta = method_2()
    assert (np.diff(theta) < 0).all()
    # Both halves give the same angle at i = 44: b'^(-88/128) = b^(-88/128) / 8.
    high = base_frequencies(1e4 * 8 ** (128 / 88), 128)
    assert high[44] == pytest.approx(theta[44], rel=1e-12)


def test_the_fitted_line_says_that_k_is_1024():
    slope, intercept = np.polyfit(np.log(list(TABLE_2)), np.log(list(TABLE_2.values())), 1)
    assert slope == pytest.approx(1.628, abs=5e-4)
    assert np.exp(intercept) == pytest.approx(0.0424, abs=1e-4)


def test_seven_published_bases_break_their_own_criterion():
    breaking = [
        length // 1024
        for length, base in TABLE_2.items()
        if not judge(base_frequencies(base, 128), length).feasible
    ]
    assert len(breaking) == 7
    assert not {1, 2, 8, 64} & set(breaking)


def test_the_listing_gives_the_table_at_some_lengths_only():
    lengths = [1024, 2048, 4096, 8192, 16384]
    listed = paper_listings(lengths, 128)
    agreeing = [length // 1024 for length in lengths if listed[length] == TABLE_2[length]]
    assert agreeing == [1, 2, 8]
    assert paper_listing(4096, 128) == listed[4096]


def test_the_listing_is_the_plain_float32_sum():
    assert len(LISTING_GRID) == 630
    base, length = 2.7e4, 4096
    theta = np.float32(base) ** (-np.arange(0, 128, 2).astype(np.float32) / np.float32(128))
    plain = np.cos(np.arange(length, dtype=np.float32)[:, None] * theta).sum(1)
    assert listing_first_failing(base, 128, length) == np.flatnonzero(plain < 0)[0]
