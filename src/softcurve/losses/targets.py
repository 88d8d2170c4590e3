"""The kinds of target that a row of logits is compared with.

Plain tensors are read as torch reads them: integers are class indices (:mod:`softcurve.losses.labels`), floating-point
rows are probabilities of any sum. Other kinds are wrapped: :class:`Probabilities`, :class:`Logits`, :class:`TopK`, and
:class:`~softcurve.losses.teacher.LinearTeacher`. :meth:`Target.against` returns a model's logits and the target's over
the same outcomes. Tensors that require gradients receive them.

Shapes and dtypes are checked when a target is made. Values are checked when a loss is computed, by
:meth:`Target.checked`, because a row whose sample weight is 0 may hold anything.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Bool, Column, Flags, Float, Indices, Int, Rows, Values
from softcurve.losses.divergences import Divergence
from softcurve.records import ShortRepr
from softcurve.typing import TopKTail

AnyTarget = TypeVar("AnyTarget", bound="Target")


class Target(ShortRepr, ABC):
    """A distribution over the classes for each row."""

    merges_tail = False
    """Whether the outcomes are listed classes and one bucket for all other classes."""

    states_mass: ClassVar[bool] = False
    """Whether its probabilities are stated, also those of classes that a row excludes; else a softmax makes them."""

    _row_field: ClassVar[str] = "values"  # the field whose leading dimensions are those of the rows
    _cut: ClassVar[str] = "target[..., :{classes}]"  # how to leave out classes of the target
    kind: ClassVar[str] = ""  # the name in error messages, by default that of the class

    @abstractmethod
    def logits(self, dtype: torch.dtype) -> Rows:
        """Return logits of the target over all classes, computed in ``dtype``; a class of probability 0 has −inf."""

    @abstractmethod
    def malformed(self, classes: int) -> Flags:
        """Return which rows hold values that a loss cannot be computed from."""

    def require_values(self, classes: int, counted: Flags | None) -> None:
        """Raise ``ValueError`` for malformed values in the rows that are ``counted``, by default all.

        Targets given by logits are not checked in advance: the loss of a row of NaN is NaN.
        """

    def cleared(self: AnyTarget, rows: Flags, classes: int) -> AnyTarget:
        """Return the target with the uniform distribution in some ``rows``, which then receive no gradient."""
        values = torch.where(rows.unsqueeze(-1), 1 / self._row_tensor.shape[-1], self._row_tensor)
        return replace(self, **{self._row_field: values})  # type: ignore[type-var]

    def against(self, z: Rows) -> tuple[Tensor, Tensor]:
        """Return the logits of the model and of the target over the target's outcomes, ``(..., outcomes)`` each.

        Raises ``ValueError`` if rows or classes differ.
        """
        self.require_fit(z.shape)
        return z, self.logits(self._common_dtype(z))

    def distribution_against(self, z: Rows) -> tuple[Tensor, Tensor]:
        """Return the same as :meth:`against`, with the target as probabilities in float32 or wider."""
        model, target = self.against(z)
        return model, torch.softmax(target, -1, dtype=self._common_dtype(z))

    def uniform_over(self, z: Rows) -> Tensor:
        """Return the uniform distribution over the unmasked classes of ``z`` as one over the outcomes."""
        return uniform_over_unmasked(z)

    def excluding(self, mask: Bool[Tensor, "*rows classes"] | None, dtype: torch.dtype) -> Target:
        """Return the target, whose own softmax leaves out the classes of ``mask``; stated probabilities stay."""
        if mask is None or self.states_mass:
            return self
        return Logits(torch.where(mask, -math.inf, self.logits(dtype)))

    def _common_dtype(self, z: Tensor) -> torch.dtype:
        return checks.wide_dtype(z.dtype, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The common dtype of the target's tensors."""
        return self._row_tensor.dtype

    @property
    def leading(self) -> torch.Size:
        """The shape of the rows."""
        return self._row_tensor.shape[:-1]

    @property
    def class_count(self) -> int:
        """The number of classes that the target gives a probability."""
        return self._row_tensor.shape[-1]

    @property
    def _row_tensor(self) -> Tensor:
        tensor: Tensor = getattr(self, self._row_field)
        return tensor

    def checked(self: AnyTarget, sample_weight: Values | None, classes: int) -> AnyTarget:
        """Return the target, its values checked; malformed rows of sample weight 0 are cleared.

        Raises ``ValueError`` if a row of another weight is malformed.
        """
        if sample_weight is None or tuple(sample_weight.shape) != tuple(self.leading):
            self.require_values(classes, None)
            return self
        left_out = sample_weight == 0
        self.require_values(classes, ~left_out)
        if checks.values_visible(left_out) and not left_out.any():
            return self
        rows = left_out & self.malformed(classes)
        return self if checks.values_visible(rows) and not rows.any() else self.cleared(rows, classes)

    def require_fit(self, logits: Sequence[int], cut: str = "logits[..., :{classes}]") -> None:
        """Raise ``ValueError`` unless the target has the rows and classes of ``logits``, a shape.

        ``cut`` is the template of an expression that truncates the logits to ``{classes}`` classes.
        """
        shape = (*self.leading, self.class_count)
        if shape != tuple(logits):
            raise ValueError(
                f"target ({self.kind or type(self).__name__}) must have the shape {tuple(logits)} of the logits that it"
                f" is compared with, got {shape}{checks.shape_remedy(logits, shape, cut, self._cut)}"
            )


@dataclass(frozen=True, eq=False, repr=False)
class Probabilities(Target):
    """Rows of probabilities, shape ``(..., C)``: entries ≥ 0, each row summing to 1.

    Raises ``TypeError`` for a dtype that is not floating point. A loss raises ``ValueError`` for negative, unnormalised
    or NaN rows whose sample weight is not 0.
    """

    states_mass: ClassVar[bool] = True

    values: Rows

    def __post_init__(self) -> None:
        checks.require_floating("target probabilities", self.values)

    def require_values(self, classes: int, counted: Flags | None) -> None:  # noqa: D102
        checks.require_probabilities("target probabilities", self.values, counted)

    def malformed(self, classes: int) -> Flags:  # noqa: D102
        least, sums = self.values.detach().amin(-1), checks.row_sums(self.values)
        return ~((least >= 0) & ((sums - 1).abs() <= checks.sum_tolerance(self.values.dtype)))

    def logits(self, dtype: torch.dtype) -> Rows:
        """Return ``log y``; a class of probability 0 gets −inf and, as a masked class, no gradient."""
        values = self.values.to(dtype)
        some = values > 0
        return torch.where(some, torch.log(torch.where(some, values, 1.0)), -math.inf)

    def distribution_against(self, z: Rows) -> tuple[Tensor, Tensor]:  # noqa: D102
        self.require_fit(z.shape)
        return z, self.values


class Masses(Probabilities):
    """A plain floating-point target of a cross-entropy: entries ≥ 0, and rows of any sum, as in torch."""

    kind = "probabilities"

    def require_values(self, classes: int, counted: Flags | None) -> None:  # noqa: D102
        checks.require_probabilities("target", self.values, counted, of_any_sum=True)

    def malformed(self, classes: int) -> Flags:  # noqa: D102
        return ~((self.values.detach().amin(-1) >= 0) & checks.row_sums(self.values).isfinite())


@dataclass(frozen=True, eq=False, repr=False)
class Logits(Target):
    """A distribution by its logits, shape ``(..., C)``; log-probabilities are logits too."""

    values: Rows

    def __post_init__(self) -> None:
        checks.require_floating("Logits", self.values)

    def malformed(self, classes: int) -> Flags:
        """Return which rows hold NaN, +inf, or −inf only."""
        return ~self.values.detach().amax(-1).isfinite()

    def logits(self, dtype: torch.dtype) -> Rows:
        """Return the logits as they are: the loss converts them to ``dtype`` tile by tile."""
        return self.values


@dataclass(frozen=True, eq=False, repr=False)
class TopK(Target):
    """A teacher's own natural log-probabilities of ``k`` distinct classes a row, shapes ``(..., k)``.

    ``tail="bucket"``: all other classes are one outcome, for teacher and student alike, so that every divergence of the
    family is defined, is ≥ 0 and bounds the full one from below (data processing).
    ``tail="renormalize"``: the list is rescaled to a distribution that is zero elsewhere.
    Raises ``TypeError`` or ``ValueError`` for indices that are not int64 or of another shape. A loss raises
    ``ValueError`` for indices that repeat or name no class, and for a mass above 1, in rows of non-zero sample weight.
    """

    _row_field: ClassVar[str] = "log_probs"
    states_mass: ClassVar[bool] = True

    indices: Int[Tensor, "*rows k"]
    log_probs: Float[Tensor, "*rows k"]
    tail: TopKTail = "bucket"

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

    def require_values(self, classes: int, counted: Flags | None) -> None:  # noqa: D102
        if counted is None:
            counted = torch.ones(self.leading, dtype=torch.bool, device=self.indices.device)
        if not checks.values_visible(self.indices, self.log_probs, counted) or not self.indices.numel():
            return
        checks.require_class_indices("TopK indices", self.indices[counted], classes)
        if (self._repeats() & counted).any():
            raise ValueError("TopK indices must name distinct classes in each row, got a class twice")
        mass = torch.where(counted, self._mass(), 0.0).max().item()
        if not mass <= 1 + checks.SUM_TOLERANCE_HALF:
            raise ValueError(
                f"TopK log_probs must be natural log-probabilities with a mass of at most 1 a row, got {mass:.6g}; "
                "take log_softmax over all classes before topk"
            )

    def malformed(self, classes: int) -> Flags:
        """Return which rows name a class twice or no class, or have a mass above 1 or NaN."""
        outside = checks.outside_classes(self.indices, classes).any(-1)
        return outside | self._repeats() | ~(self._mass() <= 1 + checks.SUM_TOLERANCE_HALF)

    def cleared(self, rows: Flags, classes: int) -> TopK:  # noqa: D102
        column, first = rows.unsqueeze(-1), torch.arange(self.indices.shape[-1], device=self.indices.device)
        log_probs = torch.where(column, -math.log(classes), self.log_probs)
        return TopK(torch.where(column, first, self.indices), log_probs, self.tail)

    def _repeats(self) -> Flags:
        in_order = self.indices.sort(-1).values
        return (in_order[..., 1:] == in_order[..., :-1]).any(-1)

    def _mass(self) -> Values:
        return checks.widened(self.log_probs.detach()).exp().sum(-1)

    @property
    def merges_tail(self) -> bool:  # type: ignore[override]
        """Whether all classes that are not listed are one outcome."""
        return self.tail == "bucket"

    @property
    def most_probable(self) -> Indices:
        """The listed class of the largest probability."""
        return self.indices.gather(-1, self.log_probs.argmax(-1, keepdim=True)).squeeze(-1)

    def logits(self, dtype: torch.dtype) -> Rows:
        """Raise ``ValueError``: a list has no logits for all classes, so it can be a target but not the model."""
        raise ValueError("a TopK can be one side of a divergence; the other must have logits for all classes")

    def against(self, z: Rows) -> tuple[Tensor, Tensor]:
        """Return logits over the listed classes and a bucket, or over all classes with −inf outside the list."""
        self.require_fit(z.shape)
        dtype = self._common_dtype(z)
        if self.tail == "renormalize":
            log_probs = self.log_probs.to(dtype)
            return z, log_probs.new_full(z.shape, -math.inf).scatter(-1, self.indices, log_probs)
        # A shift of all outcomes changes nothing, and without it the bucket would be rounded at the logits' offset.
        wide = z.to(dtype)
        top = wide.detach().amax(-1, keepdim=True)
        wide = wide - torch.where(top == -math.inf, 0.0, top)
        student = wide.gather(-1, self.indices)
        if self.indices.shape[-1] == z.shape[-1]:
            return student, self.log_probs.to(dtype)
        others = log_sum_exp(wide.scatter(-1, self.indices, -math.inf))
        return torch.cat([student, others], -1), self.outcome_log_probs(z.shape[-1], dtype, others == -math.inf)

    def uniform_over(self, z: Rows) -> Tensor:  # noqa: D102
        each = uniform_over_unmasked(z)
        if self.tail == "renormalize":
            return each
        outcomes = self.uniform_over_outcomes(each.expand(z.shape))
        return outcomes[..., :-1] if self.indices.shape[-1] == z.shape[-1] else outcomes

    def uniform_over_outcomes(self, each: Float[Tensor, "*any classes"]) -> Float[Tensor, "*rows outcomes"]:
        """Return a distribution over the classes as one over the listed classes and the bucket, ``(..., k + 1)``."""
        each = each.expand(*self.leading, each.shape[-1])
        others = each.scatter(-1, self.indices, 0.0).sum(-1, keepdim=True)
        return torch.cat([each.gather(-1, self.indices), others], -1)

    def outcome_log_probs(
        self, classes: int, dtype: torch.dtype, rest_is_masked: Bool[Tensor, "*rows 1"] | None = None
    ) -> Float[Tensor, "*rows outcomes"]:
        """Return log-probabilities over the listed classes and all others, ``(..., k + 1)``, of ``dtype``.

        The last is what the list leaves over, or −inf if it is renormalised or names every class. Where the model
        masks every class that is not listed (``rest_is_masked``), a remainder that is within the rounding of
        ``log_probs`` is no mass: it would make the loss infinite. Half an ulp of each ``log p`` moves the mass by
        ``½ eps Σ p |log p|``, and its sum over ``k`` classes, in float32 or wider, by up to ``k`` ulps.
        """
        listed = self.log_probs.to(dtype)
        k = listed.shape[-1]
        if not self.merges_tail or k == classes:
            return torch.cat([listed, torch.full_like(listed[..., :1], -math.inf)], -1)
        tail = log_complement(listed)
        if rest_is_masked is not None:
            p = listed.exp()
            entropy = torch.where(p > 0, -p * listed, 0.0).sum(-1, keepdim=True)
            eps = torch.finfo(self.dtype).eps
            rounding = 0.5 * eps * entropy + k * min(eps, torch.finfo(torch.float32).eps)
            tail = torch.where(rest_is_masked & (tail.exp() < rounding), -math.inf, tail)
        return torch.cat([listed, tail], -1)

    def require_fit(self, logits: Sequence[int], cut: str = "") -> None:
        """Raise ``ValueError`` unless the list has the rows of the ``logits`` and at most as many classes."""
        if tuple(self.leading) != tuple(logits[:-1]) or self.indices.shape[-1] > logits[-1]:
            raise ValueError(
                f"TopK indices must be of shape {tuple(logits[:-1])} + (k,) with k <= {logits[-1]}, as the "
                f"logits that they are compared with, got {checks.describe(self.indices)}"
                + checks.layout_remedy(logits, self.leading, "logits")
            )

    def require_comparable(self, divergence: Divergence, temperature: float) -> None:
        """Raise ``ValueError`` unless a divergence from the list is defined and can have the temperature."""
        if self.tail == "renormalize" and divergence.is_infinite_off_target:
            raise ValueError(
                "a TopK with tail='renormalize' is zero outside its list, so D(model‖list) is infinite; use "
                "tail='bucket', the forward direction, or a Jensen-Shannon divergence between the ends"
            )
        if self.tail == "bucket" and temperature != 1:
            raise ValueError(
                f"temperature must be 1 for a TopK with tail='bucket', got {temperature}: the bucket cannot be "
                "tempered, its classes being unknown; use tail='renormalize', or log-probabilities of that temperature"
            )


def excluded_mask(exclude: Int[Tensor, "*rows k"] | None, classes: int) -> Bool[Tensor, "*rows classes"] | None:
    """Return which classes each row excludes; −1 is none."""
    if exclude is None:
        return None
    columns = torch.where(exclude < 0, classes, exclude)  # one more column for those that are none
    mask = exclude.new_zeros((), dtype=torch.bool).expand(*exclude.shape[:-1], classes + 1)
    return mask.scatter(-1, columns, True)[..., :-1]


def uniform_over_unmasked(z: Rows) -> Tensor:
    """Return the uniform distribution over the classes that are not masked: 1/C, ``()``, where none is."""
    dtype = checks.wide_dtype(z.dtype)
    if checks.values_visible(z) and (z.numel() == 0 or z.amin() > -math.inf):
        return z.new_tensor(1 / z.shape[-1], dtype=dtype)
    unmasked = (z != -math.inf).to(dtype)
    return unmasked / unmasked.sum(-1, keepdim=True)


def log_complement(log_probs: Float[Tensor, "*rows k"]) -> Column:
    """Return ``log(1 − Σ_k e^{l_k})``, the largest apart as ``1 − e^l = −expm1(l)``, or −inf if nothing is left."""
    at = log_probs.argmax(-1, keepdim=True)
    rest = -torch.expm1(log_probs.gather(-1, at)) - log_probs.exp().scatter(-1, at, 0.0).sum(-1, keepdim=True)
    return torch.where(rest > 0, torch.where(rest > 0, rest, 1.0).log(), -math.inf)


def log_sum_exp(z: Rows) -> Column:
    """Return the log-sum-exp, with derivatives of 0 for a row of −inf only, where torch's second one is NaN."""
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    total = (z - top).exp().sum(-1, keepdim=True)
    return torch.where(total > 0, top + torch.where(total > 0, total, 1.0).log(), -math.inf)


def as_target(target: Tensor | Target) -> Tensor | Target:
    """Return class indices as an int64 tensor and floating-point rows as :class:`Masses`, as torch reads them."""
    if isinstance(target, Target):
        return target
    if not isinstance(target, Tensor):
        raise TypeError(
            "target must be a tensor of class indices or probabilities, or one of softcurve.Probabilities, Logits, "
            f"TopK, LinearTeacher; got {type(target).__name__}"
        )
    if target.is_floating_point():
        return Masses(target)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target must hold class indices (int64) or probabilities, got {target.dtype}")
    return target.long()
