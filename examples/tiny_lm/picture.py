"""The figure of the training curves and of the time and memory of each loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STREAMED, DENSE, MUTED = "#1f62c4", "#c3cad3", "#59636e"
GRID = "#e6e9ed"
COLOURS = {
    "teacher": "#24292f",
    "plain": "#59636e",
    "forward": "#1f62c4",
    "reverse": "#c2500c",
    "top_k": "#1a7f5a",
}
STYLES = {"teacher": "o:", "plain": "o--", "forward": "o-", "reverse": "o-", "top_k": "o-"}


def draw(report: Mapping[str, Any], labels: Mapping[str, str]) -> Figure:
    """Draw the training curves on the left and the costs on the right."""
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.08, 1), squeeze=False).flat
    axes = left.subplots()
    curves(axes, report["curves"], labels)
    losses = {labels[name].removeprefix("student, "): cost for name, cost in report["costs"].items()}
    above, below = right.subplots(2, 1)
    bars(above, {loss: of["megabytes"] for loss, of in losses.items()})
    above.set_title("Memory of a loss and its gradients", loc="left")
    above.set_xlabel("megabytes")
    bars(below, {loss: of["tokens_per_second"] for loss, of in losses.items()})
    below.set_title("Training step of a student", loc="left")
    below.set_xlabel("tokens per second")
    right.legend(*above.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    sizes = "{batch} × {context} tokens, width {width}, vocabulary {vocab:,}".format_map(report)
    right.supxlabel(sizes, fontsize="medium", color=MUTED)
    return figure


def curves(axes: Axes, found: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    """Plot the cross-entropy on validation windows, which is comparable between runs with different losses."""
    for name, curve in found.items():
        steps, nats = curve["steps"], curve["validation"]
        label = f"{labels[name]}: {nats[-1]:.2f}"
        axes.plot(steps, nats, STYLES[name], color=COLOURS[name], linewidth=1.8, markersize=3.2, label=label)
    axes.set_title("A teacher and four students", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("validation cross-entropy, nats per token")
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def bars(axes: Axes, found: Mapping[str, Mapping[str, float | None]]) -> None:
    """Draw one pair of labelled bars per loss, without a bar for a missing measurement."""
    for how, (offset, colour) in {"streamed": (-0.19, STREAMED), "dense": (0.19, DENSE)}.items():
        values = [pair[how] or 0.0 for pair in found.values()]
        drawn = axes.barh([place + offset for place in range(len(values))], values, 0.34, color=colour, label=how)
        axes.bar_label(drawn, [f"{value:,.0f}" if value else "–" for value in values], padding=4, color=MUTED)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
