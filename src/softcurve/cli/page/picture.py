"""Pictures as `data:` URIs: every chart is drawn twice, for a light and for a dark page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from softcurve.cli.interrupt import stop_if_interrupted


@dataclass(frozen=True)
class Theme:
    """The colours of one scheme; `first`, `second` and `third` tell series apart."""

    surface: str
    ink: str
    muted: str
    grid: str
    first: str
    second: str
    third: str

    def applied(self) -> AbstractContextManager[None]:
        """Set matplotlib to these colours for a while: quiet axes, and the same bytes for the same chart."""
        return mpl.rc_context(
            {
                "svg.hashsalt": "softcurve",
                "text.parse_math": False,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "savefig.facecolor": "none",
                "font.size": 9,
                "axes.titlesize": 9,
                "text.color": self.ink,
                "axes.labelcolor": self.ink,
                "axes.titlecolor": self.ink,
                "axes.edgecolor": self.muted,
                "xtick.color": self.muted,
                "ytick.color": self.muted,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": self.grid,
                "grid.linewidth": 0.6,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "legend.frameon": False,
                "legend.fontsize": 8.5,
                "lines.linewidth": 1.8,
            }
        )

    def signed(self) -> LinearSegmentedColormap:
        """Negative to positive through the colour of the page, so that zero is nothing."""
        return LinearSegmentedColormap.from_list("signed", [self.second, self.surface, self.first])

    def amount(self) -> LinearSegmentedColormap:
        """From nothing, the colour of the page, to ink."""
        return LinearSegmentedColormap.from_list("amount", [self.surface, self.ink])


LIGHT = Theme("#ffffff", "#1b1f24", "#59636e", "#dde2e8", "#1f62c4", "#c2500c", "#147a4a")
DARK = Theme("#171b21", "#e6e9ed", "#9aa4af", "#313943", "#6aa8ff", "#ff9a4a", "#57cf8d")


@dataclass(frozen=True)
class Picture:
    """A chart for either scheme, and what it shows in words."""

    light: str
    dark: str
    alt: str


def picture(draw: Callable[[Theme], Figure], alt: str) -> Picture:
    """Draw a chart in both schemes."""
    return Picture(_uri(draw, LIGHT), _uri(draw, DARK), alt)


def _uri(draw: Callable[[Theme], Figure], theme: Theme) -> str:
    buffer = io.BytesIO()
    with theme.applied():
        stop_if_interrupted()  # matplotlib's callbacks lose what is raised in them
        draw(theme).savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def canvas(
    width: float, height: float, *, left: float = 0.62, bottom: float = 0.46, rest: float = 0.1
) -> tuple[Figure, Axes]:
    """A figure of one panel, without pyplot and its global state; sizes and margins are in inches.

    The margins are given, because matplotlib's own layout would draw every chart three times to find them.
    """
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    room = (1 - (left + rest) / width, 1 - (bottom + rest) / height)
    return figure, figure.add_axes((left / width, bottom / height, *room))


def powers(axis: Axis) -> None:
    """Label a logarithmic axis with powers of ten in plain letters: mathtext takes a second to start."""
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    axis.set_major_formatter(lambda value, _: f"10{str(round(math.log10(value))).translate(superscript)}")
    axis.set_minor_locator(NullLocator())


def decades(axis: Axis, values: Iterable[float], *, most: int = 6) -> None:
    """A logarithmic axis over whole decades around positive values, so that even a short one has labels."""
    exponents = [math.log10(value) for value in values]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    high = max(high, low + 1)
    step = -(-(high - low) // most)
    axes = axis.axes
    if axis is axes.xaxis:
        axes.set(xscale="log", xlim=(10.0**low, 10.0**high))
    else:
        axes.set(yscale="log", ylim=(10.0**low, 10.0**high))
    axis.set_ticks([10.0**k for k in range(low, high + 1, step)])
    powers(axis)


def cells(theme: Theme, values: Sequence[Sequence[float]], *, signed: bool, cell: float = 0.2) -> Figure:
    """A matrix as coloured squares, the first row on top: vectors, so it stays crisp at any size."""
    rows, columns = len(values), len(values[0])
    figure, axes = canvas(columns * cell, rows * cell, left=0.01, bottom=0.01, rest=0.01)
    largest = max(abs(value) for row in values for value in row) or 1.0
    axes.pcolormesh(
        values,
        cmap=theme.signed() if signed else theme.amount(),
        vmin=-largest if signed else 0.0,
        vmax=largest,
        edgecolors=theme.grid,
        linewidth=0.4,
    )
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_axis_off()
    return figure


def bars(theme: Theme, values: Sequence[float], *, target: Sequence[float] | None = None, width: float = 2.4) -> Figure:
    """One bar for each class, negative ones in the second colour; a target as short lines across."""
    figure, axes = canvas(width, width * 0.7, left=0.4, bottom=0.22, rest=0.05)
    colours = [theme.first if value >= 0 else theme.second for value in values]
    axes.bar(range(len(values)), values, color=colours, width=0.72)
    if target is not None:
        axes.hlines(
            target,
            [k - 0.45 for k in range(len(target))],
            [k + 0.45 for k in range(len(target))],
            color=theme.third,
            linewidth=1.8,
        )
    axes.axhline(0, color=theme.muted, linewidth=0.6)
    axes.set_xticks(range(len(values)))
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0)
    return figure
