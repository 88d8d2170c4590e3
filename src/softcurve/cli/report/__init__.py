"""The report of a fit: one HTML page with what the head is worth and how it came about."""

from __future__ import annotations

from pathlib import Path

from softcurve.cli.encoding import encoded
from softcurve.cli.page.render import render_page
from softcurve.cli.report.classes import show_classes, show_confusion
from softcurve.cli.report.convergence import show_convergence, show_path
from softcurve.cli.report.curvature import show_curvature
from softcurve.cli.report.hardest import show_hardest
from softcurve.cli.report.record import FitReport, PathPoint, Step
from softcurve.cli.report.reliability import show_calibration
from softcurve.fit.atomic import replacing

__all__ = ["FitReport", "PathPoint", "Step", "render_report", "write_report"]

SECTIONS = (
    show_convergence,
    show_calibration,
    show_confusion,
    show_classes,
    show_curvature,
    show_path,
    show_hardest,
)


def render_report(report: FitReport) -> str:
    """The page."""
    sections = [show(report) for show in SECTIONS]
    return render_page("softcurve.cli.report", "report.html.j2", {"sections": sections, "report": report})


def write_report(path: Path, report: FitReport) -> None:
    """Write the page; what stood at ``path`` before stays there unless all is written."""
    page = encoded(render_report(report))
    with replacing(path) as file:
        file.write(page)
