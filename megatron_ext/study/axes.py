"""What the figures have in common: one colour for each arm, its seeds alike; labels; lengths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from megatron_ext.study.drawing import DASHES, MUTED, SERIES, swatch
from megatron_ext.study.runs import Run, arms, base_text

Look = tuple[str, Any]


def looks(runs: Sequence[Run]) -> dict[Path, Look]:
    """Colour and dashes of each run, by its folder."""
    return {
        run.folder: (SERIES[k % 8], DASHES[k // 8 % 3])
        for k, arm in enumerate(arms(runs))
        for run in arm.runs
    }


def legend(shown: Sequence[Run], runs: Sequence[Run]) -> list[tuple[str, str]]:
    """An entry for each arm of `runs` that has a run among the shown."""
    folders = {run.folder for run in shown}
    found = []
    for k, arm in enumerate(arms(runs)):
        count = sum(run.folder in folders for run in arm.runs)
        seeds = f", {count} seeds" if count > 1 else ""
        if count:
            found.append((swatch(k), f"{arm.name} (base {base_text(arm.first)}{seeds})"))
    return found


def trained_context(axes: Axes, runs: Sequence[Run]) -> None:
    """A dotted vertical at the context that the runs were trained with."""
    for context in {run.config.training.sequence_length for run in runs}:
        axes.axvline(context, color=MUTED, lw=1.2, ls=(0, (1, 2)), zorder=0.5)
        axes.annotate(
            "trained context", (context, 1), (4, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=MUTED, va="top", ha="left",
        )  # fmt: skip


def labels(axes: Axes, x: str, y: str) -> None:
    """Of both axes."""
    axes.set_xlabel(x)
    # Above the axis and level: a turned label is hard to read, most of all on a phone.
    if axes.get_title(loc="left"):
        axes.set_ylabel(y, rotation=0, ha="right", va="center")
    else:
        axes.set_title(y, loc="left", color=MUTED)


def short(number: float) -> str:
    """4096 as 4k."""
    if number >= 1024 and number % 1024 == 0:
        return f"{int(number) // 1024}k"
    return f"{number:g}"
