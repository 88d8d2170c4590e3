"""The steps of the solver: the gradient and the objective against time; and the regularisation path."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from softcurve.cli.page.picture import FIRST, MUTED, SECOND, SURFACE, THIRD, Line, Picture, decades, line_chart, picture
from softcurve.cli.page.render import show
from softcurve.cli.page.section import Section
from softcurve.cli.report.record import FitReport, PathPoint

MARKED = 60  # the largest number of steps that have a mark each
Points = list[tuple[float, float]]
Lines = Mapping[str, Sequence[float | None]]


def show_convergence(report: FitReport) -> Section:
    """The largest entry of the gradient, and the distance of the objective from its lowest value."""
    steps = report.fit.history
    best = min((step.objective for step in steps), default=math.nan)
    gradient = [(step.seconds, step.gradient_max) for step in steps]
    gap = [(step.seconds, step.objective - best) for step in steps]
    charts = {
        "gradient": (
            gradient,
            "largest entry of the gradient",
            report.options.tol,
            "Largest entry of the gradient",
        ),
        "gap": (gap, "objective above its lowest", None, "Objective minus its lowest value"),
    }
    pictures = {}
    for name, (points, label, tol, alt) in charts.items():
        shown = [(x, y) for x, y in points if 0 < y < math.inf]  # what a log scale can show
        if len(shown) > 1:
            pictures[name] = picture(f"{alt} against seconds, on a log scale", _falling, shown, label, tol)
    return Section("convergence", "Convergence", {"pictures": pictures, "last": steps[-1] if steps else None})


def _falling(points: Points, label: str, tol: float | None) -> Figure:
    values = [y for _, y in points]
    unit, unit_name = (1000, "milliseconds") if points[-1][0] < 1 else (1, "seconds")
    style = {"color": FIRST, "marker": "o" if len(points) <= MARKED else "", "markersize": 3.5}
    figure = line_chart(([unit * x for x, _ in points], values, style), xlabel=unit_name, ylabel=label)
    axes = figure.axes[0]
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if tol:
        axes.axhline(tol, color=THIRD, linewidth=1.2, linestyle="--")
        axes.annotate(
            "tol", (1, tol), xycoords=axes.get_yaxis_transform(), xytext=(-2, 3), textcoords="offset points",
            ha="right", color=THIRD,
        )  # fmt: skip
        values.append(tol)
    decades(axes.yaxis, values)
    return figure


def show_path(report: FitReport) -> Section:
    """Losses, accuracy and the norm of the weights against C."""
    points = sorted(report.path, key=lambda point: point.C)
    rows = [
        (
            show(p.C) if p.converged else Markup("{}&nbsp;*").format(show(p.C)), p.train_loss, p.held_loss,
            p.held_accuracy, p.weight_norm,
        )
        for p in points
    ]  # fmt: skip
    pictures = _path_pictures(points, report.options.C) if len(points) > 1 else []
    values = {"rows": rows, "pictures": pictures, "late": not all(point.converged for point in points)}
    return Section("path", "Regularisation path", values)


def _path_pictures(points: Sequence[PathPoint], chosen: float) -> list[Picture]:
    accuracies = [None if point.held_accuracy is None else 100 * point.held_accuracy for point in points]
    losses: Lines = {
        "training": [point.train_loss for point in points],
        "held-out": [point.held_loss for point in points],
    }
    charts: list[tuple[str, str, Lines]] = [
        ("Training and held-out loss", "mean loss, nats", losses),
        ("The norm of the weights", "‖W‖", {"": [point.weight_norm for point in points]}),
        ("Held-out accuracy", "held-out accuracy, %", {"": accuracies}),
    ]
    return [
        picture(f"{alt} against C, on a log scale", _against_C, points, chosen, lines, ylabel)
        for alt, ylabel, lines in charts
        if any(value is not None for values in lines.values() for value in values)
    ]


def _against_C(points: Sequence[PathPoint], chosen: float, lines: Lines, ylabel: str) -> Figure:
    """Values against C, with a hollow mark where the fit did not converge, and a dotted line at the C of the head."""
    drawn: list[Line] = []
    for name, values in lines.items():
        color = {"training": SECOND, "held-out": FIRST}.get(name, THIRD)
        style = {"color": color, "clip_on": False}
        known = [(point, value) for point, value in zip(points, values, strict=True) if value is not None]
        if known:
            line = style | {"linestyle": "--" if name == "training" else "-"} | ({"label": name} if name else {})
            drawn.append(([point.C for point, _ in known], [value for _, value in known], line))
        for converged, fill in ((True, color), (False, SURFACE)):
            marked = [(point.C, value) for point, value in known if point.converged == converged]
            mark = style | {"markerfacecolor": fill, "linestyle": "", "marker": "o", "markersize": 3.5}
            drawn.append(([C for C, _ in marked], [value for _, value in marked], mark))
    figure = line_chart(*drawn, ylabel=ylabel)
    axes = figure.axes[0]
    if "%" not in ylabel:
        axes.set_ylim(bottom=0)
    # Without a penalty C is infinite, which has no place on the axis.
    if math.isfinite(chosen):
        axes.axvline(chosen, color=MUTED, linewidth=1, linestyle=":")
    decades(axes.xaxis, [C for C in (*(point.C for point in points), chosen) if math.isfinite(C)])
    axes.set_xlabel("C; dotted: that of this head" if math.isfinite(chosen) else "C")
    return figure
