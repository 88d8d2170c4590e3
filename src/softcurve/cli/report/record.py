"""What a report shows of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from softcurve.cli.streams import encodable
from softcurve.fit.data.source import Label, TargetKind
from softcurve.fit.diagnostics import Diagnostics
from softcurve.fit.head_spectrum import CurvatureSpectrum
from softcurve.fit.solver.newton import Step

__all__ = ["FitReport", "PathPoint"]

LONGEST_NAME = 48


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
    """A fit, its scores, and the solver's steps.

    ``rows`` is the number of training rows. ``options`` are shown as they are. ``tol`` is the solver's bound on
    ``gradient_max``. ``spectrum`` may be the reason why there is none.
    """

    data: str
    rows: int
    features: int
    classes: Sequence[Label]
    kind: TargetKind
    loss: str
    C: float
    version: str
    seconds: float
    converged: bool
    gradient_max: float
    history: Sequence[Step]
    train: Diagnostics
    held: Diagnostics | None = None
    spectrum: CurvatureSpectrum | str = "it was not requested"
    path: tuple[PathPoint, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    tol: float | None = None

    @property
    def sets(self) -> dict[str, Diagnostics]:
        """The diagnostics by the name of their rows; the first ones judge the head."""
        return ({} if self.held is None else {"held-out": self.held}) | {"training": self.train}

    @property
    def judged(self) -> tuple[str, Diagnostics]:
        """The name and the diagnostics of the held-out rows, or without any of the training rows."""
        return next(iter(self.sets.items()))

    def class_name(self, index: int) -> str:
        """The name of a class on one line, short enough for a table."""
        name = encodable(" ".join(str(self.classes[index]).split())) or "(no name)"
        return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
