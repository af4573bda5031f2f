"""Figures of retrieval: found by length and depth; how far, beside what the theory allows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from megatron_ext.rope.bound import base_frequencies, usable_context
from megatron_ext.rope.frequencies import rotary_dimensions
from megatron_ext.study.axes import labels, legend, looks, short
from megatron_ext.study.drawing import GRID, INK, MUTED, SERIES, Figure, figure
from megatron_ext.study.measures import EffectiveContext, effective_context
from megatron_ext.study.runs import Arm, Run, arms, base_text, usable

_BASES = 160  # of the theory's line

Counts = dict[tuple[int, Any], tuple[int, int]]  # (length, depth) -> correct, samples


def tasks_of(runs: Sequence[Run]) -> list[str]:
    """Retrieval tasks that any of the runs has results of."""
    return list(dict.fromkeys(task for run in runs for task in run.retrieval))


def heat_maps(runs: Sequence[Run]) -> list[Figure]:
    """One figure for each task, a panel for each arm."""
    return [_heat_map(runs, task) for task in tasks_of(runs)]


def _heat_map(runs: Sequence[Run], task: str) -> Figure:
    found = [(arm, counts) for arm in arms(runs) if (counts := _counts(arm.runs, task))]
    columns = 2 if len(found) > 1 else 1
    cells = {cell for _, counts in found for cell in counts}
    lengths = sorted({length for length, _ in cells})
    depths = sorted({depth for _, depth in cells}, key=lambda depth: depth or 0)

    def paint(canvas: Canvas, wide: bool) -> None:
        across = columns if wide else 1
        panels = canvas.subplots(-(-len(found) // across), across, squeeze=False).ravel()
        for panel, (arm, counts) in zip(panels, found, strict=False):
            _heat_panel(panel, arm, counts, lengths, depths)
        for panel in panels[len(found) :]:
            panel.set_axis_off()

    rows = [
        (run.name, task, length, "" if depth is None else depth, *count, count[0] / count[1])
        for run in runs
        for (length, depth), count in _counts([run], task).items()
    ]
    seeds = " Seeds of one arm are added up." if len(found) < len(runs) else ""
    caption = (
        "Each cell: the share of prompts answered exactly, by the prompt's length in tokens and by "
        "how much of it, in percent, stands before the fact. Full colour: all; none: no prompt. "
        "A length that was not asked has no cell. Right of the dotted line the prompt is longer "
        f"than the trained context.{seeds}"
    )
    key = [
        (f"color-mix(in srgb, var(--s0) {share}%, transparent)", f"{share}% retrieved")
        for share in (10, 50, 100)
    ]
    table = (("run", "task", "length", "depth", "correct", "samples", "share"), rows)
    height = 26 * max(4, len(depths)) // 2 + 80
    return figure(
        f"retrieval_{task}", f"Retrieval by length and depth: {task}", caption, paint, table, key,
        height * -(-len(found) // columns), height * len(found),
    )  # fmt: skip


def _heat_panel(
    axes: Axes, arm: Arm, counts: Counts, lengths: list[int], depths: list[Any]
) -> None:
    for (length, depth), (correct, samples) in counts.items():
        corner = lengths.index(length) - 0.5, depths.index(depth) - 0.5
        axes.add_patch(
            Rectangle(corner, 1, 1, fc=SERIES[0], alpha=correct / samples, ec="none", lw=0)
        )
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec=GRID, lw=0.8))
    within = sum(length <= arm.first.config.training.sequence_length for length in lengths)
    axes.axvline(within - 0.5, color=MUTED, lw=1.4, ls=(0, (1, 2)))
    axes.set_xlim(-0.6, len(lengths) - 0.4)
    axes.set_ylim(len(depths) - 0.4, -0.6)  # the beginning of the prompt on top
    axes.grid(visible=False)
    axes.set_xticks(range(len(lengths)), [short(n) for n in lengths])
    shown = range(0, len(depths), max(1, (len(depths) - 1) // 4))
    names = ["any" if depths[k] is None else f"{depths[k]:g}%" for k in shown]
    axes.set_yticks(list(shown), names)
    axes.set_title(f"{arm.name}, base {base_text(arm.first)}", loc="left", color=INK)
    axes.set_xlabel("length (tokens)")


def _counts(runs: Sequence[Run], task: str) -> Counts:
    found: Counts = {}
    for run in runs:
        for entry in run.retrieval.get(task, {"lengths": []})["lengths"]:
            for d in entry["depths"]:
                cell = entry["length"], d["depth"]
                correct, samples = found.get(cell, (0, 0))
                found[cell] = correct + d["correct"], samples + d["samples"]
    return found


def effective_context_figure(runs: Sequence[Run], threshold: float) -> Figure | None:
    """Effective context against base, a panel for each task, with the theory's line over it."""
    known = [
        (run, task, effective_context(run.retrieval[task]["lengths"], threshold))
        for run in runs
        for task in run.retrieval
    ]
    if not known:
        return None
    tasks, look = tasks_of(runs), looks(runs)
    # Seeds of one base stand side by side, or the bars would hide each other.
    beside = {
        run.folder: 1.07 ** (k - (len(arm.runs) - 1) / 2)
        for arm in arms(runs)
        for k, run in enumerate(arm.runs)
    }
    shortest = min(e["length"] for r, t, _ in known for e in r.retrieval[t]["lengths"])
    longest = max(
        *(found.longest for _, _, found in known),
        *(run.config.training.sequence_length for run in runs),
    )
    theory = _theory(runs, 4 * longest)
    columns = 2 if len(tasks) > 1 else 1

    def paint(canvas: Canvas, wide: bool) -> None:
        across = columns if wide else 1
        panels = canvas.subplots(-(-len(tasks) // across), across, squeeze=False).ravel()
        for panel, task in zip(panels, tasks, strict=False):
            for bases, reach in theory.values():
                panel.plot(bases, reach, color=INK, lw=1.4, drawstyle="steps-post")
            for run, of, found in known:
                if of == task:
                    at = run.config.rope.base * beside[run.folder]
                    _effective_point(panel, run, at, found, look[run.folder][0], shortest / 2)
            _effective_axes(panel, runs, shortest, longest)
            if len(tasks) > 1:
                panel.text(0.02, 0.97, task, transform=panel.transAxes, va="top", color=INK)
        for panel in panels[len(tasks) :]:
            panel.set_axis_off()

    columns_ = (
        "run", "base", "seed", "task", "threshold", "effective_context", "low", "high",
        "longest_measured", "trained_context", "theory_usable_context",
    )  # fmt: skip
    rows = [
        (
            run.name, run.config.rope.base, run.config.training.seed, task, threshold,
            found.tokens, found.low, found.high, found.longest,
            run.config.training.sequence_length, usable(run),
        )
        for run, task, found in known
    ]  # fmt: skip
    caption = (
        "Dots: the greatest measured length up to which, at it and at every shorter one, at least "
        f"{threshold:.0%} of the prompts of all depths are answered exactly; bars: the same of the "
        "lower and the upper ends of the shares' 95% Wilson intervals, so they tell the chance of "
        "the prompts drawn, not that of the seed. A triangle: the longest length asked, so the "
        "truth may lie beyond. The solid line is the theory: the greatest L with Bₘ ≥ 0 at every "
        "distance up to L, for unscaled RoPE of that base (arXiv 2405.14591, Eq. 10); rings: the "
        "same for the runs' own rule. Dotted: the trained context, which the theory takes for "
        "given. Seeds of one base stand side by side."
    )
    marks = [("var(--ink)", "theory"), *legend([run for run, _, _ in known], runs)]
    title = "Effective context against base"
    height = 330 if len(tasks) == 1 else 270
    return figure(
        "effective_context", title, caption, paint, (columns_, rows), marks,
        height * -(-len(tasks) // columns), 280 * len(tasks),
    )  # fmt: skip


def _theory(
    runs: Sequence[Run], horizon: int
) -> dict[tuple[int, int], tuple[np.ndarray, list[int]]]:
    """Bases and what Eq. 10 allows each, for every head's width among the runs."""
    bases = [run.config.rope.base for run in runs]
    line = np.geomspace(min(bases) / 3, max(bases) * 3, _BASES)
    line = np.unique([base for base in (*line, *bases) if base > 1])
    found: dict[tuple[int, int], tuple[np.ndarray, list[int]]] = {}
    for run in runs:
        width = run.config.model.head_dim
        rotated = rotary_dimensions(width, run.config.rope.rotary_fraction)
        if (width, rotated) not in found:
            reach = [usable_context(base_frequencies(b, width, rotated), horizon) for b in line]
            found[width, rotated] = line, [horizon - 1 if r is None else r for r in reach]
    return found


def _effective_point(
    axes: Axes, run: Run, at: float, found: EffectiveContext, color: str, floor: float
) -> None:
    """`floor`: where nothing is retrieved, on an axis that has no zero."""
    y, low, high = (max(floor, n) for n in (found.tokens, found.low, found.high))
    axes.plot([at, at], [low, high], color=color, lw=2, alpha=0.6, solid_capstyle="butt")
    marker = "^" if found.tokens == found.longest else "o"
    axes.plot(at, y, marker, color=color, ms=7, alpha=0.9)
    if run.config.rope.scaling.type != "none":
        own = max(floor, usable(run))
        axes.plot(at, own, "o", ms=11, mfc="none", mec=INK, mew=1.2)


def _effective_axes(axes: Axes, runs: Sequence[Run], shortest: int, longest: int) -> None:
    for context in {run.config.training.sequence_length for run in runs}:
        axes.axhline(context, color=MUTED, lw=1.4, ls=(0, (1, 2)))
        axes.annotate(
            "trained context", (0, context), (4, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=MUTED, ha="left",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    # In powers of two, one below the shortest length for "not even that".
    ticks = [shortest << k for k in range(40) if shortest << k <= longest]
    axes.set_yticks([shortest / 2, *ticks], [f"below {short(shortest)}", *map(short, ticks)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(shortest / 2.6, longest * 2.2)
    labels(axes, "base", "effective context (tokens)")
