"""Figures of the bound: B_m with its failing distances, and the base against the context.

    plot_bound("bound.png", head_dim=128, base=1e4, context_length=4096, rows=rows)

Every figure is written with the numbers it shows, as CSV of the same name. matplotlib is imported
only when a figure is asked for. Refuses a file name that is not .png, .pdf or .svg, and a folder
that is not there.
"""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.files import atomic_write, write_file
from megatron_ext.rope.bound import base_frequencies, distance_curve, first_failing_distance
from megatron_ext.rope.published import KNOWN_MODELS, TABLE_2

_SHOWN = 20000  # points of a curve that a figure can show; above, the least of each stretch


@dataclass(frozen=True)
class BoundRow:
    """One context length of the table; a base is None where it was not asked for or published."""

    context_length: int
    head_dim: int
    published_base: float | None
    listing_base: float | None
    smallest_feasible_base: float
    always_feasible_base: float
    active_distance: int | None


def plot_bound(
    path: Path | str,
    head_dim: int,
    base: float,
    context_length: int,
    rows: Sequence[BoundRow],
    rotary_dim: int | None = None,
) -> list[Path]:
    """Left: B_m of `base` over the context, failing distances shaded. Right: `rows`, Table 2 where
    it applies (head_dim 128), and the known models. Returns the files written: figure and CSV."""
    path = Path(path)
    check_figure(path)
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display asked for

    distances, b = _curve(base, head_dim, context_length, rotary_dim)
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(distances, b, lw=0.6, color="tab:blue")
    left.axhline(0, color="black", lw=0.8)
    if (b < 0).any():
        left.plot(distances[b < 0], b[b < 0], ".", ms=1.5, color="tab:red", label="$B_m < 0$")
        first = first_failing_distance(base_frequencies(base, head_dim, rotary_dim), context_length)
        assert first is not None
        left.axvspan(first, context_length, color="tab:red", alpha=0.08, label=f"from m = {first}")
    left.set(
        xlabel="distance m (tokens)",
        ylabel="$B_m$",
        title=f"base {base:g}, head dim {head_dim}, {context_length} tokens",
    )
    left.legend()
    _base_against_context(right, head_dim, rows)
    with atomic_write(path) as stream:
        figure.savefig(stream, dpi=150, format=path.suffix[1:])
    table = path.with_suffix(".csv")
    write_file(table, _csv(distances, b, rows))
    return [path, table]


def check_figure(path: Path) -> None:
    """ValueError when a figure cannot be written there; costs nothing, so ask before the work."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{path} has no known figure format: write a name that ends in .png")
    if not path.parent.is_dir():
        raise ValueError(f"{path} lies in no existing folder: make {path.parent} first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need matplotlib: pip install 'megatron-ext[report]'")


def _base_against_context(axes: Any, head_dim: int, rows: Sequence[BoundRow]) -> None:
    contexts = [row.context_length for row in rows]
    always = [row.always_feasible_base for row in rows]
    least = [row.smallest_feasible_base for row in rows]
    axes.fill_between(contexts, least, always, color="tab:orange", alpha=0.15, label="islands")
    axes.plot(contexts, always, "--", color="tab:orange", label="every larger base is feasible")
    axes.plot(contexts, least, "-", color="tab:blue", label="smallest feasible base (Eq. 11)")
    if head_dim == 128:
        axes.plot(list(TABLE_2), list(TABLE_2.values()), "x", color="black", label="Table 2")
        for name, (context, base) in KNOWN_MODELS.items():
            axes.plot(context, base, "o", color="tab:red", ms=4)
            # Baichuan2 is the same point as Llama 2, and Llama 1 stands close to its left.
            at = {"Baichuan2": (5, -11), "Llama 1": (-46, 4)}.get(name, (5, 4))
            axes.annotate(name, (context, base), xytext=at, textcoords="offset points")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="context length (tokens)",
        ylabel="base",
        title=f"base of RoPE and the context it bounds, head dim {head_dim}",
    )
    axes.set_xscale("log", base=2)
    axes.legend(loc="lower right")


def _curve(
    base: float, head_dim: int, context_length: int, rotary_dim: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and B_m; a long curve is thinned to the least value of each stretch, so that no
    failing distance goes unseen."""
    b = distance_curve(base_frequencies(base, head_dim, rotary_dim), context_length)
    stretch = -(-len(b) // _SHOWN)
    if stretch == 1:
        return np.arange(len(b)), b
    padded = np.pad(b, (0, -len(b) % stretch), constant_values=np.inf).reshape(-1, stretch)
    at = padded.argmin(1) + np.arange(len(padded)) * stretch
    return at, b[at]


def _csv(distances: np.ndarray, b: np.ndarray, rows: Sequence[BoundRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    names = list(BoundRow.__dataclass_fields__)
    writer.writerow(["series", *names, "distance", "b"])
    for row in rows:
        writer.writerow(["bound", *(getattr(row, name) for name in names), "", ""])
    for m, value in zip(distances.tolist(), b.tolist(), strict=True):
        writer.writerow(["curve", *[""] * len(names), m, value])
    return text.getvalue()
