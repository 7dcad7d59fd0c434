"""Figures of the open questions: SVG files of a few kilobytes, the same bytes for the same numbers.

What was measured is drawn with markers (and a band, the 95 % interval), what a formula says without them and dashed; so is the
second of two measured lines of one colour.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Okabe and Ito's colours, which survive colour blindness; markers repeat what the colour says.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#6b7280", "#E69F00", "#111827")
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")
STYLE = {
    **{"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False},
    **{"axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "axes.edgecolor": "#9ca3af"},
    **{"axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.6, "lines.markersize": 4.5},
}


class Line(NamedTuple):
    """One line of a panel: x and y of equal length, and the band where there is one. `look` numbers its colour and marker."""

    name: str  # in the legend; "" for none
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    look: int = 0
    theory: bool = False


class Panel(NamedTuple):
    """One pair of axes; `log` is "", "x", "y" or "xy". `ticks` are the labels of x = 0, 1, 2 ... where x has no unit. Points of
    things that have no order are not `joined`."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log: str = ""
    ticks: Sequence[str] = ()
    joined: bool = True


def draw(path: Path, panels: Sequence[Panel], description: str) -> None:
    """Write the panels, side by side, to `path`. Raises `ValueError` for a line whose x and y differ in length."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        canvas = Figure(figsize=(4.3 * len(panels), 3.6), layout="constrained")
        for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _fill(axes, panel)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    drawn = buffer.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", drawn)  # a hundredth of a point is enough
    said = description.replace("&", "&amp;").replace("<", "&lt;")
    drawn = re.sub(r"(<svg[^>]*>)", rf"\1<desc>{said}</desc>", drawn, count=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line.strip() for line in drawn.splitlines() if line.strip()) + "\n", encoding="utf-8")


def _fill(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        colour = COLOURS[line.look % len(COLOURS)]
        label = line.name or "_"
        if line.theory:
            axes.plot(line.x, line.y, color=colour, linestyle="--", label=label)
            continue
        marker, style = MARKERS[line.look % len(MARKERS)], "-" if panel.joined else "none"
        axes.plot(line.x, line.y, color=colour, marker=marker, linestyle=style, label=label)
        if line.low is None or line.high is None:
            continue
        if panel.joined:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.12, linewidth=0)
        else:
            axes.vlines(line.x, line.low, line.high, color=colour, alpha=0.4)
    if "x" in panel.log:
        axes.set_xscale("log")
        _decades(axes.xaxis, *axes.get_xlim())
    if "y" in panel.log:
        axes.set_yscale("log")
        _decades(axes.yaxis, *axes.get_ylim())
    axes.minorticks_off()
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize=10 if len(panel.ticks) < 6 else 7)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    if any(line.name for line in panel.lines):
        axes.legend()


def _decades(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5, 10 ... where there are few decades, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
