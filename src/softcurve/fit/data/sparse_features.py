"""Sparse features of a block of rows, and the logits of sparse and of dense features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from softcurve.array_types import Float, Int64

NUMPY = {torch.float32: "float32", torch.float64: "float64"}


class SparseFeatures:
    """Rows of a scipy CSR matrix in float32 or float64, and their products with dense matrices.

    No operation but :meth:`dense` takes memory of the order rows × d. The products are scipy's, in one thread: for
    TF-IDF rows with 58 classes, torch's CSR products with two threads took longer, up to twelve times as long on a busy
    machine, and need a copy of the transposed matrix.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix, self.shape = matrix, torch.Size(matrix.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the entries."""
        return torch.float32 if self.matrix.dtype == np.float32 else torch.float64

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int64[Tensor, " chosen"]) -> SparseFeatures:
        return SparseFeatures(self.matrix[rows.numpy() if isinstance(rows, Tensor) else rows])

    def to(self, dtype: torch.dtype) -> SparseFeatures:
        """Return the rows in this dtype; only the stored entries are copied, if it is another one."""
        return SparseFeatures(self.matrix.astype(NUMPY[dtype], copy=False))

    def double(self) -> SparseFeatures:
        """Return the rows in float64."""
        return self.to(torch.float64)

    def with_entries(self, entries: Any) -> SparseFeatures:
        """Return a matrix with other entries at the same places."""
        matrix = self.matrix
        return SparseFeatures(csr_array((entries, matrix.indices, matrix.indptr), shape=matrix.shape))

    def times(self, right: Float[Tensor, "d k"]) -> Float[Tensor, "rows k"]:
        """Return ``X B`` for a contiguous ``B`` of the dtype of the rows."""
        return torch.from_numpy(self.matrix @ right.numpy())

    def transposed_times(self, left: Float[Tensor, "rows k"]) -> Float[Tensor, "d k"]:
        """Return ``Xᵀ B`` for a contiguous ``B`` of the dtype of the rows."""
        return torch.from_numpy(self.matrix.T @ left.numpy())

    def dense(self) -> Float[Tensor, "rows d"]:
        """Return the dense rows."""
        return torch.from_numpy(self.matrix.toarray())


Features = Float[Tensor, "rows d"] | SparseFeatures


def dense_features(features: Features) -> Float[Tensor, "rows d"]:
    """Return dense features as they are, and sparse ones as a dense copy."""
    return features.dense() if isinstance(features, SparseFeatures) else features


def linear(
    features: Features, weight: Float[Tensor, "classes d"], bias: Float[Tensor, " classes"]
) -> Float[Tensor, "rows classes"]:
    """Return ``X Wᵀ + b`` in the dtype of the weight."""
    if isinstance(features, SparseFeatures):
        return features.to(weight.dtype).times(weight.T.contiguous()).add_(bias)
    return torch.addmm(bias, features.to(weight.dtype), weight.T)
