"""Figures of loss against context: perplexity by length, its power law, loss by position."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator

from megatron_ext.study.axes import labels, legend, looks, short, trained_context
from megatron_ext.study.drawing import Figure, figure
from megatron_ext.study.measures import PowerLaw, law_of, losses_within
from megatron_ext.study.runs import Run


def perplexity(runs: Sequence[Run]) -> Figure | None:
    """Perplexity against context length."""
    known = [(run, run.perplexity["lengths"]) for run in runs if run.perplexity]
    if not known:
        return None
    look = looks(runs)
    lengths = sorted({entry["length"] for _, entries in known for entry in entries})

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.subplots()
        for run, entries in known:
            x = [entry["length"] for entry in entries]
            color, style = look[run.folder]
            y = [entry["token_weighted_perplexity"] for entry in entries]
            axes.plot(x, y, "o", ls=style, color=color, lw=1.8, ms=5)
            y = [entry["mean_document_perplexity"] for entry in entries]
            axes.plot(x, y, "o", ls=(0, (2, 2)), color=color, lw=1, ms=3, mfc="none", alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [short(n) for n in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        trained_context(axes, runs)
        labels(axes, "context length (tokens)", "perplexity")

    columns = (
        "length", "stride", "documents", "tokens_scored",
        "token_weighted_perplexity", "mean_document_perplexity",
    )  # fmt: skip
    rows = [(run.name, *(e[c] for c in columns)) for run, entries in known for e in entries]
    caption = (
        "The same tokens of validation documents are predicted at every length; only how far back "
        "the model may look differs. Solid, filled: exp of the mean loss over tokens. Dotted, "
        "hollow: mean of the documents' perplexities, as in the paper. A line that rises right of "
        "the dotted vertical means that context beyond training hurts."
    )
    return figure(
        "perplexity", "Perplexity against context length", caption, paint,
        (("run", *columns), rows), legend([run for run, _ in known], runs), 340, 270,
    )  # fmt: skip


def context_law(runs: Sequence[Run]) -> Figure | None:
    """Loss against context within the trained one, with the power law where one could be fitted."""
    known = [(run, points) for run in runs if len(points := losses_within(run)) > 1]
    if not known:
        return None
    look, laws = looks(runs), {run.folder: law_of(run) for run, _ in known}
    if not any(isinstance(law, PowerLaw) for law in laws.values()):
        return None
    lengths = sorted({length for _, points in known for length, _ in points})

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.subplots()
        for run, points in known:
            (color, style), law = look[run.folder], laws[run.folder]
            axes.plot(*zip(*points, strict=True), "o", color=color, ms=5)
            if isinstance(law, PowerLaw):
                c = np.geomspace(points[0][0], points[-1][0], 100)
                axes.plot(c, law.at(c), ls=style, color=color, lw=1.4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [short(n) for n in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        labels(axes, "context length (tokens)", "loss (nats a token)")

    rows = [
        (run.name, length, loss, *_law_cells(laws[run.folder], length))
        for run, points in known
        for length, loss in points
    ]
    caption = (
        "Dots: mean loss at each context length within the trained one. Lines: L(c) = (α/c)^β + γ, "
        "least squares with γ ≥ 0; α, β and γ stand in the table below. Where a run has dots and "
        "no line, the table says why."
    )
    table = (("run", "length", "loss", "fitted", "alpha", "beta", "gamma", "rms"), rows)
    marks = legend([run for run, _ in known], runs)
    title = "What more context buys: a power law"
    return figure("context_law", title, caption, paint, table, marks, 320, 260)


def _law_cells(law: PowerLaw | str, length: int) -> tuple[Any, ...]:
    if isinstance(law, str):
        return ("",) * 5
    return (float(law.at(length)), law.alpha, law.beta, law.gamma, law.rms)


def loss_by_position(runs: Sequence[Run]) -> Figure | None:
    """Loss by position in the longest context."""
    known = [(run, run.perplexity["lengths"][-1]) for run in runs if run.perplexity]
    if not known:
        return None
    look = looks(runs)

    def middles(entry: dict[str, Any]) -> list[float]:
        return [(b["from"] + b["to"]) / 2 for b in entry["loss_by_position"]]

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.subplots()
        for run, entry in known:
            y = [b["loss"] for b in entry["loss_by_position"]]
            color, style = look[run.folder]
            axes.plot(middles(entry), y, ls=style, color=color, lw=1.6)
        trained_context(axes, runs)
        axes.set_xlim(left=0)
        labels(axes, "tokens before the predicted one", "loss (nats a token)")

    rows = [
        (run.name, entry["length"], *(b[c] for c in ("from", "to", "tokens", "loss")))
        for run, entry in known
        for b in entry["loss_by_position"]
    ]
    caption = (
        "One long window for each document, from its first token on: how well a token is predicted "
        "with so many tokens before it, averaged in bins. The documents are few, so the line is "
        "noisy; compare the runs with each other at the same place, right of the dotted vertical "
        "above all, where no run was trained."
    )
    table = (("run", "length", "from", "to", "tokens", "loss"), rows)
    marks = legend([run for run, _ in known], runs)
    title = "Loss by position in context"
    return figure("position", title, caption, paint, table, marks, 300, 240)
