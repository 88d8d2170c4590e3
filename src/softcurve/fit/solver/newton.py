"""Newton's method for a softmax head: damped where rows are wrong, its steps by preconditioned conjugate gradients.

The damping μ is a trust region in the form of a multiplier (Levenberg, Marquardt): a step ``x`` minimises the
quadratic model plus ``½ μ Σ_i |p_i − y_i| · (change of the logits of row i)²``, and μ falls and rises by how well the
model foretold what the objective did. Measured in logits, and only where a row is still wrong, it does not hold back
what is settled: a trust region in the parameters took hundreds of steps for thousands of rare classes, this takes ten.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.fit.solver.curvature import Curvature
from softcurve.fit.solver.objective import Objective, Point
from softcurve.fit.solver.preconditioner import ClassBlocks, Eigenbasis, blocks_pay
from softcurve.records import ShortRepr

__all__ = ["OtherRows", "Outcome", "State", "Step", "minimise"]

REMEDY = "raise tol, or scale the features to the order of 1"
# Undamped from here on.
NO_DAMPING = 1e-5
# The residual that conjugate gradients may leave, relative to the gradient.
LOOSEST, TIGHTEST = 0.1, 1e-4
# The error of the last model up to which the residual counts as the next gradient, and its share of the tolerance.
NEARLY_TRUE, ENOUGH = 0.3, 0.5
# Of the tolerance, the nats that Newton's step may still promise at the end. By an approximate inverse, which has been
# seen to promise ten to thirty times too little where features are nearly collinear.
PROMISED = 0.02
MOST_PRODUCTS = 500  # of one step
ROUNDING = 1e-14  # of the objective
# A step must reach this share of what was foretold, or a part of it is tried; the shortest part.
SUFFICIENT, SHORTEST = 1e-4, 1e-3
MOST_FAILURES = 8
# How far, in nats, or relative to it, rounding and other axes may move the objective of a state.
SAME_OBJECTIVE = 1e-9
# The slope at a step's end, relative to its beginning, from which on it may pay to go on; how far at least, at most.
STILL_FALLING, WORTH_GOING_ON, FARTHEST = 0.1, 1.5, 8.0


class OtherRows(ValueError):
    """The objective at the parameters of a state is not the one that the state says."""


@dataclass(frozen=True)
class Step:
    """Where the fit stands after a step: nats, the largest entry of the gradient, products so far, seconds."""

    iteration: int
    objective: float
    gradient_max: float
    products: int
    seconds: float
    damping: float


@dataclass(frozen=True, eq=False, repr=False)
class State(ShortRepr):
    """All that the next step depends on."""

    parameters: Float64[Tensor, "classes size"]
    damping: float
    model_error: float  # the part of the gradient that the last step's model did not foretell; or infinite
    failures: int  # steps since the last that led on
    double: bool  # whether products are in float64
    blocks: bool  # whether the preconditioner is that of the classes' blocks
    history: tuple[Step, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Outcome(ShortRepr):
    """The last state, and why the fit ended."""

    state: State
    point: Point
    converged: bool
    reason: str


class Newton:
    """The fit from a state on; see :func:`minimise`."""

    def __init__(
        self, objective: Objective, curvature_in: Callable[[torch.dtype], Curvature], state: State, *, tol: float,
        memory_of_blocks: int, cold: Callable[[], State] | None = None,
    ) -> None:  # fmt: skip
        self.objective, self.curvature_in, self.state, self.tol = objective, curvature_in, state, tol
        self.memory_of_blocks = memory_of_blocks
        last = state.history[-1] if state.history else None
        self.started = time.perf_counter() - (last.seconds if last else 0.0)
        self.products = last.products if last else 0
        self.curvature = curvature_in(_dtype(state))
        self.point = self._first_point(cold if not state.history else None)
        self.curvature.move_to(self.point.parameters)
        self.prepared: tuple[float, ClassBlocks | Eigenbasis] | None = None
        if last is None:
            self._note()
        elif not math.isclose(self.point.value, last.objective, rel_tol=SAME_OBJECTIVE, abs_tol=SAME_OBJECTIVE):
            raise OtherRows(f"the objective is {self.point.value!r} there, and {last.objective!r} here")

    def _first_point(self, cold: Callable[[], State] | None) -> Point:
        """The point of the state, or that of ``cold`` where the objective is lower, or has no value at the state.

        Far from the optimum, as after a change of the features' units, rows are certain and the curvature says nothing.
        """
        lower = None if cold is None else cold()
        bound = math.inf if lower is None else self.objective.at(lower.parameters).value
        point = self.objective.at(self.state.parameters, self.curvature.keep)
        if lower is not None and not (point.finite and point.value <= bound):
            self.state, point = lower, self.objective.at(lower.parameters, self.curvature.keep)
        if not point.finite:
            self.objective.refuse_rows()
        return point

    def converged(self) -> bool:
        """Whether the gradient is within the tolerance, and what Newton's step promises at most a share of it, in nats.

        The gradient's size depends on the units of the features, and on how many classes share the rows. Half the
        squared Newton decrement, ``½ gᵀ H⁻¹ g``, does not: it is what the undamped step would gain. At least one step
        is made, as both are small also where the loss is flat.
        """
        if not self.point.gradient_max <= self.tol or len(self.state.history) < 2:
            return False
        # The loss of labels is at least 1 − p, and never below zero: there is no more to gain than what it is.
        settled = self.objective.source.kind == "labels" and self.point.value <= self.tol
        return settled or self._promised() <= PROMISED * self.tol

    def _promised(self) -> float:
        return 0.5 * _norm(self.point.gradient, self._approximation(0.0)) ** 2

    def lacks(self) -> str:
        """What keeps the fit from having converged where the gradient does not say it."""
        if not self.point.gradient_max <= self.tol or len(self.state.history) < 2:
            return ""
        return (
            f" (the gradient is within tol, but a step may still gain {self._promised():.1e} nats a row, and "
            f"{PROMISED * self.tol:.1e} are allowed)"
        )

    def _approximation(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The approximate inverse of the curvature with this damping, which products have from now on.

        A gradient has no part that is the same in all classes, but by rounding, and the inverse gives none.
        """
        if self.prepared is None or self.prepared[0] != damping:
            self.curvature.damping = damping
            self.curvature.leave_out_settled_rows()
            self.prepared = damping, ClassBlocks(self.curvature) if self.state.blocks else Eigenbasis(self.curvature)
        inverse = self.prepared[1]
        return lambda gradient: _settled(inverse(_settled(gradient)))

    def step(self) -> None:
        """One step of Newton's method, or a higher damping where it did not lead downwards."""
        state, point, curvature = self.state, self.point, self.curvature
        inverse = self._approximation(state.damping if state.damping >= NO_DAMPING else 0.0)
        norm = _norm(point.gradient, inverse)
        spent = curvature.products
        step, residual, foretold = conjugate_gradients(
            curvature, inverse, point.gradient,
            # To solve the model better than it is true is lost (Eisenstat and Walker, 1996).
            tol=max(min(LOOSEST, state.model_error), TIGHTEST),
            # Where the model is nearly true, its residual is the next gradient.
            enough=self._within_tolerance if state.model_error < NEARLY_TRUE else _never,
        )  # fmt: skip
        spent = curvature.products - spent
        there, whole = self._downhill(step, foretold)
        # The model is of the whole step's end.
        model_error = _norm(there.gradient + residual, inverse) / norm if whole and norm and there.finite else math.inf
        reached = there.value - point.value
        rounding = ROUNDING * abs(point.value)
        ratio = reached / foretold if foretold < -rounding else math.nan
        better = reached < -rounding or (reached <= rounding and there.gradient_max < point.gradient_max)
        failures = 0 if better else state.failures + 1
        # An undamped step that was solved to a tenth or better, and leaves most of the gradient, may lack digits.
        slow = whole and not curvature.damping and _norm(there.gradient, inverse) > 0.9 * norm
        if better and whole:
            there = self._beyond(there)
        blocks = state.blocks or blocks_pay(curvature, spent, self.memory_of_blocks)
        self.state = replace(
            state,
            damping=_next_damping(state.damping, ratio, better and whole),
            model_error=model_error,
            failures=failures,
            double=state.double or slow or failures >= 2,
            blocks=blocks,
        )
        self._move_to(there if better else point, recompute=not better)
        self._note()

    def _downhill(self, step: Tensor, foretold: float) -> tuple[Point, bool]:
        """The point at the end of the step, or of a part of it where all of it leads uphill; and whether of all."""
        point = self.point
        slope = float((point.gradient * step).sum())
        share = 1.0
        while True:
            there = self.objective.at(_settled(point.parameters + share * step), self.curvature.keep)
            reached = there.value - point.value
            hidden = not foretold < -ROUNDING * abs(point.value)  # by rounding
            if hidden or (there.finite and reached < SUFFICIENT * share * foretold) or share < SHORTEST:
                return there, share == 1.0
            if not there.finite:
                share *= 0.1
                continue
            # The parabola through both values and the slope has its minimum there.
            share *= min(max(0.5 * share * slope / (share * slope - reached), 0.1), 0.5)

    def _beyond(self, there: Point) -> Point:
        """A point farther along the step, if the objective goes on falling there.

        Where rows become certain, their loss dies away like an exponential, and each of Newton's steps gains one unit
        of their logits, whatever is left to gain. So the slope along the step is taken as ``a + b e^(−ct)``, through
        the values and slopes at both its ends, and followed to where it is zero.
        """
        point = self.point
        step = there.parameters - point.parameters
        first, last = (float((at.gradient * step).sum()) for at in (point, there))
        length = _zero_of_slope(first, last, there.value - point.value)
        if length < WORTH_GOING_ON:
            return there
        beyond = self.objective.at(_settled(point.parameters + length * step), self.curvature.keep)
        if beyond.finite and beyond.value < there.value:
            return beyond
        return self.objective.at(there.parameters, self.curvature.keep)

    def _within_tolerance(self, residual: Tensor, square: float) -> bool:
        """Whether a gradient like this residual would end the fit, with room for what the model leaves out."""
        if 0.5 * square > ENOUGH * PROMISED * self.tol:
            return False
        coordinates = self.objective.coordinates
        turned = residual[:, : coordinates.width]
        # The largest entry of d is at least their norm over √d, and the norm is the same in all coordinates.
        if float(turned.square().sum(1).max()) > (ENOUGH * self.tol) ** 2 * len(coordinates.mean):
            return False
        return coordinates.largest_gradient(*coordinates.about_mean(residual)) <= ENOUGH * self.tol

    def _move_to(self, point: Point, *, recompute: bool) -> None:
        self.point, self.prepared = point, None
        if self.state.double and self.curvature.dtype != torch.float64:
            self.products += self.curvature.products
            self.curvature = self.curvature_in(torch.float64)
            recompute = True
        self.curvature.move_to(point.parameters)
        if recompute:
            self.point = self.objective.at(point.parameters, self.curvature.keep)

    def _note(self) -> None:
        point, history = self.point, self.state.history
        done = Step(
            len(history), point.value, point.gradient_max, self.products + self.curvature.products,
            time.perf_counter() - self.started, self.state.damping,
        )  # fmt: skip
        self.state = replace(self.state, parameters=point.parameters, history=(*history, done))


def minimise(
    objective: Objective,
    curvature_in: Callable[[torch.dtype], Curvature],
    state: State,
    *,
    tol: float,
    max_iter: int,
    memory_of_blocks: int,
    on_step: Callable[[State], None],
    cold: Callable[[], State] | None = None,
) -> Outcome:
    """Go on from ``state`` until the fit has converged to ``tol``, ``max_iter`` steps, or no progress.

    Where the objective is lower at ``cold`` than at a ``state`` without a step, it goes on from there. Raises OtherRows
    for a state that other rows have led to.
    """
    newton = Newton(objective, curvature_in, state, tol=tol, memory_of_blocks=memory_of_blocks, cold=cold)
    while True:
        on_step(newton.state)
        if newton.converged():
            reason = "the gradient and the Newton decrement are within the tolerance"
            return Outcome(newton.state, newton.point, True, reason)
        if newton.state.failures >= MOST_FAILURES:
            reason = f"rounding hides any further decrease{newton.lacks()}; {REMEDY}"
            return Outcome(newton.state, newton.point, False, reason)
        if len(newton.state.history) > max_iter:
            reason = f"{max_iter} steps were not enough{newton.lacks()}; raise max_iter, or {REMEDY}"
            return Outcome(newton.state, newton.point, False, reason)
        newton.step()


def _zero_of_slope(first: float, last: float, change: float) -> float:
    """Where ``a + b e^(−ct)`` is zero that is ``first`` at 0, ``last`` at 1, and ``change`` in the mean between.

    At most ``FARTHEST``. One, where the slope at 1 is hardly negative any more, or falls in another way.
    """
    if not first < last < STILL_FALLING * first:
        return 1.0
    # h(c) = 1/(1 − e^(−c)) − 1/c rises from ½, a parabola's, to 1.
    h = (first - change) / (first - last)
    if not 0.5 < h < 1.0:
        return min(first / (first - last), FARTHEST) if h <= 0.5 else 1.0
    low, high = 1e-6, 1e3
    for _ in range(60):
        c = math.sqrt(low * high)
        low, high = (c, high) if -1.0 / math.expm1(-c) - 1.0 / c < h else (low, c)
    b = (first - last) / -math.expm1(-c)
    a = first - b
    return min(math.log(-b / a) / c, FARTHEST) if a > 0.0 else FARTHEST


def _dtype(state: State) -> torch.dtype:
    return torch.float64 if state.double else torch.float32


def _next_damping(damping: float, ratio: float, better: bool) -> float:
    if not better or ratio < 0.25:
        return max(damping, 1e-3) * 4
    if 0.9 < ratio < 1.1:
        return damping / 50
    if ratio > 0.9:
        return damping / 8
    if ratio > 0.6 or math.isnan(ratio):
        return damping / 3
    return damping


def _never(residual: Tensor, square: float) -> bool:
    return False


def _norm(gradient: Tensor, inverse: Callable[[Tensor], Tensor]) -> float:
    return math.sqrt(max(float((gradient * inverse(gradient)).sum()), 0.0))


def _settled(parameters: Tensor) -> Tensor:
    """The same change in all classes changes no probability: of such heads, the one with the smallest norm."""
    return parameters - parameters.mean(0)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    gradient: Float64[Tensor, "classes size"],
    *,
    tol: float,
    enough: Callable[[Tensor, float], bool],
    most: int = MOST_PRODUCTS,
) -> tuple[Float64[Tensor, "classes size"], Float64[Tensor, "classes size"], float]:
    """A step ``x`` with ``A x ≈ −gradient``, its residual, and the change ``g·x + ½ x·A x`` that the model foretells.

    It ends where the residual, in the preconditioner's measure, is ``tol`` times the gradient's, or where it, and its
    square in that measure, are ``enough``.
    """
    x = torch.zeros_like(gradient)
    residual = -gradient
    z = inverse(residual)
    along = z.clone()
    square = first = float((residual * z).sum())
    for _ in range(most):
        if not square > 0.0:
            break
        changed = product(along)
        bend = float((along * changed).sum())
        if not bend > 0.0:
            break
        length = square / bend
        x.add_(along, alpha=length)
        residual.sub_(changed, alpha=length)
        z = inverse(residual)
        last, square = square, float((residual * z).sum())
        if square <= tol * tol * first or enough(residual, square):
            break
        along.mul_(square / last).add_(z)
    return x, residual, 0.5 * float((x * (gradient - residual)).sum())
