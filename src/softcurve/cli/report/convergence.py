"""The steps of the solver: the gradient and the objective against time; and the regularisation path."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from softcurve.cli.page.picture import FIRST, MUTED, SECOND, SURFACE, THIRD, Picture, decades, line_chart, picture
from softcurve.cli.page.render import Section, show
from softcurve.cli.report.record import FitReport, PathPoint

MARKED = 60  # the largest number of steps that have a mark each
Points = list[tuple[float, float]]
Style = dict[str, str]


def show_convergence(report: FitReport) -> Section:
    """The largest entry of the gradient, and the distance of the objective from its lowest value."""
    steps = report.fit.history
    best = min((step.objective for step in steps), default=math.nan)
    gradient = [(step.seconds, step.gradient_max) for step in steps]
    gap = [(step.seconds, step.objective - best) for step in steps]
    pictures = {}
    for name, points, label, tol in (
        ("gradient", gradient, "largest entry of the gradient", report.options.tol),
        ("gap", gap, "objective minus its lowest value", None),
    ):
        shown = [(x, y) for x, y in points if 0 < y < math.inf]  # what a log scale can show
        if len(shown) > 1:
            alt = f"{label.capitalize()} against seconds, on a log scale"
            pictures[name] = picture(alt, _falling, shown, label, tol)
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
    rows = []
    for p in points:
        C = show(p.C) if p.converged else Markup("{}&nbsp;*").format(show(p.C))
        rows.append((C, p.train_loss, p.held_loss, p.held_accuracy, p.weight_norm))
    pictures = _path_pictures(points, report.options.C) if len(points) > 1 else []
    values = {"rows": rows, "pictures": pictures, "late": not all(point.converged for point in points)}
    return Section("path", "Regularisation path", values)


def _path_pictures(points: Sequence[PathPoint], chosen: float) -> list[Picture]:
    dashed = {"color": SECOND, "linestyle": "--", "label": "training"}
    charts: dict[str, tuple[str, dict[str, Style]]] = {
        "Training and held-out loss": (
            "mean loss, nats", {"train_loss": dashed, "held_loss": {"color": FIRST, "label": "held-out"}},
        ),
        "The norm of the weights": ("‖W‖", {"weight_norm": {"color": THIRD}}),
        "Held-out accuracy": ("held-out accuracy", {"held_accuracy": {"color": FIRST}}),
    }  # fmt: skip
    return [
        picture(f"{alt} against C, on a log scale", _against_C, points, chosen, ylabel, styles)
        for alt, (ylabel, styles) in charts.items()
        if getattr(points[0], next(iter(styles))) is not None
    ]


def _against_C(points: Sequence[PathPoint], chosen: float, ylabel: str, styles: dict[str, Style]) -> Figure:
    """Fields of the points against C, with a hollow mark where the fit did not converge; dotted, the C of the head."""
    Cs = [point.C for point in points]
    columns = {name: [getattr(point, name) for point in points] for name in styles}
    columns = {name: values for name, values in columns.items() if values[0] is not None}
    lines = [(Cs, values, {"clip_on": False} | styles[name]) for name, values in columns.items()]
    figure = line_chart(*lines, ylabel=ylabel)
    axes = figure.axes[0]
    for name, values in columns.items():
        color = styles[name]["color"]
        faces = [color if point.converged else SURFACE for point in points]
        axes.scatter(Cs, values, s=12, facecolors=faces, edgecolors=color, clip_on=False, zorder=3)
    if "held_accuracy" not in styles:
        axes.set_ylim(bottom=0)
    if math.isfinite(chosen):  # an infinite C, no penalty, has no place on the axis
        axes.axvline(chosen, color=MUTED, linewidth=1, linestyle=":")
    decades(axes.xaxis, [C for C in (*Cs, chosen) if math.isfinite(C)])
    axes.set_xlabel("C; dotted: that of this head" if math.isfinite(chosen) else "C")
    return figure
