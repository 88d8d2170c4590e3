"""How far the head's probabilities can be believed."""

from __future__ import annotations

from matplotlib.figure import Figure

from softcurve.cli.page.picture import Theme, canvas, picture
from softcurve.cli.report.record import FitReport
from softcurve.cli.report.section import Section
from softcurve.fit.diagnostics import Calibration

WIDTH, HEIGHT, BELOW = 4.6, 4.5, 1.0  # inches; below is the histogram


def show_calibration(report: FitReport) -> Section:
    """The reliability curve with the histogram of the confidence under it."""
    name, judged = report.judged
    labelled = report.kind == "labels"
    return Section(
        "calibration",
        "Calibration",
        {
            "name": name,
            "error": judged.calibration.error,
            "labelled": labelled,
            "picture": picture(
                lambda theme: _draw(theme, judged.calibration, labelled=labelled),
                f"{'Accuracy' if labelled else 'Probability by the target'} against confidence of the {name} rows, and "
                "below it how many rows have that confidence",
            ),
        },
    )


def _draw(theme: Theme, found: Calibration, *, labelled: bool) -> Figure:
    bins = len(found.counts)
    edges = [k / bins for k in range(bins)]
    figure, axes = canvas(WIDTH, HEIGHT, bottom=0.46 + BELOW + 0.2)
    full = found.counts > 0
    confidence, accuracy = found.confidence[full].tolist(), found.accuracy[full].tolist()
    axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle="--")
    axes.vlines(confidence, confidence, accuracy, color=theme.second, linewidth=3, alpha=0.45)
    axes.plot(confidence, accuracy, color=theme.first, marker="o", markersize=4.5)
    axes.annotate(
        f"ECE {100 * found.error:.2f} %", (0.04, 0.94), xycoords="axes fraction", va="top", fontsize=10, color=theme.ink
    )
    height = "share predicted correctly" if labelled else "target's probability of that class"
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), ylabel=height)
    axes.tick_params(labelbottom=False)
    left, _, width, _ = axes.get_position().bounds
    below = figure.add_axes((left, 0.46 / HEIGHT, width, BELOW / HEIGHT), sharex=axes)
    below.bar(edges, (100 * found.counts / found.counts.sum()).tolist(), 1 / bins, align="edge", color=theme.first,
              edgecolor=theme.surface, linewidth=0.8)  # fmt: skip
    below.set(xlabel="confidence: probability of the predicted class", ylabel="% of rows")
    below.grid(axis="x", visible=False)
    figure.align_ylabels()
    return figure
