"""The Nyström approximation of a positive semidefinite matrix from its products with random columns.

Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data".
Frangella, Tropp, Udell 2023, "Randomized Nyström preconditioning".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcurve.array_types import Float

__all__ = ["NystromPreconditioner", "low_rank"]

ENTRIES = 2**22  # that are widened to float64 at a time


def low_rank(probes: Float[Tensor, "n r"], image: Float[Tensor, "n r"]) -> Float[Tensor, "n k"]:
    """``low`` of ``low lowᵀ ⪯ A``, ``k ≤ r``, from orthonormal ``probes`` and ``image = A probes``, overwritten.

    With orthogonal columns, the longest first. The image is shifted by a rounding error, which is taken out again.

    Raises:
        ValueError: ``A`` has an eigenvalue below 0 that is no rounding error.
    """
    shift = torch.finfo(image.dtype).eps * torch.linalg.vector_norm(image)
    image.add_(probes, alpha=float(shift))
    core = _inner(probes, image)
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    largest = values.abs().amax()
    if (values < -1e-5 * largest).any():
        raise ValueError("the matrix must be positive semidefinite, got an eigenvalue below 0")
    kept = values > largest * 1e-12
    low = image @ (vectors[:, kept] / values[kept].sqrt()).to(image.dtype)
    squares, turned = torch.linalg.eigh(_inner(low, low))
    squares, turned = squares.flip(0).clamp(min=torch.finfo(torch.float64).tiny), turned.flip(1)
    lengths = ((squares - shift.double()).clamp(min=0) / squares).sqrt()
    turned *= lengths
    return torch.matmul(low, turned.to(low.dtype))


def _inner(a: Float[Tensor, "n r"], b: Float[Tensor, "n s"]) -> Tensor:
    """``aᵀ b`` in float64, some rows at a time."""
    step = max(1, ENTRIES // max(1, a.shape[1]))
    found = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(step), b.split(step), strict=True):
        found.addmm_(left.T.double(), right.double())
    return found


class NystromPreconditioner:
    """``(A + damping I)⁻¹`` with ``A ≈ U diag(λ) Uᵀ``, and its smallest ``λ`` in all other directions, up to a factor.

    ``(λ_min + damping) U (λ + damping)⁻¹ Uᵀ + (I − U Uᵀ)``. Source: Frangella, Tropp, Udell 2023.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor, *, rank: int, damping: float, seed: int):
        n = len(like)
        generator = torch.Generator().manual_seed(seed)
        probes = torch.empty(n, min(rank, n), dtype=like.dtype).normal_(generator=generator).to(like.device)
        probes = torch.linalg.qr(probes)[0]
        low = low_rank(probes, product(probes).to(like.dtype))
        values = low.double().square().sum(0)
        kept = values > 0
        self.basis = low[:, kept] / values[kept].sqrt().to(low.dtype)
        # Fewer columns than probes: the rank of the matrix is found, and all else is 0.
        least = values.amin() if kept.sum() == probes.shape[1] < n else values.new_zeros(())
        self.excess = ((least + damping) / (values[kept] + damping) - 1).to(low.dtype)

    def __call__(self, columns: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Of columns."""
        return columns + self.basis @ (self.excess.unsqueeze(-1) * (self.basis.T @ columns))
