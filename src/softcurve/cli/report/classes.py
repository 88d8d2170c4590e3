"""The classes one by one: which are taken for which, how often each occurs and how often it is found."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from softcurve.array_types import Int64
from softcurve.cli.page.picture import Theme, canvas, decades, picture
from softcurve.cli.report.record import FitReport
from softcurve.cli.report.section import Section, class_name
from softcurve.fit.diagnostics import Diagnostics

IN_A_TABLE = 25  # classes, up to which the matrix is a table and each class has a row of its own
WORST = 12
PAIRS = 15
VECTORS = 1000  # marks, beyond which a chart holds pixels
# Shades of a cell from where its text stands out better in the colour of the page: on a dark page, and on both.
MIDDLE, STRONG = 0.62, 0.82


def show_confusion(report: FitReport) -> Section:
    """The confusion matrix as a table, as a picture, or the pairs alone."""
    name, judged = report.judged
    names = report.classes
    values: dict[str, object] = {
        "name": name,
        "wrong": judged.rows - int(judged.correct.sum()),
        "names": None,
        "cells": None,
        "picture": None,
        "pairs": [
            (class_name(names[pair.label]), class_name(names[pair.predicted]), pair.count, _share(pair.count, support))
            for pair in judged.confused[:PAIRS]
            for support in [int(judged.support[pair.label])]
        ],
    }
    if judged.matrix is not None and len(names) <= IN_A_TABLE:
        values["names"] = [class_name(label) for label in names]
        values["cells"] = _cells(judged.matrix)
    elif judged.matrix is not None:
        matrix = judged.matrix
        values["picture"] = picture(
            lambda theme: _heat_map(theme, matrix),
            f"Confusion matrix of {len(names)} classes: the diagonal in one colour, confusions in another",
        )
    return Section("confusion", "Which class is taken for which", values)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _shades(matrix: Int64[Tensor, "classes classes"]) -> Tensor:
    """Shares of each row, square roots off the diagonal, so that a few confusions are seen."""
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    shades = shares.sqrt()
    shades.diagonal().copy_(shares.diagonal())
    return shades


def _cells(matrix: Int64[Tensor, "classes classes"]) -> list[list[tuple[int, float, str]]]:
    """By row: the count, the shade in percent, and how the text stands out from it."""

    def text(shade: float) -> str:
        return "strong" if shade > STRONG else "middle" if shade > MIDDLE else ""

    return [
        [(count, 100 * shade, text(shade)) for count, shade in zip(*row, strict=True)]
        for row in zip(matrix.tolist(), _shades(matrix).tolist(), strict=True)
    ]


def _heat_map(theme: Theme, matrix: Int64[Tensor, "classes classes"]) -> Figure:
    figure, axes = canvas(5.6, 5.4)
    signed = -_shades(matrix)
    signed.diagonal().neg_()
    axes.imshow(signed.numpy(), cmap=theme.signed(), vmin=-1, vmax=1, interpolation="none")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted, number of the class", ylabel="label, number of the class")
    return figure


# --- support and accuracy --------------------------------------------------------------------------------------------


def show_classes(report: FitReport) -> Section:
    """Each class with its bars, or for many classes a cloud of them and those that are found least often."""
    name, judged = report.judged
    classes, few = len(report.classes), len(report.classes) <= IN_A_TABLE
    seen = judged.support > 0
    values: dict[str, object] = {
        "name": name,
        "few": few,
        "unseen": int((~seen).sum()),
        "never": int((judged.predicted == 0).sum()),
        "picture": None,
    }
    order = list(range(classes))
    if not few:
        order = _worst(judged)
        if seen.any():
            values["picture"] = picture(
                lambda theme: _cloud(theme, judged),
                "Accuracy of each class against its number of rows, which is on a log scale",
            )
    most = max(1, int(judged.support.max()))
    rows = []
    for k in order:
        support, predicted, correct = (int(part[k]) for part in (judged.support, judged.predicted, judged.correct))
        found = correct / support if support else None
        precision = correct / predicted if predicted else None
        rows.append((class_name(report.classes[k]), support, 100 * support / most, predicted, found, precision))
    return Section("classes", "Class by class", values | {"rows": rows})


def _worst(judged: Diagnostics) -> list[int]:
    """Classes with rows that are found least often, of equals those with most rows."""
    seen = (judged.support > 0).nonzero().squeeze(1)
    by_support = seen[judged.support[seen].argsort(descending=True, stable=True)]
    accuracy = judged.correct[by_support] / judged.support[by_support]
    worst: list[int] = by_support[accuracy.argsort(stable=True)[:WORST]].tolist()
    return worst


def _cloud(theme: Theme, judged: Diagnostics) -> Figure:
    figure, axes = canvas(6.0, 3.4)
    seen = judged.support > 0
    points, copies = torch.stack([judged.support[seen], judged.correct[seen]]).unique(dim=1, return_counts=True)
    support, accuracy = points[0].double(), 100 * points[1] / points[0]
    axes.axhline(100 * judged.accuracy, color=theme.muted, linewidth=1, linestyle="--")
    axes.scatter(
        support,
        accuracy,
        s=8 + 4 * copies.clamp(max=25),
        color=theme.first,
        alpha=0.5,
        linewidths=0,
        rasterized=len(copies) > VECTORS,
    )
    decades(axes.xaxis, support.tolist())
    axes.set_xlim(left=axes.get_xlim()[0] * 0.85)
    axes.set(ylim=(-4, 104), xlabel="rows of the class", ylabel="found, %")
    return figure
