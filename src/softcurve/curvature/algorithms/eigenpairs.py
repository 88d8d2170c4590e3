"""Eigenpairs at the ends of the spectrum of a symmetric matrix, by Lanczos and scipy's LOBPCG."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float
from softcurve.curvature.algorithms.lanczos import lanczos, most_wanted
from softcurve.curvature.algorithms.matrix import SymmetricMatrix, product, random_columns, working_dtype
from softcurve.extras import needed
from softcurve.records import ShortRepr

EigenMethod = Literal["lanczos", "lobpcg"]
SpectrumEnd = Literal["LA", "SA", "LM", "BE"]
Columns = npt.NDArray[np.floating[Any]]

POWERS = 3  # products that measure the size of a matrix
STAGE = 20  # LOBPCG steps between checks of the residuals


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(ShortRepr):
    """Eigenvalues, from the largest down, with unit eigenvectors and the norms of the true residuals ``A v − λ v``.

    ``products`` counts the matrix-vector products, including those for the residuals. ``method`` is ``"dense"`` where
    the matrix is too small for the method that was asked for.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residuals: Float[Tensor, " k"]
    products: int
    method: str


def eigsh(
    matrix: SymmetricMatrix, k: int = 6, *, which: SpectrumEnd = "LA", tol: float = 0.0,
    max_products: int | None = None, seed: int = 0, method: EigenMethod = "lanczos",
) -> Eigenpairs:  # fmt: skip
    """Return the ``k`` largest (``"LA"``), smallest (``"SA"``), absolutely largest (``"LM"``) or outermost eigenvalues.

    ``"BE"`` takes half from each end, and the odd one from above.

    ``"lanczos"`` (Wu, Simon 2000) takes the fewest products, one column each, and holds ``max(2 k + 1, 20) + 1``
    vectors. Its ``tol`` is relative to the eigenvalue, and 0 is the dtype's precision. It may miss copies of a multiple
    eigenvalue, and does not converge on the lower end of a singular matrix, a cluster at 0: set ``max_products``.

    ``"lobpcg"`` (Knyazev 2001, by scipy; ``"LA"`` and ``"SA"`` only) takes more products, but ``k`` columns at once,
    which share the passes over the data, and finds the copies. Its ``tol`` bounds residuals relative to the largest
    eigenvalue met; 0 is the root of the dtype's precision, because the error of a separated eigenvalue is of second
    order in the residual. A matrix too small for either method is made dense.

    Raises:
        ValueError: ``k`` is not in ``1 … n``, or ``max_products`` is too small to begin.
        RuntimeError: not converged within ``max_products`` (``None``: about ``10 n`` restarts of Lanczos,
            ``200 (k + 5)`` products of LOBPCG); the message names what did converge.
    """
    n = matrix.shape[0]
    checks.require_choice("which", which, get_args(SpectrumEnd))
    checks.require_choice("method", method, get_args(EigenMethod))
    checks.require_between("tol", tol, 0.0, 1.0)
    checks.require_count("k", k, 1)
    checks.require_count("seed", seed, 0)
    if max_products is not None:
        checks.require_count("max_products", max_products, 1)
    if k > n:
        raise ValueError(f"k must be at most n = {n}, got {k}; a matrix has no more eigenvalues than columns")
    if method == "lobpcg" and which not in ("LA", "SA"):
        raise ValueError(f"which must be 'LA' or 'SA' for method='lobpcg', got {which!r}; use method='lanczos'")
    width = max(2 * k + 1, 20) if method == "lanczos" else 5 * k + 4
    least, purpose = width + (k if method == "lanczos" else POWERS), f"method={method!r} and k={k}"
    if is_small := n <= width:
        least, purpose = n, f"a dense matrix of {n} columns"
    if max_products is not None and max_products < least:
        raise ValueError(f"max_products must be at least {least} for {purpose}, got {max_products}")
    if is_small:
        return _dense(matrix, k, which)
    if method == "lanczos":
        return _lanczos(matrix, k, which, tol, max_products, seed, width)
    return _lobpcg(matrix, k, which, tol, 200 * (k + 5) if max_products is None else max_products, seed)


def _dense(matrix: SymmetricMatrix, k: int, which: str) -> Eigenpairs:
    n = matrix.shape[0]
    dense = product(matrix, torch.eye(n, dtype=matrix.dtype, device=matrix.device))
    values, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
    places = most_wanted(values, which)[:k].sort(descending=True).values
    return _with_residuals(values[places], vectors[:, places], dense @ vectors[:, places], n, "dense")


def _with_residuals(values: Tensor, vectors: Tensor, images: Tensor, products: int, method: str) -> Eigenpairs:
    # In float64: squares of small residuals are below float32's range.
    residuals = torch.linalg.vector_norm(images.double() - vectors.double() * values.double(), dim=0)
    return Eigenpairs(values, vectors, residuals.to(values.dtype), products, method)


class _ScaledMatrix:
    """The matrix divided by about its norm, for scipy, whose solvers stop at absolute numbers; it counts products."""

    def __init__(self, matrix: SymmetricMatrix, start: Float[Tensor, "n 1"]) -> None:
        self.matrix, self.products, self.scale = matrix, POWERS, 0.0
        self.numpy_dtype = np.dtype(np.float64 if matrix.dtype == torch.float64 else np.float32)
        start = start / torch.linalg.vector_norm(start)
        for _ in range(POWERS):
            image = product(matrix, start).double()
            self.scale = float(torch.linalg.vector_norm(image))
            if self.scale == 0:
                break
            start = (image / self.scale).to(start.dtype)

    def tensor(self, columns: Columns) -> Tensor:
        dtype = working_dtype(self.matrix)
        return torch.from_numpy(np.ascontiguousarray(columns)).to(device=self.matrix.device, dtype=dtype)

    def times(self, columns: Columns, *, checked: bool = True) -> Columns:
        """Return the product with ``(n,)`` or ``(n, k)``, ``checked`` to be finite."""
        vectors = self.tensor(columns.reshape(len(columns), -1))
        self.products += vectors.shape[1]
        image = product(self.matrix, vectors) if checked else (self.matrix @ vectors.to(self.matrix.dtype)).to(vectors)
        scaled: Columns = image.cpu().numpy() / (self.scale or 1.0)
        return scaled.astype(self.numpy_dtype, copy=False)

    def for_scipy(self) -> Any:
        """Return the operator that LOBPCG calls, whose products are not checked: those between its stages are."""
        from scipy.sparse.linalg import LinearOperator

        times = functools.partial(self.times, checked=False)
        return LinearOperator((self.matrix.shape[0],) * 2, matvec=times, matmat=times, dtype=self.numpy_dtype)


def _not_converged(method: str, converged: list[float], k: int, products: int, tol: float) -> RuntimeError:
    which = f" (converged: {', '.join(f'{value:.6g}' for value in converged)})" if converged else ""
    return RuntimeError(
        f"{method} found {len(converged)} of {k} eigenpairs to tol={tol:g} in {products} products{which}; "
        "raise max_products or tol, or ask for fewer; the smallest eigenvalues of a singular matrix, a cluster at 0, "
        "are seen in its spectral_density instead"
    )


def _lanczos(
    matrix: SymmetricMatrix, k: int, which: SpectrumEnd, tol: float, max_products: int | None, seed: int, width: int
) -> Eigenpairs:
    """Run the restarted Lanczos method, and compute the true residuals by ``k`` more products."""
    tol = tol or torch.finfo(matrix.dtype).eps
    most = 10 * matrix.shape[0] * width if max_products is None else max_products
    values, vectors, converged, products = lanczos(
        matrix, k, which, tol=tol, width=width, max_products=most - k, seed=seed
    )
    if not converged.all():
        raise _not_converged("lanczos", values[converged].sort(descending=True).values.tolist(), k, products, tol)
    order = values.argsort(descending=True, stable=True)
    held = vectors[:, order.to(vectors.device)].contiguous()
    return _with_residuals(values[order].to(held), held, product(matrix, held), products + k, "lanczos")


def _lobpcg(matrix: SymmetricMatrix, k: int, which: str, tol: float, max_products: int, seed: int) -> Eigenpairs:
    """Run scipy's LOBPCG in stages: its tolerance is absolute, and the largest eigenvalue shows only on the way.

    It warns, or breaks down with columns of NaN, where it does not reach the tolerance: the residuals are checked here.
    """
    with needed("eigsh", "fit"):
        from scipy.sparse.linalg import lobpcg

    accuracy = tol or max(math.sqrt(torch.finfo(working_dtype(matrix)).eps), torch.finfo(matrix.dtype).eps)
    start = random_columns(matrix, k, seed=seed)
    scaled = _ScaledMatrix(matrix, start[:, :1])
    unit, dtype, counting = scaled.scale or 1.0, scaled.numpy_dtype, scaled.for_scipy()
    vectors = np.linalg.qr(start.cpu().numpy().astype(dtype))[0]
    largest = 0.0  # in units of the scale
    while True:
        images = scaled.times(vectors)
        values, mix = np.linalg.eigh(vectors.T.astype(float) @ images)
        order = np.argsort(-values, kind="stable")
        values, mix = values[order], mix[:, order].astype(dtype)
        vectors, images = vectors @ mix, images @ mix
        largest = max(largest, float(np.abs(values).max()))
        good = np.linalg.norm(images - vectors * values.astype(dtype), axis=0) <= accuracy * largest
        steps = min(STAGE, (max_products - scaled.products) // k - 4)
        if good.all():
            parts = (unit * values, vectors, unit * images.astype(float))
            eigenvalues, block, image = (scaled.tensor(part) for part in parts)
            return _with_residuals(eigenvalues, block, image, scaled.products, "lobpcg")
        if steps < 1:
            raise _not_converged("lobpcg", (unit * values[good]).tolist(), k, scaled.products, accuracy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vectors = lobpcg(counting, vectors, tol=accuracy * largest / 2, maxiter=steps, largest=which == "LA")[1]
        vectors = np.linalg.qr(vectors)[0]
