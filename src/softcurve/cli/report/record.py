"""What a report tells of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from softcurve.fit.data.source import Label, TargetKind
from softcurve.fit.diagnostics import Diagnostics
from softcurve.fit.head_spectrum import CurvatureSpectrum

__all__ = ["FitReport", "PathPoint", "Step"]


@runtime_checkable
class Step(Protocol):
    """Where the solver stood: ``products`` with the curvature or passes over the data, ``seconds`` since it began."""

    @property
    def iteration(self) -> int:
        """From 0 or 1 on."""

    @property
    def seconds(self) -> float:
        """Since the fit began."""

    @property
    def objective(self) -> float:
        """What is minimised, the penalty included."""

    @property
    def gradient_max(self) -> float:
        """The largest absolute entry of its gradient."""

    @property
    def products(self) -> int:
        """So far."""


@dataclass(frozen=True)
class PathPoint:
    """A fit with another inverse strength ``C`` of the penalty; held-out figures where there are such rows."""

    C: float
    train_loss: float
    held_loss: float | None
    held_accuracy: float | None
    weight_norm: float
    converged: bool = True


@dataclass(frozen=True, eq=False)
class FitReport:
    """A fit, what it is worth, and how it came about.

    ``rows`` are those that were fitted; ``options`` are shown as they are; ``tol`` is the bound on ``gradient_max``
    that the solver had to keep, where it had one. ``spectrum`` may be the reason why there is none.
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
    spectrum: CurvatureSpectrum | str = "it was not asked for"
    path: tuple[PathPoint, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    tol: float | None = None

    @property
    def sets(self) -> dict[str, Diagnostics]:
        """The figures by the name of their rows, those that judge the head first."""
        held = {} if self.held is None else {"held-out": self.held}
        return held | {"training": self.train}

    @property
    def judged(self) -> tuple[str, Diagnostics]:
        """The rows that judge the head: held-out ones where there are any."""
        return next(iter(self.sets.items()))
