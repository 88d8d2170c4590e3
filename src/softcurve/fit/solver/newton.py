"""Newton's method for a softmax head, with damping in the logits and steps by preconditioned conjugate gradients.

The damping μ is a trust region in the form of a multiplier (Levenberg, Marquardt): a step ``x`` minimises the quadratic
model plus ``½ μ Σ_i |p_i − y_i| · (change of the logits of row i)²``, and μ is adapted to how well the model predicts
the change of the objective. As it measures the logits, and only of rows with an error, it does not limit the others: a
trust region in the parameters took hundreds of steps for thousands of rare classes, this one takes ten.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.curvature.algorithms.matrix import Map
from softcurve.fit.solver.curvature import Curvature
from softcurve.fit.solver.model import MOST_PRODUCTS, RoundedProduct, inner, minimise_model
from softcurve.fit.solver.objective import Objective, Point
from softcurve.fit.solver.preconditioner import (
    ClassBlocks,
    Eigenbasis,
    between_centred,
    centred,
    cost_of_blocks,
    expected_rows,
    most_rows,
    saved_by_blocks,
)
from softcurve.records import ShortRepr

REMEDY = "raise tol, or scale the features to the order of 1"
NO_DAMPING = 1e-5  # a smaller damping counts as none
LOOSEST, TIGHTEST = 0.1, 1e-4  # the residual that conjugate gradients may leave, relative to the gradient
# The error of the last model up to which the residual predicts the next gradient, and the share of the tolerance that
# it must reach then.
NEARLY_EXACT, ENOUGH = 0.3, 0.5
# The nats that Newton's step may still gain at the end, relative to the tolerance. They are measured with an
# approximate inverse, which has been ten to thirty times too small for nearly collinear features.
GAIN = 0.02
IN_VAIN = 2.0  # blocks that take more than this multiple of the products of the eigenbasis are given up
ROUNDING = 1e-14  # of the objective
# A step must reach this share of the predicted decrease, or a shorter one is tried, down to the shortest.
SUFFICIENT, SHORTEST = 1e-4, 1e-3
MOST_FAILURES = 8
SAME_OBJECTIVE = 1e-9  # how much rounding and other axes may change the objective of a state, in nats or relatively
# The slope at the end of a step, relative to that at its beginning, from which on going farther may pay; the shortest
# and the longest such extension.
STILL_FALLING, WORTH_GOING_ON, FARTHEST = 0.1, 1.5, 8.0


class OtherRows(ValueError):
    """The objective at the parameters of a state differs from the one in the state."""


@dataclass(frozen=True)
class Step:
    """The objective in nats after a step, the largest entry of its gradient, and the products and seconds so far."""

    iteration: int
    objective: float
    gradient_max: float
    products: int
    seconds: float
    damping: float


@dataclass(frozen=True, eq=False, repr=False)
class State(ShortRepr):
    """The state of a fit, on which the next step depends."""

    parameters: Float64[Tensor, "classes size"]
    damping: float
    model_error: float = math.inf  # the part of the gradient that the model of the last step did not predict
    failures: int = 0  # the number of steps since the last one that decreased the objective
    double: bool = False  # whether products are in float64
    rounded: bool = True  # whether products may be in bfloat16
    blocks: bool = False  # whether the preconditioner is ClassBlocks
    # The point where the blocks in use are computed (None: the next one) and the damping there; the products of the
    # step with the eigenbasis before the first blocks and of the first with these, and how many more the later took.
    blocks_at: Float64[Tensor, "classes size"] | None = None
    blocks_damping: float = 0.0
    eigenbasis_products: int = 0
    first_products: int = 0
    more_products: int = 0
    no_blocks: bool = False  # whether blocks have been tried in vain
    # The error of a step's model below which the curvature at its end counts as alike, so that blocks are used again.
    alike: float = 0.5
    history: tuple[Step, ...] = ()


class Newton:
    """A fit that starts from a state.

    ``curvature_in(dtype=...)`` makes the curvature. If the state has no step yet and the objective is lower at
    ``cold``, the fit starts there. Raises OtherRows for a state of other rows.
    """

    def __init__(
        self, objective: Objective, curvature_in: Callable[..., Curvature], state: State, *, tol: float,
        memory_of_blocks: int, cold: Callable[[], State] | None = None,
    ) -> None:  # fmt: skip
        state = replace(state, parameters=objective.coordinates.laid_out(state.parameters))
        self.objective, self.curvature_in, self.state, self.tol = objective, curvature_in, state, tol
        self.memory_of_blocks = memory_of_blocks
        last = state.history[-1] if state.history else None
        self.started = time.perf_counter() - (last.seconds if last else 0.0)
        self.products = last.products if last else 0
        self.curvature = curvature_in(dtype=torch.float64 if state.double else torch.float32)
        self.point = self._first_point(cold if last is None else None)
        self.curvature.move_to(self.point.parameters)
        self.prepared: tuple[float, Map] | None = None
        self.blocks: ClassBlocks | None = None
        if last is None:
            self._note()
        elif not math.isclose(self.point.value, last.objective, rel_tol=SAME_OBJECTIVE, abs_tol=SAME_OBJECTIVE):
            raise OtherRows(f"the objective is {self.point.value!r} there, and {last.objective!r} here")

    def _first_point(self, cold: Callable[[], State] | None) -> Point:
        """Return the point of the state, or that of ``cold`` if the objective is lower there or not finite here.

        Far from the optimum, as after a change of the units of the features, rows are certain and have no curvature.
        """
        other = None if cold is None else cold()
        bound = math.inf if other is None else self.objective.at(other.parameters).value
        point = self.objective.at(self.state.parameters, self.curvature.keep)
        if other is not None and not (point.finite and point.value <= bound):
            self.state, point = other, self.objective.at(other.parameters, self.curvature.keep)
        if not point.finite:
            self.objective.refuse_rows()
        return point

    def run(self, max_iter: int, on_step: Callable[[State], None]) -> tuple[bool, str]:
        """Take steps, up to ``max_iter``, while they make progress; return whether the fit converged, and why it ended.

        It has converged when the gradient is within the tolerance and an undamped step would gain at most a share of
        the tolerance, in nats.
        """
        while True:
            on_step(self.state)
            gain = self._gain()
            lacking = f"a step may still gain {gain:.1e} nats a row, and {GAIN * self.tol:.1e} are allowed"
            lacking = "" if gain == math.inf else f" (the gradient is within tol, but {lacking})"
            if gain <= GAIN * self.tol:
                return True, "the gradient and the Newton decrement are within the tolerance"
            if self.state.failures >= MOST_FAILURES:
                return False, f"rounding hides any further decrease{lacking}; {REMEDY}"
            if len(self.state.history) > max_iter:
                return False, f"{max_iter} steps were not enough{lacking}; raise max_iter, or {REMEDY}"
            self.step()

    def _gain(self) -> float:
        """Return the nats that an undamped step would gain, or infinity while the gradient is not within the tolerance.

        The size of the gradient depends on the units of the features and on the number of classes. Half the squared
        Newton decrement, ``½ gᵀ H⁻¹ g``, which is the gain, does not. At least one step is taken, as both are small
        also where the loss is flat.
        """
        point = self.point
        if not (point.gradient_max <= self.tol and len(self.state.history) >= 2):
            return math.inf
        # For labels the loss is at least 1 − p ≥ 0, so that no more can be gained than its value.
        if self.objective.problem.source.kind == "labels" and point.value <= self.tol:
            return 0.0
        return 0.5 * _norm(point.gradient, self._approximation(0.0)) ** 2

    def _approximation(self, damping: float) -> Map:
        """Return the approximate inverse of the curvature with this damping, and set the damping of the products."""
        if self.prepared is None or self.prepared[0] != damping:
            self.curvature.damping = damping
            self.curvature.leave_out_negligible_rows()
            usable = self.state.blocks and most_rows(self.curvature, self.memory_of_blocks)
            self.prepared = damping, between_centred(self._blocks(damping) if usable else Eigenbasis(self.curvature))
        inverse = self.prepared[1]
        return lambda gradient: inverse(gradient.to(self.curvature.vectors))

    def _blocks(self, damping: float) -> ClassBlocks:
        """Return the blocks in use, with the diagonal at this point. If there are none, they are computed here."""
        state, point, curvature = self.state, self.point, self.curvature
        if state.blocks_at is None:
            self.state = replace(
                state, blocks_at=point.parameters, blocks_damping=damping, first_products=0, more_products=0
            )
            self.blocks = ClassBlocks(curvature, self.memory_of_blocks)
            return self.blocks
        if self.blocks is None:  # in a fit that goes on from a checkpoint
            self._look_from(state.blocks_at, state.blocks_damping)
            self.blocks = ClassBlocks(curvature, self.memory_of_blocks)
            self._look_from(point.parameters, damping)
        self.blocks.rescale(curvature)
        return self.blocks

    def _look_from(self, parameters: Tensor, damping: float) -> None:
        """Let the curvature be that at these parameters."""
        self.objective.at(parameters, self.curvature.keep)
        self.curvature.move_to(parameters)
        self.curvature.damping = damping
        self.curvature.leave_out_negligible_rows()

    def _rounded(self) -> RoundedProduct | None:
        """Return the product in bfloat16 while it is accurate enough, where there is one."""
        usable = self.state.rounded and self.curvature.rounded is not None
        return RoundedProduct(self.curvature.rounded_product) if usable else None

    def step(self) -> None:
        """Take one step of Newton's method, or raise the damping where it does not decrease the objective."""
        inverse = self._approximation(self.state.damping if self.state.damping >= NO_DAMPING else 0.0)
        point, curvature, rounded = self.point, self.curvature, self._rounded()
        before, most = curvature.products, self._most_products(rounded=rounded is not None)
        step, residual, predicted = self._minimise(inverse, rounded, most)
        if most < MOST_PRODUCTS and curvature.products - before >= most:
            self._replace_blocks()
            del inverse  # its blocks take as much memory as those that replace them
            inverse, before = self._approximation(curvature.damping), curvature.products
            step, residual, predicted = self._minimise(inverse, rounded, MOST_PRODUCTS)
        state, norm = self.state, _norm(point.gradient, inverse)
        step, residual = step.double(), residual.double()
        products = curvature.products - before
        there, whole = self._backtrack(step, predicted)
        # The model predicts the gradient at the end of the whole step.
        model_error = _norm(there.gradient + residual, inverse) / norm if whole and norm and there.finite else math.inf
        change = there.value - point.value
        rounding = ROUNDING * abs(point.value)
        ratio = change / predicted if predicted < -rounding else math.nan
        better = change < -rounding or (change <= rounding and there.gradient_max < point.gradient_max)
        failures = 0 if better else state.failures + 1
        # An undamped step that was solved to a tenth or better, but leaves most of the gradient, may lack precision.
        slow = whole and not curvature.damping and _norm(there.gradient, inverse) > 0.9 * norm
        if better and whole:
            there = self._extend(there)
        self.state = replace(
            state, damping=_next_damping(state.damping, ratio, better and whole), model_error=model_error,
            failures=failures, double=state.double or slow or failures >= 2,
            rounded=state.rounded and (rounded is None or rounded.accurate),
        )  # fmt: skip
        self._choose_blocks(products, rounded=rounded is not None, alike=not better or model_error < state.alike)
        self._move_to(there if better else point, recompute=not better)
        self._note()

    def _minimise(self, inverse: Map, rounded: RoundedProduct | None, most: int) -> tuple[Tensor, Tensor, float]:
        """Return the step, its residual and the predicted change of the objective, after at most so many products."""
        error, gradient = self.state.model_error, self.point.gradient.to(self.curvature.vectors)
        return minimise_model(
            self.curvature, inverse, gradient,
            # Solving the model more exactly than it is true gains nothing (Eisenstat and Walker, 1996).
            tol=max(min(LOOSEST, error), TIGHTEST),
            # The residual of a nearly exact model is the next gradient.
            enough=self._within_tolerance if error < NEARLY_EXACT else None, most=most, rounded=rounded,
        )  # fmt: skip

    def _most_products(self, *, rounded: bool) -> int:
        """Return the products of a step after which its blocks are replaced.

        Those of an earlier point may take as many products more as new ones cost. The first ones of a fit may take
        twice those of the eigenbasis, which has represented the curvature better if they take more.
        """
        state = self.state
        if self.blocks is None or not (state.first_products or state.eigenbasis_products):
            return MOST_PRODUCTS
        cost = cost_of_blocks(self.curvature, self.blocks.count, self.memory_of_blocks, rounded=rounded)
        if not state.first_products:
            return int(min(MOST_PRODUCTS, IN_VAIN * state.eigenbasis_products + cost))
        return int(min(MOST_PRODUCTS, min(state.first_products, cost) + cost))

    def _replace_blocks(self) -> None:
        """Replace blocks that take too many products: by others, or the first ones of a fit by the eigenbasis."""
        if self.state.first_products:
            self.state = replace(self.state, alike=self.state.alike / 2)
        else:
            self.state = replace(self.state, blocks=False, no_blocks=True)
        self._drop_blocks()
        self.prepared = None

    def _choose_blocks(self, products: int, *, rounded: bool, alike: bool) -> None:
        """Note after a step with as many products whether the next one uses blocks, and whether it computes them anew.

        They are used when they should save more than they cost. They are computed anew when the last step has changed
        the curvature, so that it is not ``alike``, or when steps have taken as many products more than the first one
        with them as others cost.
        """
        state, curvature, memory = self.state, self.curvature, self.memory_of_blocks
        if self.blocks is not None:
            cost = cost_of_blocks(curvature, self.blocks.count, memory, rounded=rounded)
            first = state.first_products or products
            more = max(state.more_products + products - first, 0)
            self.state = replace(state, first_products=first, more_products=more, eigenbasis_products=0)
            if more > cost or not alike:
                self._drop_blocks()
        elif not (state.blocks or state.no_blocks):
            cost = cost_of_blocks(curvature, expected_rows(curvature, memory), memory, rounded=rounded)
            pays = saved_by_blocks(curvature, products) > cost
            self.state = replace(state, blocks=pays, eigenbasis_products=products)

    def _drop_blocks(self) -> None:
        self.state, self.blocks = replace(self.state, blocks_at=None), None

    def _backtrack(self, step: Tensor, predicted: float) -> tuple[Point, bool]:
        """Shorten the step until the objective decreases; return the new point and whether the full step was taken."""
        point = self.point
        slope = float(inner(point.gradient, step))
        share = 1.0
        while True:
            there = self.objective.at(centred(point.parameters + share * step), self.curvature.keep)
            change = there.value - point.value
            hidden = not predicted < -ROUNDING * abs(point.value)  # by rounding
            if hidden or (there.finite and change < SUFFICIENT * share * predicted) or share < SHORTEST:
                return there, share == 1.0
            # The parabola through both values and the slope has its minimum at this share of the step.
            share *= min(max(0.5 * share * slope / (share * slope - change), 0.1), 0.5) if there.finite else 0.1

    def _extend(self, there: Point) -> Point:
        """Return a point farther along the step if the objective continues to decrease there.

        Where rows become certain, their loss decreases exponentially, and each of Newton's steps changes their logits
        by only one unit. The slope along the step is modelled as ``a + b e^(−ct)``, which agrees with the values and
        slopes at both ends of the step, and is followed to its zero.
        """
        point = self.point
        step = there.parameters - point.parameters
        first, last = (float(inner(at.gradient, step)) for at in (point, there))
        length = _zero_of_slope(first, last, there.value - point.value)
        if length < WORTH_GOING_ON:
            return there
        farther = self.objective.at(centred(point.parameters + length * step), self.curvature.keep)
        better = farther.finite and farther.value < there.value
        return farther if better else self.objective.at(there.parameters, self.curvature.keep)

    def _within_tolerance(self, residual: Tensor, square: float) -> bool:
        """Whether a gradient like this residual would end the fit, with a margin for the error of the model."""
        if 0.5 * square > ENOUGH * GAIN * self.tol:
            return False
        coordinates = self.objective.coordinates
        turned = residual[:, : coordinates.width]
        # The largest of d entries is at least their norm over √d, and the norm is the same in all coordinates.
        if float(turned.square().sum(1).max()) > (ENOUGH * self.tol) ** 2 * len(coordinates.mean):
            return False
        return coordinates.largest_gradient(*coordinates.about_mean(residual)) <= ENOUGH * self.tol

    def _move_to(self, point: Point, *, recompute: bool) -> None:
        self.point, self.prepared = point, None
        if self.state.double and self.curvature.dtype != torch.float64:
            self.products += self.curvature.products
            self.curvature = self.curvature_in(dtype=torch.float64)
            self._drop_blocks()
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


def _zero_of_slope(first: float, last: float, change: float) -> float:
    """Return the zero of ``a + b e^(−ct)`` that is ``first`` at 0, ``last`` at 1, and has the integral ``change``.

    It is at most ``FARTHEST``, and one where the slope at 1 is hardly negative, or has another form.
    """
    if not first < last < STILL_FALLING * first:
        return 1.0
    # h(c) = 1/(1 − e^(−c)) − 1/c increases from ½, the value of a parabola, to 1.
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


def _norm(gradient: Tensor, inverse: Map) -> float:
    return math.sqrt(max(float(inner(gradient, inverse(gradient).double())), 0.0))
