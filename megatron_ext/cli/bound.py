"""`megatron-ext bound`: which base a context needs, and which context a base can use.

    megatron-ext bound --context 32768               # least base for 32k tokens
    megatron-ext bound --base 1e6                    # first failing distance of a base
    megatron-ext bound --table --plot bound.png      # all lengths 1k .. 1M, and a figure

Bases are printed with ten digits, rounded up, so that the base a person copies is feasible; --json
prints them exactly. Refuses (exit 2) questions without a base, a context, a table or a figure,
bases of 1 and below, and --listing without a table to add it to.
"""

from __future__ import annotations

import json as json_module
import sys
import time
from dataclasses import asdict
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from megatron_ext.errors import UserError
from megatron_ext.rope.bound import base_frequencies, judge
from megatron_ext.rope.feasible import always_feasible, smallest_feasible
from megatron_ext.rope.frequencies import rotary_dimensions
from megatron_ext.rope.plot import BoundRow, check_figure, plot_bound
from megatron_ext.rope.published import TABLE_2, paper_listings

HORIZON = 1 << 20


def bound(
    context: Annotated[
        int | None,
        typer.Option(help="Context length in tokens; with --table the greatest one shown."),
    ] = None,
    base: Annotated[float | None, typer.Option(help="Base of RoPE to judge, such as 1e6.")] = None,
    head_dim: Annotated[int, typer.Option(help="Dimensions of an attention head.")] = 128,
    rotary_fraction: Annotated[
        float, typer.Option(help="Part of a head's dimensions that is rotated.")
    ] = 1.0,
    table: Annotated[
        bool,
        typer.Option(
            "--table",
            help="One row for each length 1k, 2k, .. 1M: a minute, for head dim 256 a quarter of "
            "an hour; --context 32768 stops sooner.",
        ),
    ] = False,
    listing: Annotated[
        bool, typer.Option("--listing", help="Add the paper's own grid search to the table.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a figure (.png, .pdf, .svg) and its CSV.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lower bound of RoPE's base for a context, usable context of a base.

    A base fails a context when B_m = sum cos(m theta_i) is negative at some distance m in it
    ("Base of RoPE Bounds Context Length", arXiv 2405.14591).

    Example: megatron-ext bound --base 1e4 --context 4096
    """
    try:
        answer = _answer(
            context, base, head_dim, rotary_fraction, table or plot is not None, listing, plot
        )
    except ValueError as mistake:
        raise UserError(str(mistake)) from mistake
    if json:
        print(json_module.dumps(answer, indent=2))
    elif isinstance(answer, list):
        print(format_table(answer, listing, rotary_fraction))
    else:
        print(_sentence(answer, head_dim, context or HORIZON, rotary_fraction))
    if plot is not None:
        print(f"wrote {plot} and {plot.with_suffix('.csv')}", file=sys.stderr)


def _answer(
    context: int | None,
    base: float | None,
    head_dim: int,
    rotary_fraction: float,
    rows_wanted: bool,
    listing: bool,
    plot: Path | None,
) -> Any:
    if context is None and base is None and not rows_wanted:
        raise UserError("nothing was asked: give --context, --base, --table or --plot")
    if listing and not rows_wanted:
        raise UserError("--listing adds a column to the table: write --table --listing")
    if base is not None and base <= 1:
        raise UserError(f"--base {base:g} must be above 1: write for example 10000")
    if plot is not None:
        check_figure(plot)
    rows: list[BoundRow] = []
    if rows_wanted:
        rows = table_rows(head_dim, rotary_fraction, context or HORIZON, listing)
    if plot is not None:
        shown = context or 4096
        drawn = base or smallest_feasible(shown, head_dim, rotary_fraction).base
        rotary_dim = rotary_dimensions(head_dim, rotary_fraction)
        plot_bound(plot, head_dim, drawn, shown, rows, rotary_dim)
    if base is not None:
        return verdict_of_base(base, context or HORIZON, head_dim, rotary_fraction)
    if rows:
        return [asdict(row) for row in rows]
    assert context is not None
    return verdict_of_context(context, head_dim, rotary_fraction)


def verdict_of_base(
    base: float, context: int, head_dim: int, rotary_fraction: float = 1.0
) -> dict[str, Any]:
    """What `--base` prints, over the distances below `context`."""
    rotary_dim = rotary_dimensions(head_dim, rotary_fraction)
    verdict = judge(base_frequencies(base, head_dim, rotary_dim), context)
    return {
        "base": base,
        "first_failing_distance": verdict.first_failing_distance,
        "min_b": verdict.min_b,
        "failing_share": verdict.failing_share,
        "usable_context": verdict.usable_context,
    }


def verdict_of_context(context: int, head_dim: int, rotary_fraction: float = 1.0) -> dict[str, Any]:
    """What `--context` prints."""
    least = smallest_feasible(context, head_dim, rotary_fraction)
    return {
        "context_length": context,
        "head_dim": head_dim,
        "smallest_feasible_base": least.base,
        "always_feasible_base": always_feasible(context, head_dim, rotary_fraction).base,
        "active_distance": least.active_distance,
    }


def table_rows(
    head_dim: int, rotary_fraction: float = 1.0, greatest: int = HORIZON, listing: bool = False
) -> list[BoundRow]:
    """The table: one row for each length of the paper's Table 2 up to `greatest` tokens."""
    lengths = [length for length in TABLE_2 if length <= greatest]
    if not lengths:
        raise UserError(
            f"--context {greatest} is below the table's first length: write 1024 or more"
        )
    listed = paper_listings(lengths, head_dim) if listing else {}
    rows = []
    progress = tqdm(lengths, desc=f"head dim {head_dim}", disable=None, file=sys.stderr)
    start = last = time.monotonic()
    for length in progress:
        if progress.disable and time.monotonic() - last > 10:  # a log: a line now and then
            last = time.monotonic()
            print(f"head dim {head_dim}: at {length} tokens, {last - start:.0f} s", file=sys.stderr)
        published = TABLE_2[length] if head_dim == 128 and rotary_fraction == 1.0 else None
        row = verdict_of_context(length, head_dim, rotary_fraction)
        rows.append(BoundRow(published_base=published, listing_base=listed.get(length), **row))
    return rows


def format_table(
    rows: list[dict[str, Any]], listing: bool = False, rotary_fraction: float = 1.0
) -> str:
    """Markdown; our own bases with ten digits, rounded up."""
    columns = {
        "context": lambda row: f"{row['context_length'] // 1024}k",
        "Table 2": lambda row: short_base(row["published_base"]),
        "its listing": lambda row: short_base(row["listing_base"]),
        "smallest feasible base": lambda row: _least_in_digits(row, rotary_fraction),
        "always feasible above": lambda row: round_up(row["always_feasible_base"]),
        "active distance": lambda row: str(row["active_distance"] or "none"),
    }
    if not listing:
        del columns["its listing"]
    lines = [list(columns), ["---:"] * len(columns)]
    lines += [[column(row) for column in columns.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short_base(base: float | None) -> str:
    """Two digits, as the paper writes bases: 4.3e3."""
    return "" if base is None else f"{base:.1e}".replace("e+0", "e").replace("e+", "e")


def round_up(base: float, digits: int = 10) -> str:
    """The least number of so many digits that is not below `base`: 4293.4375693 -> 4293.437570."""
    exact = Decimal(base)
    unit = Decimal(1).scaleb(exact.adjusted() + 1 - digits)
    return f"{float(exact.quantize(unit, ROUND_CEILING)):#.{digits}g}"


def _least_in_digits(row: dict[str, Any], rotary_fraction: float) -> str:
    """The smallest feasible base rounded up to ten digits, or more where rounding leaves the island
    of feasible bases that it begins."""
    head_dim, base = row["head_dim"], row["smallest_feasible_base"]
    rotary_dim = rotary_dimensions(head_dim, rotary_fraction)
    for digits in range(10, 17):
        text = round_up(base, digits)
        inv_freq = base_frequencies(float(text), head_dim, rotary_dim)
        if judge(inv_freq, row["context_length"]).feasible:
            return text
    return repr(base)


def _sentence(
    answer: dict[str, Any], head_dim: int, context: int, rotary_fraction: float = 1.0
) -> str:
    if "context_length" in answer:
        active = answer["active_distance"]
        if active is None and answer["always_feasible_base"] <= 1:
            return (
                f"{context} tokens with head dim {head_dim} and rotary fraction "
                f"{rotary_fraction:g} need no base in particular: none from 1 up fails."
            )
        return (
            f"{context} tokens with head dim {head_dim} need a base of at least "
            f"{_least_in_digits(answer, rotary_fraction)} (distance {active} decides); above "
            f"{round_up(answer['always_feasible_base'])} every base will do, between them only "
            "some."
        )
    first = answer["first_failing_distance"]
    if first is None:
        return (
            f"base {answer['base']:g} with head dim {head_dim} is feasible for {context} tokens: "
            f"the least B_m is {answer['min_b']:.4g}."
        )
    return (
        f"base {answer['base']:g} with head dim {head_dim} first fails at distance {first}, so its "
        f"usable context is {answer['usable_context']}; over {context} tokens B_m falls to "
        f"{answer['min_b']:.4g} and {answer['failing_share']:.2%} of the distances fail."
    )
