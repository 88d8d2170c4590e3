"""What logits that are not made are: features, a head's weight and bias, and the operations that followed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from softcurve.checks import wide_dtype
from softcurve.head.sharded import lies_over_processes
from softcurve.losses.low_rank import LowRankWeight, matrix_of
from softcurve.losses.teacher import LinearTeacher

Plan: TypeAlias = tuple[tuple[str, Any], ...]

NUMBERS = ("dtype", "dim", "lowered", "scale", "after", "kind", "factor", "memory_budget", "version",
           "wants")  # fmt: skip


def shape_of(input: Tensor, weight: Tensor, dim: int) -> torch.Size:
    """Return the shape of logits whose classes stand at ``dim``."""
    leading = input.shape[:-1]
    return torch.Size((*leading[:dim], weight.shape[0], *leading[dim:]))


@dataclass(frozen=True, eq=False)
class LinearRecord:
    """Logits ``after · tanh(scale · (W e + b))``, or ``scale · (W e + b)`` without a cap, or a softmax of them.

    The features have their ``d`` last, and the classes of what is recorded stand at dimension ``dim``.
    """

    input: Tensor  # (..., d)
    weight: Tensor | LowRankWeight  # (C, d)
    bias: Tensor | None  # (C,)
    dtype: torch.dtype  # of the tensor that is recorded
    dim: int
    lowered: torch.dtype | None = None  # the dtype of autocast when the head ran, which made its product in it
    scale: float = 1.0
    after: float | None = None  # the factor of tanh; None if there is no cap
    kind: Literal["logits", "log_softmax", "softmax"] = "logits"
    factor: float = 1.0  # of the log-softmax or softmax
    memory_budget: Any = None  # of the functions on a head that take the record
    version: int | None = None  # of the tensors when the operation was recorded
    wants: bool = False  # whether compiled code that recorded it wants gradients
    returned: list[tuple[Tensor, Tensor]] | None = None  # classes of each row whose entries a function has returned

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.weight.shape[0]

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that is recorded."""
        return shape_of(self.input, matrix_of(self.weight), self.dim)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self.input.ndim

    @property
    def classes_last(self) -> bool:
        """Whether the classes are the last dimension, as those of a head are."""
        return self.dim == self.input.ndim - 1

    @property
    def streams(self) -> bool:
        """Whether a loss on the head has options that mean this record: a cap and a temperature, both positive."""
        return self.scale > 0 and (self.after is None or self.after > 0)

    @property
    def options(self) -> dict[str, Any]:
        """The options of a function on a head that mean this record."""
        softcap = None if self.after is None else 1 / self.scale
        temperature = 1 / (self.scale if self.after is None else self.scale * self.after)
        return {
            "linear_bias": self.bias, "softcap": softcap, "temperature": temperature,
            "memory_budget": self.memory_budget,
        }  # fmt: skip

    def tensors(self) -> tuple[Any, ...]:
        """Return the tensors of the record, those of an adapter last."""
        if not isinstance(self.weight, LowRankWeight):
            return self.input, self.weight, self.bias, None, None, None
        low = self.weight
        scale = low.scale if isinstance(low.scale, Tensor) else None
        return self.input, low.weight, self.bias, low.a, low.b, scale

    def plan(self) -> Plan:
        """Return everything but the tensors; :meth:`of_plan` is the inverse."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        if isinstance(self.weight, LowRankWeight) and not isinstance(self.weight.scale, Tensor):
            numbers["low_rank_scale"] = float(self.weight.scale)
        return tuple(numbers.items())

    @staticmethod
    def of_plan(
        plan: Plan, input: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
        low_rank_scale: Tensor | None,
    ) -> LinearRecord:  # fmt: skip
        """Return the record of a plan and its tensors."""
        numbers = dict(plan)
        scale = numbers.pop("low_rank_scale", low_rank_scale)
        if a is None or b is None:
            return LinearRecord(input, weight, bias, **numbers)
        return LinearRecord(input, LowRankWeight(weight, a, b, scale), bias, **numbers)

    def but(self, **changes: Any) -> LinearRecord:
        """Return the record with some fields changed."""
        return replace(self, **changes)

    def of_rows(self, input: Tensor) -> LinearRecord:
        """Return the record of other features, with the classes last."""
        return replace(self, input=input, dim=input.ndim - 1)

    def detached(self) -> LinearRecord:
        """Return the record without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, input=self.input.detach(), weight=self.weight.detach(), bias=bias, wants=False)

    def as_teacher(self, temperature: float = 1.0) -> LinearTeacher:
        """Return the softmax as a target of a loss that divides the target's logits by ``temperature``.

        A divergence divides them by its own temperature, which the target undoes here; a cross-entropy does not divide.
        """
        scale, softcap = self.scale * temperature, None
        if self.after is not None:
            softcap = self.after * temperature
            scale = self.scale * softcap
        return LinearTeacher(self.input, self.weight, self.bias, softcap=softcap, scale=scale)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which a head multiplies in the dtype in which it did when it was recorded."""
        if not torch.amp.is_autocast_available(self.input.device.type):
            return nullcontext()
        return torch.autocast(self.input.device.type, dtype=self.lowered, enabled=self.lowered is not None)

    def widened(self, result: Tensor) -> Tensor:
        """Return a result of a function on a head in the record's dtype, as torch does, but in float32 or wider."""
        return result.to(wide_dtype(self.dtype))

    def multiplied(self, input: Tensor, matrix: Tensor) -> Tensor:
        """Return ``input @ matrix.mT``; a scale of each row may have widened the features."""
        if self.lowered is None:
            wide = torch.promote_types(input.dtype, matrix.dtype)
            input, matrix = input.to(wide), matrix.to(wide)
        return input @ matrix.mT

    def materialize(self) -> Tensor:
        """Return the tensor, computed as the head and the operations would have."""
        matrix, bias = matrix_of(self.weight), self.bias
        with self.autocast():
            if self.input.dtype == matrix.dtype and (bias is None or bias.dtype == matrix.dtype):
                z = F.linear(self.input, matrix, bias)
            else:
                z = self.multiplied(self.input, matrix)
                z = z if bias is None else z + bias
            if isinstance(self.weight, LowRankWeight):
                low = F.linear(self.input.to(self.weight.b.dtype), self.weight.b)
                z = z + self.weight.factor * F.linear(low, self.weight.a).to(z.dtype)
        if z.dtype.itemsize < self.dtype.itemsize:
            z = z.to(self.dtype)
        z = z if self.scale == 1 else z * self.scale
        z = z if self.after is None else torch.tanh(z) * self.after
        if self.kind != "logits":
            z = (F.log_softmax if self.kind == "log_softmax" else F.softmax)(z, dim=-1, dtype=self.dtype)
            z = z if self.factor == 1 else z * self.factor
        z = z.to(self.dtype)
        return z if self.classes_last else z.movedim(-1, self.dim)


def version_of(record: LinearRecord) -> int | None:
    """Return a number that grows with each change of the tensors in place; ``None`` where torch does not count them."""
    parts = [part for part in record.tensors() if part is not None]
    return None if any(part.is_inference() for part in parts) else sum(part._version for part in parts)


def require_unchanged(record: LinearRecord) -> None:
    """Raise ``RuntimeError`` if the features, the weight or the bias are not what the head multiplied any more."""
    matrix = matrix_of(record.weight)
    if lies_over_processes(matrix) or torch._C._functorch.is_functorch_wrapped_tensor(matrix):
        return
    if matrix.numel() and matrix.device.type != "meta" and matrix.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            "the weight of unmade logits was freed after the head ran, as FSDP does for a head that is a group of its "
            "own; leave the head to the root group, or shard it with reshard_after_forward=False"
        )
    if record.version is not None and version_of(record) != record.version:
        raise RuntimeError(
            "the features, weight or bias of unmade logits were changed in place after the head ran, the weight as by "
            "an optimizer step; use the logits before, or call logits.materialize() where they must stay as they are"
        )
