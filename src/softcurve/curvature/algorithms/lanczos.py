"""The Lanczos method with thick restarts, for eigenpairs at the ends of the spectrum of a symmetric matrix.

The basis stays on the matrix's device, and its inner products use torch's threads. Between the steps of ARPACK, which
uses the threads of scipy's BLAS, a product of the matrix was measured to take twice as long as alone on two cores.

Source: Wu, Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.curvature.algorithms.matrix import SymmetricMatrix, product, random_columns, working_dtype

COLUMNS_AT_ONCE = 1 << 16  # of the basis that a restart combines


class RitzPairs(NamedTuple):
    """Approximate eigenpairs, the most wanted first, and whether each has converged."""

    values: Float64[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    converged: Tensor  # (k,)
    products: int


def most_wanted(values: Float[Tensor, " n"], which: str) -> Tensor:
    """Return the places of ascending eigenvalues, the most wanted first; see :func:`.eigenpairs.eigsh`."""
    upwards = torch.arange(len(values), device=values.device)
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)
    if which == "BE":
        return torch.stack([upwards.flip(0), upwards], 1).flatten()[: len(values)]
    return upwards if which == "SA" else upwards.flip(0)


def lanczos(
    matrix: SymmetricMatrix, k: int, which: str, *, tol: float, width: int, max_products: int, seed: int
) -> RitzPairs:
    """Return ``k`` Ritz pairs of a basis of ``width`` vectors, which is restarted until they converge.

    A residual converges below ``tol`` times its eigenvalue, or times ``eps^(2/3)`` of the largest if that is more. The
    first basis takes ``width`` products and each restart fewer than ``width − k``; it stops within ``max_products``.
    """
    n, eps = matrix.shape[0], torch.finfo(working_dtype(matrix)).eps
    basis = torch.empty(width + 1, n, dtype=working_dtype(matrix), device=matrix.device)
    basis[0] = _unit(random_columns(matrix, 1, seed=seed).squeeze(1), basis[:0])
    projected = torch.zeros(width, width, dtype=torch.float64)
    held = products = 0
    while True:
        norm = 0.0
        for j in range(held, width):
            rest = product(matrix, basis[j].unsqueeze(1)).squeeze(1)
            products += 1
            # Without rounding only the last two vectors have a part in it, after a restart all. Subtracting twice is
            # enough (Giraud, Langou, Rozložník, van den Eshof 2005).
            first = 0 if j == held else j - 1
            projected[j, first : j + 1] = _subtract(rest, basis[first : j + 1])
            projected[j, : j + 1] += _subtract(rest, basis[: j + 1])
            projected[:j, j] = projected[j, :j]
            norm = float(torch.linalg.vector_norm(rest, dtype=torch.float64))
            if norm <= 10 * eps * float(projected.abs().max()):  # an invariant subspace: continue beside it
                norm, rest = 0.0, random_columns(matrix, 1, seed=seed + products).squeeze(1)
            basis[j + 1] = _unit(rest, basis[: j + 1]) if norm == 0 else rest.div_(norm)
        values, mix = torch.linalg.eigh(projected)
        order = most_wanted(values, which)
        values, mix = values[order], mix[:, order]
        bounds = tol * values.abs().clamp(min=eps ** (2 / 3) * float(values.abs().max()))
        converged = norm * mix[-1, :k].abs() <= bounds[:k]
        held = min(k + max(int(converged.sum()), (width - k) // 4), width - 1)
        if converged.all() or products + width - held > max_products:
            vectors = basis[:width].mT @ mix[:, :k].to(basis)
            return RitzPairs(values[:k], vectors, converged, products)
        for part in basis.split(COLUMNS_AT_ONCE, 1):
            part[:held] = mix[:, :held].mT.to(part) @ part[:width]
        basis[held] = basis[width]
        projected = torch.zeros_like(projected)
        projected.diagonal()[:held] = values[:held]


def _subtract(vector: Tensor, basis: Tensor) -> Float64[Tensor, " j"]:
    """Subtract from a vector, in place, its part in an orthonormal ``basis (j, n)``; return the coefficients."""
    coefficients = basis @ vector
    vector.addmv_(basis.mT, coefficients, alpha=-1)
    return coefficients.double().cpu()


def _unit(vector: Tensor, basis: Tensor) -> Tensor:
    """Return a unit vector in the direction of the part of ``vector`` that is orthogonal to ``basis``."""
    for _ in range(3):
        _subtract(vector, basis)
        vector /= torch.linalg.vector_norm(vector)
    return vector
