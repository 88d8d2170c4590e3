"""The record of a fit, from which a report is rendered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from softcurve.cli.options import FitOptions
from softcurve.cli.streams import encodable, shortened
from softcurve.fit.coefficients import CoefficientSummary
from softcurve.fit.data.source import Label, TargetKind
from softcurve.fit.diagnostics import Diagnostics, Scores
from softcurve.fit.fitting import Fit
from softcurve.fit.head_spectrum import CurvatureSpectrum
from softcurve.fit.uncertainty import BootstrapIntervals, bootstrap_intervals, standard_error


@dataclass(frozen=True)
class PathPoint:
    """A fit with another inverse strength ``C`` of the penalty; the held-out scores are None without such rows."""

    C: float
    train_loss: float
    held_loss: float | None
    held_accuracy: float | None
    weight_norm: float
    converged: bool = True
    held_standard_error: float | None = None  # of the mean loss

    @classmethod
    def of(cls, C: float, fit: Fit, train: Diagnostics, held: Diagnostics | None) -> PathPoint:
        """Return the point of a fit with its figures."""
        on_held = (None, None, None) if held is None else (held.loss, held.accuracy, standard_error(held.groups))
        loss, accuracy, error = on_held
        return cls(C, train.loss, loss, accuracy, float(fit.weight.norm()), fit.converged, error)


@dataclass(frozen=True, eq=False)
class FitReport:
    """A fit with its options, its scores on the training rows and on any held-out rows, and its path."""

    options: FitOptions
    fit: Fit
    seconds: float
    features: int
    classes: tuple[Label, ...]
    kind: TargetKind
    train: Diagnostics
    baseline: Scores  # of the class frequencies of the training rows, on the rows that judge the head
    held: Diagnostics | None = None
    spectrum: CurvatureSpectrum | str = "it was not requested"  # or the reason why there is none
    path: tuple[PathPoint, ...] = ()
    coefficients: CoefficientSummary | str = "they were not requested"  # or the reason why there are none

    @property
    def sets(self) -> dict[str, Diagnostics]:
        """Return the diagnostics by the name of their rows; the first ones judge the head."""
        return ({} if self.held is None else {"held-out": self.held}) | {"training": self.train}

    @property
    def judged(self) -> Diagnostics:
        """Return the diagnostics of the held-out rows, or without any those of the training rows."""
        return self.held or self.train

    @cached_property
    def intervals(self) -> BootstrapIntervals | None:
        """Return the intervals of the scores on the held-out rows, if there are any."""
        return None if self.held is None else bootstrap_intervals(self.held.groups, seed=self.options.seed)

    @property
    def majority(self) -> int:
        """Return the index of the most frequent class of the training rows, which the baseline predicts."""
        return int(self.train.frequencies.argmax())

    @property
    def point(self) -> PathPoint:
        """Return the head as a point of the path."""
        return PathPoint.of(self.options.C, self.fit, self.train, self.held)

    def class_name(self, index: int) -> str:
        """Return the name of a class on one line, short enough for a table."""
        return shortened(encodable(" ".join(str(self.classes[index]).split())) or "(no name)")
