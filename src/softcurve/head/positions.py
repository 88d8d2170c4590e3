"""Losses of K more dimensions: a weight ``(C, d_1, …, d_K, d)`` is a head for each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcurve import checks
from softcurve.head.problem import HeadProblem, head_problem
from softcurve.head.row_statistics import LossStats
from softcurve.losses.reduction import Reduction
from softcurve.losses.spec import LossSpec
from softcurve.losses.targets import Target
from softcurve.typing import Integer


def problems_by_position(
    loss: LossSpec, input: Tensor, linear_weight: Tensor, target: Tensor | Target, linear_bias: Tensor | None,
    sample_weight: Tensor | None, shift: int, exclude: Tensor | None, **options: Any,
) -> tuple[list[HeadProblem], tuple[int, ...]]:  # fmt: skip
    """Return the problem at each position ``d_1 … d_K`` of a weight ``(C, d_1, …, d_K, d)``, and the shape of rows."""
    target, rows = _require_positions(input, linear_weight, target, linear_bias, shift)
    target = target.flatten(2).movedim(1, 2) if target.is_floating_point() else target.flatten(1)
    by_position = {"linear_bias": None if linear_bias is None else linear_bias.flatten(1)}
    if sample_weight is not None:
        checks.require_rows("sample_weight", sample_weight, rows, "the target")
        by_position["sample_weight"] = sample_weight.flatten(1)
    excluded = checks.require_exclude(exclude, rows, classes=len(linear_weight))
    by_position["exclude"] = None if excluded is None else excluded.flatten(1, -2)
    input = checks.widened(input)  # so that the sum of its gradients over the positions is rounded once
    problems = []
    for i, weight in enumerate(linear_weight.flatten(1, -2).unbind(1)):
        options |= {name: None if values is None else values[:, i] for name, values in by_position.items()}
        problems.append(head_problem(loss, input, weight, target[:, i], **options))
    return problems, rows


def by_position(
    problems: list[HeadProblem], rows: tuple[int, ...], reducer: Reduction, memory_budget: Integer | None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, LossStats]:  # fmt: skip
    """Compute the loss of the problems of all positions, whose mean has one divisor."""
    divisors = [problem.divisor(reducer) for problem in problems]
    divisor = torch.stack(divisors).sum() if reducer.kind == "mean" else divisors[0]
    parts: list[Any] = [problem.computed(reducer, divisor, memory_budget, return_stats) for problem in problems]
    losses = torch.stack([part[0] if return_stats else part for part in parts], -1)
    result = losses.reshape(rows) if reducer.kind == "none" else losses.sum()
    if not return_stats:
        return result
    columns = zip(*(stats for _, stats in parts), strict=True)
    stacked = [torch.stack(column, 1) for column in columns]
    return result, LossStats(*(column.reshape((*rows, *column.shape[2:])) for column in stacked))


def _require_positions(
    input: Tensor, linear_weight: Tensor, target: Tensor | Target, linear_bias: Tensor | None, shift: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Check the arguments of a head of ``K`` more dimensions; return the target and the shape of the rows."""
    classes, *positions, _ = linear_weight.shape
    if not isinstance(target, Tensor):
        raise TypeError(
            "target must be a plain tensor for a linear_weight of more than two dimensions, class indices or "
            f"probabilities with the classes second, got {type(target).__name__}; pass its values"
        )
    checks.require_features("input", input)
    if input.ndim != 2:
        raise ValueError(f"input must be of shape (N, d) for a weight of K dimensions, got {checks.describe(input)}")
    if shift:
        raise ValueError(f"shift must be 0 for a linear_weight of more than two dimensions, got {shift}")
    if 0 in positions:
        raise ValueError(f"linear_weight must have at least one position, got {checks.describe(linear_weight)}")
    rows = (len(input), *positions)
    distributions = (len(input), classes, *positions)
    shapes = {"target": distributions if target.is_floating_point() else rows, "linear_bias": distributions[1:]}
    for name, tensor in (("target", target), ("linear_bias", linear_bias)):
        if tensor is not None:
            checks.require_tensor(name, tensor)
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} must be of shape {shapes[name]}, got {checks.describe(tensor)}")
    return target, rows
