"""The base class of the operators: products with tensors and arrays, and the algorithms as methods."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float
from softcurve.curvature.algorithms import conjugate_gradients, eigenpairs, estimates, spectral_density
from softcurve.curvature.algorithms.matrix import SymmetricMatrix, identity_chunks
from softcurve.extras import needed

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

FloatArray = npt.NDArray[np.floating]


class SymmetricOperator(SymmetricMatrix):
    """A symmetric ``n × n`` matrix by its products; a subclass gives its size, dtype, device and ``_columns``.

    ``is_positive`` says that the matrix is positive semidefinite by construction, whatever the data.
    """

    is_positive: bool = False

    # Without this, numpy multiplies an array on the left with the operator entry by entry.
    __array_ufunc__ = None

    @abstractmethod
    def _columns(self, vectors: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return the products with ``k ≥ 0`` columns, which come detached, in the operator's dtype and device."""

    trace = estimates.trace
    diagonal = estimates.diagonal
    eigsh = eigenpairs.eigsh
    spectral_density = spectral_density.spectral_density
    solve = conjugate_gradients.solve

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}(shape={self.shape}, dtype={dtype}, device={self.device})"

    @overload  # type: ignore[override]  # also takes arrays
    def __matmul__(self, vectors: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, vectors: FloatArray) -> FloatArray: ...
    def __matmul__(self, vectors: object) -> Tensor | FloatArray:
        """Return ``A v`` for a vector ``(n,)`` or a matrix of columns ``(n, k)``, in the operator's dtype, detached.

        A torch tensor gives a tensor, a numpy array an array (in float32 where numpy lacks the operator's dtype).

        Raises:
            TypeError: ``vectors`` is neither, or does not hold real floating-point numbers.
            ValueError: its shape does not fit, or it is on another device.
        """
        if isinstance(vectors, np.ndarray):
            _require_floating(vectors.dtype, np.issubdtype(vectors.dtype, np.floating), "astype(float)")
            copied = torch.from_numpy(np.array(vectors, dtype=_numpy_dtype(self.dtype), order="C")).to(self.device)
            return checks.widened(self._product(copied)).cpu().numpy()
        if not isinstance(vectors, Tensor):
            kind = type(vectors).__name__
            raise TypeError(f"vectors must be a torch.Tensor or a numpy array, got {kind}; use torch.as_tensor")
        _require_floating(vectors.dtype, vectors.is_floating_point(), "double()")
        if vectors.device != self.device:
            raise ValueError(f"vectors must be on the operator's device {self.device}, got {vectors.device}")
        return self._product(vectors)

    def _product(self, vectors: Tensor) -> Tensor:
        n = self.shape[0]
        if vectors.ndim not in (1, 2) or vectors.shape[0] != n:
            raise ValueError(
                f"vectors must be of shape ({n},) or ({n}, k) for an operator of shape {self.shape}, "
                f"got {tuple(vectors.shape)}"
            )
        columns = vectors.detach().to(self.dtype)
        return self._columns(columns.reshape(n, -1)).detach().reshape(vectors.shape)

    def to_dense(self, *, columns_at_once: int = 16) -> Float[Tensor, "n n"]:
        """Return the matrix itself: its products with the identity, ``columns_at_once`` at a time, not symmetrised."""
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for columns, chunk in identity_chunks(self, columns_at_once):
            dense[:, columns] = self @ chunk
        return dense

    def to_scipy(self) -> LinearOperator:
        """Return the same matrix for scipy's solvers, in the operator's dtype (half precisions as float32)."""
        with needed("to_scipy", "fit"):
            from scipy.sparse.linalg import LinearOperator

        dtype = _numpy_dtype(self.dtype)

        def product(vectors: npt.NDArray[np.generic]) -> FloatArray:
            # scipy's own operators accept integers as real numbers.
            return self @ (vectors.astype(dtype) if vectors.dtype.kind in "biu" else cast("FloatArray", vectors))

        products = {"matvec": product, "rmatvec": product, "matmat": product, "rmatmat": product}
        return LinearOperator((self.shape[0], self.shape[1]), **products, dtype=np.dtype(dtype))


def _require_floating(dtype: object, is_floating: bool, remedy: str) -> None:
    if not is_floating:
        raise TypeError(f"vectors must hold real floating-point numbers, got {dtype}; use vectors.{remedy}")


def _numpy_dtype(dtype: torch.dtype) -> type[np.floating]:
    return np.float64 if dtype == torch.float64 else np.float32
