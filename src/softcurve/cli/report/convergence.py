"""How the solver came to its end: the gradient and the objective against time, and the path of the penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from softcurve.cli.page.picture import Picture, Theme, canvas, decades, picture
from softcurve.cli.report.record import FitReport, PathPoint
from softcurve.cli.report.section import Section

MARKED = 60  # steps, up to which each has a mark
WIDTH, HEIGHT = 4.4, 3.0

Points = list[tuple[float, float]]


def show_convergence(report: FitReport) -> Section:
    """The largest entry of the gradient, and how far the objective is above its end."""
    steps = report.history
    gradient = _positive([(step.seconds, step.gradient_max) for step in steps])
    best = min((step.objective for step in steps), default=math.nan)
    gap = _positive([(step.seconds, step.objective - best) for step in steps])
    pictures = {}
    if len(gradient) > 1:
        pictures["gradient"] = picture(
            lambda theme: _falling(theme, gradient, "largest entry of the gradient", report.tol),
            "The largest entry of the gradient against seconds, on a log scale",
        )
    if len(gap) > 1:
        pictures["gap"] = picture(
            lambda theme: _falling(theme, gap, "objective above its lowest", None),
            "The objective less the lowest that was reached, against seconds, on a log scale",
        )
    return Section("convergence", "Convergence", {"pictures": pictures, "last": steps[-1] if steps else None})


def _positive(points: Points) -> Points:
    """Those that a log scale has a place for."""
    return [(x, y) for x, y in points if 0 < y < math.inf]


def _falling(theme: Theme, points: Points, name: str, tol: float | None) -> Figure:
    figure, axes = canvas(WIDTH, HEIGHT)
    values = [y for _, y in points]
    unit, name_of_unit = (1000, "milliseconds") if points[-1][0] < 1 else (1, "seconds")
    marker = "o" if len(points) <= MARKED else ""
    axes.plot([unit * x for x, _ in points], values, color=theme.first, marker=marker, markersize=3.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if tol:
        axes.axhline(tol, color=theme.third, linewidth=1.2, linestyle="--")
        axes.annotate(
            "tol",
            (1, tol),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=theme.third,
        )
        values.append(tol)
    decades(axes.yaxis, values)
    axes.set_xlabel(name_of_unit)
    axes.set_ylabel(name)
    return figure


# --- the penalty -----------------------------------------------------------------------------------------------------


def show_path(report: FitReport) -> Section:
    """Losses, accuracy and the size of the weights against C."""
    points = sorted(report.path, key=lambda point: point.C)
    pictures = _path_pictures(points, report.C) if len(points) > 1 else {}
    late = any(not point.converged for point in points)
    return Section("path", "Regularisation path", {"pictures": pictures, "points": points, "late": late})


def _path_pictures(points: Sequence[PathPoint], chosen: float) -> dict[str, Picture]:
    held = [(point, point.held_loss) for point in points if point.held_loss is not None]
    accuracy = [(point, 100 * point.held_accuracy) for point in points if point.held_accuracy is not None]

    def losses(theme: Theme) -> Figure:
        figure, axes = canvas(WIDTH, HEIGHT)
        lines = {
            "training": _line(axes, theme, theme.second, [(point, point.train_loss) for point in points], dashed=True)
        }
        if held:
            lines["held-out"] = _line(axes, theme, theme.first, held)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("mean loss, nats")
        _over_strengths(theme, axes, points, chosen)
        axes.legend(lines.values(), lines)
        return figure

    def sizes(theme: Theme) -> Figure:
        figure, axes = canvas(WIDTH, HEIGHT)
        _line(axes, theme, theme.third, [(point, point.weight_norm) for point in points])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("‖W‖")
        _over_strengths(theme, axes, points, chosen)
        return figure

    def accuracies(theme: Theme) -> Figure:
        figure, axes = canvas(WIDTH, HEIGHT)
        _line(axes, theme, theme.first, accuracy)
        axes.set_ylabel("held-out accuracy, %")
        _over_strengths(theme, axes, points, chosen)
        return figure

    drawn = {
        "losses": picture(losses, "Training and held-out loss against C, on a log scale"),
        "norms": picture(sizes, "The norm of the weights against C, on a log scale"),
    }
    if accuracy:
        drawn["accuracy"] = picture(accuracies, "Held-out accuracy against C, on a log scale")
    return drawn


def _line(
    axes: Axes, theme: Theme, color: str, values: Sequence[tuple[PathPoint, float]], *, dashed: bool = False
) -> Line2D:
    """Values against C, with a hollow mark where the fit had not converged."""
    over, heights = [point.C for point, _ in values], [value for _, value in values]
    (line,) = axes.plot(over, heights, color=color, linestyle="--" if dashed else "-", clip_on=False)
    for converged, fill in ((True, color), (False, theme.surface)):
        marked = [(point.C, value) for point, value in values if point.converged == converged]
        if marked:
            axes.plot(
                *zip(*marked, strict=True), color=color, markerfacecolor=fill, linestyle="", marker="o", markersize=3.5,
                clip_on=False,
            )  # fmt: skip
    return line


def _over_strengths(theme: Theme, axes: Axes, points: Sequence[PathPoint], chosen: float) -> None:
    # Without a penalty there is no place on the axis.
    strengths = [C for C in (*(point.C for point in points), chosen) if math.isfinite(C)]
    if math.isfinite(chosen):
        axes.axvline(chosen, color=theme.muted, linewidth=1, linestyle=":")
    decades(axes.xaxis, strengths)
    axes.set_xlabel("C; dotted, that of this head" if math.isfinite(chosen) else "C")
