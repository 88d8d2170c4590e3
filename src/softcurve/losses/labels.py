"""The target of a cross-entropy as class indices: which rows count, and the weight of each in a sum and in a mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Flags, Float, Indices, Values
from softcurve.losses.class_map import GroupedTarget
from softcurve.losses.targets import Target, as_target
from softcurve.losses.teacher import LinearTeacher

DEFAULT_IGNORE_INDEX = -100  # torch's own default


class Labels(NamedTuple):
    """Checked class indices and the weights of their rows; an ignored row has class 0 and weight 0."""

    classes: Indices
    counted: Flags
    class_weight: Values | None  # of the class of each row
    weight: Values
    mean_weight: Values  # the weight of each row times that of its class

    @staticmethod
    def of(
        target: Indices, sample_weight: Values | None, class_weight: Float[Tensor, " classes"] | None, classes: int,
        ignore_index: int, dtype: torch.dtype,
    ) -> Labels:  # fmt: skip
        """Check class indices; a row of sample weight 0 may hold any number, and is ignored if that is no class."""
        if sample_weight is not None:
            left_out = (sample_weight == 0) & checks.outside_classes(target, classes)
            target = torch.where(left_out, ignore_index, target)
        checks.require_class_indices("target", target, classes, ignore_index)
        counted = target != ignore_index
        label = torch.where(counted, target, 0)
        of_class = None if class_weight is None else class_weight[label]
        weight = counted.to(dtype) if sample_weight is None else torch.where(counted, sample_weight, 0.0)
        return Labels(label, counted, of_class, weight, weight if of_class is None else weight * of_class)


def count_alike(target: Indices, classes: int, ignore_index: int) -> bool:
    """Return whether all rows are seen to have a class, so that without weights none of them differs from the others.

    This is all that there is to check then, and takes one pass over the indices.
    """
    return not 0 <= ignore_index < classes and checks.names_classes(target, classes)


def cross_entropy_target(
    target: Tensor | Target, ignore_index: object, class_weight: Tensor | None, classes: int
) -> tuple[Tensor | Target, int]:
    """Return the target as int64 class indices or a :class:`Target`, and the index of ignored rows.

    Raises ``TypeError`` or ``ValueError`` if the target, the class weights or ``ignore_index`` do not fit together.
    """
    target = as_target(target)
    if isinstance(target, GroupedTarget):
        target.refuse_labels()
    if class_weight is not None:
        checks.require_class_weight(class_weight, classes)
        if isinstance(target, Target) and target.merges_tail:
            raise ValueError(
                "weight must be None for a TopK with tail='bucket', whose bucket has no class; "
                "use tail='renormalize' or sample_weight"
            )
    index = resolve_ignore_index(ignore_index)
    if isinstance(target, Target) and index != DEFAULT_IGNORE_INDEX:
        raise ValueError(
            f"ignore_index must not be given for a target that is a distribution, got {index}; "
            "use sample_weight to leave out rows"
        )
    return target, index


def require_labels(target: Tensor | Target) -> Tensor | Target:
    """Return the labels beside a divergence as :func:`as_target` does; raise ``TypeError`` for a second head."""
    labels = as_target(target)
    if isinstance(labels, LinearTeacher):
        raise TypeError(
            "target must be class indices, or soft labels that are given by numbers, got LinearTeacher; pass it as the "
            "teacher, or softcurve.Logits of its logits, or add its linear_cross_entropy to the loss"
        )
    return labels


def resolve_ignore_index(ignore_index: object) -> int:
    """Return the class index of ignored rows as a Python int; ``None`` is the default, −100."""
    index = DEFAULT_IGNORE_INDEX if ignore_index is None else checks.as_integer(ignore_index)
    if index is None:
        raise TypeError(f"ignore_index must be an int or None, got {type(ignore_index).__name__}")
    return index
