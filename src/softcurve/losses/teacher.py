"""A teacher's linear head as a target, whose logits a loss on a head computes tile by tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Flags, Float, Int, Rows
from softcurve.losses.low_rank import LowRankWeight, linear, lowered_by_autocast, matrix_of
from softcurve.losses.spec import LogitMap
from softcurve.losses.targets import Target
from softcurve.typing import Number


@dataclass(frozen=True, eq=False, repr=False)
class LinearTeacher(Target):
    """A teacher's head: ``softmax(cap(scale * (input @ linear_weight.T + linear_bias)))`` over some of its classes.

    Args:
        input: Features ``(..., d)``; the width ``d`` is the teacher's own.
        linear_weight: ``(C, d)``, or a :class:`~softcurve.LowRankWeight` of this shape.
        linear_bias: ``(C,)``; −inf masks a class.
        softcap: ``κ`` in ``cap(z) = κ tanh(z / κ)``, the teacher's own, in nats; ``None`` is no cap. The temperature of
            a divergence is applied after it.
        scale: A factor > 0 of the logits before the cap.
        classes: Which of the teacher's classes are those of the model, in the model's order: a slice, for example for a
            padded vocabulary, or int64 indices ``(C_model,)``, where −1 is a class that the teacher lacks and gives no
            probability. The softmax is over these classes. By default all of them. A slice copies nothing; of an
            index, a head gathers a few rows of the weight at a time.

    Under ``torch.autocast`` its tensors are rounded to the dtype of autocast, as those of the model's head are, unless
    they are float64.

    Raises:
        TypeError, ValueError: If an argument has a wrong type, shape or value. A loss raises ``ValueError`` for
            ``classes`` that are not as many as the model's, or outside of ``−1 … C − 1`` (in eager mode on the CPU).

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(5, 4)
        >>> of_student = torch.tensor([6, 2, 0, -1, 4])  # where each class of the student is in the teacher's head
        >>> teacher = softcurve.LinearTeacher(torch.randn(3, 8), torch.randn(7, 8), softcap=30.0, classes=of_student)
        >>> loss = softcurve.linear_kl_divergence(x, w, teacher)
    """

    _row_field: ClassVar[str] = "input"
    _class_fields: ClassVar[tuple[str, ...] | None] = ()  # the features are last wherever the model's classes are
    _cut: ClassVar[str] = "LinearTeacher(..., classes=slice({classes}))"

    input: Float[Tensor, "*rows teacher_features"]
    linear_weight: Float[Tensor, "teacher_classes teacher_features"] | LowRankWeight
    linear_bias: Float[Tensor, " teacher_classes"] | None = None
    _: KW_ONLY
    softcap: Number | None = None
    scale: Number = 1.0
    classes: slice | Int[Tensor, " classes"] | None = None

    def __post_init__(self) -> None:
        checks.require_head(self.input, matrix_of(self.linear_weight), self.linear_bias, owner="LinearTeacher ")
        for name in ("scale", "softcap"):
            if (number := getattr(self, name)) is not None or name == "scale":
                checks.require_positive(f"LinearTeacher {name}", number)
        if isinstance(self.classes, Tensor):
            if self.classes.dtype != torch.int64 or self.classes.ndim != 1 or not len(self.classes):
                raise TypeError(
                    "LinearTeacher classes must be a slice or an int64 tensor (C_model,) of the teacher's classes, got "
                    f"{checks.describe(self.classes)}; convert it with .long().flatten()"
                )
        elif self.classes is not None and not isinstance(self.classes, slice):
            raise TypeError(
                "LinearTeacher classes must be a slice, an int64 tensor or None, got "
                f"{type(self.classes).__name__}; convert it with torch.tensor"
            )
        elif self.classes is not None and ((self.classes.step or 1) < 1 or self.class_count == 0):
            raise ValueError(
                f"LinearTeacher classes must be a slice in steps >= 1 of the {self.linear_weight.shape[0]} classes of "
                f"linear_weight that has at least one, got {self.classes}; for another order pass an int64 tensor"
            )

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return torch.promote_types(self.input.dtype, self.linear_weight.dtype)

    @property
    def logit_map(self) -> LogitMap:
        """The teacher's own scale and soft cap."""
        return LogitMap.of_scaled(float(self.scale), None if self.softcap is None else float(self.softcap))

    @property
    def class_count(self) -> int:  # noqa: D102
        count = self.linear_weight.shape[0]
        if isinstance(self.classes, slice):
            return len(range(*self.classes.indices(count)))
        return count if self.classes is None else len(self.classes)

    def require_fit(self, logits: Sequence[int], cut: str = "logits[..., :{classes}]") -> None:  # noqa: D102
        try:
            super().require_fit(logits, cut)
        except ValueError as error:
            if self.class_count == logits[-1]:
                raise
            raise ValueError(
                f"{error}; if the classes differ, say by LinearTeacher(..., classes=) which of the teacher's are the "
                "model's, −1 for one that it lacks, or group the classes of both by softcurve.ClassMap"
            ) from None

    def require_values(self, classes: int, counted: Flags | None) -> None:
        """Raise ``ValueError`` for indices that name no class of the teacher."""
        if not isinstance(self.classes, Tensor) or not checks.values_visible(self.classes):
            return
        least, most = (int(bound) for bound in self.classes.aminmax())
        count = self.linear_weight.shape[0]
        if least < -1 or most >= count or most < 0:
            raise ValueError(
                f"LinearTeacher classes must hold the teacher's classes 0 … {count - 1}, at least one, or -1 where it "
                f"lacks a class of the model, got {least if least < -1 or most < 0 else most}"
            )

    def malformed(self, classes: int) -> Flags:
        """Return which rows have NaN or infinite features."""
        return ~self.input.detach().isfinite().all(-1)

    def chosen(self) -> tuple[Tensor | LowRankWeight, Tensor | None, Tensor | None]:
        """Return weight and bias for the model's classes, and the rows of the weight that these are.

        The rows are ``None`` if the weight has no others. A class that the teacher lacks is row 0 with a bias of −inf.
        """
        weight, bias, classes = self.linear_weight, self.linear_bias, self.classes
        if classes is None:
            return weight, bias, None
        if isinstance(classes, slice):
            return weight[classes], None if bias is None else bias[classes], None
        rows = classes.clamp(min=0)
        known = torch.zeros(rows.shape, dtype=weight.dtype, device=rows.device) if bias is None else bias[rows]
        return weight, torch.where(classes < 0, -math.inf, known), rows

    def logits(self, dtype: torch.dtype) -> Rows:
        """Return the logits after scale and soft cap, without a cap less a constant of each row."""
        weight, bias, rows = self.chosen()
        weight = weight if rows is None else weight[rows]
        input, weight, bias = lowered_by_autocast(self.input, weight, bias)
        logits = linear(input, weight, bias, dtype)
        return self.logit_map.shifted_value(logits)[0]
