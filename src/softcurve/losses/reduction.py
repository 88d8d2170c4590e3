"""Reductions of the losses of rows to one number, with the means that torch has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Values
from softcurve.typing import Number

REDUCTIONS = ("none", "sum", "mean", "batchmean")


@dataclass(frozen=True)
class Reduction:
    """The reduction of the losses of rows to one number, and its unit."""

    kind: str = "mean"
    base: float = math.e

    @staticmethod
    def of(kind: str, base: Number) -> Reduction:
        """Make the reduction from the arguments of a public call."""
        return Reduction(checks.require_choice("reduction", kind, REDUCTIONS), checks.require_base(base))

    @property
    def nats(self) -> float:
        """The number of nats in one unit, ``ln base``."""
        return 1.0 if self.base == math.e else math.log(self.base)

    def apply(self, rows: Values, weight: Values | None = None) -> Tensor:
        """Reduce ``rows``, which are already weighted; ``weight`` is the weight of each row in a mean (default 1)."""
        if self.kind == "none":
            return rows
        total = rows.sum()
        if self.kind == "sum":
            return total
        if weight is None and rows.numel():
            return total / (rows.numel() if self.kind == "mean" else self.batch(rows.shape))
        return quotient(total, self.divisor(rows.shape, rows, weight))

    @staticmethod
    def batch(leading: Sequence[int]) -> int:
        """Return the divisor of a ``"batchmean"``."""
        return leading[0] if len(leading) else 1

    def divisor(self, leading: Sequence[int], like: Tensor, weight: Tensor | None) -> Tensor:
        """Return the divisor of the sum over rows of shape ``leading``, ``()``, in the dtype of ``like``."""
        if self.kind in ("sum", "none"):
            return like.new_ones(())
        if self.kind == "batchmean":
            return like.new_full((), self.batch(leading))
        return like.new_full((), math.prod(leading)) if weight is None else weight.to(like.dtype).sum()


def quotient(total: Tensor, divisor: Tensor) -> Tensor:
    """Return ``total / divisor``; a divisor of 0 gives NaN, whose derivatives are 0."""
    empty = divisor == 0
    return torch.where(empty, math.nan, total / torch.where(empty, 1.0, divisor))


def weighted(weight: Tensor, rows: Tensor) -> Tensor:
    """Return ``weight ⊙ rows``, which is 0 in a row of weight 0 even if the row is infinite or NaN."""
    return weight * torch.where((weight == 0) & ~rows.isfinite(), 0.0, rows)
