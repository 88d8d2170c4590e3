"""The scores of a head: calibration, confusions, recall and precision of each class, and the hardest rows."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.cli.page import picture as chart
from softcurve.cli.page.render import Section
from softcurve.cli.report.record import FitReport
from softcurve.fit.diagnostics import Calibration, Diagnostics

WIDTH, HEIGHT, BELOW = 4.6, 4.5, 1.0  # of the reliability curve and the histogram below it, in inches
SMALLEST_SIDE = 4
IN_A_TABLE = 25  # the largest number of classes whose matrix is a table, and that have a row each
WORST, PAIRS = 12, 15
VECTORS = 1000  # the largest number of marks that are drawn as vectors


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
    below.set(xlabel="confidence: probability of the predicted class", ylabel="% of rows")
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
    axes.set(ylim=(-4, 104), xlabel="rows of the class", ylabel="recall, %")
    return figure


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
