"""The spectrum of the curvature where the fit came to rest."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from softcurve.cli.page.picture import Theme, canvas, decades, picture, powers
from softcurve.cli.report.record import FitReport
from softcurve.cli.report.section import Section
from softcurve.fit.head_spectrum import CurvatureSpectrum

BINS = 27


def show_curvature(report: FitReport) -> Section:
    """The largest eigenvalues, and how all of them are distributed."""
    found = report.spectrum
    if isinstance(found, str):
        return Section("curvature", "Curvature", {"found": None, "reason": found, "pictures": {}})
    top = float(torch.cat([found.largest, found.nodes]).max())
    if top <= 0:
        reason = "every eigenvalue is zero: the head is certain of every row"
        return Section("curvature", "Curvature", {"found": None, "reason": reason, "pictures": {}})
    pictures = {
        "density": picture(
            lambda theme: _histogram(theme, found, top),
            "Shares of all eigenvalues by their size, on a log scale",
        )
    }
    if len(found.largest) > 1 and float(found.largest.min()) > 0:
        pictures["largest"] = picture(
            lambda theme: _largest(theme, found), f"The {len(found.largest)} largest eigenvalues, on a log scale"
        )
    values = {"found": found, "reason": "", "pictures": pictures, "top": top}
    carried = float(found.largest.sum()) / found.trace if found.trace > 0 and len(found.largest) else None
    flat = float(found.shares[found.nodes < found.resolution * top].sum())
    return Section("curvature", "Curvature", values | {"carried": carried, "flat": flat})


def _largest(theme: Theme, found: CurvatureSpectrum) -> Figure:
    figure, axes = canvas(4.4, 3.0)
    values = found.largest.tolist()
    axes.semilogy(range(1, len(values) + 1), values, color=theme.first, marker="o", markersize=4, linewidth=1)
    decades(axes.yaxis, values)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="rank", ylabel="eigenvalue")
    return figure


def _histogram(theme: Theme, found: CurvatureSpectrum, top: float) -> Figure:
    figure, axes = canvas(4.4, 3.0)
    shown = -math.log10(found.resolution)  # decades
    places = ((found.nodes / top).clamp(min=found.resolution).log10() + shown) * BINS / shown
    shares = torch.zeros(BINS, dtype=found.shares.dtype)
    shares.index_add_(0, places.long().clamp(0, BINS - 1), found.shares)
    edges = [10 ** (k * shown / BINS - shown) for k in range(BINS + 1)]
    colours = [theme.muted] + [theme.first] * (BINS - 1)
    axes.set_xscale("log")
    axes.bar(
        edges[:-1],
        (100 * shares).tolist(),
        [right - left for left, right in pairwise(edges)],
        align="edge",
        color=colours,
        edgecolor=theme.surface,
        linewidth=0.6,
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks([10.0**k for k in range(round(-shown), 1, 3 if shown > 5 else 1)])
    powers(axes.xaxis)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="eigenvalue / largest; grey: all that are smaller", ylabel="% of eigenvalues")
    return figure
