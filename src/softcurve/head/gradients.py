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


def terms_of(map: LinearMap, residual: Tensor, change: Tensor | None, factor: Tensor | None) -> list[Term]:
    """Return the terms of a gradient, ``g W`` and ``gᵀ e``; or of its change, ``ġ W + g Ẇ`` and ``ġᵀ e + gᵀ ė``."""
    scaling = None if factor is None else factor.to(map.input.dtype)
    if map.scale != 1:
        ones = map.input.new_ones(residual.shape[0], 1)
        scaling = (ones if scaling is None else scaling) * map.scale
    if change is None:
        return [Term(residual, map.weight, map.input, scaling)]
    return [
        Term(change, map.weight, map.input, scaling),
        Term(residual, map.along.weight, map.along.input, scaling, in_bias=False),
    ]


@dataclass
class MapSums:
    """The gradients of one linear map, as sums over tiles.

    The first product into the rows or classes of a block overwrites what is there; with ``touched=None`` the tensors
    hold numbers already, and everything is added.
    """

    into: Direction
    touched: set[tuple[str, int]] | None = None  # the names of the gradients, and the first classes of the blocks

    def add(self, rows: slice | Tensor, classes: slice, terms: list[Term]) -> None:
        """Add the terms of one block."""
        in_input, in_weight, in_bias = self.into
        for number, (residual, weight, input, scale, bias_too) in enumerate(terms):
            if in_input is not None and weight is not None:
                part = to_features(residual, weight[classes], in_input.dtype)
                if scale is not None:
                    part.mul_(scale)
                # Every tile has rows of its own, whose first product is that with the first block.
                if self.touched is None or number or classes.start:
                    in_input[rows] += part
                else:
                    in_input[rows] = part
                    self.touched.add(("input", 0))
            if in_weight is not None and input is not None:
                e = input.to(in_weight.dtype) if scale is None else input.to(in_weight.dtype) * scale
                products.back_to_weight(in_weight[classes], residual, e, accumulate=self._adds("weight", classes.start))
            if in_bias is not None and bias_too:
                each = residual.new_ones(len(residual), dtype=in_bias.dtype) if scale is None else scale[:, 0]
                products.back_to_bias(in_bias[classes], residual, each, accumulate=self._adds("bias", classes.start))

    def _adds(self, name: str, start: int) -> bool:
        """Return whether there is a sum already that a product adds to; from now on there is."""
        if self.touched is None:
            return True
        count = len(self.touched)
        self.touched.add((name, start))
        return len(self.touched) == count

    def finish(self, group: ProcessGroup | None) -> Direction:
        """Return the sums; 0 where no tile has added, and the features' over the classes of all processes."""
        touched = {name for name, _ in self.touched or ()}
        for name, tensor in zip(Direction._fields, self.into, strict=True):
            if tensor is not None and name not in touched:
                tensor.zero_()
        if group is not None and self.into.input is not None and self.into.input.numel():
            sum_over([self.into.input], group)  # before it is rounded to half precision
        return self.into


def to_features(residual: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``residual @ weight``."""
    out = residual.new_empty((residual.shape[0], weight.shape[1]), dtype=dtype)
    products.back_to_features(out, residual, weight, accumulate=False)
    return out
