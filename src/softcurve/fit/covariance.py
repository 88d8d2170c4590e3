"""The covariance of the coefficients of a fitted head: the inverse Hessian of the summed loss, or the sandwich form.

With ``A = Σ w J ⊗ x xᵀ + penalty`` and the scores ``s = (p − y) ⊗ x`` of the rows, it is ``A⁻¹``, or ``A⁻¹ (Σ w s sᵀ)
A⁻¹`` (Huber 1967; White 1980), which holds without the assumption that the model is true. A weight counts copies.

Adding a vector to the coefficients of all classes changes no probability. Without a penalty one class is therefore the
base: its coefficients are zero and those of the others are the differences from it. With a penalty that leaves only the
intercepts undetermined, which sum to zero; their covariance is the pseudo-inverse. Any symmetric ``G`` with ``A G A =
A`` leads to it, by subtracting the mean over the classes from the rows and columns of the intercepts, and also to the
covariance of differences. ``A + 1 1ᵀ ⊗ γ e eᵀ``, with ``e`` the axis of the intercept, has such an inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.fit import DataError
from softcurve.fit.covariance_blocks import class_blocks_from_rows
from softcurve.fit.data.source import share_of
from softcurve.fit.fitted_head import FOR_TILES, FittedHead
from softcurve.fit.head_matrix import SingularMatrix, add_rows, invert

CovarianceKind = Literal["hessian", "sandwich"]
WORKSPACE = 2**23  # bytes of the buffers of the linear algebra


def full_covariance(
    head: FittedHead, base: int | None, *, kind: CovarianceKind
) -> Float64[Tensor, "estimated size estimated size"]:
    """Return the covariance of all coefficients, by classes and features, the intercept last.

    The class ``base`` is left out. Raises DataError for a matrix that is singular or larger than the budget.
    """
    needed = _bytes_of_full(head, base, kind)
    if needed > head.budget:
        count = (len(head.bias) - (base is not None)) * head.size
        raise DataError(
            f"memory_budget must be at least {needed:,} bytes for the covariance of all {count:,} coefficients; got "
            f"{head.budget:,}: raise it, or use block='class' for the covariances within each class alone"
        )
    kept = _kept(head, base)
    covariance = _inverse_of_hessian(head, kept)
    if kind == "sandwich":
        covariance = _sandwich(head, kept, covariance)
    _to_original_units(covariance, head)
    if not head.penalty:
        return covariance
    if base is not None:
        covariance -= covariance[base].clone()
        covariance -= covariance[:, :, base, None].clone()
        estimated = [k for k in kept if k != base]
        result = covariance.new_empty(len(estimated), head.size, len(estimated), head.size)
        for row, k in zip(result, estimated, strict=True):  # one class at a time, as there is memory for two matrices
            row.copy_(covariance[k][:, estimated])
        return result
    if head.intercept:
        covariance[:, -1] -= covariance[:, -1].mean(0)
        covariance[..., -1] -= covariance[..., -1].mean(-1, keepdim=True)
    return covariance


def class_covariances(
    head: FittedHead, base: int | None, *, kind: CovarianceKind
) -> Float64[Tensor, "estimated size size"]:
    """Return the covariances of the coefficients within each class, which are blocks of :func:`full_covariance`."""
    count = len(head.bias) - (base is not None)
    blocks = _class_blocks(head, base, kind, output=8 * count * head.size**2)
    covariances = torch.empty(count, head.size, head.size, dtype=torch.float64)
    for covariance, block in zip(covariances, blocks, strict=True):
        covariance.copy_(block)
    return covariances


def variances(head: FittedHead, base: int | None, *, kind: CovarianceKind) -> Float64[Tensor, "estimated size"]:
    """Return the diagonal of :func:`full_covariance`."""
    return torch.stack([block.diagonal().clone() for block in _class_blocks(head, base, kind, output=0)])


def _class_blocks(
    head: FittedHead, base: int | None, kind: CovarianceKind, output: int
) -> Iterator[Float64[Tensor, "size size"]]:
    """Return the covariances within each class one by one, for a result of ``output`` bytes.

    They come from the full matrix, or from a matrix over the rows, whichever fits in the budget and takes fewer
    operations. Raises DataError if neither fits.
    """
    rows, parameters, sandwich = head.source.rows, len(head.bias) * head.size, kind == "sandwich"
    costs = {
        "full": parameters**2 * (rows * (3 if sandwich else 1) + parameters),
        "rows": rows**2 * parameters * (10 if sandwich else 4),
    }
    needed = {"full": _bytes_of_full(head, base, kind) + output, "rows": _bytes_of_rows(head, kind) + output}
    if share_of(head.source).group.size > 1:
        del needed["rows"]
    usable = [name for name, size in needed.items() if size <= head.budget]
    if not usable:
        raise DataError(
            f"memory_budget must be at least {min(needed.values()):,} bytes for the covariances of {len(head.bias):,} "
            f"classes of {head.size:,} coefficients from {rows:,} rows; got {head.budget:,}: raise it"
        )
    if min(usable, key=costs.__getitem__) == "rows":
        return class_blocks_from_rows(head, _kept(head, base), base, sandwich=sandwich)
    full = full_covariance(head, base, kind=kind)
    return (full[k, :, k] for k in range(len(full)))


def _kept(head: FittedHead, base: int | None) -> list[int]:
    """Return the classes whose coefficients the Hessian is formed in."""
    return [k for k in range(len(head.bias)) if head.penalty or k != base]


def _bytes_of_full(head: FittedHead, base: int | None, kind: CovarianceKind) -> int:
    count = len(_kept(head, base)) * head.size
    copies = 2 if kind == "sandwich" or (head.penalty and base is not None) else 1
    return WORKSPACE + int(8 * copies * count**2 / (1 - FOR_TILES))


def _bytes_of_rows(head: FittedHead, kind: CovarianceKind) -> int:
    rows, classes, size = head.source.rows, len(head.bias), head.size
    squares, columns = (2, 2 * classes) if kind == "sandwich" else (1, classes)
    return WORKSPACE + int(8 * (squares * rows**2 + rows * (columns + 10 * size) + 10 * size**2) / (1 - FOR_TILES))


def _rows_at_once(head: FittedHead, kept: list[int]) -> int:
    """Return how many rows may have four arrays of all coefficients in the part of the budget for them."""
    of_row = 8 * (4 * len(kept) * head.size + 6 * len(head.bias))
    return max(1, min(head.rows_at_once, int(FOR_TILES * head.budget) // of_row))


def _inverse_of_hessian(head: FittedHead, kept: list[int]) -> Float64[Tensor, "classes size classes size"]:
    """Return ``G`` in the coefficients of the ``kept`` classes and of centred features."""
    classes, size = len(kept), head.size
    matrix = torch.zeros(classes, size, classes, size, dtype=torch.float64)
    with share_of(head.source).group.summed(matrix):
        for rows in head.rows(_rows_at_once(head, kept)):
            p = rows.probabilities[:, kept]
            add_rows(matrix, p, rows.weights * p, rows.weights, rows.features)
    flat = matrix.view(classes * size, -1)
    if head.penalty:
        flat.diagonal().add_(head.coordinates.penalties(head.penalty).repeat(classes))
        if head.intercept:
            # Of the order of the other curvatures of the intercepts, so that the sum is conditioned as they are.
            matrix[:, -1, :, -1] += matrix[:, -1, :, -1].diagonal().sum() / classes
    try:
        invert(flat)
    except SingularMatrix as error:
        raise head.dependent(error.place) from error
    return matrix


def _sandwich(
    head: FittedHead, kept: list[int], inverse: Float64[Tensor, "classes size classes size"]
) -> Float64[Tensor, "classes size classes size"]:
    """Return ``G (Σ w s sᵀ) G``."""
    flat = inverse.view(len(kept) * head.size, -1)
    result = torch.zeros_like(flat)
    with share_of(head.source).group.summed(result):
        for rows in head.rows(_rows_at_once(head, kept)):
            residuals = rows.residuals()[:, kept] * rows.weights.sqrt()
            scores = (residuals[:, :, None] * rows.features[:, None]).flatten(1) @ flat
            result.addmm_(scores.T, scores)
    return result.view(inverse.shape)


def _to_original_units(covariance: Float64[Tensor, "classes size classes size"], head: FittedHead) -> None:
    """Replace the intercepts ``c`` of centred features by those of the features, ``b = c − W μ``."""
    if not head.intercept:
        return
    turn = torch.cat([-head.coordinates.mean, torch.ones(1, dtype=torch.float64)])
    for rows in covariance.view(len(covariance), head.size, -1):  # views, as a slice would be copied for a product
        rows[-1] = turn @ rows
    covariance[..., -1] = (covariance.view(-1, head.size) @ turn).view(covariance.shape[:-1])
