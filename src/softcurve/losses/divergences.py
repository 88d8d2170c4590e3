"""The separable divergences ``D(y, p) = Σ_k φ(p_k, y_k)``: value, score, curve and cross term of each.

    score  s = p ∂φ/∂p        curve  c = p ∂φ/∂p + p² ∂²φ/∂p²        cross  x = p y ∂²φ/∂p∂y

are all that a softmax needs to pull ``D`` back to its logits, in first and second order and in both arguments
(:mod:`softcurve.losses.softmax`). Exchanging the arguments of a member gives a member, so the target's side
needs no formulas of its own.

Each ``φ`` is taken in the gauge ``φ(p, y) ≥ 0``, zero only at ``p = y``. A multiple of ``p`` or ``y`` added to ``φ``
adds a constant to ``D`` and nothing to a derivative in logits, so this is the textbook's value, but as a sum of terms
none of which is negative: it cannot cancel, and it cannot come out below zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.array_types import Float


class Pair(NamedTuple):
    """Two rows of probabilities and how they differ, each entry with a small *relative* error.

    ``log_ratio`` is ``log p − log y`` (0 where both are masked), ``difference`` is ``p − y``.
    """

    p: Float[Tensor, "*rows classes"]
    y: Float[Tensor, "*rows classes"]
    log_ratio: Float[Tensor, "*rows classes"]
    difference: Float[Tensor, "*rows classes"]

    def exchanged(self) -> Pair:
        """The same pair seen from the target's side."""
        return Pair(self.y, self.p, -self.log_ratio, -self.difference)


def _exponential_excess(t: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """``h(t) = e^t − 1 − t`` for ``|t| ≤ ½``, by its series: the subtraction would cancel."""
    order = 8 if t.dtype == torch.float32 else 14  # remainder below half an ulp at |t| = ½
    total = torch.full_like(t, 1 / math.factorial(order + 1))
    for n in range(order, 1, -1):
        total = total * t + 1 / math.factorial(n)
    return total * t * t


def excess(
    a: Float[Tensor, "*rows classes"], difference: Float[Tensor, "*rows classes"], t: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows classes"]:
    """``a h(log(b/a)) = b − a − a log(b/a) ≥ 0`` from ``difference = b − a`` and ``t = log(b/a)``.

    Its sum over classes is ``D(a‖b)``. ``+inf`` where ``b`` is masked and ``a`` is not, ``b`` where ``a`` is zero.
    """
    near = t.abs() < 0.5
    series = a * _exponential_excess(t.clamp(-0.5, 0.5))
    direct = difference - _times_finite(a, t)
    return torch.where(near, series, torch.where(t == -math.inf, torch.full_like(a, math.inf), direct))


def log_mixture(t: Float[Tensor, "*any"], weight: float) -> Float[Tensor, "*any"]:
    """``log((1−w) + w e^t)``, right relatively, and without overflow."""
    near = torch.log1p(weight * torch.expm1(t.clamp(max=80.0)))
    if weight > 0.5:  # 1 + w (e^t − 1) cancels towards 1 − w
        near = torch.where(t < -1, torch.log((1 - weight) + weight * torch.exp(t.clamp(max=-1.0))), near)
    far = t.clamp(min=80.0) + torch.log(weight + (1 - weight) * torch.exp(-t.clamp(min=80.0)))
    return torch.where(t < 80, near, far)


def _times_finite(p: Tensor, factor: Tensor) -> Tensor:
    """``p ⊙ factor`` with ``0 · ±inf = 0``, in its derivatives too: a class without mass has no part in a sum."""
    return p * torch.where(p == 0, 0.0, factor)


class Divergence(ABC):
    """One member of the family, as the functions of DESIGN's table. Stateless but for its parameters."""

    @abstractmethod
    def value(self, pair: Pair) -> Float[Tensor, "*rows"]:
        """``D(y, p) = Σ_k φ(p_k, y_k) ≥ 0``, in nats."""

    @abstractmethod
    def score(self, pair: Pair) -> Float[Tensor, "*rows classes"]:
        """``s = p ∂φ/∂p``."""

    @abstractmethod
    def curve(self, pair: Pair) -> Float[Tensor, "*rows classes"]:
        """``c = p ∂φ/∂p + p² ∂²φ/∂p²``."""

    @abstractmethod
    def cross(self, pair: Pair) -> Float[Tensor, "*rows classes"]:
        """``x = p y ∂²φ/∂p∂y``, symmetric under exchange."""

    @abstractmethod
    def exchanged(self) -> Divergence:
        """The member ``D′`` with ``D′(p, y) = D(y, p)``."""


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """``D(y‖p)``: ``φ = y log(y/p) − y + p``, ``s = p − y``, ``c = p``. Mode-covering."""

    def value(self, pair: Pair) -> Float[Tensor, "*rows"]:  # noqa: D102
        return excess(pair.y, pair.difference, pair.log_ratio).sum(-1)

    def score(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return pair.difference

    def curve(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return pair.p

    def cross(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return -pair.y

    def exchanged(self) -> Divergence:  # noqa: D102
        return ReverseKL()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """``D(p‖y)``, ``r = log(p/y)``: ``φ = p r − p + y``, ``s = p r``, ``c = p (r + 1)``. Mode-seeking."""

    def value(self, pair: Pair) -> Float[Tensor, "*rows"]:  # noqa: D102
        return ForwardKL().value(pair.exchanged())

    def score(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return _times_finite(pair.p, pair.log_ratio)

    def curve(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return _times_finite(pair.p, pair.log_ratio + 1)

    def cross(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return -pair.p

    def exchanged(self) -> Divergence:  # noqa: D102
        return ForwardKL()


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """``JS_β = β D(y‖m) + (1−β) D(p‖m)``, ``m = (1−β) p + β y``, for ``0 < β < 1``.

    ``s = (1−β) p log(p/m)``, ``c = (1−β) [p log(p/m) + β p y/m]``, ``x = −β(1−β) p y/m``.
    """

    beta: float

    def value(self, pair: Pair) -> Float[Tensor, "*rows"]:  # noqa: D102
        to_mixture = excess(pair.p, -self.beta * pair.difference, self._log_mixture_over_p(pair))
        exchanged = self.exchanged()
        from_target = excess(pair.y, (1 - self.beta) * pair.difference, exchanged._log_mixture_over_p(pair.exchanged()))
        return ((1 - self.beta) * to_mixture + self.beta * from_target).sum(-1)

    def _log_mixture_over_p(self, pair: Pair) -> Float[Tensor, "*rows classes"]:
        return log_mixture(-pair.log_ratio, self.beta)

    def _harmonic(self, pair: Pair) -> Float[Tensor, "*rows classes"]:
        """``p y / m``."""
        return pair.p * torch.exp(-log_mixture(pair.log_ratio, 1 - self.beta))

    def score(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return -(1 - self.beta) * _times_finite(pair.p, self._log_mixture_over_p(pair))

    def curve(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return self.score(pair) + self.beta * (1 - self.beta) * self._harmonic(pair)

    def cross(self, pair: Pair) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return -self.beta * (1 - self.beta) * self._harmonic(pair)

    def exchanged(self) -> JensenShannon:  # noqa: D102
        return JensenShannon(1 - self.beta)


def jensen_shannon(beta: float) -> Divergence:
    """``JS_β`` with the ecosystem's ends: β = 0 is the forward, β = 1 the reverse KL, exactly."""
    if beta == 0:
        return ForwardKL()
    return ReverseKL() if beta == 1 else JensenShannon(beta)
