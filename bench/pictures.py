"""The pictures of :mod:`bench.growth`: time and extra memory on logarithmic axes, as SVG for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.tables import Record


class Style(NamedTuple):
    """The label, colour, marker and line of a contestant."""

    label: str
    colour: str
    marker: str
    line: str = "-"
    width: float = 1.6


# The colours are of medium luminance, so that they can be read on white and on black, and differ for colour-blind
# readers (Okabe and Ito, 2008). Markers tell the lines apart without colour.
STYLES: Mapping[str, Style] = {
    "ours": Style("softcurve", "#d55e00", "o", width=2.8),
    "three products": Style("three products", "#808890", "", ":"),
    "torch eager": Style("torch, logits", "#2f7fc1", "s"),
    "torch chunked": Style("torch chunked", "#009e73", "D"),
}
TEXT = "#808890"  # has a contrast of at least 3.5 with white and with GitHub's and Furo's dark backgrounds
NAMES = {"rows": "rows N", "width": "width d", "classes": "classes C"}
# Column, title, and the least value that is drawn: the resident set grows by whole pages and stays if pages are reused.
PANELS = (("s", "seconds", 0.0), ("extra_mb", "extra memory in MB", 1.0))


def draw(records: Sequence[Record], size: str, path: Path) -> None:
    """Draw both panels for records that differ in one size, and write the picture to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    index = ("rows", "width", "classes").index(size)
    # Text stays text, which is small and can be selected; without a date, equal figures give equal files.
    with pyplot.rc_context({**_settings(), "svg.fonttype": "none", "svg.hashsalt": size}):
        figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 3.6))
        for axes, (column, label, least) in zip(panels, PANELS, strict=True):
            drawn = [{**record, column: max(record[column], least)} for record in records if column in record]
            _panel(axes, drawn, column, index)
            axes.set_xlabel(NAMES[size])
            axes.set_title(label, loc="left", fontsize=11)
        panels[-1].set_title(_others(records[0]["shape"], index), loc="right", fontsize=9)
        figure.tight_layout()
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def _settings() -> dict[str, Any]:
    coloured = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(coloured, TEXT),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.family": ["sans-serif"],
        "font.size": 10,
    }


def _others(shape: Sequence[int], index: int) -> str:
    return ", ".join(
        f"{name} = {value:,}" for i, (name, value) in enumerate(zip("NdC", shape, strict=True)) if i != index
    )


def _panel(axes: Any, records: Sequence[Record], column: str, index: int) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    values = sorted({record["shape"][index] for record in records})
    axes.set_xticks(values, [_short(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(values[0] / 1.2, values[-1] * (values[-1] / values[0]) ** 0.42)  # room for the labels of the lines
    axes.grid(visible=True, color=TEXT, alpha=0.25, linewidth=0.6)
    ends: dict[int, dict[str, float]] = {}  # the last values of the lines, by the place where they end
    for who, style in STYLES.items():
        line = sorted((r["shape"][index], r[column]) for r in records if r["who"] == who)
        if line:
            ends.setdefault(line[-1][0], {})[who] = line[-1][1]
            axes.plot(
                *zip(*line, strict=True),
                color=style.colour,
                marker=style.marker,
                linestyle=style.line,
                linewidth=style.width,
                markersize=5,
            )
    for place, heights in ends.items():
        top = max(record[column] for record in records if record["shape"][index] == place)
        above = place < values[-1] and top in heights.values()
        _label(axes, place, _apart(heights, axes.get_ylim()), above=above)


def _label(axes: Any, place: int, heights: Mapping[str, float], *, above: bool) -> None:
    """Label lines to the right of their last points, or above a point that other lines would pass on the right."""
    for who, height in heights.items():
        axes.annotate(
            STYLES[who].label,
            (place, height),
            xytext=(0, 8) if above else (8, 0),
            textcoords="offset points",
            ha="center" if above else "left",
            va="bottom" if above else "center",
            color=STYLES[who].colour,
            fontsize=10,
            fontweight="bold" if who == "ours" else "normal",
        )


def _short(value: int) -> str:
    return f"{value // 1024}k" if value >= 4096 and value % 1024 == 0 else f"{value:,}"


def _apart(ends: Mapping[str, float], limits: tuple[float, float]) -> dict[str, float]:
    """Return heights of the labels near the ends of their lines, at least a line of text apart."""
    low, high = map(math.log10, limits)
    gap = (high - low) * 0.075
    names = sorted(ends, key=lambda who: ends[who])
    heights = [math.log10(ends[who]) for who in names]
    for _ in range(200):  # pairs that are too close move apart, until none is
        for i in range(len(heights) - 1):
            missing = gap - (heights[i + 1] - heights[i])
            if missing > 1e-9:
                heights[i] -= missing / 2
                heights[i + 1] += missing / 2
    return {who: 10**height for who, height in zip(names, heights, strict=True)}
