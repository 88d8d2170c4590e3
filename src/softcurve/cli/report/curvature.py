"""The spectrum of the curvature at the fitted head."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from softcurve.cli.page.picture import FIRST, MUTED, SURFACE, canvas, decades, line_chart, picture, powers
from softcurve.cli.page.render import Section
from softcurve.cli.report.record import FitReport
from softcurve.fit.head_spectrum import CurvatureSpectrum

BINS = 27


def show_curvature(report: FitReport) -> Section:
    """The largest eigenvalues, and the distribution of all of them."""
    spectrum = report.spectrum
    if not isinstance(spectrum, str):
        top = float(torch.cat([spectrum.largest, spectrum.nodes]).max())
        if top > 0:
            return Section("curvature", "Curvature", _values(spectrum, top))
        spectrum = "every eigenvalue is zero, because the head is certain of every row"
    return Section("curvature", "Curvature", {"spectrum": None, "reason": spectrum})


def _values(spectrum: CurvatureSpectrum, top: float) -> dict[str, object]:
    largest = None
    if len(spectrum.largest) > 1 and float(spectrum.largest.min()) > 0:
        alt = f"The {len(spectrum.largest)} largest eigenvalues, on a log scale"
        largest = picture(alt, _largest, spectrum.largest.tolist())
    has_share = spectrum.trace > 0 and len(spectrum.largest)
    return {
        "spectrum": spectrum,
        "top": top,
        "density": picture("Shares of all eigenvalues by their size, on a log scale", _histogram, spectrum, top),
        "largest": largest,
        "share": float(spectrum.largest.sum()) / spectrum.trace if has_share else None,
        "flat": float(spectrum.shares[spectrum.nodes < spectrum.resolution * top].sum()),
    }


def _largest(values: list[float]) -> Figure:
    ranks = range(1, len(values) + 1)
    style = {"color": FIRST, "marker": "o", "markersize": 4, "linewidth": 1}
    figure = line_chart((ranks, values, style), xlabel="rank", ylabel="eigenvalue")
    decades(figure.axes[0].yaxis, values)
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _histogram(spectrum: CurvatureSpectrum, top: float) -> Figure:
    figure, axes = canvas()
    shown = -math.log10(spectrum.resolution)  # decades
    places = ((spectrum.nodes / top).clamp(min=spectrum.resolution).log10() + shown) * BINS / shown
    shares = torch.zeros(BINS, dtype=spectrum.shares.dtype)
    shares.index_add_(0, places.long().clamp(0, BINS - 1), spectrum.shares)
    edges = [10 ** (k * shown / BINS - shown) for k in range(BINS + 1)]
    widths = [right - left for left, right in pairwise(edges)]
    colours = [MUTED] + [FIRST] * (BINS - 1)
    axes.set_xscale("log")
    axes.bar(edges[:-1], (100 * shares).tolist(), widths, align="edge", color=colours, edgecolor=SURFACE, linewidth=0.6)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks([10.0**k for k in range(round(-shown), 1, 3 if shown > 5 else 1)])
    powers(axes.xaxis)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="eigenvalue / largest; grey: all smaller ones", ylabel="% of eigenvalues")
    return figure
