"""The public calls that return what a head's softmax is: its statistics, and lists of its most probable classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from softcurve import checks
from softcurve.head.autograd import head_statistics
from softcurve.head.local import LocalHead, local_exclusions, local_head, local_row_values
from softcurve.head.problem import explain_head_nan, require_budget
from softcurve.head.row_statistics import HeadStatistics
from softcurve.head.sharded import PlainHead, head_layout
from softcurve.head.tensors import HeadTensors
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.low_rank import LowRankWeight, matrix_of
from softcurve.losses.reduction import Reduction
from softcurve.losses.spec import LossSpec
from softcurve.typing import Integer, Number

MOST_LISTED = 1024  # classes of a list


def statistics_of_head(
    input: Tensor, linear_weight: Tensor | LowRankWeight, index: Tensor | None, *, linear_bias: Tensor | None,
    temperature: Number | Tensor, softcap: Number | None, exclude: Tensor | None, memory_budget: Integer | None,
) -> HeadStatistics:  # fmt: skip
    """Compute what :func:`softcurve.linear_log_probs` returns."""
    checks.require_head(input, matrix_of(linear_weight), linear_bias)
    layout = head_layout(
        input, linear_weight, None, linear_bias=linear_bias, index=index, temperature=temperature, exclude=exclude
    )

    def make() -> tuple[LocalHead, LossSpec, HeadTensors]:
        per_row = temperature if isinstance(temperature, Tensor) and temperature.ndim else None
        number: Any = 1.0 if per_row is not None else temperature
        loss = LossSpec.of(CrossEntropy(), Reduction.of("none", math.e), number, softcap)
        loss = dataclasses.replace(loss, **layout.shard)
        rows = _flat_index(layout, index, input.device)
        head = local_head(layout, loss, input, linear_weight, linear_bias, rows, None)
        scale = None if per_row is None else 1 / _row_temperature(layout, per_row).to(head.dtype)
        ones = torch.ones(len(head.input), dtype=head.dtype, device=head.input.device)
        excluded = local_exclusions(layout, exclude, 0)
        tensors = HeadTensors(
            **head.tensors, indices=rows, row_weight=ones, class_weight=None, excluded=excluded, row_scale=scale
        )
        return head, loss, tensors

    head, loss, tensors = layout.agreed(make)
    assert tensors.indices is not None
    found = head_statistics(loss, tensors, tensors.indices, require_budget(memory_budget))
    layout.agreed(lambda: explain_head_nan(tensors, HeadStatistics.of(found, one=False).entropy))
    whole = layout.restored(found.reshape(*head.leading, found.shape[-1]), per_row=True)
    return HeadStatistics.of(whole, one=index is not None and index.ndim < input.ndim)


def head_top_classes(
    loss: LossSpec, input: Tensor, linear_weight: Tensor | LowRankWeight, linear_bias: Tensor | None, k: object,
    exclude: Tensor | None, memory_budget: Integer | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the ``k`` most probable classes of each row of a public call and their log-probabilities, detached."""
    checks.require_head(input, matrix_of(linear_weight), linear_bias)
    layout = head_layout(input, linear_weight, None, linear_bias=linear_bias, exclude=exclude)
    count, most = checks.as_integer(k), min(layout.classes, MOST_LISTED)
    if count is None or not 1 <= count <= most:
        raise ValueError(
            f"k must be an int from 1 to {most}, the smaller of the {layout.classes} classes and {MOST_LISTED}, "
            f"got {k!r}"
        )

    def make() -> tuple[Tensor, Tensor]:
        head = local_head(layout, loss, input, linear_weight, linear_bias, None, None)
        parts: dict[str, Any] = {name: None if part is None else part.detach() for name, part in head.tensors.items()}
        ones = head.input.new_ones(len(head.input), dtype=head.dtype)
        excluded = local_exclusions(layout, exclude, 0)
        tensors = HeadTensors(**parts, indices=None, row_weight=ones, class_weight=None, excluded=excluded)
        spec = dataclasses.replace(loss, target="sparse", **layout.shard)
        indices, log_probs = torch.ops.softcurve.head_top_classes(
            *tensors, spec.encode(), count, require_budget(memory_budget)
        )
        explain_head_nan(tensors, log_probs[:, 0])
        shape = (*head.leading, count)
        return indices.reshape(shape), log_probs.to(head.dtype).reshape(shape)

    indices, log_probs = layout.agreed(make)
    return layout.restored(indices, per_row=True), layout.restored(log_probs, per_row=True)


def _flat_index(layout: PlainHead, index: Tensor | None, device: torch.device) -> Tensor:
    """Return the classes asked for in the rows of this process, ``(n, k)``."""
    leading = tuple(layout.leading)
    if index is None:
        index = torch.empty(*leading, 0, dtype=torch.int64, device=device)
    checks.require_tensor("index", index)
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"index must hold class indices (int64), got {index.dtype}; convert it with .long()")
    if tuple(index.shape) != leading and tuple(index.shape[:-1]) != leading:
        raise ValueError(
            f"index must have one class per row, shape {leading} (the leading dimensions of input), or k of them, "
            f"{(*leading, 'k')}, got {checks.describe(index)}"
        )
    index = layout.local_rows(index if index.ndim > len(leading) else index.unsqueeze(-1)).long()
    checks.require_class_indices("index", index, layout.classes)
    return index.reshape(math.prod(index.shape[:-1]), index.shape[-1])


def _row_temperature(layout: PlainHead, temperature: Tensor) -> Tensor:
    """Return the temperature of each row of this process, ``(n,)``."""
    if temperature.requires_grad:
        raise ValueError("temperature must not require gradients, which are not computed in it; detach it")
    rows = local_row_values(layout, "temperature", temperature, 0, 0)
    if checks.values_visible(rows) and not bool(((rows > 0) & rows.isfinite()).all()):
        raise ValueError("temperature must be positive and finite in every row, got another; clamp it")
    return rows
