"""The passes as operators of ``torch.library``: opaque to ``torch.compile``, so that a compiled model has no break.

What is not asked for comes back as an empty tensor, since an operator returns a fixed number of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softcurve.head import passes
from softcurve.head.problem import Directions, HeadLoss, HeadTensors, Wanted


@torch.library.custom_op("softcurve::head_losses", mutates_args=())
def head_losses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    indices: Tensor | None,
    row_weight: Tensor,
    class_weight: Tensor | None,
    family: str,
    kind: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    z_loss: float,
    smoothing: float,
    memory_budget: int | None,
    stats: bool,
    all_rows: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Each row's loss; log-sum-exp, entropy, predicted class and label if ``stats``; the six gradients ``wanted``."""
    loss = HeadLoss(family, kind, beta, temperature, softcap, z_loss, smoothing)
    tensors = HeadTensors(
        input, weight, bias, target, target_weight, target_bias, indices, row_weight, class_weight
    )
    outcome = passes.evaluate(
        loss, tensors, memory_budget, wanted=_six(wanted), stats=stats, all_rows=all_rows
    )
    return [outcome.rows, *_present(input, *vars(outcome.statistics).values(), *outcome.gradients)]


@head_losses.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    indices: Tensor | None,
    row_weight: Tensor,
    class_weight: Tensor | None,
    family: str,
    kind: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    z_loss: float,
    smoothing: float,
    memory_budget: int | None,
    stats: bool,
    all_rows: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    tensors = HeadTensors(
        input, weight, bias, target, target_weight, target_bias, indices, row_weight, class_weight
    )
    rows = input.new_empty(input.shape[0], dtype=tensors.dtype)
    columns: list[Tensor | None] = [None] * 4
    if stats:
        columns = [torch.empty_like(rows), torch.empty_like(rows)]
        columns += [torch.empty_like(rows, dtype=torch.int64) for _ in range(2)]
    return [rows, *_present(input, *columns, *_gradients_like(tensors, wanted))]


@torch.library.custom_op("softcurve::head_hessian_product", mutates_args=())
def head_hessian_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    indices: Tensor | None,
    row_weight: Tensor,
    class_weight: Tensor | None,
    input_v: Tensor | None,
    weight_v: Tensor | None,
    bias_v: Tensor | None,
    target_v: Tensor | None,
    target_weight_v: Tensor | None,
    target_bias_v: Tensor | None,
    family: str,
    kind: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    z_loss: float,
    smoothing: float,
    memory_budget: int | None,
    tangents: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The change of each row's loss if ``tangents``, and of the six gradients ``wanted``, along a direction."""
    loss = HeadLoss(family, kind, beta, temperature, softcap, z_loss, smoothing)
    tensors = HeadTensors(
        input, weight, bias, target, target_weight, target_bias, indices, row_weight, class_weight
    )
    directions = (input_v, weight_v, bias_v, target_v, target_weight_v, target_bias_v)
    outcome = passes.hessian_product(
        loss, tensors, directions, memory_budget, wanted=_six(wanted), wants_tangents=tangents
    )
    return [outcome.rows, *_present(input, *outcome.gradients)]


@head_hessian_product.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    indices: Tensor | None,
    row_weight: Tensor,
    class_weight: Tensor | None,
    input_v: Tensor | None,
    weight_v: Tensor | None,
    bias_v: Tensor | None,
    target_v: Tensor | None,
    target_weight_v: Tensor | None,
    target_bias_v: Tensor | None,
    family: str,
    kind: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    z_loss: float,
    smoothing: float,
    memory_budget: int | None,
    tangents: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    tensors = HeadTensors(
        input, weight, bias, target, target_weight, target_bias, indices, row_weight, class_weight
    )
    rows = input.new_empty(input.shape[0], dtype=tensors.dtype)
    return [rows, *_present(input, *_gradients_like(tensors, wanted))]


def described(loss: HeadLoss) -> tuple[str, str, float, float, float | None, float, float]:
    """The description as an operator takes it."""
    return (
        loss.family, loss.target, loss.beta, loss.temperature, loss.softcap, loss.z_loss, loss.smoothing
    )  # fmt: skip


def _six(wanted: Sequence[bool]) -> Wanted:
    a, b, c, d, e, f = wanted
    return a, b, c, d, e, f


def _gradients_like(tensors: HeadTensors, wanted: Sequence[bool]) -> Directions:
    a, b, c, d, e, f = (
        tensor.new_empty(tensor.shape) if is_wanted and tensor is not None else None
        for tensor, is_wanted in zip(tensors[:6], wanted, strict=True)
    )
    return a, b, c, d, e, f


def _present(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]
