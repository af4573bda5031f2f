"""The paper's listing beside ours, and the page that shows every bound.

    python benchmarks/bound.py                              # verdicts, ratio, times (2 minutes)
    python benchmarks/bound.py --document docs/bound.md     # the page, all head dims (half an hour)

Both run on one core, with the package installed (or PYTHONPATH=.). The comparison judges every base
of the listing's grid at one length, once the listing's way (every cosine in float32, with torch)
and once ours (one matrix product in float64). Times are processor seconds.
"""

# ruff: noqa: E402 -- numpy and torch read the number of threads when they are imported
from __future__ import annotations

import argparse
import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import platform
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch

from megatron_ext.cli.bound import format_table, short_base, table_rows
from megatron_ext.rope import feasible
from megatron_ext.rope.bound import base_frequencies, distance_curve, judge
from megatron_ext.rope.published import LISTING_GRID, TABLE_2

HEAD_DIMS = (64, 80, 96, 128, 256)


def compare(context_length: int = 32768, head_dim: int = 128) -> str:
    """Every grid base judged both ways; a sentence with the verdicts and the ratio of times."""
    bases = LISTING_GRID.tolist()
    torch.set_num_threads(1)
    start = time.process_time()
    listed = [listing_as_printed(base, head_dim, context_length) for base in bases]
    middle = time.process_time()
    ours = [judge(base_frequencies(base, head_dim), context_length).feasible for base in bases]
    end = time.process_time()
    same = sum(a == b for a, b in zip(listed, ours, strict=True))
    return (
        f"{len(bases)} bases at {context_length} tokens, head dim {head_dim}: listing "
        f"{middle - start:.2f} s, ours {end - middle:.2f} s, ratio "
        f"{(middle - start) / (end - middle):.1f}; {same} of {len(bases)} verdicts agree, "
        f"{sum(ours)} bases are feasible"
    )


def listing_as_printed(base: float, head_dim: int, context_length: int) -> bool:
    """What the listing does for one base: every cosine in float32, the mean, its sign."""
    theta = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(context_length, dtype=torch.float32), theta)
    return bool((angles.cos().mean(-1) >= 0).all())


def curve_times() -> str:
    """Best of five of the curve at a million distances, and of the check of one base."""

    def best(work: object) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            work()  # type: ignore[operator]
            times.append(time.process_time() - start)
        return 1e3 * min(times)

    theta = base_frequencies(1e6, 128)
    curve = best(lambda: distance_curve(theta, 1 << 20))
    check = best(lambda: judge(theta, 32768))
    million = best(lambda: judge(theta, 1 << 20))
    return (
        f"head dim 128: curve of 1,048,576 distances {curve:.0f} ms; verdict on one base "
        f"{check:.1f} ms at 32k, {million:.0f} ms at 1M"
    )


def table_times(head_dim: int = 128) -> str:
    """Processor seconds of the eleven lengths: wall time says more about what else is running."""
    feasible.smallest_feasible.cache_clear()
    feasible.always_feasible.cache_clear()
    start = time.process_time()
    for length in TABLE_2:
        feasible.smallest_feasible(length, head_dim)
    middle = time.process_time()
    for length in TABLE_2:
        feasible.always_feasible(length, head_dim)
    end = time.process_time()
    return (
        f"head dim {head_dim}, all eleven lengths 1k .. 1M: smallest feasible bases "
        f"{middle - start:.0f} s, always-feasible bases {end - middle:.0f} s (processor time)"
    )


def published_against_criterion() -> str:
    """Where Table 2 fails its own criterion, literally applied."""
    lines = [
        "| context | Table 2 | first m with B_m < 0 | least B_m |",
        "| ---: | ---: | ---: | ---: |",
    ]
    broken = 0
    for length, base in TABLE_2.items():
        verdict = judge(base_frequencies(base, 128), length)
        broken += not verdict.feasible
        first = "none" if verdict.feasible else str(verdict.first_failing_distance)
        lines.append(f"| {length // 1024}k | {short_base(base)} | {first} | {verdict.min_b:.4f} |")
    return f"{broken} of {len(TABLE_2)} published bases break it:\n\n" + "\n".join(lines)


def document() -> str:
    """The text of docs/bound.md."""
    sections = []
    for head_dim in HEAD_DIMS:
        rows = [asdict(row) for row in table_rows(head_dim, listing=True)]
        table = format_table(rows, listing=True)
        sections.append(f"### Head dim {head_dim}\n\n{table}")
    return PAGE.format(
        tables="\n\n".join(sections),
        published=published_against_criterion(),
        comparison=compare(),
        curve=curve_times()[1:],
        times=table_times()[1:],
        today=date.today().isoformat(),
        versions=f"Python {platform.python_version()}, numpy {np.__version__}, "
        f"torch {torch.__version__}",
    )


PAGE = """# The base a context needs

Made by `python benchmarks/bound.py --document docs/bound.md`. {today}, one core of a 2-core x86-64
machine, {versions}.

A RoPE base is *feasible* for a context of L tokens when B_m = sum_i cos(m base^(-2i/d)) is not
negative at any distance m = 0 .. L-1 ("Base of RoPE Bounds Context Length", arXiv 2405.14591; its
Eq. 10 and 11 say 0 .. L, its listing 0 .. L-1; no value below depends on which, as
`tests/rope/test_feasible.py` checks for every row of this page). `k` is 1024.

- **Table 2**: the lower bound as published, for head dim 128.
- **its listing**: the paper's listing run again: the least base of two significant digits, from
  1.0e3 to 9.9e9, that passes in float32.
- **smallest feasible base**: base_L of Eq. 11, certified: every smaller base (from 1 up) has been
  excluded by a distance at which it fails, and this one passes.
- **always feasible above**: every larger base passes; this is where the last failing base ends.
  Between the two columns lie islands of feasible bases among infeasible ones.
- **active distance**: the distance whose B_m is zero at the smallest feasible base.

Both columns of bases are rounded up to ten digits, so that the first, typed in, is feasible.

`usable_context` of a base is L_theta of Eq. 10: one less than its first failing distance. When part
of a head is not rotated, each pair left alone adds cos(0) = 1 to every B_m; with half of them left
alone nothing can fail.

One base or one context: `megatron-ext bound --base 1e6`, `megatron-ext bound --context 32768`.

{tables}

## Where Table 2 breaks its own criterion

Head dim 128, float64. {published}

The listing run again gives other numbers than Table 2 at most lengths, so Table 2 is not its output
as printed. Neither is the infimum: the listing's grid steps over narrow islands, and at a million
tokens its float32 sums are wrong by up to 0.15, more than many a base fails by.

## How fast

H{curve}.

H{times}.

Head dims 64, 80 and 96 take up to twice that for the first and less for the second; head dim 256
takes minutes for the first and ten for the second, as more of its cosines are hard to bound.

The listing's way against ours, in one process on one core: {comparison}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=32768, help="length of the comparison")
    parser.add_argument("--document", type=Path, help="write the page here instead")
    arguments = parser.parse_args()
    if arguments.document is None:
        print(compare(arguments.context))
        print(curve_times())
        print(table_times())
        return
    temporary = arguments.document.with_suffix(".tmp")
    temporary.write_text(document())
    temporary.replace(arguments.document)
    print(f"wrote {arguments.document}")


if __name__ == "__main__":
    main()
