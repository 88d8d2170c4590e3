"""Charts as ``data:`` URIs, each drawn once for a light page and once for a dark one."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import NullLocator

from softcurve.cli.interrupt import stop_if_interrupted

P = ParamSpec("P")

# The colours of a chart by their place in matplotlib's colour cycle, which each scheme fills with colours of its own.
FIRST, SECOND, THIRD, INK, MUTED, GRID, SURFACE = (f"C{place}" for place in range(7))
LIGHT = ("#1f62c4", "#c2500c", "#147a4a", "#1b1f24", "#59636e", "#dde2e8", "#ffffff")
DARK = ("#6aa8ff", "#ff9a4a", "#57cf8d", "#e6e9ed", "#9aa4af", "#313943", "#171b21")


def _scheme(colours: Sequence[str]) -> AbstractContextManager[None]:
    """Use these colours, quiet axes, and a fixed salt that gives the same bytes for the same chart."""
    _, _, _, ink, muted, grid, _ = colours
    parameters: Any = {
        "axes.prop_cycle": cycler(color=colours),
        "svg.hashsalt": "softcurve",
        "text.parse_math": False,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.8,
    }
    parameters |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
    parameters |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), ink)
    parameters |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), muted)
    return mpl.rc_context(parameters)


@dataclass(frozen=True)
class Picture:
    """A chart as two URIs, for a light and for a dark page, and its description in words."""

    light: str
    dark: str
    alt: str

    def __html__(self) -> Markup:
        """The element that shows the chart of the page's scheme."""
        dark = Markup('<source media="(prefers-color-scheme: dark)" srcset="{}">').format(self.dark)
        return Markup('<picture>{}<img src="{}" alt="{}"></picture>').format(dark, self.light, self.alt)


def picture(alt: str, draw: Callable[P, Figure], *args: P.args, **kwargs: P.kwargs) -> Picture:
    """Draw a chart in both schemes; ``draw`` takes the remaining arguments."""

    def svg() -> bytes:
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw(*args, **kwargs).savefig(buffer, format="svg", metadata=metadata)
        return buffer.getvalue()

    return encoded_picture(alt, "svg+xml", svg)


def encoded_picture(alt: str, kind: str, encode: Callable[[], bytes]) -> Picture:
    """Make an image of the media type ``image/kind`` in both schemes."""
    uris = []
    for colours in (LIGHT, DARK):
        stop_if_interrupted()  # an exception that is raised in a callback of matplotlib is lost
        with _scheme(colours):
            uris.append(f"data:image/{kind};base64,{base64.b64encode(encode()).decode('ascii')}")
    light, dark = uris
    return Picture(light, dark, alt)


def canvas(
    width: float = 4.4, height: float = 3.0, *, left: float = 0.62, bottom: float = 0.46, rest: float = 0.1
) -> tuple[Figure, Axes]:
    """Make a figure of one panel without pyplot's global state; sizes and margins are in inches.

    The margins are arguments because matplotlib's automatic layout draws every chart three times to find them.
    """
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    inner = (1 - (left + rest) / width, 1 - (bottom + rest) / height)
    return figure, figure.add_axes((left / width, bottom / height, *inner))


Line = tuple[Sequence[int | float], Sequence[float], Mapping[str, Any]]


def line_chart(*lines: Line, size: tuple[float, float] = (4.4, 3.0), **settings: Any) -> Figure:
    """Plot lines, each given by x, y and its style; ``settings`` are those of ``Axes.set``."""
    figure, axes = canvas(*size)
    for x, y, style in lines:
        axes.plot(x, y, **style)
    axes.set(**settings)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            powers(axis)
    if any("label" in style for *_, style in lines):
        axes.legend()
    return figure


def powers(axis: Axis) -> None:
    """Label a logarithmic axis with powers of ten in plain letters, because mathtext takes a second to start."""
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    axis.set_major_formatter(lambda value, _: f"10{str(round(math.log10(value))).translate(superscript)}")
    axis.set_minor_locator(NullLocator())


def decades(axis: Axis, values: Iterable[float], *, most: int = 6) -> None:
    """Span the whole decades around positive values on a logarithmic axis, at least one, so that it has labels."""
    exponents = [math.log10(value) for value in values]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    high = max(high, low + 1)
    name = "x" if axis is axis.axes.xaxis else "y"
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (10.0**low, 10.0**high)})
    axis.set_ticks([10.0**k for k in range(low, high + 1, -(-(high - low) // most))])
    powers(axis)


def cells(axes: Axes, values: Sequence[Sequence[float]], *, signed: bool) -> Any:
    """Draw a matrix as coloured squares, the first row on top; zero has the colour of the page."""
    largest = max(abs(value) for row in values for value in row) or 1.0
    mesh = axes.pcolormesh(
        values, cmap=signed_colours() if signed else LinearSegmentedColormap.from_list("amount", [SURFACE, INK]),
        vmin=-largest if signed else 0.0, vmax=largest, edgecolors=GRID, linewidth=0.4,
    )  # fmt: skip
    axes.set_aspect("equal")
    axes.invert_yaxis()
    return mesh


def signed_colours() -> LinearSegmentedColormap:
    """Map negative to positive numbers through the colour of the page."""
    return LinearSegmentedColormap.from_list("signed", [SECOND, SURFACE, FIRST])


def matrix_chart(values: Sequence[Sequence[float]], *, signed: bool = True, cell: float = 0.2) -> Figure:
    """Draw a matrix alone, without axes."""
    figure, axes = canvas(len(values[0]) * cell, len(values) * cell, left=0.01, bottom=0.01, rest=0.01)
    cells(axes, values, signed=signed)
    axes.set_axis_off()
    return figure


def bars(values: Sequence[float], *, target: Sequence[float] | None = None, width: float = 2.4) -> Figure:
    """Draw a bar for each class, negative ones in the second colour, and a target as short lines across."""
    figure, axes = canvas(width, width * 0.7, left=0.4, bottom=0.22, rest=0.05)
    places = range(len(values))
    axes.bar(places, values, color=[FIRST if value >= 0 else SECOND for value in values], width=0.72)
    if target is not None:
        axes.hlines(target, [k - 0.45 for k in places], [k + 0.45 for k in places], color=THIRD, linewidth=1.8)
    axes.axhline(0, color=MUTED, linewidth=0.6)
    axes.set_xticks(places)
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0)
    return figure
