"""The kinds of target that a row of logits is compared with.

Plain tensors are read as torch reads them: integers are class indices (:mod:`softcurve.losses.labels`), floating-point
rows are probabilities of any sum. Other kinds are wrapped: :class:`Probabilities`, :class:`Logits`,
:class:`~softcurve.losses.teacher.LinearTeacher` and :class:`~softcurve.losses.topk.TopK`. :meth:`Target.against`
returns a model's logits and the target's over the same outcomes. Tensors that require gradients receive them.

Shapes and dtypes are checked when a target is made. Values are checked when a loss is computed, by
:meth:`Target.checked`, because a row whose sample weight is 0 may hold anything.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Bool, Flags, Int, Rows, Values
from softcurve.records import ShortRepr
from softcurve.typing import Integer

AnyTarget = TypeVar("AnyTarget", bound="Target")


class Target(ShortRepr, ABC):
    """A distribution over the classes for each row."""

    merges_tail = False
    """Whether the outcomes are listed classes and one bucket for all other classes."""

    states_mass: ClassVar[bool] = False
    """Whether its probabilities are stated, also those of classes that a row excludes; else a softmax makes them."""

    _row_field: ClassVar[str] = "values"  # the field whose leading dimensions are those of the rows
    _class_fields: ClassVar[tuple[str, ...] | None] = None  # that have a dimension of classes; by default the same one
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

    def with_classes_last(self: AnyTarget, dim: int) -> AnyTarget:
        """Return the target of which the classes are in dimension ``dim``, as a view that has them last."""
        fields = (self._row_field,) if self._class_fields is None else self._class_fields
        moved = {name: checks.moved_last(getattr(self, name), dim, "target") for name in fields}
        return replace(self, **moved)  # type: ignore[type-var]

    def require_fit(self, logits: Sequence[int], cut: str = "logits[..., :{classes}]") -> None:
        """Raise ``ValueError`` unless the target has the rows and classes of ``logits``, a shape.

        ``cut`` is the template of an expression that truncates the logits to ``{classes}`` classes.
        """
        shape = (*self.leading, self.class_count)
        if shape != tuple(logits):
            remedy = checks.shape_remedy(logits, shape, cut, self._cut)
            if shape == tuple(logits[:-1]):
                remedy = "; class indices are integers: pass target.long()"
            raise ValueError(
                f"target ({self.kind or type(self).__name__}) must have the shape {tuple(logits)} of the logits that it"
                f" is compared with, got {shape}{remedy}"
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


def with_classes_last(dim: Integer, **arguments: Any) -> list[Any]:
    """Return views of the arguments whose classes are in dimension ``dim``; class indices are left as they are."""
    number = checks.require_dim(dim)
    views: list[Any] = []
    for name, value in arguments.items():
        if isinstance(value, Target):
            views.append(value.with_classes_last(number))
        elif isinstance(value, Tensor) and (value.is_floating_point() or name == "exclude"):
            views.append(checks.moved_last(value, number, name))
        else:
            views.append(value)
    return views


def as_target(
    target: Tensor | Target, plain: str = "a tensor of class indices or probabilities, or "
) -> Tensor | Target:
    """Return class indices as an int64 tensor and floating-point rows as :class:`Masses`, as torch reads them.

    ``plain`` says in an error which tensors are accepted without a wrapper.
    """
    if isinstance(target, Target):
        return target
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target must be {plain}one of softcurve.Probabilities, Logits, TopK, LinearTeacher, got "
            f"{type(target).__name__}; wrap a tensor to say what it holds, and read the rows of a cache by cache[rows]"
        )
    if target.is_floating_point():
        return Masses(target)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target must hold class indices (int64) or probabilities, got {target.dtype}")
    return target.long()
