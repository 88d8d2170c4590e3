"""The passes as operators of ``torch.library``: opaque to ``torch.compile``, so that a compiled model has no break.

What is not asked for comes back as an empty tensor, since an operator's tensors are all there. Their derivatives are
registered by :mod:`softcurve.head.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softcurve.head import loop
from softcurve.head.tensors import Directions, HeadTensors, Wanted
from softcurve.losses.spec import LossSpec

# The fields of HeadTensors. The loss is passed as the string that LossSpec.encode returns.
TENSORS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? target, Tensor? target_weight, Tensor? target_bias, "
    "Tensor? indices, Tensor row_weight, Tensor? class_weight"
)
DIRECTIONS = (
    "Tensor? input_v, Tensor? weight_v, Tensor? bias_v, Tensor? target_v, Tensor? target_weight_v, "
    "Tensor? target_bias_v"
)


LIBRARY = torch.library.Library("softcurve", "FRAGMENT")
# ``per_row``, ``weight_moves``: whether derivatives of the rows will be wanted, and in the rows' weights.
LIBRARY.define(
    f"head_losses({TENSORS}, str loss, int? memory_budget, bool stats, bool all_rows, bool per_row, bool weight_moves, "
    "bool[] wanted) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"head_hessian_product({TENSORS}, {DIRECTIONS}, str loss, int? memory_budget, bool tangents, bool[] wanted) "
    "-> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(LIBRARY, "head_losses", "CompositeExplicitAutograd")
def _head_losses(*arguments: Any) -> list[Tensor]:
    """``Σ weight · loss``, each row's loss; lse, entropy, predicted class and label if ``stats``; the six gradients."""
    *given, loss, memory_budget, stats, all_rows, _, _, wanted = arguments
    tensors, loss = HeadTensors(*given), LossSpec.decode(loss)
    with _no_autocast(tensors.input):
        outcome = loop.evaluate(loss, tensors, memory_budget, wanted=_six(wanted), stats=stats, all_rows=all_rows)
    return flattened(outcome, tensors)


def flattened(outcome: loop.Outcome, tensors: HeadTensors) -> list[Tensor]:
    """Return the tensors of ``head_losses``: the weighted sum of the losses, the losses, statistics and gradients."""
    total = torch.where(tensors.row_weight == 0, 0.0, tensors.row_weight * outcome.rows).sum()
    return [total, outcome.rows, *_present(outcome.rows, *vars(outcome.statistics).values(), *outcome.gradients)]


def _fake_head_losses(*arguments: Any) -> list[Tensor]:
    *given, loss, _, stats, _, _, _, wanted = arguments
    tensors = HeadTensors(*given)
    rows = _rows_like(tensors)
    total = rows.new_empty((), dtype=torch.promote_types(rows.dtype, tensors.row_weight.dtype))
    columns: list[Tensor | None] = [None] * 4
    if stats:
        columns = [torch.empty_like(rows), torch.empty_like(rows)]
        columns += [torch.empty_like(rows, dtype=torch.int64) for _ in range(2)]
    # Not rounded yet, but for a target that is written once, tile by tile.
    wide = [rows.dtype] * 6
    if LossSpec.decode(loss).target != "teacher" and tensors.target is not None:
        wide[3] = tensors.target.dtype
    return [total, rows, *_present(rows, *columns, *_gradients_like(tensors, wanted, wide))]


@torch.library.impl(LIBRARY, "head_hessian_product", "CompositeExplicitAutograd")
def _head_hessian_product(*arguments: Any) -> list[Tensor]:
    """The change of each row's loss if ``tangents``, and of the six gradients ``wanted``, along a direction."""
    *given, loss, memory_budget, tangents, wanted = arguments
    tensors, directions = HeadTensors.split(given)
    loss = LossSpec.decode(loss)
    with _no_autocast(tensors.input):
        outcome = loop.evaluate(
            loss, tensors, memory_budget, wanted=_six(wanted), directions=directions, tangents=tangents
        )
    return [outcome.rows, *_present(outcome.rows, *outcome.gradients)]


def _fake_head_hessian_product(*arguments: Any) -> list[Tensor]:
    *given, _, _, _, wanted = arguments
    tensors, _ = HeadTensors.split(given)
    rows = _rows_like(tensors)
    own = [rows.dtype if tensor is None else tensor.dtype for tensor in tensors[:6]]
    return [rows, *_present(rows, *_gradients_like(tensors, wanted, own))]


torch.library.register_fake("softcurve::head_losses", _fake_head_losses, lib=LIBRARY)
torch.library.register_fake("softcurve::head_hessian_product", _fake_head_hessian_product, lib=LIBRARY)


def one_by_one(
    function: Callable[..., Sequence[Tensor]], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> list[Tensor]:
    """``vmap`` as a loop over problems, each of which fills the machine; stacked in front."""
    results = [
        function(
            *(
                argument if dim is None or not isinstance(argument, Tensor) else argument.select(dim, i)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def batched(operator: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """``operator(*arguments)``, one by one where ``is_grads_batched`` has batched a gradient.

    That older ``vmap`` of autograd's does not know the rules of an ``autograd.Function`` and runs its body as it is.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    in_dims = [0 if isinstance(argument, Tensor) and is_batched(argument) else None for argument in arguments]
    if all(dim is None for dim in in_dims):
        return operator(*arguments)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    whole = [
        argument if dim is None else torch._remove_batch_dim(argument, level, -1, 0)
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    size = next(len(argument) for argument, dim in zip(whole, in_dims, strict=True) if dim == 0)
    stacked = one_by_one(operator, size, in_dims, whole)
    return [torch._add_batch_dim(part, 0, level) for part in stacked]


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """What is lowered was lowered before; inside, the dtypes are the passes' own."""
    return torch.autocast(tensor.device.type, enabled=False)


def _six(wanted: Sequence[bool]) -> Wanted:
    a, b, c, d, e, f = wanted
    return a, b, c, d, e, f


def _rows_like(tensors: HeadTensors) -> Tensor:
    return tensors.input.new_empty(tensors.input.shape[0], dtype=tensors.dtype)


def _gradients_like(tensors: HeadTensors, wanted: Sequence[bool], dtypes: Sequence[torch.dtype]) -> Directions:
    a, b, c, d, e, f = (
        tensor.new_empty(tensor.shape, dtype=dtype) if is_wanted and tensor is not None else None
        for tensor, is_wanted, dtype in zip(tensors[:6], wanted, dtypes, strict=True)
    )
    return a, b, c, d, e, f


def _present(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]
