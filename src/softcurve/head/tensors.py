"""What a pass over a head's tiles is given: the loss as a description of plain values, and the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.losses.spec import LossSpec


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
    def split(given: Sequence[Tensor | None]) -> tuple[HeadTensors, Directions]:
        """Return the tensors and the directions that follow them in a flat sequence."""
        count = len(HeadTensors._fields)
        a, b, c, d, e, f = given[count:]
        return HeadTensors(*given[:count]), (a, b, c, d, e, f)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: at least float32."""
        dtype = torch.promote_types(self.input.dtype, self.weight.dtype)
        if self.target is not None and self.indices is None:
            dtype = torch.promote_types(dtype, self.target.dtype)
        return torch.promote_types(dtype, torch.float32)


Directions = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Wanted = tuple[bool, bool, bool, bool, bool, bool]

NOTHING: Wanted = (False, False, False, False, False, False)


class RowLosses(NamedTuple):
    """The losses of a head's rows; ``merges_tail`` says whether the unlisted classes of a list are one outcome."""

    loss: LossSpec
    tensors: HeadTensors
    merges_tail: bool
    memory_budget: int | None
