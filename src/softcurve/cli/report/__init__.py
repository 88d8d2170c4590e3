"""The report of a fit: one HTML page with the scores of the head, its curvature, and the solver's steps."""

from __future__ import annotations

import softcurve
from softcurve.cli.page.render import render_page
from softcurve.cli.report.convergence import show_convergence, show_path
from softcurve.cli.report.curvature import show_curvature
from softcurve.cli.report.record import FitReport, PathPoint
from softcurve.cli.report.scores import show_calibration, show_classes, show_confusion, show_hardest

__all__ = ["FitReport", "PathPoint", "render_report"]

SECTIONS = (
    show_convergence, show_calibration, show_confusion, show_classes, show_curvature, show_path, show_hardest,
)  # fmt: skip


def render_report(report: FitReport) -> str:
    """The page as one string of HTML."""
    sections = [show(report) for show in SECTIONS]
    return render_page("softcurve.cli.report", "report.html.j2", sections, report=report, version=softcurve.__version__)
