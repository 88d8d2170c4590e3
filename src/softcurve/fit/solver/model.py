"""The minimum of a step's quadratic model by preconditioned conjugate gradients, also with products in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float
from softcurve.curvature.algorithms.conjugate_gradients import Recurrence
from softcurve.curvature.algorithms.matrix import Map

MOST_PRODUCTS = 500  # of one step
# The residual of products in bfloat16, relative to the last exact one, that is compared with the exact one again; the
# products after which it is at the latest; and the ratio of the two from which on rounding counts.
COMPARED, COMPARED_AFTER, ROUNDED_OFF = 0.1, 50, 2.0


@dataclass(eq=False)
class RoundedProduct:
    """A cheaper product with rounding errors, and whether they have not mattered so far."""

    product: Map
    accurate: bool = True


def minimise_model(
    product: Map, inverse: Map, gradient: Float[Tensor, "classes size"], *, tol: float,
    enough: Callable[[Tensor, float], bool] | None = None, most: int = MOST_PRODUCTS,
    rounded: RoundedProduct | None = None,
) -> tuple[Float[Tensor, "classes size"], Float[Tensor, "classes size"], float]:  # fmt: skip
    """Return ``x`` with ``A x ≈ −gradient``, its residual, and the change ``g·x + ½ x·A x`` that the model predicts.

    Conjugate gradients end where the norm of the residual that the preconditioner defines is ``tol`` times that of the
    gradient, or where the residual and its squared norm are ``enough``, or after ``most`` products.

    With ``rounded``, its products are used while they are accurate. The residual of the recurrence is replaced by that
    of ``product`` each time that it has fallen by ``COMPARED``, before the end, and now and then (van der Vorst and Ye,
    2000). If the two differ, or it has grown, ``product`` continues from there.
    """
    first_product = product if rounded is None else rounded.product
    recurrence = Recurrence(first_product, inverse, torch.zeros_like(gradient), -gradient, dot=inner)
    square = first = compared = float(recurrence.rho)
    products = since = 0

    def small() -> bool:
        return square <= tol * tol * first or (enough is not None and enough(recurrence.r, square))

    while products < most and square > 0.0:
        products += 1
        positive = bool(recurrence.advance())
        if positive:
            recurrence.turn()
            square = float(recurrence.rho)
        if rounded is not None and rounded.accurate:
            since += 1
            near = since < COMPARED_AFTER and COMPARED**2 * compared < square < compared / COMPARED**2
            if positive and near and products + 1 < most and not small():
                continue
            most_expected = min(ROUNDED_OFF**2 * square, compared) if positive else 0.0
            square = compared = _replace_residual(recurrence, product, gradient)
            products, since = products + 1, 0
            if not square <= most_expected:
                rounded.accurate = False
                square = _restart(recurrence, product, gradient, first)
                continue
        if not positive or small():
            break
    x, residual = recurrence.x, recurrence.r
    return x, residual, 0.5 * float(inner(x, gradient - residual))


def _replace_residual(recurrence: Recurrence, product: Map, gradient: Tensor) -> float:
    """Compute the residual by ``product``, keep the direction, and return the squared norm of the residual."""
    recurrence.r.copy_(-gradient).sub_(product(recurrence.x))
    recurrence.rho = inner(recurrence.r, recurrence.preconditioned(recurrence.r))
    return float(recurrence.rho)


def _restart(recurrence: Recurrence, product: Map, gradient: Tensor, first: float) -> float:
    """Continue with ``product`` from here, or from zero if that has a smaller residual; return its squared norm."""
    if not float(recurrence.rho) <= first:
        recurrence.x.zero_()
        recurrence.r.copy_(-gradient)
    recurrence.product = product
    recurrence.p.copy_(recurrence.preconditioned(recurrence.r))
    recurrence.rho = inner(recurrence.r, recurrence.p)
    return float(recurrence.rho)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors in the same order in memory."""
    # The order in memory is that of both, so that no entry is copied.
    return torch.dot(*((each if a.is_contiguous() else each.T).reshape(-1) for each in (a, b)))
