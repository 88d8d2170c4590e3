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
from ast import literal_eval
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float, Rows, Values


class Pair(NamedTuple):
    """Two rows of probabilities and how they differ, each entry with a small *relative* error.

    ``log_ratio`` is ``log p − log y`` (0 where both are masked), ``difference`` is ``p − y``.
    """

    p: Rows
    y: Rows
    log_ratio: Rows
    difference: Rows

    def exchanged(self) -> Pair:
        """Return the pair with the two distributions exchanged."""
        return Pair(self.y, self.p, -self.log_ratio, -self.difference)


def _exponential_excess(t: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return ``h(t) = e^t − 1 − t`` for ``|t| ≤ ½`` by its series, because the subtraction would cancel."""
    order = 8 if t.dtype == torch.float32 else 14  # remainder below half an ulp at |t| = ½
    total = torch.full_like(t, 1 / math.factorial(order + 1))
    for n in range(order, 1, -1):
        total = total * t + 1 / math.factorial(n)
    return total * t * t


def excess(a: Rows, difference: Rows, t: Rows) -> Rows:
    """Return ``a h(log(b/a)) = b − a − a log(b/a) ≥ 0`` from ``difference = b − a`` and ``t = log(b/a)``.

    Its sum over classes is ``D(a‖b)``. It is ``+inf`` where only ``b`` is masked, and ``b`` where ``a`` is 0.
    """
    near = t.abs() < 0.5
    series = a * _exponential_excess(t.clamp(-0.5, 0.5))
    direct = difference - _times_finite(a, t)
    return torch.where(near, series, torch.where(t == -math.inf, torch.full_like(a, math.inf), direct))


def log_mixture(t: Float[Tensor, "*any"], weight: float) -> Float[Tensor, "*any"]:
    """Return ``log((1−w) + w e^t)`` with a small relative error and without overflow."""
    near = torch.log1p(weight * torch.expm1(t.clamp(max=80.0)))
    if weight > 0.5:  # 1 + w (e^t − 1) cancels towards 1 − w
        near = torch.where(t < -1, torch.log((1 - weight) + weight * torch.exp(t.clamp(max=-1.0))), near)
    far = t.clamp(min=80.0) + torch.log(weight + (1 - weight) * torch.exp(-t.clamp(min=80.0)))
    return torch.where(t < 80, near, far)


def _times_finite(p: Tensor, factor: Tensor) -> Tensor:
    """Return ``p ⊙ factor`` with ``0 · ±inf = 0``, in its derivatives too: a class of probability 0 adds nothing."""
    return p * torch.where(p == 0, 0.0, factor)


class Divergence(ABC):
    """A separable divergence ``D(y, p) = Σ_k φ(p_k, y_k)``, given by its derivatives with respect to ``log p``.

    Subclass it as a frozen dataclass whose fields are numbers, and implement the five methods below in the gauge
    ``φ ≥ 0``. Every part of the library (losses on logits and on heads, curvature, fits) then works with the
    member. See :class:`Pair` for what the methods receive.
    """

    hessian_is_fisher: ClassVar[bool] = False
    """Whether ``H_z = J``, as for the forward KL; the Gauss-Newton matrix is then the Hessian."""

    gauss_newton_is_fisher: ClassVar[bool] = False
    """Whether ``p² ∂²φ/∂p² = p``, as for the reverse KL, so that the Gauss-Newton matrix is ``J``."""

    _key: ClassVar[str]
    _members: ClassVar[dict[str, type[Divergence]]] = {}

    def __init_subclass__(cls) -> None:
        """Register the class, so that :meth:`decode` finds it by a key that no other class has.

        The class attributes describe the formulas of one class: a subclass that replaces some must declare them again.
        """
        for name in ("hessian_is_fisher", "gauss_newton_is_fisher", "gauss_newton_bound"):
            if name not in cls.__dict__:
                setattr(cls, name, Divergence.__dict__[name])
        cls._key = f"{cls.__module__}:{cls.__qualname__}#{len(Divergence._members)}"
        Divergence._members[cls._key] = cls

    @abstractmethod
    def value(self, pair: Pair) -> Values:
        """Return ``D(y, p) = Σ_k φ(p_k, y_k) ≥ 0`` of each row, in nats."""

    @abstractmethod
    def score(self, pair: Pair) -> Rows:
        """Return ``s = p ∂φ/∂p``."""

    @abstractmethod
    def curve(self, pair: Pair) -> Rows:
        """Return ``c = p ∂φ/∂p + p² ∂²φ/∂p²``."""

    @abstractmethod
    def cross(self, pair: Pair) -> Rows:
        """Return ``x = p y ∂²φ/∂p∂y``, which is symmetric under exchange."""

    @abstractmethod
    def exchanged(self) -> Divergence:
        """Return the member ``D′`` with ``D′(p, y) = D(y, p)``."""

    def encode(self) -> str:
        """Return a string from which :meth:`decode` makes an equal member: the operators of ``torch`` take no objects.

        Raises ``TypeError`` unless the member is a frozen dataclass of numbers, or has no attributes.
        """
        fields = getattr(self, "__dataclass_fields__", {})
        values = [(name, getattr(self, name)) for name in fields]
        values = [(name, v.item() if isinstance(v, np.generic | Tensor) and v.ndim == 0 else v) for name, v in values]
        state = [name for name in self.__dict__ if not isinstance(getattr(type(self), name, None), cached_property)]
        if len(state) != len(fields) or not all(isinstance(v, bool | int | float | str) for _, v in values):
            raise TypeError(
                f"divergence must be a frozen dataclass whose fields are numbers or strings, got {self!r}; "
                "keep other state out of the instance"
            )
        text = ";".join([self._key, *(f"{name}={value!r}" for name, value in values)])
        if text.count(";") != len(values):
            raise TypeError(f"divergence must not have a string with a semicolon among its fields, got {self!r}")
        return text

    @staticmethod
    def decode(text: str) -> Divergence:
        """Return the member that :meth:`encode` described."""
        key, *fields = text.split(";")
        values = (field.partition("=") for field in fields)
        return Divergence._members[key](
            **{name: float(value) if value in ("inf", "-inf") else literal_eval(value) for name, _, value in values}
        )

    @property
    def gauss_newton_bound(self) -> float:
        """The bound ``sup p ∂²φ/∂p²`` of the Gauss-Newton matrix relative to ``J``, or infinity if there is none."""
        return 1.0 if self.hessian_is_fisher or self.gauss_newton_is_fisher else math.inf

    @property
    def curvature_at_agreement(self) -> float:
        """The factor ``p φ″`` at ``p = y``, where ``D ≈ ½ Σ_k p_k r_k²`` times this factor, ``r = log p − log y``."""
        one = torch.ones(1, dtype=torch.float64)
        agreeing = Pair(one, one, 0 * one, 0 * one)
        return float(self.curve(agreeing) - self.score(agreeing))

    @property
    def is_infinite_off_target(self) -> bool:
        """Whether ``D`` is infinite where the model has mass on a class that the target excludes."""
        return bool(_is_infinite_off_target(self.encode()))


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """The cross-entropy ``−Σ_k y_k log p_k``: ``φ = −y log p``, ``s = −y``, ``c = 0``, ``x = −y``.

    The target may have any sum, and the value is not zero at ``p = y``. The library evaluates it by
    :func:`softcurve.losses.softmax.dense_loss`, which is exact for confident rows.
    """

    hessian_is_fisher = True

    def value(self, pair: Pair) -> Values:  # noqa: D102
        return -torch.xlogy(pair.y, pair.p).sum(-1)

    def score(self, pair: Pair) -> Rows:  # noqa: D102
        return -pair.y

    def curve(self, pair: Pair) -> Rows:  # noqa: D102
        return torch.zeros_like(pair.p)

    def cross(self, pair: Pair) -> Rows:  # noqa: D102
        return -pair.y

    def exchanged(self) -> Divergence:
        """Raise ``TypeError``: a model's cross-entropy against a target is not one of the family's members."""
        raise TypeError("a cross-entropy has a target and a model; use softcurve.cross_entropy(logits, target)")


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """The forward KL ``D(y‖p)``, mode-covering: ``φ = y log(y/p) − y + p``, ``s = p − y``, ``c = p``.

    Source: Kullback and Leibler (1951), "On information and sufficiency".
    """

    hessian_is_fisher = True

    def value(self, pair: Pair) -> Values:  # noqa: D102
        return excess(pair.y, pair.difference, pair.log_ratio).sum(-1)

    def score(self, pair: Pair) -> Rows:  # noqa: D102
        return pair.difference

    def curve(self, pair: Pair) -> Rows:  # noqa: D102
        return pair.p

    def cross(self, pair: Pair) -> Rows:  # noqa: D102
        return -pair.y

    def exchanged(self) -> Divergence:  # noqa: D102
        return ReverseKL()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """The reverse KL ``D(p‖y)``, mode-seeking: ``φ = p r − p + y``, ``r = log(p/y)``, ``s = p r``, ``c = p (r + 1)``.

    Source: Kullback and Leibler (1951), "On information and sufficiency".
    """

    gauss_newton_is_fisher = True

    def value(self, pair: Pair) -> Values:  # noqa: D102
        return ForwardKL().value(pair.exchanged())

    def score(self, pair: Pair) -> Rows:  # noqa: D102
        return _times_finite(pair.p, pair.log_ratio)

    def curve(self, pair: Pair) -> Rows:  # noqa: D102
        return _times_finite(pair.p, pair.log_ratio + 1)

    def cross(self, pair: Pair) -> Rows:  # noqa: D102
        return -pair.p

    def exchanged(self) -> Divergence:  # noqa: D102
        return ForwardKL()


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """The Jensen-Shannon divergence ``β D(y‖m) + (1−β) D(p‖m)``, ``m = (1−β) p + β y``, for ``0 < β < 1``.

    ``s = (1−β) p log(p/m)``, ``c = (1−β) [p log(p/m) + β p y/m]``, ``x = −β(1−β) p y/m``.

    Source: Lin (1991), "Divergence measures based on the Shannon entropy".
    """

    beta: float

    def __post_init__(self) -> None:
        remedy = "above 0 and below 1; use ForwardKL() for the limit at 0 and ReverseKL() for the limit at 1"
        object.__setattr__(self, "beta", checks.require_number("beta", self.beta, lambda b: 0 < b < 1, remedy))

    @property
    def gauss_newton_bound(self) -> float:  # noqa: D102
        return 1 - self.beta

    def value(self, pair: Pair) -> Values:  # noqa: D102
        beta = self.beta
        to_mixture = excess(pair.p, -beta * pair.difference, log_mixture(-pair.log_ratio, beta))
        from_target = excess(pair.y, (1 - beta) * pair.difference, log_mixture(pair.log_ratio, 1 - beta))
        return ((1 - beta) * to_mixture + beta * from_target).sum(-1)

    def score(self, pair: Pair) -> Rows:  # noqa: D102
        return -(1 - self.beta) * _times_finite(pair.p, log_mixture(-pair.log_ratio, self.beta))

    def curve(self, pair: Pair) -> Rows:  # noqa: D102
        return self.score(pair) - self.cross(pair)

    def cross(self, pair: Pair) -> Rows:  # noqa: D102
        harmonic = pair.p * torch.exp(-log_mixture(pair.log_ratio, 1 - self.beta))  # p y / m
        return -self.beta * (1 - self.beta) * harmonic

    def exchanged(self) -> JensenShannon:  # noqa: D102
        return JensenShannon(min(1 - self.beta, math.nextafter(1.0, 0.0)))


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """The α-divergence ``Σ_k [α y + (1−α) p − w] / (α(1−α))``, ``w = y^α p^{1−α}``, for ``α`` other than 0 and 1.

    ``α = ½`` is four times the squared Hellinger distance; ``α → 1`` is the forward and ``α → 0`` the reverse KL.
    With ``r = log(p/y)``: ``s = (p − w)/α``, ``c = s + w``, ``x = −w``.

    Source: Amari (2016), "Information Geometry and Its Applications", section 3.5.
    """

    alpha: float

    def __post_init__(self) -> None:
        remedy = "other than 0 and 1; use ReverseKL() for the limit at 0 and ForwardKL() for the limit at 1"
        object.__setattr__(self, "alpha", checks.require_number("alpha", self.alpha, lambda a: a not in (0, 1), remedy))

    def value(self, pair: Pair) -> Values:
        """Return ``Σ p [α h(−r) − h(−αr)] / (α(1−α))`` with ``h(t) = e^t − 1 − t``: nothing cancels for ``α ≤ ½``."""
        a = self.alpha
        if a > 0.5:
            return self.exchanged().value(pair.exchanged())
        of_target = excess(pair.p, -pair.difference, -pair.log_ratio)
        of_mean = excess(pair.p, -a * self.score(pair), -a * pair.log_ratio)
        excluded = pair.p / a if a > 0 else torch.where(pair.p > 0, math.inf, pair.p)
        terms = (a * of_target - of_mean) / (a * (1 - a))
        return torch.where(pair.y == 0, excluded, terms).sum(-1)

    def score(self, pair: Pair) -> Rows:  # noqa: D102
        exponent = -self.alpha * pair.log_ratio
        near = -pair.p * torch.expm1(exponent.clamp(-1, 1))
        return torch.where(exponent.abs() < 1, near, pair.p + self.cross(pair)) / self.alpha

    def curve(self, pair: Pair) -> Rows:  # noqa: D102
        return self.score(pair) - self.cross(pair)

    def cross(self, pair: Pair) -> Rows:
        """Return ``−w`` by ``p e^{−αr}`` or ``y e^{(1−α)r}``, whichever does not overflow where ``w`` does not."""
        r = pair.log_ratio
        exponent = torch.where(r < 0, (1 - self.alpha) * r, -self.alpha * r)
        return -_times_finite(torch.where(r < 0, pair.y, pair.p), torch.exp(exponent))

    def exchanged(self) -> AlphaDivergence:  # noqa: D102
        return AlphaDivergence(1 - self.alpha)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """The skewed KL: ``D(y ‖ w y + (1−w) p)``, or ``D(p ‖ w p + (1−w) y)`` with ``direction="reverse"``.

    ``w = weight`` lies in [0, 1); 0 is the KL itself. With the mixture ``m`` and ``x = −(c − s)`` in both directions,
    forward: ``s = (1−w)² p (p−y)/m``, ``c = s + (1−w)² y (p/m)²``;
    reverse: ``s = (1−w)² p (p−y)/m − p h(log(p/m))``, ``c = s + (1−w)² p (y/m)²``, ``h(t) = e^t − 1 − t``.

    Source: Lee (1999), "Measures of distributional similarity"; Ko et al. (2024), "DistiLLM".
    """

    weight: float
    direction: str = "forward"

    def __post_init__(self) -> None:
        weight = checks.require_number("weight", self.weight, lambda w: 0 <= w < 1, "at least 0 and below 1")
        object.__setattr__(self, "weight", weight)
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f"direction must be 'forward' or 'reverse', got {self.direction!r}")

    @property
    def hessian_is_fisher(self) -> bool:  # type: ignore[override]  # noqa: D102
        return self.weight == 0 and self.direction == "forward"

    @property
    def gauss_newton_bound(self) -> float:
        """The bound is ``(1−w)/(4w)`` forward, at ``(1−w) p = w y``, and 1 reverse, at ``p = 0``."""
        return 1.0 if self.weight == 0 or self.direction == "reverse" else (1 - self.weight) / (4 * self.weight)

    @property
    def _limit(self) -> Divergence | None:
        """The KL that the member is at weight 0, where its mixture has only one side."""
        if self.weight:
            return None
        return ForwardKL() if self.direction == "forward" else ReverseKL()

    def value(self, pair: Pair) -> Values:  # noqa: D102
        if self.direction == "reverse":
            return self.exchanged().value(pair.exchanged())
        log_ratio = log_mixture(pair.log_ratio, 1 - self.weight)  # log m/y
        return excess(pair.y, (1 - self.weight) * pair.difference, log_ratio).sum(-1)

    def score(self, pair: Pair) -> Rows:  # noqa: D102
        if self._limit is not None:
            return self._limit.score(pair)
        change = (1 - self.weight) * pair.difference
        if self.direction == "forward":
            return (1 - self.weight) * change * torch.exp(-log_mixture(-pair.log_ratio, self.weight))
        log_ratio = -log_mixture(-pair.log_ratio, 1 - self.weight)  # log p/m
        change = _times_finite(change, torch.exp(log_ratio))
        return (1 - self.weight) * change - excess(pair.p, change, torch.where(pair.p > 0, log_ratio, 0.0))

    def curve(self, pair: Pair) -> Rows:  # noqa: D102
        return self.score(pair) - self.cross(pair) if self._limit is None else self._limit.curve(pair)

    def cross(self, pair: Pair) -> Rows:  # noqa: D102
        if self._limit is not None:
            return self._limit.cross(pair)
        if self.direction == "reverse":
            return self.exchanged().cross(pair.exchanged())
        over_mixture = torch.exp(-log_mixture(-pair.log_ratio, self.weight))  # p/m
        return -((1 - self.weight) ** 2) * pair.y * over_mixture.square()

    def exchanged(self) -> SkewKL:  # noqa: D102
        return SkewKL(self.weight, "reverse" if self.direction == "forward" else "forward")


def _is_infinite_off_target(encoded: str) -> bool:
    """Evaluate the member on one class: by its encoding, which a traced graph knows as a constant."""
    one = torch.ones(1, dtype=torch.float64)
    return not bool(Divergence.decode(encoded).value(Pair(one, 0 * one, math.inf * one, one)).isfinite())


# As torch.compiler.assume_constant_result, which would import torch's compiler, at the cost of a second.
_is_infinite_off_target._dynamo_marked_constant = True  # type: ignore[attr-defined]


MEMBERS: dict[str, type[CrossEntropy | ForwardKL | ReverseKL]]
MEMBERS = {"cross_entropy": CrossEntropy, "forward_kl": ForwardKL, "reverse_kl": ReverseKL}
LOSS_NAMES = (*MEMBERS, "js")


def divergence_of(loss: str | Divergence, beta: float = 0.5, *, argument: str = "divergence") -> Divergence:
    """Return the divergence that a public ``argument`` names or is; ``beta`` is that of ``"js"``.

    Raises ``TypeError`` or ``ValueError`` for anything else.
    """
    if isinstance(loss, Divergence):
        loss.encode()
        return loss
    if not isinstance(loss, str):
        raise TypeError(
            f"{argument} must be an instance of softcurve.Divergence, such as softcurve.AlphaDivergence(0.5), "
            f"got {loss!r}"
        )
    if loss not in LOSS_NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, LOSS_NAMES))} or a Divergence, got {loss!r}")
    if loss != "js":
        return MEMBERS[loss]()
    # By the convention of the field, the ends are the two KL divergences.
    return JensenShannon(beta) if 0 < beta < 1 else MEMBERS["reverse_kl" if beta else "forward_kl"]()
