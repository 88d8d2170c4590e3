"""All rows of a source as arrays in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softcurve.array_types import Float, Float64, Int, Int64
from softcurve.fit import DataError
from softcurve.fit.data.source import Label, Source, rows_within

__all__ = ["GatheredRows", "gather"]


@dataclass(frozen=True, eq=False)
class GatheredRows:
    """Features with a target for each row: indices into ``classes``, or distributions over them."""

    features: Float64[np.ndarray, "rows d"]
    target: Int64[np.ndarray, " rows"] | Float64[np.ndarray, "rows classes"]
    classes: tuple[Label, ...]

    @property
    def soft(self) -> bool:
        """Whether the targets are distributions."""
        return self.target.ndim == 2

    def __len__(self) -> int:
        return len(self.features)

    def tensors(
        self, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"] | Float[Tensor, "rows classes"]]:
        """Return features and target, distributions in ``dtype`` too. Raises DataError on overflow."""
        features = torch.tensor(self.features, dtype=dtype)
        if not features.isfinite().all():
            raise DataError(f"data: features go beyond the range of {dtype}; scale them, or use float64")
        return features, torch.tensor(self.target, dtype=dtype if self.soft else torch.int64)


def gather(source: Source, name: str) -> GatheredRows:
    """Read all rows of a source with labels or distributions; errors call it ``name``. Raises DataError."""
    if source.kind == "top_k":
        raise DataError(f"data: {name} has a teacher's lists for targets; give labels or distributions here")
    if source.kind is None:
        raise DataError(f"data: {name} has no targets; give them in an .npy file by --target")
    features = np.empty((source.rows, source.width), np.float64)
    targets = []
    for block in source.blocks(rows_within(len(source.classes), source.width)):
        assert isinstance(block.target, Tensor)
        features[block.start : block.start + len(block)] = block.features
        targets.append(block.target.numpy())
    return GatheredRows(features, np.concatenate(targets), source.classes)
