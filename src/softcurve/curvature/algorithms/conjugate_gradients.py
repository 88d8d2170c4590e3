"""Solutions of ``(A + damping I) x = b`` by preconditioned conjugate gradients (Hestenes, Stiefel 1952).

The columns of ``b`` share the passes of one product over the data, each with its own step lengths. Two things differ
from the textbook: a column whose recurrence meets the tolerance restarts from its true residual if that does not, and a
direction along which the curvature is not positive ends its column as indefinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Bool, Float, Float64
from softcurve.curvature.algorithms.matrix import Map, SymmetricMatrix, dots, product, working_dtype
from softcurve.records import dataclass_repr
from softcurve.warn import warn_caller


@dataclass(frozen=True, eq=False)
class Solution:
    """``x`` and how well it solves the system, with one entry per column, or a number for a single vector.

    ``residuals`` are ``‖b − (A + damping I)x‖ / ‖b‖``, computed from ``x`` and not from the recurrence; ``converged``
    is whether they are within the tolerance. An ``indefinite`` column met a direction of curvature ≤ 0 and keeps the
    iterate before it; on a singular matrix without damping that may be far out, as its residual shows.
    ``iterations`` is the largest over the columns, ``products`` the sum.
    """

    x: Float[Tensor, "n ..."]
    iterations: int
    residuals: Float64[Tensor, "*columns"]
    converged: Bool[Tensor, "*columns"]
    indefinite: Bool[Tensor, "*columns"]
    products: int

    __repr__ = dataclass_repr


def solve(
    matrix: SymmetricMatrix, b: Tensor, *, damping: float = 0.0, preconditioner: Map | None = None, tol: float = 1e-6,
    max_iterations: int | None = None, x0: Tensor | None = None,
) -> Solution:  # fmt: skip
    """Solve ``(A + damping I) x = b`` to ``‖residual‖ ≤ tol ‖b‖`` in each column of ``b``, ``(n,)`` or ``(n, k)``.

    ``preconditioner`` maps residuals ``(n, k)`` to ``(n, k)``, column by column, as a symmetric positive definite
    matrix near the inverse does. ``x0`` (default zero) is the start, ``max_iterations`` (default ``10 n``) the limit.
    A column of zeros has the solution zero. Vectors are in the matrix's dtype, at least float32, inner products in
    float64. Warns (``UserWarning``) where a column has not converged, with the residual reached and the one requested.

    Raises:
        TypeError: ``b`` or ``x0`` is not a real floating-point tensor.
        ValueError: shapes or devices do not fit, an option is out of range, the products are not finite, or the
            preconditioner is not positive definite.
    """
    solution = conjugate_gradients(matrix, b, damping, preconditioner, tol, max_iterations, x0)
    warn_unless_converged("solve", solution.residuals, solution.indefinite, tol, solution.iterations)
    return solution


def warn_unless_converged(
    name: str, residuals: Float64[Tensor, "*columns"], indefinite: Bool[Tensor, "*columns"], tol: float, iterations: int
) -> None:
    """Warn if a residual is above ``tol``; ``name`` is that of the public function."""
    failed = ~(residuals <= tol)
    if not failed.any():
        return
    systems = "" if residuals.ndim == 0 else f" in {int(failed.sum())} of {residuals.numel()} columns"
    remedy = "raise max_iterations or damping, or give a preconditioner"
    if (indefinite & failed).any():
        remedy = "a direction of curvature <= 0 was met: raise damping, or solve with GGN in place of Hessian"
    elif residuals[failed].max() < 1e-3:
        remedy += "; a residual that no longer falls is at the precision of the dtype: raise tol or use float64"
    warn_caller(
        f"{name} has not converged{systems}: the relative residual is {float(residuals[failed].max()):.3g} after "
        f"{iterations} iterations, requested is tol={tol:g}; {remedy}"
    )


def conjugate_gradients(
    matrix: SymmetricMatrix, b: Tensor, damping: float, preconditioner: Map | None, tol: float,
    max_iterations: int | None, x0: Tensor | None = None,
) -> Solution:  # fmt: skip
    """Solve the systems as :func:`solve` does, without the warning."""
    checks.require_between("damping", damping, 0.0, math.inf)
    checks.require_positive("tol", tol)
    max_iterations = 10 * matrix.shape[0] if max_iterations is None else max_iterations
    checks.require_count("max_iterations", max_iterations, 0)
    columns = _as_columns("b", b, matrix)
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must be of b's shape {tuple(b.shape)}, got {tuple(x0.shape)}")
    x = torch.zeros_like(columns) if x0 is None else _as_columns("x0", x0, matrix).clone()
    system = _DampedSystem(matrix, damping, preconditioner)
    norms = dots(columns, columns).sqrt()
    x[:, norms == 0] = 0
    iterations, relative, indefinite = _iterate(system, columns, x, norms, tol, max_iterations)
    residuals, converged, indefinite = (t.reshape(b.shape[1:]) for t in (relative, relative <= tol, indefinite))
    return Solution(x.reshape(b.shape), iterations, residuals, converged, indefinite, system.products)


def _iterate(
    system: _DampedSystem, b: Tensor, x: Tensor, norms: Tensor, tol: float, max_iterations: int
) -> tuple[int, Tensor, Tensor]:
    """Improve ``x`` in place; return the iterations, the true relative residuals, and which columns are indefinite."""
    relative = (norms != 0).double()
    indefinite, stale = torch.zeros_like(norms, dtype=torch.bool), torch.zeros_like(norms, dtype=torch.bool)
    active = norms.nonzero().squeeze(1)
    r = b[:, active]
    if x.any():
        r -= system.product(x[:, active])
        relative[active] = dots(r, r).sqrt() / norms[active]
    keep = relative[active] > tol
    active = active[keep]
    rounding = torch.finfo(x.dtype).eps
    columns = Recurrence(system.product, system.preconditioned, x[:, active], r[:, keep], rounding=rounding)
    iterations = 0
    while len(active) and iterations < max_iterations:
        iterations += 1
        keep = columns.advance()
        indefinite[active[~keep]], stale[active[keep]] = True, True
        near = dots(columns.r, columns.r).sqrt() <= tol * norms[active]
        if near.any():
            checked = active[near]
            columns.r[:, near] = r = b[:, checked] - system.product(columns.x[:, near])
            true = dots(r, r).sqrt() / norms[checked]
            # A residual that has not halved since it was last computed is as small as the dtype lets it be.
            keep[near] = (true > tol) & (true <= relative[checked] / 2)
            relative[checked], stale[checked] = true, False
        if not keep.all():
            x[:, active[~keep]] = columns.x[:, ~keep]
            active, near = active[keep], near[keep]
            columns.select(keep)
        columns.turn(restart=near)
    x[:, active] = columns.x
    if stale.any():
        r = b[:, stale] - system.product(x[:, stale])
        relative[stale] = dots(r, r).sqrt() / norms[stale]
    return iterations, relative, indefinite


class Recurrence:
    """The recurrence of conjugate gradients on columns that share the products.

    ``x`` are the solutions so far and ``r`` their residuals, both changed in place, ``p`` the directions of the next
    step, and ``rho`` are ``r·z`` with ``z``, the preconditioned residuals. With another inner product ``dot`` than that
    of columns, a whole matrix is one vector. ``rounding`` bounds the curvatures ``p·Ap / (‖p‖ ‖Ap‖)`` whose sign is
    that of rounding errors.
    """

    def __init__(
        self, product: Map, preconditioned: Map, x: Tensor, r: Tensor, *, rounding: float = 0.0,
        dot: Callable[[Tensor, Tensor], Tensor] = dots,
    ) -> None:  # fmt: skip
        self.product, self.preconditioned, self.rounding, self.dot = product, preconditioned, rounding, dot
        self.x, self.r, self.p = x, r, preconditioned(r).clone()
        self.rho = dot(r, self.p)

    def advance(self) -> Bool[Tensor, "*columns"]:
        """Move each column along its direction if it has positive curvature there, and return whether it has."""
        q = self.product(self.p)
        curvature = self.dot(self.p, q)
        bound = self.rounding * (self.dot(self.p, self.p) * self.dot(q, q)).sqrt() if self.rounding else 0.0
        positive, step = curvature > bound, self.rho / curvature
        if not positive.all():  # also where a product is not finite
            q, step = torch.where(positive, q, 0.0), torch.where(positive, step, 0.0)
        step = step.to(q.dtype)
        self.x.addcmul_(self.p, step)
        self.r.addcmul_(q, step, value=-1.0)
        return positive

    def turn(self, restart: Bool[Tensor, "*columns"] | None = None) -> None:
        """Choose directions conjugate to all earlier ones, or those of steepest descent in ``restart`` columns."""
        z, last = self.preconditioned(self.r), self.rho
        self.rho = self.dot(self.r, z)
        share = self.rho / last if restart is None else torch.where(restart, 0.0, self.rho / last)
        self.p.mul_(share.to(z.dtype)).add_(z)

    def select(self, columns: Bool[Tensor, "*columns"]) -> None:
        """Keep these columns and drop the others."""
        self.x, self.r, self.p, self.rho = (each[..., columns] for each in (self.x, self.r, self.p, self.rho))


@dataclass(eq=False)
class _DampedSystem:
    """``A + damping I`` and the preconditioner; it counts the products."""

    matrix: SymmetricMatrix
    damping: float
    preconditioner: Map | None
    products: int = 0

    def product(self, p: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return ``(A + damping I) p``, and count its columns."""
        self.products += p.shape[1]
        q = product(self.matrix, p)
        return q + self.damping * p if self.damping else q

    def preconditioned(self, r: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return ``z = M r``. Raises ValueError for a result that a positive definite ``M`` does not have."""
        if self.preconditioner is None or r.shape[1] == 0:
            return r
        z = self.preconditioner(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            came = checks.describe(z)
            raise ValueError(f"preconditioner must map (n, k) to (n, k), got {came} from shape {tuple(r.shape)}")
        z = z.detach().to(r.dtype)
        rho = dots(r, z)
        if not ((rho > 0) | (r == 0).all(0)).all():
            raise ValueError(
                f"preconditioner must be positive definite, got r·Mr = {rho.min().item():.3g} of a residual r; "
                "leave it out, or damp it"
            )
        return z


def _as_columns(name: str, vectors: Tensor, matrix: SymmetricMatrix) -> Float[Tensor, "n k"]:
    """Return vectors ``(n,)`` or ``(n, k)``, checked, as columns ``(n, k)`` in the working dtype."""
    checks.require_tensor(name, vectors)
    if not vectors.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {vectors.dtype}; convert it with {name}.float()")
    n = matrix.shape[0]
    if vectors.ndim not in (1, 2) or vectors.shape[0] != n:
        raise ValueError(f"{name} must be of shape ({n},) or ({n}, k), got {checks.describe(vectors)}")
    if vectors.device != matrix.device:
        raise ValueError(f"{name} must be on the operator's device {matrix.device}, got {vectors.device}")
    vectors = vectors.detach().to(working_dtype(matrix))
    if not vectors.isfinite().all():
        raise ValueError(f"{name} must hold finite numbers, got NaN or infinity; look for where they come from")
    return vectors.unsqueeze(1) if vectors.ndim == 1 else vectors
