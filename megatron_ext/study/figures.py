"""What the report's figures show, and how a reader is told to read them.

    for drawn in draw(runs, threshold=0.8):
        drawn.name, drawn.caption, drawn.wide, drawn.narrow
        drawn.save(Path("runs/demo/figures"))        # loss.png, loss.svg, loss.csv

A figure for which no run has data is left out. Needs matplotlib (extra `report`).
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_ext.rope.bound import distance_curve
from megatron_ext.study.axes import labels, legend, looks, short
from megatron_ext.study.context_figures import context_law, loss_by_position, perplexity
from megatron_ext.study.distance_figures import by_distance
from megatron_ext.study.drawing import FAIL, FAIL_FAR, INK, MUTED, SERIES, Figure, figure
from megatron_ext.study.measures import THRESHOLD
from megatron_ext.study.retrieval_figures import effective_context_figure, heat_maps, tasks_of
from megatron_ext.study.runs import Arm, Run, arms, base_text, count

_CURVE_POINTS = 700  # of a B_m curve: more than a screen shows


def draw(runs: Sequence[Run], threshold: float = THRESHOLD) -> list[Figure]:
    """Every figure that the runs have data for, the answer first."""
    tasks = tasks_of(runs)
    found = [
        effective_context_figure(runs, threshold),
        *(by_distance(runs, task) for task in tasks), *heat_maps(runs),
        bound_curves(runs),
        perplexity(runs), context_law(runs), loss_by_position(runs),
        loss_curves(runs),
    ]  # fmt: skip
    return [drawn for drawn in found if drawn is not None]


def loss_curves(runs: Sequence[Run]) -> Figure | None:
    """Training and validation loss over tokens."""
    if not any(run.training for run in runs):
        return None
    look = looks(runs)

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.subplots()
        for run in runs:
            training = run.config.training
            color, dashes = look[run.folder]
            axes.plot(
                [r["tokens"] for r in run.training],
                [r["loss"] for r in run.training],
                color=color, ls=dashes, lw=1.1, alpha=0.55,
            )  # fmt: skip
            axes.plot(
                [training.tokens_after(r["step"]) for r in run.validation],
                [r["validation_loss"] for r in run.validation],
                marker="o", color=color, ls=dashes, lw=1.8, ms=4.5,
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        labels(axes, "tokens", "loss (nats a token)")

    rows = [
        (
            run.name,
            kind,
            record["step"],
            run.config.training.tokens_after(record["step"]),
            record[key],
        )
        for run in runs
        for kind, key, records in (
            ("training", "loss", run.training),
            ("validation", "validation_loss", run.validation),
        )
        for record in records
    ]
    chance = ", ".join(
        f"{math.log(v):.2f}" for v in sorted({r.config.model.vocab_size for r in runs})
    )
    caption = (
        "Thin lines: training loss at the logged steps. Dots: validation loss, on documents that "
        f"no run was trained on. Guessing every token alike would cost ln(vocabulary) = {chance}. "
        "Lower is better."
    )
    table = (("run", "kind", "step", "tokens", "loss"), rows)
    return figure(
        "loss", "Loss while training", caption, paint, table, legend(runs, runs), 340, 260
    )


def bound_curves(runs: Sequence[Run]) -> Figure | None:
    """B_m of each arm, one panel each, failing distances marked."""
    found = arms(runs)
    curves = [(arm, distance_curve(arm.first.inv_freq, horizon(arm.first))) for arm in found]
    columns = 2 if len(found) > 3 else 1

    def paint(canvas: Canvas, wide: bool) -> None:
        across = columns if wide else 1
        panels = canvas.subplots(-(-len(found) // across), across, squeeze=False).ravel()
        for k, (panel, (arm, curve)) in enumerate(zip(panels, curves, strict=False)):
            _bound_panel(panel, arm, curve, SERIES[k % 8])
        for panel in panels[len(curves) :]:
            panel.set_axis_off()

    rows = (
        (arm.name, m, f"{value:.9g}", m < arm.first.config.training.sequence_length)
        for arm, curve in curves
        for m, value in enumerate(curve)
    )
    caption = (
        "Bₘ is how much more attention a similar token at distance m gets, in expectation, than a "
        "random one, in units of 2σ² (arXiv 2405.14591, Theorem 1). Where it is below zero the "
        "model prefers the wrong token. Filled strongly: failing distances within the trained "
        "context, left of the dotted line; faintly: failing distances beyond it. The ring marks "
        "the first one."
    )
    marks = [("var(--fail)", "Bₘ < 0 within the context"), ("var(--fail-far)", "beyond it")]
    table = (("run", "distance", "b_m", "within_trained_context"), rows)
    height = 225 * -(-len(found) // columns)
    title = "What the theory says: Bₘ over distance"
    return figure("bound", title, caption, paint, table, marks, height, 200 * len(found))


def horizon(run: Run) -> int:
    """Distances shown: twice the trained context, or the longest one evaluated."""
    evaluated = [e["length"] for e in (run.perplexity or {}).get("lengths", [])]
    return max([2 * run.config.training.sequence_length, *evaluated])


def _bound_panel(axes: Axes, arm: Arm, curve: np.ndarray, color: str) -> None:
    context = arm.first.config.training.sequence_length
    m, b = _thinned(curve)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.axvline(context, color=MUTED, lw=1.2, ls=(0, (1, 2)))
    axes.fill_between(m, b, 0, where=(b < 0) & (m < context), color=FAIL, lw=0)
    axes.fill_between(m, b, 0, where=(b < 0) & (m >= context - 1), color=FAIL_FAR, lw=0)
    axes.plot(m, b, color=color, lw=1)
    axes.plot(m, np.where(b < 0, b, np.nan), color=FAIL, lw=1)
    failing = np.flatnonzero(curve < 0)
    if len(failing):
        axes.plot(failing[0], curve[failing[0]], "o", ms=8, mfc="none", mec=INK, mew=1.4)
        where = f"first Bₘ < 0 at m = {failing[0]:,}"
    else:
        where = f"Bₘ ≥ 0 up to m = {len(curve) - 1:,}"
    axes.set_xlim(0, len(curve))
    axes.set_ylim(min(-0.28 * curve[0], 1.15 * curve.min()), 1.04 * curve[0])
    axes.set_title(f"{arm.name}, base {base_text(arm.first)}", loc="left", color=INK)
    axes.text(0.98, 0.93, where, transform=axes.transAxes, ha="right", va="top", color=INK)
    left = context > 0.6 * len(curve)
    axes.annotate(
        f"trained context {context:,}", (context, 0), (-4 if left else 4, 4),
        xycoords=("data", "axes fraction"), textcoords="offset points",
        color=MUTED, ha="right" if left else "left",
    )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    labels(axes, "distance m (tokens)", "Bₘ")


def _thinned(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve as its least value in each stretch, so that no failing distance goes unseen."""
    stretch = -(-len(curve) // _CURVE_POINTS)
    padded = np.pad(curve, (0, -len(curve) % stretch), constant_values=np.inf)
    at = padded.reshape(-1, stretch).argmin(1) + np.arange(len(padded) // stretch) * stretch
    return at, curve[at]
