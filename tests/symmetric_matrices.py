"""Symmetric matrices that show their products only, for the solvers' tests."""

from __future__ import annotations

import torch

from softcurve.curvature.operator import SymmetricOperator


class Matrix(SymmetricOperator):
    """A dense matrix: how many columns and calls it has multiplied, and the widest of these."""

    def __init__(self, matrix):
        self.matrix, self.products, self.calls, self.widest = matrix, 0, 0, 0

    @property
    def shape(self):
        return tuple(self.matrix.shape)

    @property
    def dtype(self):
        return self.matrix.dtype

    @property
    def device(self):
        return self.matrix.device

    def _columns(self, vectors):
        assert vectors.dtype == self.dtype
        assert not vectors.requires_grad
        self.products += vectors.shape[1]
        self.calls += 1
        self.widest = max(self.widest, vectors.shape[1])
        return self.matrix @ vectors


def with_spectrum(eigenvalues, seed=0):
    """Of random orthonormal eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    matrix = (q * eigenvalues) @ q.mT
    return (matrix + matrix.mT) / 2
