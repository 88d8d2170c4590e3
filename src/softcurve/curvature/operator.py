"""A symmetric matrix that is known by its products with vectors alone.

A matrix of curvature has the size of the parameters squared and is never held. What is asked of it (its trace, its
spectrum, a solution of ``A x = b``) is answered by products, many columns at once where the method allows, because the
columns of one product share its passes over the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcurve.array_types import Float
from softcurve.extras import needed

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from softcurve.curvature.conjugate_gradients import Solution
    from softcurve.curvature.estimates import DiagonalEstimate, Estimate
    from softcurve.curvature.spectrum import Eigenpairs, SpectralDensity

Floats = npt.NDArray[np.floating]

Distribution = Literal["rademacher", "normal"]
TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]
DiagonalMethod = Literal["xdiag", "hutchinson"]
EigenMethod = Literal["lanczos", "lobpcg"]
End = Literal["LA", "SA", "LM", "BE"]


class SymmetricOperator(ABC):
    """A symmetric ``n × n`` matrix by its products; a subclass gives its size, dtype, device and ``_columns``.

    ``is_positive`` says that the matrix is positive semidefinite by construction, whatever the data.
    """

    is_positive: bool = False

    # So that an array on the left does not take the operator for an object to be multiplied entry by entry.
    __array_ufunc__ = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the products are computed and where vectors must be."""

    def __repr__(self) -> str:
        """One line."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}(shape={self.shape}, dtype={dtype}, device={self.device})"

    @abstractmethod
    def _columns(self, vectors: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The products with ``k ≥ 0`` columns, which come detached, in the operator's dtype and on its device."""

    @overload
    def __matmul__(self, vectors: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, vectors: Floats) -> Floats: ...
    def __matmul__(self, vectors: object) -> Tensor | Floats:
        """``A v`` for a vector ``(n,)`` or a matrix of columns ``(n, k)``, in the operator's dtype, detached.

        A torch tensor gives a tensor, a numpy array an array (in float32 where numpy lacks the operator's dtype).

        Raises:
            TypeError: ``vectors`` is neither, or does not hold real floating-point numbers.
            ValueError: its shape does not fit, or it is on another device.
        """
        if isinstance(vectors, np.ndarray):
            if not np.issubdtype(vectors.dtype, np.floating):
                raise TypeError(
                    f"vectors must hold real floating-point numbers, got {vectors.dtype}; "
                    "convert them with vectors.astype(float)"
                )
            held = torch.from_numpy(np.array(vectors, dtype=_numpy_dtype(self.dtype), order="C")).to(self.device)
            product = self._product(held)
            return product.to(torch.promote_types(product.dtype, torch.float32)).cpu().numpy()
        if not isinstance(vectors, Tensor):
            raise TypeError(
                f"vectors must be a torch.Tensor or a numpy array, got {type(vectors).__name__}; "
                "convert it with torch.as_tensor"
            )
        if not vectors.is_floating_point():
            raise TypeError(
                f"vectors must hold real floating-point numbers, got {vectors.dtype}; "
                "convert them with vectors.double()"
            )
        if vectors.device != self.device:
            raise ValueError(
                f"vectors must be on the operator's device {self.device}, got {vectors.device}; "
                "move them with vectors.to(operator.device)"
            )
        return self._product(vectors)

    def _product(self, vectors: Tensor) -> Tensor:
        """The product in the shape that ``vectors`` came in."""
        n = self.shape[0]
        if vectors.ndim not in (1, 2) or vectors.shape[0] != n:
            raise ValueError(
                f"vectors must be of shape ({n},) or ({n}, k) for an operator of shape {self.shape}, "
                f"got {tuple(vectors.shape)}"
            )
        columns = vectors.detach().to(self.dtype)
        if vectors.ndim == 1:
            return self._columns(columns.unsqueeze(1)).detach().squeeze(1)
        return self._columns(columns).detach()

    def to_dense(self, *, columns_at_once: int = 16) -> Float[Tensor, "n n"]:
        """The matrix itself: its products with the identity, ``columns_at_once`` at a time, as they come."""
        require_count("columns_at_once", columns_at_once, 1)
        n = self.shape[0]
        dense = torch.empty(n, n, dtype=self.dtype, device=self.device)
        for start in range(0, n, columns_at_once):
            chunk = identity_columns(self, start, min(start + columns_at_once, n))
            dense[:, start : start + chunk.shape[1]] = self @ chunk
        return dense

    def to_scipy(self) -> LinearOperator:
        """The same matrix for scipy's solvers, in the operator's dtype (half precisions as float32)."""
        with needed("to_scipy", "fit"):
            from scipy.sparse.linalg import LinearOperator

        dtype = _numpy_dtype(self.dtype)

        def product(vectors: npt.NDArray[np.generic]) -> Floats:
            # scipy's own operators take whole numbers for real ones.
            return self @ (vectors.astype(dtype) if vectors.dtype.kind in "biu" else cast("Floats", vectors))

        return LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=np.dtype(dtype)
        )

    def trace(
        self,
        *,
        method: TraceMethod = "xtrace",
        products: int = 64,
        distribution: Distribution = "rademacher",
        seed: int = 0,
        columns_at_once: int = 16,
    ) -> Estimate:
        """An estimate of the trace with its standard error: :func:`softcurve.curvature.estimates.trace`."""
        from softcurve.curvature import estimates

        return estimates.trace(
            self,
            method=method,
            products=products,
            distribution=distribution,
            seed=seed,
            columns_at_once=columns_at_once,
        )

    def diagonal(
        self, *, method: DiagonalMethod = "xdiag", products: int = 64, seed: int = 0, columns_at_once: int = 16
    ) -> DiagonalEstimate:
        """An estimate of the diagonal with standard errors: :func:`softcurve.curvature.estimates.diagonal`."""
        from softcurve.curvature import estimates

        return estimates.diagonal(self, method=method, products=products, seed=seed, columns_at_once=columns_at_once)

    def eigsh(
        self,
        k: int = 6,
        *,
        which: End = "LA",
        tol: float = 0.0,
        max_products: int | None = None,
        seed: int = 0,
        method: EigenMethod = "lanczos",
    ) -> Eigenpairs:
        """``k`` eigenpairs from an end of the spectrum: :func:`softcurve.curvature.spectrum.eigsh`."""
        from softcurve.curvature import spectrum

        return spectrum.eigsh(self, k, which=which, tol=tol, max_products=max_products, seed=seed, method=method)

    def spectral_density(
        self, *, probes: int = 10, steps: int = 80, seed: int = 0, columns_at_once: int | None = None
    ) -> SpectralDensity:
        """The distribution of the eigenvalues: :func:`softcurve.curvature.spectrum.spectral_density`."""
        from softcurve.curvature import spectrum

        return spectrum.spectral_density(self, probes=probes, steps=steps, seed=seed, columns_at_once=columns_at_once)

    def solve(
        self,
        b: Tensor,
        *,
        damping: float = 0.0,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        tol: float = 1e-6,
        max_iterations: int | None = None,
        x0: Tensor | None = None,
    ) -> Solution:
        """``x`` of ``(A + damping I) x = b``: :func:`softcurve.curvature.conjugate_gradients.conjugate_gradients`."""
        from softcurve.curvature.conjugate_gradients import conjugate_gradients

        return conjugate_gradients(
            self, b, damping=damping, preconditioner=preconditioner, tol=tol, max_iterations=max_iterations, x0=x0
        )


def identity_columns(operator: SymmetricOperator, start: int, stop: int) -> Float[Tensor, "n k"]:
    """Columns ``start … stop − 1`` of the identity, in the operator's dtype and on its device."""
    columns = torch.zeros(operator.shape[0], stop - start, dtype=operator.dtype, device=operator.device)
    columns[start:stop].fill_diagonal_(1)
    return columns


def require_count(name: str, value: int, least: int) -> None:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def require_finite(products: Tensor | Floats) -> None:
    """What a solver goes on with: NaN would make a spectrum that looks like one."""
    held = torch.from_numpy(products) if isinstance(products, np.ndarray) else products
    if not held.isfinite().all():
        raise ValueError(
            "the operator's products must be finite, got NaN or infinity; look for them in parameters and data"
        )


def working_dtype(operator: SymmetricOperator) -> torch.dtype:
    """The dtype of columns between products: the operator's, at least float32."""
    return torch.promote_types(operator.dtype, torch.float32)


def _numpy_dtype(dtype: torch.dtype) -> type[np.floating]:
    return np.float64 if dtype == torch.float64 else np.float32
