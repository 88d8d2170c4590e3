"""The sections of a report: the solver's steps, the regularisation path, the curvature, and the scores of a head."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.cli.page import picture as chart
from softcurve.cli.page.render import Section
from softcurve.cli.report.conclusion import recommend
from softcurve.cli.report.record import FitReport, PathPoint
from softcurve.cli.report.reproduction import command_line, versions
from softcurve.fit.diagnostics import Calibration, Diagnostics
from softcurve.fit.head_spectrum import CurvatureSpectrum

MARKED = 60  # the largest number of steps that have a mark each
BINS = 27
WIDTH, HEIGHT, BELOW = 4.6, 4.5, 1.0  # of the reliability curve and the histogram below it, in inches
SMALLEST_SIDE = 4
IN_A_TABLE = 25  # the largest number of classes whose matrix is a table, and that have a row each
WORST, PAIRS = 12, 15
VECTORS = 1000  # the largest number of marks that are drawn as vectors
Styles = dict[str, dict[str, str]]


def show_conclusion(report: FitReport) -> Section:
    """Compare the scores with a baseline, with their uncertainty, and recommend a C."""
    infinite = not math.isfinite(report.baseline.loss)
    values = {"intervals": report.intervals, "recommendation": str(recommend(report)), "infinite": infinite}
    return Section("conclusion", values)


def show_reproduction(report: FitReport) -> Section:
    """Show the command line and the versions that repeat the fit."""
    return Section("reproduction", {"command": command_line(report.options), "versions": versions()})


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
        reason = "every eigenvalue is zero, because the head is certain of every sample"
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


def show_calibration(report: FitReport) -> Section:
    """Draw the reliability curve with the histogram of the confidence under it."""
    labelled = report.kind == "labels"
    drawn = chart.picture(_reliability, report.judged.calibration, labelled=labelled)
    return Section("calibration", {"labelled": labelled, "picture": drawn})


def _reliability(calibration: Calibration, *, labelled: bool) -> Figure:
    bins = len(calibration.counts)
    figure, axes = chart.canvas(WIDTH, HEIGHT, bottom=0.46 + BELOW + 0.2)
    full = calibration.counts > 0
    confidence, accuracy = calibration.confidence[full].tolist(), calibration.accuracy[full].tolist()
    axes.plot([0, 1], [0, 1], color=chart.MUTED, linewidth=1, linestyle="--")
    axes.vlines(confidence, confidence, accuracy, color=chart.SECOND, linewidth=3, alpha=0.45)
    axes.plot(confidence, accuracy, color=chart.FIRST, marker="o", markersize=4.5)
    error = f"ECE {100 * calibration.error:.2f} %"
    axes.annotate(error, (0.04, 0.94), xycoords="axes fraction", va="top", fontsize=10, color=chart.INK)
    height = "share predicted correctly" if labelled else "target's probability of that class"
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), ylabel=height)
    axes.tick_params(labelbottom=False)
    left, _, width, _ = axes.get_position().bounds
    below = figure.add_axes((left, 0.46 / HEIGHT, width, BELOW / HEIGHT), sharex=axes)
    shares = (100 * calibration.counts / calibration.counts.sum()).tolist()
    edges = [k / bins for k in range(bins)]
    below.bar(edges, shares, 1 / bins, align="edge", color=chart.FIRST, edgecolor=chart.SURFACE, linewidth=0.8)
    below.set(xlabel="confidence: probability of the predicted class", ylabel="% of samples")
    below.grid(axis="x", visible=False)
    figure.align_ylabels()
    return figure


def show_confusion(report: FitReport) -> Section:
    """Show the confusion matrix as a table or a picture, and the pairs that are confused most."""
    judged, matrix = report.judged, report.judged.matrix
    cells = drawn = None
    if matrix is not None:
        # Shares of each row, and off the diagonal their square roots, so that a few confusions are visible.
        shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
        shades = shares.sqrt()
        shades.diagonal().copy_(shares.diagonal())
        if len(report.classes) <= IN_A_TABLE:
            cells = torch.stack([matrix, 100 * shades], -1).tolist()
        else:
            drawn = chart.picture(_heat_map, shades)
    wrong = judged.rows - int(judged.correct.sum())
    return Section("confusion", {"cells": cells, "picture": drawn, "wrong": wrong, "pairs": judged.confused[:PAIRS]})


def _heat_map(shades: Float[Tensor, "classes classes"]) -> Figure:
    figure, axes = chart.canvas(5.6, 5.4)
    signed = -shades
    signed.diagonal().neg_()
    axes.imshow(signed.numpy(), cmap=chart.signed_colours(), vmin=-1, vmax=1, interpolation="none")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(xlabel="index of the predicted class", ylabel="index of the label")
    return figure


def show_classes(report: FitReport) -> Section:
    """Show each class, or for many classes a scatter plot of all and those of lowest recall."""
    judged = report.judged
    shown, drawn = list(range(len(report.classes))), None
    if len(shown) > IN_A_TABLE:
        seen = int((judged.support > 0).sum())
        recall = judged.correct / judged.support  # NaN without rows, which comes last
        # The classes of lowest recall among those with rows; of equals those with most rows.
        shown = np.lexsort((-judged.support.numpy(), recall.numpy()))[: min(WORST, seen)].tolist()
        drawn = chart.picture(_scatter, judged) if seen else None
    values = {
        "few": len(report.classes) <= IN_A_TABLE, "unseen": int((judged.support == 0).sum()),
        "never": int((judged.predicted == 0).sum()), "picture": drawn, "most": max(1, int(judged.support.max())),
        "rows": [(k, *(int(part[k]) for part in (judged.support, judged.predicted, judged.correct))) for k in shown],
    }  # fmt: skip
    return Section("classes", values)


def _scatter(judged: Diagnostics) -> Figure:
    figure, axes = chart.canvas(6.0, 3.4)
    seen = judged.support > 0
    points, copies = torch.stack([judged.support[seen], judged.correct[seen]]).unique(dim=1, return_counts=True)
    support, recall = points[0].double(), 100 * points[1] / points[0]
    axes.axhline(100 * judged.accuracy, color=chart.MUTED, linewidth=1, linestyle="--")
    sizes, many = 8 + 4 * copies.clamp(max=25), len(copies) > VECTORS
    axes.scatter(support, recall, s=sizes, color=chart.FIRST, alpha=0.5, linewidths=0, rasterized=many)
    chart.decades(axes.xaxis, support.tolist())
    axes.set_xlim(left=axes.get_xlim()[0] * 0.85)
    axes.set(ylim=(-4, 104), xlabel="samples of the class", ylabel="recall, %")
    return figure


def show_coefficients(report: FitReport) -> Section:
    """Show each coefficient with its standard error, where they are few."""
    summary = report.coefficients
    if isinstance(summary, str):
        return Section("coefficients", {"summary": None, "reason": summary})
    names = {label: report.class_name(k) for k, label in enumerate(report.classes)}
    rows = [(names[row.pop("class")], *row.values()) for row in summary.records()]
    base, penalised = names.get(summary.base_class), math.isfinite(report.options.C)
    values = {"summary": summary, "rows": rows, "base": base, "penalised": penalised}
    return Section("coefficients", values)


def show_hardest(report: FitReport) -> Section:
    """Show tables by EL2N, with the rows as small images where their features can be pixels."""
    return Section("hardest", {"thumbnails": {name: _thumbnails(judged) for name, judged in report.sets.items()}})


def _thumbnails(judged: Diagnostics) -> list[chart.Picture]:
    """Draw the hardest rows as square images, if their width is a square and no feature is negative."""
    features = judged.hardest_features
    if features is None or not len(features):
        return []
    side = math.isqrt(features.shape[1])
    if side**2 != features.shape[1] or side < SMALLEST_SIDE or bool((features < 0).any()):
        return []
    shades = (features / (float(features.max()) or 1.0)).reshape(-1, side, side)
    return [chart.picture(_png, shade) for shade in shades]


def _png(shades: Float64[Tensor, "side side"]) -> bytes:
    """Encode one pixel for each feature, from transparent to ink."""
    pixels = np.empty((*shades.shape, 4))
    pixels[..., :3] = to_rgb(chart.INK)
    pixels[..., 3] = shades.numpy()
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png", metadata={"Software": "softcurve"})
    return buffer.getvalue()
