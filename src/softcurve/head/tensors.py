"""The tensors of a pass over a head's tiles, beside the :class:`~softcurve.losses.spec.LossSpec` that describes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from softcurve.losses.spec import LossSpec

# One entry for each of the first six tensors of HeadTensors: its change, gradient, or whether that is wanted.
Directions: TypeAlias = Sequence[Tensor | None]
Wanted: TypeAlias = Sequence[bool]
NOTHING: Wanted = (False,) * 6


class HeadTensors(NamedTuple):
    """The tensors of a head's loss, rows flattened; the first six may receive gradients."""

    input: Tensor  # (n, d)
    weight: Tensor  # (C, d)
    bias: Tensor | None  # (C,)
    target: Tensor | None  # see LossSpec
    target_weight: Tensor | None
    target_bias: Tensor | None
    indices: Tensor | None  # (n, k)
    row_weight: Tensor  # (n,)
    # (C,); or (2, C) where masked classes have no share of label smoothing: in the target's own mass, in the smoothing.
    class_weight: Tensor | None

    @staticmethod
    def split(given: Sequence[Any]) -> tuple[Any, Any]:
        """Return the tensors, or what there is for each of them, and what follows them in a flat sequence."""
        count = len(HeadTensors._fields)
        return HeadTensors(*given[:count]), given[count:]

    @property
    def differentiable(self) -> tuple[Any, ...]:
        """The tensors that may receive gradients, or what there is for each of them."""
        return self[:6]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation, at least float32."""
        dtype = torch.promote_types(self.input.dtype, self.weight.dtype)
        if self.target is not None and self.indices is None:
            dtype = torch.promote_types(dtype, self.target.dtype)
        return torch.promote_types(dtype, torch.float32)


class RowLosses(NamedTuple):
    """The losses of a head's rows; ``merges_tail`` says whether the unlisted classes of a list are one outcome."""

    loss: LossSpec
    tensors: HeadTensors
    merges_tail: bool
    memory_budget: int | None
