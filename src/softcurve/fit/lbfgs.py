"""The fit of a linear softmax head by scipy's L-BFGS-B on softcurve's loss and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from softcurve.fit import DataError
from softcurve.fit.evaluation import check_loss, mean_loss, tensors
from softcurve.fit.rows import Rows

__all__ = ["Fit", "Step", "fit_head"]


# Multiply-adds of the logits.
ONE_THREAD_BELOW = 10_000_000


@dataclass(frozen=True)
class Step:
    """Where the fit stands after an iteration."""

    iteration: int
    objective: float
    gradient_max: float


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted head; ``converged`` says whether the gradient came down to the tolerance."""

    weight: Float[Tensor, "classes d"]
    bias: Float[Tensor, " classes"]
    objective: float
    gradient_max: float
    iterations: int
    evaluations: int
    converged: bool


def fit_head(
    rows: Rows,
    *,
    loss: str = "cross_entropy",
    C: float = 1.0,
    max_iter: int = 500,
    tol: float = 1e-5,
    dtype: torch.dtype = torch.float64,
    on_iteration: Callable[[Step], None] = lambda step: None,
) -> Fit:
    """Minimise the mean over rows of the loss, plus ‖W‖²/(2·C·n), over the weight W and the bias, from zero.

    This is scikit-learn's ½‖W‖² + C·Σ loss divided by C·n, so C means the same; the bias is not penalised.
    (Two classes have two rows here and one there: its C is twice this one.)
    It has converged when no entry of this mean's gradient exceeds ``tol``. Losses and gradients are computed
    in ``dtype``, the steps in float64. Raises DataError.
    """
    check_loss(loss, rows)
    _check_options(C, max_iter, tol)
    objective = _Objective(rows, loss, C, dtype)
    iterations = 0

    def report(intermediate_result: OptimizeResult) -> None:
        nonlocal iterations
        iterations += 1
        on_iteration(Step(iterations, float(intermediate_result.fun), objective.gradient_max))

    with _threads(objective.size * len(rows)):
        result = minimize(
            objective,
            np.zeros(objective.size),
            jac=True,
            method="L-BFGS-B",
            callback=report,
            # The gradient alone decides: ftol = 0 goes on while the objective falls at all.
            options={"maxiter": max_iter, "maxfun": 20 * max_iter + 20, "gtol": tol, "ftol": 0.0},
        )
    weight, bias = objective.unpack(torch.tensor(result.x, dtype=dtype))
    gradient_max = float(np.abs(result.jac).max())
    return Fit(
        weight=weight.clone(),
        bias=bias.clone(),
        objective=float(result.fun),
        gradient_max=gradient_max,
        iterations=int(result.nit),
        evaluations=int(result.nfev),
        converged=gradient_max <= tol,
    )


class _Objective:
    """The mean objective and its gradient at a flat vector: the weight's rows, then the bias."""

    def __init__(self, rows: Rows, loss: str, C: float, dtype: torch.dtype) -> None:
        self.features, self.target = tensors(rows, dtype)
        self.loss = loss
        self.penalty = 1.0 / (2.0 * C * len(rows))
        self.shape = len(rows.classes), rows.features.shape[1]
        self.size = self.shape[0] * (self.shape[1] + 1)
        self.gradient_max = math.inf

    def unpack(self, flat: Float[Tensor, " size"]) -> tuple[Float[Tensor, "classes d"], Float[Tensor, " classes"]]:
        weight, bias = flat.split([self.size - self.shape[0], self.shape[0]])
        return weight.view(self.shape), bias

    def __call__(self, flat: Float64[np.ndarray, " size"]) -> tuple[float, Float64[np.ndarray, " size"]]:
        leaf = torch.tensor(flat, dtype=self.features.dtype, requires_grad=True)
        weight, bias = self.unpack(leaf)
        logits = torch.addmm(bias, self.features, weight.T)
        if not logits.isfinite().all():
            raise _overflow("the logits", leaf.dtype)
        value = mean_loss(self.loss, logits, self.target) + self.penalty * weight.square().sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        self.gradient_max = float(gradient.abs().max())
        if not (math.isfinite(value.item()) and math.isfinite(self.gradient_max)):
            raise _overflow("the objective or its gradient", leaf.dtype)
        return value.item(), gradient.double().numpy()


@contextmanager
def _threads(work: int) -> Iterator[None]:
    """Keep torch to one thread where an evaluation is a matter of milliseconds.

    Waiting for a second thread then costs more than it brings: on a busy machine ten times the evaluation.
    """
    threads = torch.get_num_threads()
    if work < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _overflow(what: str, dtype: torch.dtype) -> DataError:
    return DataError(
        f"data: {what} went beyond the range of {dtype}; scale the features to the order of 1, or use float64"
    )


def _check_options(C: float, max_iter: int, tol: float) -> None:
    for name, value in (("C", C), ("tol", tol)):
        if not (math.isfinite(value) and value > 0):
            raise DataError(f"{name} must be a positive number; got {value}")
    if max_iter < 1:
        raise DataError(f"max_iter must be 1 or more; got {max_iter}")
