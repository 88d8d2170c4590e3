"""The coefficients of a fitted head with their standard errors, z statistics, p values and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.fit import DataError
from softcurve.fit.covariance import CovarianceKind, variances
from softcurve.fit.data.source import Source, share_of
from softcurve.fit.fitted_head import FittedHead
from softcurve.fit.fitting import Fit, budget_of
from softcurve.losses.divergences import Divergence

PRINTED = 60  # rows of a table
UNCERTAIN = 20.0  # a standard error of a standardised feature's coefficient that shows a nearly flat likelihood
INTERCEPT = "(intercept)"
IN_A_TABLE = 100  # coefficients in a report
WORK = 1e10  # rows · coefficients² for which the Hessian takes a second or two


@dataclass(frozen=True, eq=False, repr=False)
class CoefficientSummary:
    """Coefficients of a head, one row for each class and feature; the arrays have shape ``(classes, features)``.

    Printing it shows a table of 80 columns, :meth:`records` returns its rows.

    Attributes:
        classes: The labels of the estimated classes.
        features: The names of the features; the last is ``"(intercept)"`` if there is one.
        base_class: The class whose coefficients are zero, so that the others are differences from it; or ``None``.
        coefficient: The coefficients, in nats per unit of the feature.
        standard_error: The roots of the diagonal of the covariance.
        kind: ``"hessian"`` or ``"sandwich"``, the form of the covariance.
        level: The confidence level; the normal quantile ``q`` is that of ``(1 + level) / 2``.
        weight: The sum of the sample weights, which is the number of samples if there are no weights.
        caution: Why the rows hardly determine some coefficients; empty if they do, or with a penalty.
    """

    classes: tuple[Any, ...]
    features: tuple[str, ...]
    base_class: Any
    coefficient: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    kind: CovarianceKind
    level: float
    weight: float
    caution: str = ""

    @property
    def z(self) -> NDArray[np.float64]:
        """Return ``coefficient / standard_error``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.coefficient / self.standard_error

    @property
    def p_value(self) -> NDArray[np.float64]:
        """Return the probability of a larger ``|z|`` if the coefficient were zero, by the normal distribution."""
        return np.asarray(2.0 * ndtr(-np.abs(self.z)))

    @property
    def low(self) -> NDArray[np.float64]:
        """Return the lower ends of the intervals, ``coefficient − q standard_error`` with the quantile of the level."""
        return np.asarray(self.coefficient + ndtri((1.0 - self.level) / 2.0) * self.standard_error)

    @property
    def high(self) -> NDArray[np.float64]:
        """Return the upper ends of the intervals, ``coefficient + q standard_error`` with the quantile of the level."""
        return np.asarray(self.coefficient - ndtri((1.0 - self.level) / 2.0) * self.standard_error)

    def records(self) -> list[dict[str, Any]]:
        """Return a dict for each row of the table, for example for ``pandas.DataFrame(summary.records())``."""
        return list(self._records(len(self.classes) * len(self.features)))

    def _records(self, at_most: int) -> Iterator[dict[str, Any]]:
        names = ("coefficient", "standard_error", "z", "p_value", "low", "high")
        columns = [getattr(self, name).ravel().tolist() for name in names]
        for place in range(at_most):
            k, j = divmod(place, len(self.features))
            figures = {name: column[place] for name, column in zip(names, columns, strict=True)}
            yield {"class": self.classes[k], "feature": self.features[j], **figures}

    def __str__(self) -> str:
        count = len(self.classes) * len(self.features)
        base = "" if self.base_class is None else f", relative to the class {self.base_class!s}"
        form = "inverse Hessian" if self.kind == "hessian" else "sandwich (robust)"
        level = f"{100 * self.level:g} %"
        lines = [
            f"Coefficients of {len(self.classes)} classes{base}",
            f"Covariance: {form}; sum of the sample weights: {self.weight:g}",
            "",
            _line("class", "feature", "coef", "std err", "z", "p", f"low {level}", f"high {level}"),
            "-" * 80,
        ]
        for row in self._records(min(count, PRINTED)):
            label, feature, coefficient, error, z, p, low, high = row.values()
            figures = [f"{each:.4g}" for each in (coefficient, error, low, high)]
            figures[2:2] = [f"{z:.2f}" if abs(z) < 1e4 else f"{z:.1e}", "<0.001" if p < 5e-4 else f"{p:.3f}"]
            lines.append(_line(label, feature, *figures))
        if count > PRINTED:
            lines.append(f"... and {count - PRINTED:,} more rows, which records() returns")
        if self.caution:
            lines += ["", *wrap(f"Caution: {self.caution}.", 80)]
        return "\n".join(lines)

    __repr__ = __str__


def _line(label: object, feature: object, *figures: str) -> str:
    first = f"{_cut(label, 11):<11} {_cut(feature, 13):<13}"
    return first + "".join(f"{each:>{width}}" for each, width in zip(figures, (10, 10, 8, 7, 10, 10), strict=True))


def _cut(name: object, width: int) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def summarise(
    head: FittedHead, base: int | None, classes: tuple[Any, ...], *, kind: CovarianceKind, level: float
) -> CoefficientSummary:
    """Return the coefficients of a head with their standard errors.

    Raises what :func:`~softcurve.fit.covariance.variances` does.
    """
    errors = variances(head, base, kind=kind).clamp(min=0.0).sqrt()
    coefficients = torch.cat([head.weight, head.bias[:, None]], 1)[:, : head.size]
    if base is not None:
        coefficients = coefficients - coefficients[base]
    estimated = [k for k in range(len(coefficients)) if k != base]
    return CoefficientSummary(
        tuple(classes[k] for k in estimated), (*head.names, *([INTERCEPT] if head.intercept else [])),
        None if base is None else classes[base], coefficients[estimated].numpy(), errors.numpy(), kind, level,
        head.total, _caution(head, base, kind, errors),
    )  # fmt: skip


def _caution(head: FittedHead, base: int | None, kind: CovarianceKind, errors: Float64[Tensor, "classes size"]) -> str:
    """Return why the rows hardly determine some coefficients, or nothing if they do."""
    if head.penalty:
        return ""
    if kind == "sandwich":
        # The scores of separated rows are near zero too, so that this form can be small where the Hessian is singular.
        errors = variances(head, base, kind="hessian").clamp(min=0.0).sqrt()
    standardised = errors[:, : head.source.width] * head.moments.deviation
    if (largest := float(standardised.max())) <= UNCERTAIN:
        return ""
    name, form = head.names[int(standardised.amax(0).argmax())], " by the Hessian" if kind == "sandwich" else ""
    return (
        f"the rows hardly determine some coefficients: the standard error of feature {name!r} is {largest:.3g} per "
        f"standard deviation of the feature{form}. Some classes may be separable, and their coefficients then grow as "
        "tol falls, or the features are nearly collinear; leave such features out, or give a finite C"
    )


@torch.no_grad()
def short_summary(
    source: Source, fit: Fit, *, loss: str | Divergence, C: float, intercept: bool, tol: float, budget: int | None
) -> CoefficientSummary | str:
    """Return the summary of a fit without weights if a table can show it, or the reason why it is left out.

    All processes that share the source must call this function.
    """
    classes, rows = len(source.classes), share_of(source).total
    base = 0 if classes == 2 or math.isinf(C) else None
    count = (classes - (base is not None)) * (source.width + intercept)
    if count > IN_A_TABLE or rows * count**2 > WORK:
        return (
            f"{count:,} coefficients from {rows:,} samples are too many for this report, which shows up to "
            f"{IN_A_TABLE}; SoftmaxRegression.summary(X, y) returns them"
        )
    head = FittedHead(
        source, torch.ones(source.rows, dtype=torch.float64), loss, fit.weight, fit.bias,
        (2.0 if classes == 2 else 1.0) / C, intercept, feature_names(source.width), budget_of(source, budget),
    )  # fmt: skip
    try:
        if warning := head.require_covariance(10.0 * max(tol, fit.gradient_max)):
            return warning
        return summarise(head, base, source.classes, kind="hessian", level=0.95)
    except DataError as error:
        return str(error)


def feature_names(width: int) -> tuple[str, ...]:
    """Return the names that scikit-learn gives features without names."""
    return tuple(f"x{j}" for j in range(width))
