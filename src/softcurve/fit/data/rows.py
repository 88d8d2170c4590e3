"""Rows held in memory as arrays of float64: a source, gathered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.data.memory import to_source
from softcurve.fit.data.opening import open_source, open_source_for
from softcurve.fit.data.source import Label, Source
from softcurve.fit.data.subset import holdout_mask
from softcurve.targets import TopK

__all__ = ["Label", "Rows", "load_rows", "load_rows_for", "make_rows", "split"]

BLOCK_BYTES = 8_000_000


@dataclass(frozen=True, eq=False)
class Rows:
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
        """Features and target, distributions in ``dtype`` too. Raises DataError on overflow."""
        features = torch.tensor(self.features, dtype=dtype)
        if not features.isfinite().all():
            raise DataError(f"data: features go beyond the range of {dtype}; scale them, or use float64")
        return features, torch.tensor(self.target, dtype=dtype if self.soft else torch.int64)

    def take(self, index: Int64[np.ndarray, " taken"]) -> Rows:
        """Return the rows at ``index``, with all the classes."""
        return Rows(self.features[index], self.target[index], self.classes)


def load_rows(data: str, target: Path | None = None) -> Rows:
    """Read rows to fit a head to; see ``open_source`` for ``data`` and ``target``. Raises DataError."""
    return _with_targets(open_source(data, target), data)


def load_rows_for(
    data: str, classes: tuple[Label, ...], width: int, target: Path | None = None
) -> tuple[Float64[np.ndarray, "rows width"], Rows | None]:
    """Read features for a head of this width and, where there are targets, the rows in terms of its classes.

    Raises DataError, also for a label that is none of the classes.
    """
    source = open_source_for(data, classes, width, target)
    if source.kind is None:
        return _gathered(source)[0], None
    rows = _with_targets(source, data)
    return rows.features, rows


def make_rows(
    features: NDArray[Any],
    target: NDArray[Any],
    *,
    features_name: str = "features",
    target_name: str = "target",
) -> Rows:
    """Check arrays and make them rows: labels (any integers or strings; (n,)) or distributions ((n, C)).

    The classes are the sorted distinct labels, as in scikit-learn, or 0…C-1. Distributions are rescaled to
    sum to one in float64 where they do within 1e-3. Raises DataError, which uses the names.
    """
    source = to_source(features, target, features_name=features_name, target_name=target_name)
    return _with_targets(source, target_name)


def split(rows: Rows, holdout: float, seed: int) -> tuple[Rows, Rows]:
    """Divide rows at random into those to fit and those held out, both in their first order.

    Raises DataError where either side would be empty.
    """
    held = holdout_mask(len(rows), holdout, seed)
    return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held))


def _with_targets(source: Source, name: str) -> Rows:
    if source.kind == "top_k":
        raise DataError(f"data: {name} has a teacher's lists for targets; give labels or distributions here")
    features, target = _gathered(source)
    assert target is not None
    return Rows(features, target, source.classes)


def _gathered(source: Source) -> tuple[NDArray[Any], NDArray[Any] | None]:
    features = np.empty((source.rows, source.width), np.float64)
    target: NDArray[Any] | None = None
    for block in source.blocks(max(1, BLOCK_BYTES // (8 * max(source.width, len(source.classes))))):
        here = slice(block.start, block.start + len(block))
        features[here] = block.features
        if block.target is None or isinstance(block.target, TopK):
            continue
        if target is None:
            target = np.empty((source.rows, *block.target.shape[1:]), block.target.numpy().dtype)
        target[here] = block.target
    return features, target
