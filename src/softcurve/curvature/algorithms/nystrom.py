"""The Nyström approximation of a positive semidefinite matrix from its products with random columns.

Tropp, Yurtsever, Udell, Cevher 2017, Fixed-rank approximation of a positive-semidefinite matrix from streaming data.
Frangella, Tropp, Udell 2023, Randomized Nyström preconditioning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softcurve.array_types import Float
from softcurve.curvature.algorithms.matrix import Map, SymmetricMatrix, inner


def nystrom_factor(probes: Float[Tensor, "n r"], image: Float[Tensor, "n r"]) -> Float[Tensor, "n k"]:
    """Return ``L`` of ``L Lᵀ ⪯ A``, ``k ≤ r``, from orthonormal ``probes`` and ``image = A probes``, overwritten.

    The columns of ``L`` are orthogonal, the longest first. For stability the matrix is shifted by a rounding error,
    which is taken off the squared lengths of the columns again.

    Raises ``ValueError`` if ``A`` has an eigenvalue below 0 that is no rounding error.
    """
    shift = torch.finfo(image.dtype).eps * torch.linalg.vector_norm(image)
    image.add_(probes, alpha=float(shift))
    core = inner(probes, image)
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    largest = values.abs().amax()
    if (values < -1e-5 * largest).any():
        raise ValueError("the matrix must be positive semidefinite, got an eigenvalue below 0")
    kept = values > largest * 1e-12
    factor = image @ (vectors[:, kept] / values[kept].sqrt()).to(image.dtype)
    squares, rotation = torch.linalg.eigh(inner(factor, factor))
    squares, rotation = squares.flip(0).clamp(min=torch.finfo(torch.float64).tiny), rotation.flip(1)
    rotation *= ((squares - shift.double()).clamp(min=0) / squares).sqrt()
    return torch.matmul(factor, rotation.to(factor.dtype))


def nystrom_preconditioner(matrix: SymmetricMatrix, *, rank: int, damping: float, seed: int) -> Map:
    """Return a multiple of ``(A + damping I)⁻¹`` with ``A ≈ U diag(λ) Uᵀ``, its smallest ``λ`` in all other directions.

    ``(λ_min + damping) U (λ + damping)⁻¹ Uᵀ + (I − U Uᵀ)`` on columns ``(n, k)``. Source: Frangella, Tropp, Udell 2023,
    "Randomized Nyström preconditioning".
    """
    n = matrix.shape[0]
    generator = torch.Generator().manual_seed(seed)
    probes = torch.empty(n, min(rank, n), dtype=matrix.dtype).normal_(generator=generator).to(matrix.device)
    probes = torch.linalg.qr(probes)[0]
    factor = nystrom_factor(probes, matrix @ probes)
    values = factor.double().square().sum(0)
    kept = values > 0
    basis = factor[:, kept] / values[kept].sqrt().to(factor.dtype)
    # With fewer columns than probes the matrix has their rank, and is 0 in all other directions.
    least = values.amin() if kept.sum() == probes.shape[1] < n else values.new_zeros(())
    excess = ((least + damping) / (values[kept] + damping) - 1).to(factor.dtype).unsqueeze(-1)
    return lambda columns: columns + basis @ (excess * (basis.T @ columns))
