"""The scores of a head: calibration, confusions, recall and precision of each class, and the hardest rows."""

from __future__ import annotations

import io
import math
from functools import partial

import numpy as np
import torch
from markupsafe import Markup
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from softcurve.array_types import Float64, Int64
from softcurve.cli.page.picture import (
    FIRST,
    INK,
    MUTED,
    SECOND,
    SURFACE,
    Picture,
    canvas,
    decades,
    encoded_picture,
    picture,
    signed_colours,
)
from softcurve.cli.page.render import Section, show
from softcurve.cli.report.record import FitReport
from softcurve.fit.diagnostics import Calibration, Diagnostics

WIDTH, HEIGHT, BELOW = 4.6, 4.5, 1.0  # of the reliability curve and the histogram below it, in inches
SMALLEST_SIDE = 4
IN_A_TABLE = 25  # the largest number of classes whose matrix is a table, and that have a row each
WORST, PAIRS = 12, 15
VECTORS = 1000  # the largest number of marks that are drawn as vectors
# The shades of a cell above which the colour of the page is the better text colour: on a dark page, and on both.
MIDDLE, STRONG = 0.62, 0.82


def show_calibration(report: FitReport) -> Section:
    """The reliability curve with the histogram of the confidence under it."""
    name, judged = report.judged
    labelled = report.kind == "labels"
    height = "Accuracy" if labelled else "Probability by the target"
    alt = f"{height} against confidence of the {name} rows, and below it the share of rows with each confidence"
    drawn = picture(alt, _reliability, judged.calibration, labelled=labelled)
    values = {"name": name, "error": judged.calibration.error, "labelled": labelled, "picture": drawn}
    return Section("calibration", "Calibration", values)


def _reliability(calibration: Calibration, *, labelled: bool) -> Figure:
    bins = len(calibration.counts)
    figure, axes = canvas(WIDTH, HEIGHT, bottom=0.46 + BELOW + 0.2)
    full = calibration.counts > 0
    confidence, accuracy = calibration.confidence[full].tolist(), calibration.accuracy[full].tolist()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
    axes.vlines(confidence, confidence, accuracy, color=SECOND, linewidth=3, alpha=0.45)
    axes.plot(confidence, accuracy, color=FIRST, marker="o", markersize=4.5)
    error = f"ECE {100 * calibration.error:.2f} %"
    axes.annotate(error, (0.04, 0.94), xycoords="axes fraction", va="top", fontsize=10, color=INK)
    height = "share predicted correctly" if labelled else "target's probability of that class"
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), ylabel=height)
    axes.tick_params(labelbottom=False)
    left, _, width, _ = axes.get_position().bounds
    below = figure.add_axes((left, 0.46 / HEIGHT, width, BELOW / HEIGHT), sharex=axes)
    shares = (100 * calibration.counts / calibration.counts.sum()).tolist()
    edges = [k / bins for k in range(bins)]
    below.bar(edges, shares, 1 / bins, align="edge", color=FIRST, edgecolor=SURFACE, linewidth=0.8)
    below.set(xlabel="confidence: probability of the predicted class", ylabel="% of rows")
    below.grid(axis="x", visible=False)
    figure.align_ylabels()
    return figure


def show_hardest(report: FitReport) -> Section:
    """Tables by EL2N, with the rows as small images where their features can be pixels."""
    columns = {
        "row": "d",
        "EL2N": ".4f",
        "label": "s",
        "predicted": "s",
        r"\(p\) of the label": "",
        "loss, nats": ".4f",
    }
    tables = []
    for name, judged in report.sets.items():
        rows: list[tuple[object, ...]] = [
            (h.row, h.el2n, report.class_name(h.label), report.class_name(h.predicted), h.probability, h.loss)
            for h in judged.hardest
        ]
        pictures = _thumbnails(judged)
        if pictures:
            rows = [(*row, drawn) for row, drawn in zip(rows, pictures, strict=True)]
        if rows:
            tables.append((name, columns | ({"features": "s"} if pictures else {}), rows))
    return Section("hardest", "The hardest rows", {"tables": tables})


def _thumbnails(judged: Diagnostics) -> list[Picture]:
    """The hardest rows as square images, if their width is a square and no feature is negative; else none."""
    features = judged.hardest_features
    if features is None or not len(features):
        return []
    side = math.isqrt(features.shape[1])
    if side**2 != features.shape[1] or side < SMALLEST_SIDE or bool((features < 0).any()):
        return []
    shades = (features / (float(features.max()) or 1.0)).reshape(-1, side, side)
    return [
        encoded_picture(f"Row {hard.row} as {side} by {side} pixels", "png", partial(_png, shade))
        for shade, hard in zip(shades, judged.hardest, strict=True)
    ]


def _png(shades: Float64[Tensor, "side side"]) -> bytes:
    """One pixel for each feature, from transparent to ink."""
    pixels = np.empty((*shades.shape, 4))
    pixels[..., :3] = to_rgb(INK)
    pixels[..., 3] = shades.numpy()
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png", metadata={"Software": "softcurve"})
    return buffer.getvalue()


def show_confusion(report: FitReport) -> Section:
    """The confusion matrix as a table or a picture, and the pairs that are confused most."""
    name, judged = report.judged
    matrix, table = judged.matrix, len(report.classes) <= IN_A_TABLE
    pairs = [
        (report.class_name(pair.label), report.class_name(pair.predicted), pair.count, pair.count / max(1, support))
        for pair in judged.confused[:PAIRS]
        for support in [int(judged.support[pair.label])]
    ]
    alt = f"Confusion matrix of {len(report.classes)} classes: the diagonal in one colour, confusions in another"
    values = {
        "name": name,
        "wrong": judged.rows - int(judged.correct.sum()),
        "names": [report.class_name(k) for k in range(len(report.classes))] if table else None,
        "cells": _cells(matrix) if matrix is not None and table else None,
        "picture": picture(alt, _heat_map, matrix) if matrix is not None and not table else None,
        "pairs": pairs,
    }
    return Section("confusion", "Confusion matrix", values)


def _shades(matrix: Int64[Tensor, "classes classes"]) -> Tensor:
    """Shares of each row, and off the diagonal their square roots, so that a few confusions are visible."""
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    shades = shares.sqrt()
    shades.diagonal().copy_(shares.diagonal())
    return shades


def _cells(matrix: Int64[Tensor, "classes classes"]) -> list[list[tuple[int, float, str]]]:
    """For each cell the count, the shade in percent, and the class of a text that contrasts with it."""

    def contrast(shade: float) -> str:
        return "strong" if shade > STRONG else "middle" if shade > MIDDLE else ""

    shades = _shades(matrix).tolist()
    return [
        [(count, 100 * shade, contrast(shade)) for count, shade in zip(*row, strict=True)]
        for row in zip(matrix.tolist(), shades, strict=True)
    ]


def _heat_map(matrix: Int64[Tensor, "classes classes"]) -> Figure:
    figure, axes = canvas(5.6, 5.4)
    signed = -_shades(matrix)
    signed.diagonal().neg_()
    axes.imshow(signed.numpy(), cmap=signed_colours(), vmin=-1, vmax=1, interpolation="none")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(xlabel="index of the predicted class", ylabel="index of the label")
    return figure


def show_classes(report: FitReport) -> Section:
    """Each class with its bars, or for many classes a scatter plot of all and a table of those of lowest recall."""
    name, judged = report.judged
    few = len(report.classes) <= IN_A_TABLE
    drawn: Picture | None = None
    if not few and bool((judged.support > 0).any()):
        alt = "Recall of each class against its number of rows, which is on a log scale"
        drawn = picture(alt, _scatter, judged)
    most = max(1, int(judged.support.max()))
    rows = []
    for k in range(len(report.classes)) if few else _worst(judged):
        support, predicted, correct = (int(part[k]) for part in (judged.support, judged.predicted, judged.correct))
        recall = _bar("bar", correct / support, show(correct / support, ".1%")) if support else None
        precision = correct / predicted if predicted else None
        rows.append(
            (report.class_name(k), _bar("bar second", support / most, show(support, ",")), recall, predicted, precision)
        )
    values = {
        "name": name,
        "few": few,
        "unseen": int((judged.support == 0).sum()),
        "never": int((judged.predicted == 0).sum()),
        "picture": drawn,
        "rows": rows,
    }
    return Section("classes", "Class by class", values)


def _bar(css: str, share: float, text: object) -> Markup:
    return Markup('<span class="{}"><span style="--share: {:.1f}%"></span></span>{}').format(css, 100 * share, text)


def _worst(judged: Diagnostics) -> list[int]:
    """The classes of lowest recall among those with rows; of equals those with most rows."""
    recall = judged.correct / judged.support  # NaN without rows, which comes last
    order = np.lexsort((-judged.support.numpy(), recall.numpy()))
    worst: list[int] = order[: min(WORST, int((judged.support > 0).sum()))].tolist()
    return worst


def _scatter(judged: Diagnostics) -> Figure:
    figure, axes = canvas(6.0, 3.4)
    seen = judged.support > 0
    points, copies = torch.stack([judged.support[seen], judged.correct[seen]]).unique(dim=1, return_counts=True)
    support, recall = points[0].double(), 100 * points[1] / points[0]
    axes.axhline(100 * judged.accuracy, color=MUTED, linewidth=1, linestyle="--")
    sizes, many = 8 + 4 * copies.clamp(max=25), len(copies) > VECTORS
    axes.scatter(support, recall, s=sizes, color=FIRST, alpha=0.5, linewidths=0, rasterized=many)
    decades(axes.xaxis, support.tolist())
    axes.set_xlim(left=axes.get_xlim()[0] * 0.85)
    axes.set(ylim=(-4, 104), xlabel="rows of the class", ylabel="recall, %")
    return figure
