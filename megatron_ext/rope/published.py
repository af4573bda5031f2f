"""What the main paper prints on the bound, to be shown beside what the criterion itself gives.

    TABLE_2[32768]                       # 6.4e5
    paper_listing(32768, head_dim=128)   # 6.3e5: the listing re-run; not the same number

Source: "Base of RoPE Bounds Context Length", arXiv 2405.14591v1: Tables 1 and 2, the listing of its
appendix, and section 5.5. The listing tries bases of two significant digits in float32 and prints
every one whose B_m never turns negative; the published table is not its output at most lengths.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.rope.bound import Floats, base_frequencies

K = 1024  # the paper's "k": its fitted line 0.0424 x^1.628 is Table 2's with 1024, not with 1000

TABLE_2: dict[int, float] = {
    1 * K: 4.3e3,
    2 * K: 1.6e4,
    4 * K: 2.7e4,
    8 * K: 8.4e4,
    16 * K: 3.1e5,
    32 * K: 6.4e5,
    64 * K: 2.1e6,
    128 * K: 7.8e6,
    256 * K: 3.6e7,
    512 * K: 6.4e7,
    1024 * K: 5.1e8,
}
"""Context length in tokens -> lower bound of the base (head_dim 128), as published."""

KNOWN_MODELS: dict[str, tuple[int, float]] = {
    "Llama 1": (2 * K, 1e4),
    "Llama 2": (4 * K, 1e4),
    "Llama 3": (8 * K, 5e5),
    "Mistral v0.2": (32 * K, 1e6),
    "Baichuan2": (4 * K, 1e4),
}
"""Table 1: model -> (context length, base); all with head_dim 128."""

LISTING_GRID: Floats = np.array(
    [float(f"{mantissa / 10}e{power}") for power in range(3, 10) for mantissa in range(10, 100)]
)
"""The 630 bases of two significant digits from 1.0e3 to 9.9e9."""


def listing_first_failing(
    base: float, head_dim: int, context_length: int, dtype: type = np.float32
) -> int | None:
    """First m < context_length with a negative sum, as the listing works it out: everything in
    float32, so with errors of 5e-4 at 4k, 5e-3 at 32k and 0.15 at a million tokens."""
    theta = np.asarray(base, dtype) ** (-np.arange(0, head_dim, 2).astype(dtype) / dtype(head_dim))
    # In stretches, so that a base that fails early costs little; no value depends on the others.
    for start in range(0, context_length, 1 << 14):
        m: NDArray[Any] = np.arange(start, min(start + (1 << 14), context_length)).astype(dtype)
        negative = np.cos(m[:, None] * theta).sum(1) < 0
        if negative.any():
            return start + int(negative.argmax())
    return None


def paper_listing(context_length: int, head_dim: int, dtype: type = np.float32) -> float | None:
    """The least base of the listing's grid that it finds feasible; None when the grid is too low.

    dtype float64 shows what the rounding of the listing itself changes.
    """
    return paper_listings([context_length], head_dim, dtype)[context_length]


def paper_listings(
    context_lengths: Iterable[int], head_dim: int, dtype: type = np.float32
) -> dict[int, float | None]:
    """`paper_listing` of several lengths in one pass over the grid: 40 s up to a million tokens."""
    least: dict[int, float | None] = dict.fromkeys(sorted(context_lengths))
    open_lengths = list(least)
    for base in map(float, LISTING_GRID):
        failing = listing_first_failing(base, head_dim, open_lengths[-1], dtype)
        for length in list(open_lengths):
            if failing is None or failing >= length:
                least[length] = base
                open_lengths.remove(length)
        if not open_lengths:
            break
    return least


def method_1() -> Floats:
    """Section 5.5, Method 1: theta_i of base 5e6. float64 [64]."""
    return base_frequencies(5e6, 128)


def method_2() -> Floats:
    """Section 5.5, Method 2: out-of-distribution angles avoided another way. float64 [64].

    i >= 44: base 1e4, divided by 8; i < 44: base 1e4 x 8^(128/88), which meets it at i = 44.
    """
    low = base_frequencies(1e4, 128) / 8
    high = base_frequencies(1e4 * 8 ** (128 / 88), 128)
    return np.where(np.arange(64) >= 44, low, high)
