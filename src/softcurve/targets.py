"""What a row of logits is compared with.

Plain tensors are read as torch reads them: integers are class indices, floating-point rows are probabilities. The other
kinds say what they are: :class:`Probabilities`, :class:`Logits`, :class:`TopK`, :class:`LinearTeacher`. A target meets
a model's logits in :meth:`Target.against`: both come back by logits over the same outcomes. Tensors that require
gradients receive them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float, Int


class Target(ABC):
    """A distribution over the classes for each row."""

    coarsens = False  # whether its outcomes are coarser than the classes

    @abstractmethod
    def logits(self) -> Float[Tensor, "*rows classes"]:
        """The target over all classes; log-probabilities are logits, and −inf is a class without mass."""

    def against(self, z: Float[Tensor, "*rows classes"]) -> tuple[Tensor, Tensor]:
        """The model's logits and the target's, over the outcomes that the target speaks of: ``(..., outcomes)`` each.

        Raises ``ValueError`` if rows or classes differ.
        """
        logits = self.logits()
        self._require_shape(logits.shape, z)
        return z, logits

    def distribution_against(self, z: Float[Tensor, "*rows classes"]) -> tuple[Tensor, Tensor]:
        """As :meth:`against`, the target as probabilities."""
        model, target = self.against(z)
        return model, torch.softmax(target, -1, dtype=torch.promote_types(target.dtype, torch.float32))

    def uniform_over(self, z: Float[Tensor, "*rows classes"]) -> Tensor:
        """The uniform distribution over the classes, as it looks over the outcomes: what label smoothing mixes in."""
        return z.new_tensor(1 / z.shape[-1], dtype=torch.promote_types(z.dtype, torch.float32))

    def _require_shape(self, shape: torch.Size, z: Tensor) -> None:
        if tuple(shape) != tuple(z.shape):
            raise ValueError(
                f"target ({type(self).__name__}) must have the shape {tuple(z.shape)} of the logits that it "
                f"is compared with, got {tuple(shape)}"
            )


@dataclass(frozen=True, eq=False)
class Probabilities(Target):
    """Rows of probabilities, shape ``(..., C)``: entries ≥ 0, each row summing to 1.

    Raises ``TypeError`` for a dtype that is not floating point, ``ValueError`` for negative, unnormalised or NaN rows.
    """

    values: Float[Tensor, "*rows classes"]

    def __post_init__(self) -> None:
        checks.require_floating("target probabilities", self.values)
        checks.require_probabilities("target probabilities", self.values)

    def logits(self) -> Float[Tensor, "*rows classes"]:
        """``log y``; a class of probability 0 gets −inf and, as a masked class, no gradient."""
        values = _widened(self.values)
        some = values > 0
        return torch.where(some, torch.log(torch.where(some, values, 1.0)), -math.inf)

    def distribution_against(self, z: Float[Tensor, "*rows classes"]) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require_shape(self.values.shape, z)
        return z, self.values


@dataclass(frozen=True, eq=False)
class Logits(Target):
    """A distribution by its logits, shape ``(..., C)``; log-probabilities are logits too."""

    values: Float[Tensor, "*rows classes"]

    def __post_init__(self) -> None:
        checks.require_floating("Logits", self.values)

    def logits(self) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return self.values


@dataclass(frozen=True, eq=False)
class LinearTeacher(Target):
    """A teacher's head: ``softmax(input @ linear_weight.T + linear_bias)``.

    Shapes: input ``(..., d)``, linear_weight ``(C, d)``, linear_bias ``(C,)``; the width ``d`` is the teacher's own.
    """

    input: Float[Tensor, "*rows teacher_features"]
    linear_weight: Float[Tensor, "classes teacher_features"]
    linear_bias: Float[Tensor, " classes"] | None = None

    def __post_init__(self) -> None:
        checks.require_floating("LinearTeacher input", self.input)
        checks.require_floating("LinearTeacher linear_weight", self.linear_weight)
        if self.linear_weight.ndim != 2 or self.linear_weight.shape[1] != self.input.shape[-1]:
            raise ValueError(
                f"LinearTeacher linear_weight must be of shape (C, {self.input.shape[-1]}), as wide as its input, "
                f"got {checks.describe(self.linear_weight)}"
            )
        if self.linear_bias is not None:
            checks.require_floating("LinearTeacher linear_bias", self.linear_bias)
        if self.linear_bias is not None and self.linear_bias.shape != self.linear_weight.shape[:1]:
            raise ValueError(
                f"LinearTeacher linear_bias must be of shape ({self.linear_weight.shape[0]},), "
                f"got {checks.describe(self.linear_bias)}"
            )

    def logits(self) -> Float[Tensor, "*rows classes"]:  # noqa: D102
        return torch.nn.functional.linear(self.input, self.linear_weight, self.linear_bias)


@dataclass(frozen=True, eq=False)
class TopK(Target):
    """A teacher's own natural log-probabilities of ``k`` distinct classes a row, shapes ``(..., k)``.

    ``tail="bucket"``: all other classes are one outcome, for teacher and student alike, so that every divergence of the
    family is defined, is ≥ 0 and bounds the full one from below (data processing).
    ``tail="renormalize"``: the list is rescaled to a distribution that is zero elsewhere.
    Raises ``TypeError`` or ``ValueError`` for indices that are no integers, repeat or do not fit, or a mass above 1.
    """

    indices: Int[Tensor, "*rows k"]
    log_probs: Float[Tensor, "*rows k"]
    tail: str = "bucket"

    def __post_init__(self) -> None:
        checks.require_choice("TopK tail", self.tail, ("bucket", "renormalize"))
        checks.require_floating("TopK log_probs", self.log_probs)
        if not isinstance(self.indices, Tensor) or self.indices.dtype != torch.int64:
            raise TypeError("TopK indices must be an int64 tensor of class indices; convert it with .long()")
        if self.indices.shape != self.log_probs.shape:
            raise ValueError(
                f"TopK indices must have the shape of log_probs {tuple(self.log_probs.shape)}, "
                f"got {checks.describe(self.indices)}"
            )
        if checks.values_visible(self.indices, self.log_probs) and self.indices.numel():
            self._check_values()

    def _check_values(self) -> None:
        in_order = self.indices.sort(-1).values
        if (in_order[..., 1:] == in_order[..., :-1]).any():
            raise ValueError("TopK indices must name distinct classes in each row, got a class twice")
        mass = self.log_probs.detach().double().exp().sum(-1).max().item()
        if not mass <= 1 + checks.SUM_TOLERANCE_HALF:
            raise ValueError(
                f"TopK log_probs must be natural log-probabilities with a mass of at most 1 a row, got {mass:.6g}; "
                "take log_softmax over all classes before topk"
            )

    @property
    def coarsens(self) -> bool:  # type: ignore[override]
        """A bucket makes one outcome of all classes that are not listed."""
        return self.tail == "bucket"

    def logits(self) -> Float[Tensor, "*rows classes"]:
        """A list knows nothing of the other classes: it can be a target, but not the model."""
        raise ValueError("a TopK can be one side of a divergence; the other must have logits for all classes")

    def against(self, z: Float[Tensor, "*rows classes"]) -> tuple[Tensor, Tensor]:
        """Over the listed classes and a bucket, or over all classes with −inf where nothing is listed."""
        self.require_fit(z.shape)
        if self.tail == "renormalize":
            masked = torch.full(z.shape, -math.inf, dtype=self.log_probs.dtype, device=z.device)
            return z, masked.scatter(-1, self.indices, self.log_probs)
        # A shift of all outcomes changes nothing, and without it the bucket would be rounded at the logits' offset.
        wide = _widened(z)
        top = wide.detach().amax(-1, keepdim=True)
        wide = wide - torch.where(top == -math.inf, 0.0, top)
        student, teacher = wide.gather(-1, self.indices), _widened(self.log_probs)
        if self.indices.shape[-1] == z.shape[-1]:
            return student, teacher
        others = _log_sum_exp(wide.scatter(-1, self.indices, -math.inf))
        tail = log_complement(teacher)
        # A tail of rounding errors is no mass: over a masked bucket it would make the divergence infinite.
        rounding = math.log(teacher.shape[-1] * torch.finfo(teacher.dtype).eps)
        tail = torch.where((others == -math.inf) & (tail < rounding), -math.inf, tail)
        return torch.cat([student, others], -1), torch.cat([teacher, tail], -1)

    def uniform_over(self, z: Float[Tensor, "*rows classes"]) -> Tensor:  # noqa: D102
        one, others = super().uniform_over(z), z.shape[-1] - self.indices.shape[-1]
        if self.tail == "renormalize" or not others:
            return one
        return torch.cat([one.expand(self.indices.shape[-1]), others * one.reshape(1)])

    def coarse_log_probs(self, classes: int) -> Float[Tensor, "*rows outcomes"]:
        """By logits over the listed classes and all others, ``(..., k + 1)``: what the list leaves over, or no mass."""
        listed = _widened(self.log_probs)
        if self.coarsens and self.indices.shape[-1] < classes:
            return torch.cat([listed, log_complement(listed)], -1)
        return torch.cat([listed, torch.full_like(listed[..., :1], -math.inf)], -1)

    def require_fit(self, shape: Sequence[int]) -> None:
        """Rows and classes of the logits ``shape`` that the list is compared with."""
        if tuple(self.indices.shape[:-1]) != tuple(shape[:-1]) or self.indices.shape[-1] > shape[-1]:
            raise ValueError(
                f"TopK indices must be of shape {tuple(shape[:-1])} + (k,) with k <= {shape[-1]}, as the "
                f"logits that they are compared with, got {checks.describe(self.indices)}"
            )
        checks.require_class_indices("TopK indices", self.indices, shape[-1])


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def log_complement(log_probs: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows 1"]:
    """``log(1 − Σ_k e^{l_k})``, the largest apart as ``−expm1(l)``; −inf where the list has all the mass."""
    at = log_probs.argmax(-1, keepdim=True)
    rest = -torch.expm1(log_probs.gather(-1, at)) - log_probs.exp().scatter(-1, at, 0.0).sum(-1, keepdim=True)
    return torch.where(rest > 0, torch.where(rest > 0, rest, 1.0).log(), -math.inf)


def _log_sum_exp(z: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows 1"]:
    """As torch's, but a row of −inf only has −inf with gradient 0: torch's second derivative there is NaN."""
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    total = (z - top).exp().sum(-1, keepdim=True)
    return torch.where(total > 0, top + torch.where(total > 0, total, 1.0).log(), -math.inf)


def as_target(target: Tensor | Target) -> Tensor | Target:
    """Class indices stay a tensor; floating-point rows are :class:`Probabilities`, as in torch."""
    if isinstance(target, Target):
        return target
    if not isinstance(target, Tensor):
        raise TypeError(
            "target must be a tensor of class indices or probabilities, or one of softcurve.Probabilities, Logits, "
            f"TopK, LinearTeacher; got {type(target).__name__}"
        )
    if target.is_floating_point():
        return Probabilities(target)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target must hold class indices (int64) or probabilities, got {target.dtype}")
    return target.long()
