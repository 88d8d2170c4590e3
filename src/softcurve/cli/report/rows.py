"""How reliable the head's probabilities are, and the rows that it finds hardest."""

from __future__ import annotations

import io
import math
from functools import partial

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.cli.page.picture import FIRST, INK, MUTED, SECOND, SURFACE, Picture, canvas, encoded_picture, picture
from softcurve.cli.page.section import Section
from softcurve.cli.report.record import FitReport
from softcurve.fit.diagnostics import Calibration, Diagnostics

WIDTH, HEIGHT, BELOW = 4.6, 4.5, 1.0  # of the reliability curve and the histogram below it, in inches
SMALLEST_SIDE = 4


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
