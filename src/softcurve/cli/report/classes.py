"""The classes one by one: which are confused, how many rows each has, and its recall and precision."""

from __future__ import annotations

import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from softcurve.array_types import Int64
from softcurve.cli.page.picture import FIRST, MUTED, Picture, canvas, decades, picture, signed_colours
from softcurve.cli.page.render import show
from softcurve.cli.page.section import Section
from softcurve.cli.report.record import FitReport
from softcurve.fit.diagnostics import Diagnostics

IN_A_TABLE = 25  # the largest number of classes whose matrix is a table, and that have a row each
WORST, PAIRS = 12, 15
VECTORS = 1000  # the largest number of marks that are drawn as vectors
# The shades of a cell above which the colour of the page is the better text colour: on a dark page, and on both.
MIDDLE, STRONG = 0.62, 0.82


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
    seen = (judged.support > 0).nonzero().squeeze(1)
    by_support = seen[judged.support[seen].argsort(descending=True, stable=True)]
    recall = judged.correct[by_support] / judged.support[by_support]
    worst: list[int] = by_support[recall.argsort(stable=True)[:WORST]].tolist()
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
