"""What a fit shows: the scores against a baseline, with their uncertainty, and the C that the path recommends."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from softcurve.cli.report.record import FitReport, PathPoint
from softcurve.cli.report.reproduction import command_line, versions


@dataclass(frozen=True)
class Recommendation:
    """The smallest C whose held-out loss is at most one standard error above the lowest (Hastie et al. 2009, §7.10).

    ``fitted_C`` is that of the head; ``smallest`` and ``largest`` are the ends of the values that were compared.
    """

    C: float
    loss: float
    best_C: float
    best_loss: float
    standard_error: float
    fitted_C: float
    smallest: float
    largest: float

    def __str__(self) -> str:
        if self.best_C == self.C:
            text = (
                f"C = {self.C:g} by the one-standard-error rule: it has the lowest held-out loss, {self.loss:.4f} "
                f"nats, and no smaller value is within one standard error ({self.standard_error:.4f}) of it."
            )
        else:
            text = (
                f"C = {self.C:g} by the one-standard-error rule: it is the smallest value whose held-out loss, "
                f"{self.loss:.4f} nats, is within one standard error ({self.standard_error:.4f}) of the lowest, "
                f"{self.best_loss:.4f} at C = {self.best_C:g}."
            )
        if self.smallest == self.C:
            text += " It is the smallest value compared; --path may go on to smaller ones."
        elif self.best_C == self.largest < math.inf:
            text += " The lowest loss is at the largest value compared; --path may go on to larger ones."
        if self.fitted_C != self.C:
            text += f" This head has C = {self.fitted_C:g}; fit again with --C {self.C:g}."
        return text


def recommend(report: FitReport) -> Recommendation | str:
    """Return the recommended C, or the reason why there is none."""
    if report.held is None:
        return "No value, because no samples were held out; --holdout 0.2 holds out a fifth of them."
    points = {point.C: point for point in (*report.path, report.point)}
    if len(points) < 2:
        return f"No value, because only C = {report.options.C:g} was fitted; --path 0.01,0.1,1,10 compares others."
    usable = [each for _, each in sorted(points.items()) if each.converged and math.isfinite(_loss(each))]
    if not usable:
        return "No value, because no fit converged to a finite held-out loss; raise --max-iter or --tol."
    best = min(usable, key=_loss)
    error = best.held_standard_error or 0.0
    error = 0.0 if math.isnan(error) else error  # of a single row
    chosen = next(point for point in usable if _loss(point) <= _loss(best) + error)
    ends = usable[0].C, usable[-1].C
    return Recommendation(chosen.C, _loss(chosen), best.C, _loss(best), error, report.options.C, *ends)


def _loss(point: PathPoint) -> float:
    return math.inf if point.held_loss is None else point.held_loss


def conclusion_figures(report: FitReport) -> dict[str, Any]:
    """Return the conclusions as entries of the JSON record."""
    recommendation, intervals = recommend(report), report.intervals
    if isinstance(recommendation, str):
        recommended: dict[str, Any] = {"C": None, "reason": recommendation}
    else:
        names = {"loss": "held_out_loss_nats", "best_loss": "best_held_out_loss_nats"}
        recommended = {names.get(name, name): value for name, value in asdict(recommendation).items()}
        recommended["rule"] = "one-standard-error"
    return {
        "balanced_accuracy": report.judged.balanced_accuracy,
        "majority_baseline": {
            "class": report.classes[report.majority], "loss_nats": report.baseline.loss,
            "accuracy": report.baseline.accuracy,
        },
        "held_out_intervals": None if intervals is None else {
            "method": "percentile bootstrap", "level": intervals.level, "resamples": intervals.resamples,
            "seed": intervals.seed, "loss_nats": intervals.loss, "accuracy": intervals.accuracy,
        },
        "recommendation": recommended,
        "reproduction": {"command": command_line(report.options), "versions": versions()},
    }  # fmt: skip


def class_figures(report: FitReport) -> dict[str, Any]:
    """Return the confusion matrix (label, predicted), and recall and precision by class, where there are few classes.

    A share of no rows is null.
    """
    judged = report.judged
    if judged.matrix is None:
        return {}
    correct = judged.correct.double()
    columns = (judged.support, correct / judged.support, correct / judged.predicted)
    names = ("class", "support", "recall", "precision")
    by_class = [
        dict(zip(names, row, strict=True))
        for row in zip(report.classes, *(column.tolist() for column in columns), strict=True)
    ]
    return {"confusion_matrix": judged.matrix.tolist(), "by_class": by_class}


def coefficient_figures(report: FitReport) -> dict[str, Any]:
    """Return the coefficients with their standard errors, where the report shows them."""
    summary = report.coefficients
    return {} if isinstance(summary, str) else {"coefficients": summary.records()}
