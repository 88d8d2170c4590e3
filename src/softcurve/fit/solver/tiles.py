"""Features about their mean, as the solver multiplies them: a matrix, or sparse rows and a rank-one correction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit.data.sparse_features import SparseFeatures


class DenseTile:
    """Centred features of some rows as a matrix ``(rows, d)``.

    A matrix of another dtype than the results is multiplied by factors rounded to its dtype, and so are its products.
    """

    def __init__(self, matrix: Float[Tensor, "rows d"]) -> None:
        self.matrix = matrix

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, rows: Int64[Tensor, " chosen"]) -> DenseTile:
        return DenseTile(self.matrix[rows])

    def times(
        self, weight: Float[Tensor, "classes d"], bias: Float[Tensor, " classes"] | None, out: Tensor
    ) -> Float[Tensor, "rows classes"]:
        """Write ``U Wᵀ + c`` to ``out`` and return it."""
        if self.matrix.dtype == out.dtype:
            torch.mm(self.matrix, weight.T, out=out)
        else:
            out.copy_(torch.mm(self.matrix, weight.T.to(self.matrix.dtype)))
        return out if bias is None else out.add_(bias)

    def add_transposed(
        self, values: Float[Tensor, "rows classes"], weight: Float[Tensor, "classes d"], bias: Tensor | None
    ) -> None:
        """Add ``Gᵀ U`` to ``weight`` and the sums of the columns of ``G`` to ``bias``."""
        if self.matrix.dtype == weight.dtype:
            weight.addmm_(values.T, self.matrix)
        else:
            weight.add_(torch.mm(values.to(self.matrix.dtype).T, self.matrix))
        if bias is not None:
            bias += values.sum(0)

    def square_sums(self, values: Float[Tensor, "rows classes"]) -> Float[Tensor, "classes d"]:
        """Return ``Gᵀ U²`` with the elementwise square."""
        return values.T @ self.matrix.square()


class SparseTile:
    """Centred features ``U = X − 1 μᵀ`` of some sparse rows, which are never formed.

    ``U B = X B − 1 (μᵀ B)`` and ``Uᵀ G = Xᵀ G − μ (1ᵀ G)``. The differences cancel only for columns that are stored in
    nearly every row: a share ``q`` of stored entries bounds the mean by ``√(q / (1 − q))`` standard deviations. The
    entries of a column that every row stores, such as a column of dates among indicators, are therefore centred one by
    one in float64, and the rest of its mean is zero.
    """

    def __init__(self, stored: SparseFeatures, rest: Float[Tensor, " d"]) -> None:
        self.stored, self.rest = stored, rest  # X less the subtracted means, and what remains of μ

    @staticmethod
    def centred(features: SparseFeatures, mean: Float64[Tensor, " d"], dtype: torch.dtype) -> SparseTile:
        """Return the tile of these rows in ``dtype``."""
        rows, width = features.shape
        indices = features.matrix.indices
        full = torch.from_numpy(np.bincount(indices, minlength=width) == rows) & (mean != 0)
        if not full.any():
            return SparseTile(features.to(dtype), mean.to(dtype))
        shift = torch.where(full, mean, 0.0)
        entries = features.double().matrix.data - shift.numpy()[indices]
        return SparseTile(features.with_entries(entries).to(dtype), (mean - shift).to(dtype))

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, rows: Int64[Tensor, " chosen"]) -> SparseTile:
        return SparseTile(self.stored[rows], self.rest)

    def times(
        self, weight: Float[Tensor, "classes d"], bias: Float[Tensor, " classes"] | None, out: Tensor
    ) -> Float[Tensor, "rows classes"]:
        """Return ``U Wᵀ + c``, which scipy writes to new memory and not to ``out``."""
        offset = -(weight @ self.rest)
        return self.stored.times(weight.T.contiguous()).add_(offset if bias is None else offset.add_(bias))

    def add_transposed(
        self, values: Float[Tensor, "rows classes"], weight: Float[Tensor, "classes d"], bias: Tensor | None
    ) -> None:
        """Add ``Gᵀ U`` to ``weight`` and the sums of the columns of ``G`` to ``bias``."""
        sums = values.sum(0)
        weight.add_(self.stored.transposed_times(values).T).addr_(sums, self.rest, alpha=-1.0)
        if bias is not None:
            bias += sums

    def square_sums(self, values: Float[Tensor, "rows classes"]) -> Float[Tensor, "classes d"]:
        """Return ``Gᵀ U²`` with the elementwise square, ``Gᵀ X² − 2 Gᵀ X μ + Gᵀ 1 μ²``."""
        squared = self.stored.with_entries(self.stored.matrix.data**2)
        sums = squared.transposed_times(values).T
        sums.addcmul_(self.stored.transposed_times(values).T, self.rest, value=-2.0)
        return sums.addr_(values.sum(0), self.rest.square())

    def row_squares(self) -> Float[Tensor, " rows"]:
        """Return the squared norm of each row."""
        ones = self.rest.new_ones(self.stored.shape[1], 1)
        squares = self.stored.with_entries(self.stored.matrix.data**2).times(ones)[:, 0]
        return squares.sub_(self.stored.times(2.0 * self.rest[:, None])[:, 0]).add_(self.rest.square().sum())


Tile = DenseTile | SparseTile
