"""Residuals back to the features, weight and bias of a linear map: the two products after the loop's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head import products
from softcurve.head.products import Direction, LinearMap
from softcurve.processes import sum_over


class Term(NamedTuple):
    """A summand of the gradients of ``z = W e + b``: ``scale R W`` in the features, ``Rᵀ (scale e)`` in the weight."""

    residual: Tensor
    weight: Tensor | None
    input: Tensor | None
    scale: Tensor | None  # (rows, 1)
    in_bias: bool = True  # whether Rᵀ scale is added to the gradient of the bias


def terms_of(
    map: LinearMap, along: Direction, residual: Tensor, change: Tensor | None, factor: Tensor | None, scale: float
) -> list[Term]:
    """The terms of a gradient, ``g W`` and ``gᵀ e``; or of its change, ``ġ W + g Ẇ`` and ``ġᵀ e + gᵀ ė``."""
    scaling = None if factor is None else factor.to(map.input.dtype)
    if scale != 1:
        scaling = map.input.new_full((len(residual), 1), scale) if scaling is None else scaling * scale
    if change is None:
        return [Term(residual, map.weight, map.input, scaling)]
    return [
        Term(change, map.weight, map.input, scaling),
        Term(residual, along.weight, along.input, scaling, in_bias=False),
    ]


@dataclass
class MapSums:
    """The gradients of one linear map, as sums over tiles.

    The first product into the rows or classes of a block overwrites what is there; with ``touched=None`` the tensors
    hold numbers already, and everything is added.
    """

    into: Direction
    touched: set[str] | None = None

    def add(self, rows: slice | Tensor, classes: slice, terms: list[Term]) -> None:
        """Add the terms of one block."""
        for number, term in enumerate(terms):
            residual, scale = term.residual, term.scale
            if self.into.input is not None and term.weight is not None:
                part = to_features(residual, term.weight[classes], self.into.input.dtype)
                if scale is not None:
                    part.mul_(scale)
                if self.touched is None or number > 0 or classes.start > 0:
                    self.into.input[rows] += part
                else:
                    self.into.input[rows] = part
                    self.touched.add("input")
            if self.into.weight is not None and term.input is not None:
                e = term.input.to(self.into.weight.dtype)
                products.back_to_weight(
                    self.into.weight[classes], residual, e if scale is None else e * scale,
                    accumulate=self._touches(f"weight {classes.start}"),
                )  # fmt: skip
            if self.into.bias is not None and term.in_bias:
                each = residual.new_ones(len(residual), dtype=self.into.bias.dtype) if scale is None else scale[:, 0]
                products.back_to_bias(
                    self.into.bias[classes], residual, each, accumulate=self._touches(f"bias {classes.start}")
                )

    def _touches(self, name: str) -> bool:
        """Whether there is a sum already; from now on there is."""
        if self.touched is None or name in self.touched:
            return True
        self.touched.add(name)
        return False

    def finish(self, group: ProcessGroup | None) -> Direction:
        """Return the sums; 0 where no tile has added, and the features' over the classes of all processes."""
        for name, tensor in self.into._asdict().items():
            if tensor is not None and not any(each.startswith(name) for each in self.touched or ()):
                tensor.zero_()
        if group is not None and self.into.input is not None and self.into.input.numel():
            sum_over([self.into.input], group)  # before it is rounded to half precision
        return self.into


def to_features(residual: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``residual @ weight``."""
    out = residual.new_empty((len(residual), weight.shape[1]), dtype=dtype)
    products.back_to_features(out, residual, weight, accumulate=False)
    return out
