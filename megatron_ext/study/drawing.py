"""How a figure of the report is drawn: for a desktop, for a phone, in the page's own colours.

    drawn = figure("loss", "Loss while training", caption, paint, table, legend, 340, 260)
    drawn.wide, drawn.narrow                     # inline SVG
    drawn.save(Path("runs/demo/figures"))        # loss.png, loss.svg, loss.csv

The SVG names colours by CSS variable (--ink, --muted, --grid, --fail, --s0 ..), so that one drawing
serves the light and the dark page; the files have the light ones. Needs matplotlib (extra
`report`).
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from data_tools.files import write_file

# The light page's colours; in the SVG each becomes the CSS variable of the same name.
INK, MUTED, GRID = "#1b1f24", "#5b6570", "#dfe3e8"
FAIL, FAIL_FAR = "#c92a2a", "#eba3a3"
SERIES = (
    "#0b63ce", "#946200", "#18794e", "#6f42c1", "#0c7489", "#b4256b", "#4d5560", "#7a4a2b",
)  # fmt: skip
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", FAIL: "fail", FAIL_FAR: "fail-far",
    **{color: f"s{k}" for k, color in enumerate(SERIES)},
}  # fmt: skip

_WIDE, _NARROW = 720, 358  # CSS pixels: the page's column, and that of a 390 px phone

Table = tuple[Sequence[str], Iterable[Sequence[Any]]]
Draw = Callable[[Canvas, bool], None]


@dataclass(frozen=True)
class Figure:
    """One figure of the page."""

    name: str
    title: str
    caption: str
    wide: str  # SVG
    narrow: str
    png: bytes
    svg: bytes  # a file of its own: no variables in it
    table: Table
    legend: list[tuple[str, str]]  # CSS background and text

    def save(self, folder: Path) -> None:
        """Write NAME.png, NAME.svg and NAME.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f"{self.name}.png", self.png)
        write_file(folder / f"{self.name}.svg", self.svg)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.table[0])
        writer.writerows(self.table[1])
        write_file(folder / f"{self.name}.csv", text.getvalue())


def figure(
    name: str, title: str, caption: str, paint: Draw, table: Table,
    legend: list[tuple[str, str]], wide_height: int, narrow_height: int,
) -> Figure:  # fmt: skip
    """Draw by `paint(canvas, wide)` at both widths; heights are CSS pixels."""

    def render(width: int, height: int, alone: bool = False, **how: Any) -> bytes:
        style: Any = {
            "font.size": 11 if width == _WIDE else 10.5,
            "font.family": "sans-serif",
            "axes.titlesize": "medium",
            "axes.labelsize": "medium",
            "axes.edgecolor": MUTED,
            "axes.labelcolor": MUTED,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "text.color": INK,
            "svg.fonttype": "none",
            # Ids that are the same in two drawings of a page would clip one by the other.
            "svg.hashsalt": f"{name}-{width}",
        }
        with rc_context(style):
            # 72 units an inch is matplotlib's SVG: a font of 11 is 11 CSS pixels.
            canvas = Canvas(figsize=(width / 72, height / 72), layout="constrained")
            paint(canvas, width == _WIDE)
            if alone:  # the page has its legend above the drawing
                _add_legend(canvas, legend)
            stream = io.BytesIO()
            canvas.savefig(stream, **how)
        return stream.getvalue()

    def svg(width: int, height: int) -> bytes:
        return render(width, height, format="svg", transparent=True, metadata={"Date": None})

    wide, narrow = svg(_WIDE, wide_height), svg(_NARROW, narrow_height)
    alone = wide_height + 14 * len(legend)
    png = render(_WIDE, alone, alone=True, format="png", dpi=160)
    file = render(_WIDE, alone, alone=True, format="svg", metadata={"Date": None})
    pages = for_page(wide.decode(), title), for_page(narrow.decode(), title)
    return Figure(name, title, caption, *pages, png, file, table, legend)


def _add_legend(canvas: Canvas, legend: Sequence[tuple[str, str]]) -> None:
    """For a file that stands alone. Shades of the heat maps are left to the page."""
    colors = {variable: color for color, variable in _VARIABLES.items()}
    handles = []
    for background, text in legend:
        color = re.search(r"var\(--([\w-]+)\)", background)
        if color and "color-mix" not in background:
            dashes = DASHES[1] if "gradient" in background else "-"
            handles.append(Line2D([], [], color=colors[color[1]], ls=dashes, lw=2.5, label=text))
    if handles:
        columns = 2 if len(handles) > 3 else 1
        canvas.legend(handles=handles, loc="outside upper left", frameon=False, ncols=columns)


def swatch(k: int) -> str:
    """CSS background that shows colour and dashes of the k-th arm."""
    color, dashes = f"var(--s{k % 8})", DASHES[k // 8 % 3]
    if dashes == "-":
        return color
    on, off = (2 * length for length in dashes[1])
    return f"repeating-linear-gradient(90deg, {color} 0 {on}px, transparent {on}px {on + off}px)"


def for_page(svg: str, title: str) -> str:
    """matplotlib's SVG as part of an HTML page: no header, no address, the page's font, colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    # Names of groups, which nothing refers to and which every figure has alike.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
