"""What the report's figures show, and how a reader is told to read them.

    for drawn in draw(runs):
        drawn.name, drawn.caption, drawn.wide, drawn.narrow
        drawn.save(Path("runs/demo/figures"))        # loss.png, loss.csv

A figure for which no run has data is left out. Needs matplotlib (extra `report`).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from megatron_ext.rope.bound import distance_curve
from megatron_ext.study.drawing import DASHES, FAIL, FAIL_FAR, INK, MUTED, SERIES, Figure, figure
from megatron_ext.study.runs import Run, count

_CURVE_POINTS = 700  # of a B_m curve: more than a screen shows


def draw(runs: Sequence[Run]) -> list[Figure]:
    """Every figure that the runs have data for."""
    found = [loss_curves(runs), bound_curves(runs), perplexity(runs), loss_by_position(runs)]
    return [drawn for drawn in found if drawn is not None]


def loss_curves(runs: Sequence[Run]) -> Figure | None:
    """Training and validation loss over tokens."""
    if not any(run.training for run in runs):
        return None

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.subplots()
        for k, run in enumerate(runs):
            training = run.config.training
            axes.plot(
                [r["tokens"] for r in run.training],
                [r["loss"] for r in run.training],
                color=SERIES[k % 8], ls=DASHES[k // 8 % 3], lw=1.1, alpha=0.55,
            )  # fmt: skip
            axes.plot(
                [training.tokens_after(r["step"]) for r in run.validation],
                [r["validation_loss"] for r in run.validation],
                marker="o", color=SERIES[k % 8], ls=DASHES[k // 8 % 3], lw=1.8, ms=4.5,
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        _labels(axes, "tokens", "loss (nats a token)")

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
    return figure("loss", "Loss while training", caption, paint, table, _legend(runs), 340, 260)


def bound_curves(runs: Sequence[Run]) -> Figure | None:
    """B_m of each run, one panel each, failing distances marked."""
    curves = [(run, distance_curve(run.inv_freq, horizon(run))) for run in runs]
    columns = 2 if len(runs) > 3 else 1

    def paint(canvas: Canvas, wide: bool) -> None:
        across = columns if wide else 1
        panels = canvas.subplots(-(-len(runs) // across), across, squeeze=False).ravel()
        for panel, (run, curve) in zip(panels, curves, strict=False):
            _bound_panel(panel, run, curve, SERIES[runs.index(run) % 8])
        for panel in panels[len(curves) :]:
            panel.set_axis_off()

    rows = (
        (run.name, m, f"{value:.9g}", m < run.config.training.sequence_length)
        for run, curve in curves
        for m, value in enumerate(curve)
    )
    caption = (
        "Bₘ is how much more attention a similar token at distance m gets, in expectation, than a "
        "random one, in units of 2σ² (arXiv 2405.14591, Theorem 1). Where it is below zero the "
        "model prefers the wrong token. Filled strongly: failing distances within the trained "
        "context, left of the dotted line; faintly: failing distances beyond it. The ring marks "
        "the first one."
    )
    legend = [("var(--fail)", "Bₘ < 0 within the context"), ("var(--fail-far)", "beyond it")]
    table = (("run", "distance", "b_m", "within_trained_context"), rows)
    height = 225 * -(-len(runs) // columns)
    title = "What the theory says: Bₘ over distance"
    return figure("bound", title, caption, paint, table, legend, height, 200 * len(runs))


def perplexity(runs: Sequence[Run]) -> Figure | None:
    """Perplexity against context length."""
    known = [(k, run, run.perplexity["lengths"]) for k, run in enumerate(runs) if run.perplexity]
    if not known:
        return None
    lengths = sorted({entry["length"] for _, _, entries in known for entry in entries})

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.subplots()
        for k, _, entries in known:
            x = [entry["length"] for entry in entries]
            color, style = SERIES[k % 8], DASHES[k // 8 % 3]
            y = [entry["token_weighted_perplexity"] for entry in entries]
            axes.plot(x, y, "o", ls=style, color=color, lw=1.8, ms=5)
            y = [entry["mean_document_perplexity"] for entry in entries]
            axes.plot(x, y, "o", ls=(0, (2, 2)), color=color, lw=1, ms=3, mfc="none", alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [_short(n) for n in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        _trained_context(axes, runs)
        _labels(axes, "context length (tokens)", "perplexity")

    columns = (
        "length", "stride", "documents", "tokens_scored",
        "token_weighted_perplexity", "mean_document_perplexity",
    )  # fmt: skip
    rows = [(run.name, *(e[c] for c in columns)) for _, run, entries in known for e in entries]
    caption = (
        "The same tokens of validation documents are predicted at every length; only how far back "
        "the model may look differs. Solid, filled: exp of the mean loss over tokens. Dotted, "
        "hollow: mean of the documents' perplexities, as in the paper. A line that rises right of "
        "the dotted vertical means that context beyond training hurts."
    )
    return figure(
        "perplexity", "Perplexity against context length", caption, paint,
        (("run", *columns), rows), _legend([run for _, run, _ in known], runs), 340, 270,
    )  # fmt: skip


def loss_by_position(runs: Sequence[Run]) -> Figure | None:
    """Loss by position in the longest context."""
    known = [
        (k, run, run.perplexity["lengths"][-1]) for k, run in enumerate(runs) if run.perplexity
    ]
    if not known:
        return None

    def middles(entry: dict[str, Any]) -> list[float]:
        return [(b["from"] + b["to"]) / 2 for b in entry["loss_by_position"]]

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.subplots()
        for k, _, entry in known:
            y = [b["loss"] for b in entry["loss_by_position"]]
            style = DASHES[k // 8 % 3]
            axes.plot(middles(entry), y, ls=style, color=SERIES[k % 8], lw=1.6)
        _trained_context(axes, runs)
        axes.set_xlim(left=0)
        _labels(axes, "tokens before the predicted one", "loss (nats a token)")

    rows = [
        (run.name, entry["length"], *(b[c] for c in ("from", "to", "tokens", "loss")))
        for _, run, entry in known
        for b in entry["loss_by_position"]
    ]
    caption = (
        "One long window for each document, from its first token on: how well a token is predicted "
        "with so many tokens before it, averaged in bins. The documents are few, so the line is "
        "noisy; compare the runs with each other at the same place, right of the dotted vertical "
        "above all, where no run was trained."
    )
    table = (("run", "length", "from", "to", "tokens", "loss"), rows)
    legend = _legend([run for _, run, _ in known], runs)
    title = "Loss by position in context"
    return figure("position", title, caption, paint, table, legend, 300, 240)


def horizon(run: Run) -> int:
    """Distances shown: twice the trained context, or the longest one evaluated."""
    evaluated = [e["length"] for e in (run.perplexity or {}).get("lengths", [])]
    return max([2 * run.config.training.sequence_length, *evaluated])


def _bound_panel(axes: Axes, run: Run, curve: np.ndarray, color: str) -> None:
    context = run.config.training.sequence_length
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
    axes.set_title(f"{run.name}, base {run.config.rope.base:,g}", loc="left", color=INK)
    axes.text(0.98, 0.93, where, transform=axes.transAxes, ha="right", va="top", color=INK)
    left = context > 0.6 * len(curve)
    axes.annotate(
        f"trained context {context:,}", (context, 0), (-4 if left else 4, 4),
        xycoords=("data", "axes fraction"), textcoords="offset points",
        color=MUTED, ha="right" if left else "left",
    )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _labels(axes, "distance m (tokens)", "Bₘ")


def _thinned(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve as its least value in each stretch, so that no failing distance goes unseen."""
    stretch = -(-len(curve) // _CURVE_POINTS)
    padded = np.pad(curve, (0, -len(curve) % stretch), constant_values=np.inf)
    at = padded.reshape(-1, stretch).argmin(1) + np.arange(len(padded) // stretch) * stretch
    return at, curve[at]


def _trained_context(axes: Axes, runs: Sequence[Run]) -> None:
    for context in {run.config.training.sequence_length for run in runs}:
        axes.axvline(context, color=MUTED, lw=1.2, ls=(0, (1, 2)), zorder=0.5)
        axes.annotate(
            "trained context", (context, 1), (4, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=MUTED, va="top", ha="left",
        )  # fmt: skip


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    # Above the axis and level: a turned label is hard to read, most of all on a phone.
    if axes.get_title(loc="left"):
        axes.set_ylabel(y, rotation=0, ha="right", va="center")
    else:
        axes.set_title(y, loc="left", color=MUTED)


def _legend(shown: Sequence[Run], runs: Sequence[Run] = ()) -> list[tuple[str, str]]:
    places = {run.folder: k for k, run in enumerate(runs or shown)}
    return [
        (f"var(--s{places[run.folder] % 8})", f"{run.name} (base {run.config.rope.base:,g})")
        for run in shown
    ]


def _short(number: float) -> str:
    if number >= 1024 and number % 1024 == 0:
        return f"{int(number) // 1024}k"
    return f"{number:g}"
