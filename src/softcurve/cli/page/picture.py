"""Charts as ``data:`` URIs, each drawn once for a light page and once for a dark one."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
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
STYLE = mpl.rc_params_from_file(Path(__file__).parent / "templates/page.mplstyle", use_default_template=False)


class Picture(NamedTuple):
    """A chart as two URIs, for a light and for a dark page."""

    light: str
    dark: str


def picture(draw: Callable[P, Figure | bytes], *args: P.args, **kwargs: P.kwargs) -> Picture:
    """Draw a chart in both schemes; ``draw``, which takes the remaining arguments, may also return a PNG image."""
    uris = []
    for colours in (LIGHT, DARK):
        stop_if_interrupted()  # an exception that is raised in a callback of matplotlib is lost
        with mpl.rc_context({**STYLE, "axes.prop_cycle": cycler(color=colours)}):
            image, kind = draw(*args, **kwargs), "png"
            if isinstance(image, Figure):
                buffer, kind = io.BytesIO(), "svg+xml"
                metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
                image.savefig(buffer, format="svg", metadata=metadata)
                image = buffer.getvalue()
        uris.append(f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}")
    return Picture(*uris)


def canvas(
    width: float = 4.4, height: float = 3.0, *, left: float = 0.62, bottom: float = 0.46, rest: float = 0.1
) -> tuple[Figure, Axes]:
    """Make a figure of one panel without pyplot's global state; sizes and margins are in inches.

    The margins are arguments because matplotlib's automatic layout draws every chart three times to find them.
    """
    figure = Figure(figsize=(width, height))
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


def signed_colours() -> LinearSegmentedColormap:
    """Map negative to positive numbers through the colour of the page."""
    return LinearSegmentedColormap.from_list("signed", [SECOND, SURFACE, FIRST])


def cells(axes: Axes, values: Sequence[Sequence[float]], *, signed: bool) -> Any:
    """Draw a matrix as coloured squares, the first row on top; zero has the colour of the page."""
    largest = max(abs(value) for row in values for value in row) or 1.0
    colours = signed_colours() if signed else LinearSegmentedColormap.from_list("amount", [SURFACE, INK])
    low = -largest if signed else 0.0
    mesh = axes.pcolormesh(values, cmap=colours, vmin=low, vmax=largest, edgecolors=GRID, linewidth=0.4)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    return mesh
