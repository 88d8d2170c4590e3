"""How the losses of rows become one number, with the means that torch has."""

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
    """How the losses of rows become one number, and in which unit."""

    kind: str = "mean"
    base: float = math.e

    def __post_init__(self) -> None:
        checks.require_choice("reduction", self.kind, REDUCTIONS)
        checks.require_base(self.base)

    @staticmethod
    def of(kind: str, base: Number) -> Reduction:
        """Make the reduction from the arguments of a public call."""
        return Reduction(kind, checks.require_base(base))

    @property
    def nats(self) -> float:
        """``ln base``: nats in one unit."""
        return 1.0 if self.base == math.e else math.log(self.base)

    def apply(self, rows: Values, weight: Values | None = None) -> Tensor:
        """Reduce ``rows``, which are already weighted; ``weight`` is the weight of each row in a mean (default 1)."""
        if self.kind == "none":
            return rows
        total = rows.sum()
        return total if self.kind == "sum" else quotient(total, self.divisor(rows.shape, rows, weight))

    def divisor(self, leading: Sequence[int], like: Tensor, weight: Tensor | None) -> Tensor:
        """What the sum over rows of shape ``leading`` is divided by, ``()``, in the dtype of ``like``."""
        if self.kind in ("sum", "none"):
            return like.new_ones(())
        if self.kind == "batchmean":
            return like.new_full((), leading[0] if len(leading) else 1)
        return like.new_full((), math.prod(leading)) if weight is None else weight.to(like.dtype).sum()


def quotient(total: Tensor, divisor: Tensor) -> Tensor:
    """``total / divisor``; a divisor of 0 gives NaN, whose derivatives are 0."""
    empty = divisor == 0
    return torch.where(empty, math.nan, total / torch.where(empty, 1.0, divisor))


def weighted(weight: Tensor, rows: Tensor) -> Tensor:
    """``weight ⊙ rows``; 0 in a row of weight 0 that is infinite or no number."""
    return weight * torch.where((weight == 0) & ~rows.isfinite(), 0.0, rows)
