"""The line charts of a report: the steps of the solver, the regularisation path and the spectrum of the curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from softcurve.cli.page import picture as chart
from softcurve.cli.page.render import Section
from softcurve.cli.report.record import FitReport, PathPoint
from softcurve.fit.head_spectrum import CurvatureSpectrum

MARKED = 60  # the largest number of steps that have a mark each
BINS = 27
Styles = dict[str, dict[str, str]]


def show_convergence(report: FitReport) -> Section:
    """Draw the largest entry of the gradient, and the distance of the objective from its lowest value."""
    steps = report.fit.history
    best = min((step.objective for step in steps), default=math.nan)
    pictures = {}
    for name, values, label, tol in (
        ("gradient", [step.gradient_max for step in steps], "largest entry of the gradient", report.options.tol),
        ("gap", [step.objective - best for step in steps], "objective minus its lowest value", None),
    ):
        # A log scale can show only these.
        points = [(step.seconds, y) for step, y in zip(steps, values, strict=True) if 0 < y < math.inf]
        if len(points) > 1:
            pictures[name] = chart.picture(_falling, points, label, tol)
    return Section("convergence", {"pictures": pictures, "last": steps[-1] if steps else None})


def _falling(points: list[tuple[float, float]], label: str, tol: float | None) -> Figure:
    values = [y for _, y in points]
    unit, unit_name = (1000, "milliseconds") if points[-1][0] < 1 else (1, "seconds")
    style = {"color": chart.FIRST, "marker": "o" if len(points) <= MARKED else "", "markersize": 3.5}
    figure = chart.line_chart(([unit * x for x, _ in points], values, style), xlabel=unit_name, ylabel=label)
    axes = figure.axes[0]
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if tol:
        axes.axhline(tol, color=chart.THIRD, linewidth=1.2, linestyle="--")
        place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate("tol", (1, tol), xytext=(-2, 3), **place, ha="right", color=chart.THIRD)
        values.append(tol)
    chart.decades(axes.yaxis, values)
    return figure


def show_path(report: FitReport) -> Section:
    """Draw the losses, the accuracy and the norm of the weights against C."""
    points = sorted(report.path, key=lambda point: point.C)
    losses = {"train_loss": {"color": chart.SECOND, "linestyle": "--", "label": "training"}}
    losses |= {"held_loss": {"color": chart.FIRST, "label": "held-out"}}
    charts: dict[str, tuple[str, Styles]] = {
        "Training and held-out loss": ("mean loss, nats", losses),
        "The norm of the weights": ("‖W‖", {"weight_norm": {"color": chart.THIRD}}),
        "Held-out accuracy": ("held-out accuracy", {"held_accuracy": {"color": chart.FIRST}}),
    }
    pictures = {
        name: chart.picture(_against_C, points, report.options.C, ylabel, styles)
        for name, (ylabel, styles) in charts.items()
        if len(points) > 1 and getattr(points[0], next(iter(styles))) is not None
    }
    return Section("path", {"points": points, "pictures": pictures})


def _against_C(points: Sequence[PathPoint], chosen: float, ylabel: str, styles: Styles) -> Figure:
    """Draw fields of the points against C; a hollow mark is a fit that did not converge, the dotted line the head."""
    Cs = [point.C for point in points]
    columns = {name: [getattr(point, name) for point in points] for name in styles}
    columns = {name: values for name, values in columns.items() if values[0] is not None}
    lines = [(Cs, values, {"clip_on": False} | styles[name]) for name, values in columns.items()]
    figure = chart.line_chart(*lines, ylabel=ylabel)
    axes = figure.axes[0]
    for name, values in columns.items():
        color = styles[name]["color"]
        faces = [color if point.converged else chart.SURFACE for point in points]
        axes.scatter(Cs, values, s=12, facecolors=faces, edgecolors=color, clip_on=False, zorder=3)
    if "held_accuracy" not in styles:
        axes.set_ylim(bottom=0)
    if math.isfinite(chosen):  # an infinite C, no penalty, has no place on the axis
        axes.axvline(chosen, color=chart.MUTED, linewidth=1, linestyle=":")
    chart.decades(axes.xaxis, [C for C in (*Cs, chosen) if math.isfinite(C)])
    axes.set_xlabel("C; dotted: that of this head" if math.isfinite(chosen) else "C")
    return figure


def show_curvature(report: FitReport) -> Section:
    """Draw the largest eigenvalues, and the distribution of all of them."""
    spectrum = report.spectrum
    if isinstance(spectrum, str):
        return Section("curvature", {"spectrum": None, "reason": spectrum})
    largest, top = spectrum.largest.tolist(), float(torch.cat([spectrum.largest, spectrum.nodes]).max())
    if not top > 0:
        reason = "every eigenvalue is zero, because the head is certain of every row"
        return Section("curvature", {"spectrum": None, "reason": reason})
    values = {
        "spectrum": spectrum,
        "top": top,
        "density": chart.picture(_histogram, spectrum, top),
        "largest": chart.picture(_largest, largest) if len(largest) > 1 and min(largest) > 0 else None,
        "share": float(spectrum.largest.sum()) / spectrum.trace if spectrum.trace > 0 and largest else None,
        "flat": float(spectrum.shares[spectrum.nodes < spectrum.resolution * top].sum()),
    }
    return Section("curvature", values)


def _largest(values: list[float]) -> Figure:
    ranks = range(1, len(values) + 1)
    style = {"color": chart.FIRST, "marker": "o", "markersize": 4, "linewidth": 1}
    figure = chart.line_chart((ranks, values, style), xlabel="rank", ylabel="eigenvalue")
    chart.decades(figure.axes[0].yaxis, values)
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _histogram(spectrum: CurvatureSpectrum, top: float) -> Figure:
    figure, axes = chart.canvas()
    shown = -math.log10(spectrum.resolution)  # decades
    places = ((spectrum.nodes / top).clamp(min=spectrum.resolution).log10() + shown) * BINS / shown
    shares = torch.zeros(BINS, dtype=spectrum.shares.dtype)
    shares.index_add_(0, places.long().clamp(0, BINS - 1), spectrum.shares)
    edges = [10 ** (k * shown / BINS - shown) for k in range(BINS + 1)]
    widths = [right - left for left, right in pairwise(edges)]
    colours = [chart.MUTED] + [chart.FIRST] * (BINS - 1)
    axes.set_xscale("log")
    axes.bar(
        edges[:-1], (100 * shares).tolist(), widths, align="edge", color=colours, edgecolor=chart.SURFACE, linewidth=0.6
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks([10.0**k for k in range(round(-shown), 1, 3 if shown > 5 else 1)])
    chart.powers(axes.xaxis)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="eigenvalue / largest; grey: all smaller ones", ylabel="% of eigenvalues")
    return figure
