"""The report of a fit: one HTML page with the scores of the head, its curvature, and the solver's steps."""

from __future__ import annotations

from pathlib import Path

from softcurve.cli.page.render import render_page
from softcurve.cli.report.classes import show_classes, show_confusion
from softcurve.cli.report.convergence import show_convergence, show_path
from softcurve.cli.report.curvature import show_curvature
from softcurve.cli.report.record import FitReport, PathPoint
from softcurve.cli.report.rows import show_calibration, show_hardest
from softcurve.cli.streams import encoded
from softcurve.fit.atomic import replacing

__all__ = ["FitReport", "PathPoint", "render_report", "write_report"]

SECTIONS = (
    show_convergence, show_calibration, show_confusion, show_classes, show_curvature, show_path, show_hardest,
)  # fmt: skip


def render_report(report: FitReport) -> str:
    """The page as one string of HTML."""
    columns = {"rows": "s", "loss, nats": ".5f"}
    columns |= {} if report.train.kl is None else {r"\(D(y\,\|\,p)\), nats": ".5f"}
    columns |= {"accuracy": ".2%", r"entropy of \(p\), nats": ".5f", r"Brier, \(\|p-y\|^2\)": ".5f"}
    scores = [
        (
            name, d.loss, *([] if report.train.kl is None else [d.kl]), d.accuracy, d.entropy, d.brier,
            d.calibration.error,
        )
        for name, d in report.sets.items()
    ]  # fmt: skip
    common = {"report": report, "score_columns": columns | {"calibration error": ".2%"}, "scores": scores}
    sections = [show(report) for show in SECTIONS]
    return render_page("softcurve.cli.report", "report.html.j2", sections, **common)


def write_report(path: Path, report: FitReport) -> None:
    """Write the page; on an error the file that was at ``path`` remains."""
    page = encoded(render_report(report))
    with replacing(path) as file:
        file.write(page)
