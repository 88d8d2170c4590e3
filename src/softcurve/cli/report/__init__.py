"""The report of a fit: one HTML page with the scores of the head, its curvature, and the solver's steps."""

from __future__ import annotations

import softcurve
from softcurve.cli.page.render import render_page
from softcurve.cli.report.record import FitReport, PathPoint
from softcurve.cli.report.sections import (
    show_calibration,
    show_classes,
    show_coefficients,
    show_conclusion,
    show_confusion,
    show_convergence,
    show_curvature,
    show_hardest,
    show_path,
    show_reproduction,
)

__all__ = ["FitReport", "PathPoint", "render_report"]


def render_report(report: FitReport) -> str:
    """Render the page as one string of HTML."""
    shows = (
        show_conclusion, show_convergence, show_calibration, show_confusion, show_classes, show_coefficients,
        show_curvature, show_path, show_hardest, show_reproduction,
    )  # fmt: skip
    facts = {"report": report, "judged": report.judged, "name": next(iter(report.sets))}
    sections = [show(report) for show in shows]
    return render_page("softcurve.cli.report", "report.html.j2", sections, **facts, version=softcurve.__version__)
