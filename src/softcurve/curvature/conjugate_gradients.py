"""Solutions of ``(A + damping I) x = b`` by preconditioned conjugate gradients (Hestenes, Stiefel, 1952).

The columns of ``b`` are solved side by side, each with its own step lengths, so that they share the passes of one
product over the data. Two things differ from the textbook. Where the residual of the recurrence meets the tolerance,
the true one is computed and, if it does not, the column starts again from it; and a direction along which the curvature
is not positive ends its column, which says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Bool, Float, Float64
from softcurve.curvature.operator import SymmetricOperator, require_count, working_dtype
from softcurve.records import dataclass_repr
from softcurve.warn import warn_caller

__all__ = ["Solution", "conjugate_gradients", "solve_columns", "warn_unless_converged"]


@dataclass(frozen=True, eq=False)
class Solution:
    """``x`` and how it was found; one entry a column, or a number for a single vector.

    ``residuals`` are ``‖b − (A + damping I)x‖ / ‖b‖``, computed from x and not from the recurrence; ``converged`` is
    whether they are within the tolerance. A column that is ``indefinite`` met a direction of curvature ≤ 0 and stands
    where it was before; on a singular matrix without damping that may be far out, as its residual says.
    ``iterations`` is that of the column which took the most, ``products`` the sum over columns.
    """

    x: Float[Tensor, "n ..."]
    iterations: int
    residuals: Float64[Tensor, "*columns"]
    converged: Bool[Tensor, "*columns"]
    indefinite: Bool[Tensor, "*columns"]
    products: int

    __repr__ = dataclass_repr


def conjugate_gradients(
    operator: SymmetricOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-6,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
) -> Solution:
    """``x`` of ``(A + damping I) x = b`` to ``‖residual‖ ≤ tol ‖b‖`` in each column of ``b``, ``(n,)`` or ``(n, k)``.

    ``preconditioner`` maps residuals ``(n, k)`` to ``(n, k)``, column by column, as a symmetric positive definite
    matrix near the inverse does. ``x0`` (zero) is where to start, ``max_iterations`` (``10 n``) when to give up. A
    column of zeros has the solution zero. Vectors are in the operator's dtype, at least float32, inner products in
    float64. Warns (``UserWarning``) where a column has not converged, with the residual reached and the one requested.

    Raises:
        TypeError: ``b`` or ``x0`` is not a real floating-point tensor.
        ValueError: shapes or devices do not fit, an option is out of range, the products are not finite, or the
            preconditioner is not positive definite.
    """
    solution = solve_columns(
        operator, b, damping=damping, preconditioner=preconditioner, tol=tol, max_iterations=max_iterations, x0=x0
    )
    warn_unless_converged("solve", solution.residuals, solution.indefinite, tol, solution.iterations)
    return solution


def warn_unless_converged(
    name: str, residuals: Float64[Tensor, "*columns"], indefinite: Bool[Tensor, "*columns"], tol: float, iterations: int
) -> None:
    """Warn if a residual is above ``tol``; ``name`` is the public function's."""
    open_ = ~(residuals <= tol)
    if not open_.any():
        return
    systems = "" if residuals.ndim == 0 else f" in {int(open_.sum())} of {residuals.numel()} columns"
    remedy = "raise max_iterations or damping, or give a preconditioner"
    if (indefinite & open_).any():
        remedy = "a direction of curvature <= 0 was met: raise damping, or solve with GGN in place of Hessian"
    elif residuals[open_].max() < 1e-3:
        remedy += "; a residual that no longer falls is at the precision of the dtype: raise tol or use float64"
    warn_caller(
        f"{name} has not converged{systems}: the relative residual is {float(residuals[open_].max()):.3g} after "
        f"{iterations} iterations, requested is tol={tol:g}; {remedy}"
    )


def solve_columns(
    operator: SymmetricOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-6,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
) -> Solution:
    """As :func:`conjugate_gradients`, without the warning."""
    checks.require_between("damping", damping, 0.0, math.inf)
    checks.require_positive("tol", tol)
    n = operator.shape[0]
    if max_iterations is None:
        max_iterations = 10 * n
    require_count("max_iterations", max_iterations, 0)
    columns = _columns_of("b", b, operator)
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must be of b's shape {tuple(b.shape)}, got {tuple(x0.shape)}")
    x = torch.zeros_like(columns) if x0 is None else _columns_of("x0", x0, operator).clone()
    system = _System(operator, damping, preconditioner)
    norms = _dots(columns, columns).sqrt()
    x[:, norms == 0] = 0
    relative = (norms != 0).double()
    indefinite = torch.zeros_like(norms, dtype=torch.bool)
    stale = (norms != 0) & x.any(0)  # whose `relative` is not yet that of x
    floor = torch.finfo(x.dtype).eps

    open_ = norms.nonzero().squeeze(1)
    r = columns[:, open_]
    if stale.any():
        r = r - system.product(x[:, open_])
        relative[open_], stale[open_] = _dots(r, r).sqrt() / norms[open_], False
    keep = relative[open_] > tol
    open_, r = open_[keep], r[:, keep]
    p, rho = system.preconditioned(r)
    iterations = 0
    while len(open_) and iterations < max_iterations:
        iterations += 1
        q = system.product(p)
        curvature = _dots(p, q)
        # Below `floor` the sign of a curvature is that of rounding errors.
        flat = curvature <= floor * (_dots(p, p) * _dots(q, q)).sqrt()
        indefinite[open_[flat]] = True
        open_, r, p, q = open_[~flat], r[:, ~flat], p[:, ~flat], q[:, ~flat]
        rho, curvature = rho[~flat], curvature[~flat]

        step = (rho / curvature).to(x.dtype)
        x[:, open_] += step * p
        r = r - step * q
        stale[open_] = True
        near = _dots(r, r).sqrt() <= tol * norms[open_]
        keep = torch.ones_like(near)
        if near.any():
            checked = open_[near]
            r[:, near] = columns[:, checked] - system.product(x[:, checked])
            true = _dots(r[:, near], r[:, near]).sqrt() / norms[checked]
            # A residual that has not halved since it was last computed is as small as the dtype lets it be.
            keep[near] = (true > tol) & (true <= relative[checked] / 2)
            relative[checked], stale[checked] = true, False
        open_, r, p, rho, near = open_[keep], r[:, keep], p[:, keep], rho[keep], near[keep]
        z, fresh = system.preconditioned(r)
        p = z + torch.where(near, 0.0, fresh / rho).to(x.dtype) * p
        rho = fresh

    if stale.any():
        r = columns[:, stale] - system.product(x[:, stale])
        relative[stale] = _dots(r, r).sqrt() / norms[stale]
    shape = b.shape[1:]
    return Solution(
        x.reshape(b.shape),
        iterations,
        relative.reshape(shape),
        (relative <= tol).reshape(shape),
        indefinite.reshape(shape),
        system.products,
    )


@dataclass(eq=False)
class _System:
    """``A + damping I`` and the preconditioner; counts the products."""

    operator: SymmetricOperator
    damping: float
    preconditioner: Callable[[Tensor], Tensor] | None
    products: int = 0

    def product(self, p: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """``(A + damping I) p``."""
        if p.shape[1] == 0:
            return p
        self.products += p.shape[1]
        q = (self.operator @ p).to(p.dtype)
        if not q.isfinite().all():
            raise ValueError("operator must give finite products, got NaN or infinity; look for where they come from")
        return q + self.damping * p if self.damping else q

    def preconditioned(self, r: Float[Tensor, "n k"]) -> tuple[Float[Tensor, "n k"], Float64[Tensor, " k"]]:
        """``z = M r`` and ``r·z > 0``."""
        if self.preconditioner is None or r.shape[1] == 0:
            return r, _dots(r, r)
        z = self.preconditioner(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            found = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"preconditioner must map (n, k) to (n, k), got {found} from shape {tuple(r.shape)}")
        z = z.detach().to(r.dtype)
        rho = _dots(r, z)
        if not ((rho > 0) | (r == 0).all(0)).all():
            raise ValueError(
                f"preconditioner must be positive definite, got r·Mr = {rho.min().item():.3g} of a residual r; "
                "leave it out, or damp it"
            )
        return z, rho


def _columns_of(name: str, vectors: Tensor, operator: SymmetricOperator) -> Float[Tensor, "n k"]:
    """As columns of the working dtype."""
    checks.require_tensor(name, vectors)
    if not vectors.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {vectors.dtype}; convert it with {name}.float()")
    n = operator.shape[0]
    if vectors.ndim not in (1, 2) or vectors.shape[0] != n:
        raise ValueError(f"{name} must be of shape ({n},) or ({n}, k), got {checks.describe(vectors)}")
    if vectors.device != operator.device:
        raise ValueError(
            f"{name} must be on the operator's device {operator.device}, got {vectors.device}; move it there"
        )
    vectors = vectors.detach().to(working_dtype(operator))
    if not vectors.isfinite().all():
        raise ValueError(f"{name} must hold finite numbers, got NaN or infinity; look for where they come from")
    return vectors.unsqueeze(1) if vectors.ndim == 1 else vectors


def _dots(a: Float[Tensor, "n k"], b: Float[Tensor, "n k"]) -> Float64[Tensor, " k"]:
    """``a_i·b_i`` of the columns, in float64."""
    dots: Tensor = torch.linalg.vecdot(a.double(), b.double(), dim=0)
    return dots
