"""Line charts as inline SVG for the report."""

from __future__ import annotations

import html
import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguished by colour-blind readers too.
PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000",
)  # fmt: skip

TITLE, LABEL = 52, 66  # characters that fit side by side

GRID = "#e6e6e6"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "svg.hashsalt": "report",  # equal input, equal bytes
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Line:
    """One curve: points, colour (a number of the palette), label ("" = none), dash or not, and
    the lower and upper bounds of a band around it."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    label: str = ""
    dashed: bool = False
    marker: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    limits: tuple[float, float] | None = None,
    ticks: Sequence[str] | None = None,
) -> str:
    """An `<svg>` element of the curves, 5.6 × 3.2 inches, which scales with its surroundings.

    ticks: names of x = 0, 1, 2 …
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE), warnings.catch_warnings():
        # Text stays text, and the reader's fonts have what matplotlib's lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=PALETTE[line.colour % len(PALETTE)],
                linestyle="--" if line.dashed else "-",
                linewidth=1.4,
                marker="o" if line.marker or len(line.x) == 1 else None,
                markersize=3.5,
                label=in_legend(line.label),
            )
            if line.band is not None:
                colour = PALETTE[line.colour % len(PALETTE)]
                axes.fill_between(line.x, *line.band, color=colour, alpha=0.2, linewidth=0)
        axes.set(title=wrapped(title, TITLE), xlabel=x, ylabel=y)
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks)
        elif all(float(x).is_integer() for line in lines for x in line.x):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if limits is not None:
            axes.set_ylim(*limits)
        if any(line.label for line in lines):
            add_legend(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return inline(buffer.getvalue(), title)


def in_legend(label: str) -> str:
    """The label of a line for matplotlib, whose legend leaves out those that begin with _."""
    label = wrapped(label, LABEL)
    return f" {label}" if label.startswith("_") else label or "_"


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most `width` characters, as it is where it fits in one."""
    return text if len(text) <= width else "\n".join(textwrap.wrap(text, width))


def add_legend(figure: Figure) -> None:
    """A legend under the axes with as many columns as fit, four at most."""
    for columns in (4, 3, 2, 1):
        legend = figure.legend(loc="outside lower center", ncols=columns)
        # The reader's font may be wider than the one measured here.
        if columns == 1 or legend.get_window_extent().width < 0.9 * figure.bbox.width:
            return
        legend.remove()


def inline(svg: str, title: str) -> str:
    """A matplotlib SVG file made fit for a page: no prolog or metadata, ids of its own, a name;
    colours are the page's variables --c0 … and --line, which know light from dark."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    own = re.sub(r"\W+", "-", title).strip("-").lower()
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = svg.replace("url(#", f"url(#{own}-").replace('href="#', f'href="#{own}-')
    name = html.escape(title)

    def opening(svg: re.Match[str]) -> str:
        return (
            f'<svg class="chart" role="img" aria-label="{name}" viewBox="{svg[1]}" '
            'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        )

    for index, colour in enumerate(PALETTE):
        svg = svg.replace(f": {colour}", f": var(--c{index}, {colour})")
    svg = svg.replace(f": {GRID}", f": var(--line, {GRID})")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, svg, count=1)
