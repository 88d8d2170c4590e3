"""The record of a fit, from which a report is rendered."""

from __future__ import annotations

from dataclasses import dataclass

from softcurve.cli.options import FitOptions
from softcurve.cli.streams import encodable, shortened
from softcurve.fit.data.source import Label, TargetKind
from softcurve.fit.diagnostics import Diagnostics
from softcurve.fit.fitting import Fit
from softcurve.fit.head_spectrum import CurvatureSpectrum


@dataclass(frozen=True)
class PathPoint:
    """A fit with another inverse strength ``C`` of the penalty; the held-out scores are None without such rows."""

    C: float
    train_loss: float
    held_loss: float | None
    held_accuracy: float | None
    weight_norm: float
    converged: bool = True


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
    held: Diagnostics | None = None
    spectrum: CurvatureSpectrum | str = "it was not requested"  # or the reason why there is none
    path: tuple[PathPoint, ...] = ()

    @property
    def sets(self) -> dict[str, Diagnostics]:
        """Return the diagnostics by the name of their rows; the first ones judge the head."""
        return ({} if self.held is None else {"held-out": self.held}) | {"training": self.train}

    @property
    def judged(self) -> Diagnostics:
        """Return the diagnostics of the held-out rows, or without any those of the training rows."""
        return self.held or self.train

    def class_name(self, index: int) -> str:
        """Return the name of a class on one line, short enough for a table."""
        return shortened(encodable(" ".join(str(self.classes[index]).split())) or "(no name)")
