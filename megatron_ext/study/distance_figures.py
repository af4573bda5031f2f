"""Figure of retrieval by distance: the theory speaks of tokens between fact and question."""

from collections.abc import Sequence

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator, PercentFormatter

from megatron_ext.study.axes import labels, legend, looks, short, trained_context
from megatron_ext.study.drawing import MUTED, Figure, figure
from megatron_ext.study.runs import Run, arms, usable

_NEAREST = 16  # tokens: where the axis of distances, which has no zero, begins

Count = tuple[int, int]


def by_distance(runs: Sequence[Run], task: str) -> Figure | None:
    """Share of prompts answered by the distance back to the fact, all lengths together."""
    known = [run for run in runs if _counts([run], task)]
    found = [(arm, _counts(arm.runs, task)) for arm in arms(known)]
    if not found:
        return None
    look = looks(runs)
    places = sorted({place for _, counts in found for place in counts})

    def paint(canvas: Canvas, wide: bool) -> None:
        axes = canvas.subplots()
        for arm, counts in found:
            color, style = look[arm.first.folder]
            x = sorted(counts)
            y = [counts[place][0] / counts[place][1] for place in x]
            axes.plot(x, y, "o", ls=style, color=color, lw=1.8, ms=4.5)
            if _NEAREST / 2 <= usable(arm.first) <= places[-1]:
                axes.plot(usable(arm.first), 1.05, "v", color=color, ms=8)
        axes.set_xscale("log", base=2)
        marks = [place for place in places if place & (place - 1) == 0]
        axes.set_xticks(marks, [short(n) if n > marks[0] else f"≤{n}" for n in marks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(-0.03, 1.12)
        axes.axhline(1, color=MUTED, lw=0.8)
        trained_context(axes, known)
        labels(axes, "behind the fact (tokens)", "prompts answered")

    rows = [
        (run.name, place, *count, count[0] / count[1], usable(run))
        for run in known
        for place, count in sorted(_counts([run], task).items())
    ]
    caption = (
        "Prompts of all lengths by the part of them that stands behind the fact, length × "
        "(100% − depth): within some tens of tokens the distance between fact and question. A dot "
        "is the share answered exactly among those up to it and beyond the dot before; seeds of "
        "one arm are added up. Triangles on top, in the colour of their arm: the theory's usable "
        "context, the greatest distance up to which no Bₘ is negative; an arm without one has it "
        "farther out, or nearer than the axis begins."
    )
    table = (("run", "up_to_distance", "correct", "samples", "share", "theory_usable"), rows)
    return figure(
        f"distance_{task}", f"Retrieval by distance: {task}", caption, paint, table,
        legend(known, runs), 340, 270,
    )  # fmt: skip


def _counts(runs: Sequence[Run], task: str) -> dict[int, Count]:
    """Correct answers and prompts by the least of 2^k and 1.5 x 2^k that the distance is within."""
    found: dict[int, Count] = {}
    for run in runs:
        for entry in run.retrieval.get(task, {"lengths": []})["lengths"]:
            for cell in entry["depths"]:
                if cell["depth"] is not None:
                    place = _place(entry["length"] * (100 - cell["depth"]) / 100)
                    correct, samples = found.get(place, (0, 0))
                    found[place] = correct + cell["correct"], samples + cell["samples"]
    return found


def _place(distance: float) -> int:
    place = _NEAREST
    while distance > place:
        place = place * 3 // 2 if place & (place - 1) == 0 else place * 4 // 3
    return place
