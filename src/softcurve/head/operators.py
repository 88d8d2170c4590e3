"""The passes as operators of ``torch.library``: opaque to ``torch.compile``, so that a compiled model has no break.

What is not asked for comes back as an empty tensor, since an operator's tensors are all there. Their derivatives are
registered by :mod:`softcurve.head.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softcurve.head import loop, topk
from softcurve.head.kernel import Statistics
from softcurve.head.tensors import DIFFERENTIABLE, TARGET, HeadTensors
from softcurve.losses.spec import LossSpec

# The fields of HeadTensors. The loss is passed as the string that LossSpec.encode returns.
TENSORS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? target, Tensor? target_weight, Tensor? target_bias, "
    "Tensor? low_rank, Tensor? target_low_rank, Tensor? indices, Tensor row_weight, Tensor? class_weight, "
    "Tensor? excluded, Tensor? labels, Tensor? row_scale, Tensor? target_classes, Tensor? groups, "
    "Tensor? target_groups, Tensor? label_factor, Tensor? label_values"
)
DIRECTIONS = ", ".join(f"Tensor? {name}_v" for name in HeadTensors._fields[:DIFFERENTIABLE])

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
LIBRARY.define(
    f"head_statistics({TENSORS}, str loss, int? memory_budget, Tensor? known) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"head_top_classes({TENSORS}, str loss, int k, int? memory_budget) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(LIBRARY, "head_losses", "CompositeExplicitAutograd")
def _head_losses(*arguments: Any) -> list[Tensor]:
    """Return ``Σ weight · loss``, the rows' losses, their statistics if ``stats``, and the gradients."""
    *given, loss, memory_budget, stats, all_rows, _, _, wanted = arguments
    tensors, spec = HeadTensors(*given), LossSpec.decode(loss)
    with torch.autocast(tensors.input.device.type, enabled=False):  # the inputs are in autocast's dtype already
        outcome = loop.evaluate(spec, tensors, memory_budget, wanted=wanted, stats=stats, all_rows=all_rows)
    return flattened(outcome, tensors)


def flattened(outcome: loop.Outcome, tensors: HeadTensors) -> list[Tensor]:
    """Return what ``head_losses`` returns of an outcome."""
    total = torch.where(tensors.row_weight == 0, 0.0, tensors.row_weight * outcome.rows).sum()
    return [total, outcome.rows, *_present(outcome.rows, *outcome.statistics, *outcome.gradients)]


def parted(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return the sum, the rows, the fields of :class:`Statistics` and the gradients that ``head_losses`` returns."""
    total, rows, *others = outputs
    count = len(Statistics._fields)
    return total, rows, others[:count], others[count:]


def _fake_head_losses(*arguments: Any) -> list[Tensor]:
    *given, loss, _, stats, _, _, _, wanted = arguments
    tensors = HeadTensors(*given)
    rows = tensors.input.new_empty(tensors.input.shape[0], dtype=tensors.dtype)
    total = rows.new_empty((), dtype=torch.promote_types(rows.dtype, tensors.row_weight.dtype))
    columns = [torch.empty_like(rows, dtype=kind) if stats else None for kind in Statistics.dtypes(rows.dtype)]
    # Not rounded yet, but for a target that is written once, tile by tile.
    written = None if LossSpec.decode(loss).target == "teacher" else tensors.target
    gradients = [
        _like(tensor if is_wanted else None, None if tensor is written else rows.dtype)
        for tensor, is_wanted in zip(tensors.differentiable, wanted, strict=True)
    ]
    return [total, rows, *_present(rows, *columns, *gradients)]


@torch.library.impl(LIBRARY, "head_hessian_product", "CompositeExplicitAutograd")
def _head_hessian_product(*arguments: Any) -> list[Tensor]:
    """Return the change of each row's loss if ``tangents``, and of the gradients ``wanted``, along a direction."""
    *given, loss, memory_budget, tangents, wanted = arguments
    tensors, directions = HeadTensors.split(given)
    options = {"wanted": wanted, "directions": directions, "tangents": tangents}
    with torch.autocast(tensors.input.device.type, enabled=False):
        outcome = loop.evaluate(LossSpec.decode(loss), tensors, memory_budget, **options)
    return [outcome.rows, *_present(outcome.rows, *outcome.gradients)]


def _fake_head_hessian_product(*arguments: Any) -> list[Tensor]:
    *given, _, _, _, wanted = arguments
    tensors, _ = HeadTensors.split(given)
    rows = tensors.input.new_empty(tensors.input.shape[0], dtype=tensors.dtype)
    gradients = [_like(t if w else None) for t, w in zip(tensors.differentiable, wanted, strict=True)]
    return [rows, *_present(rows, *gradients)]


@torch.library.impl(LIBRARY, "head_statistics", "CompositeExplicitAutograd")
def _head_statistics(*arguments: Any) -> list[Tensor]:
    """Return the gradient of a combination of statistics with respect to its coefficients: the statistics."""
    *given, loss, memory_budget, known = arguments
    if known is not None:
        return [known.clone()]
    tensors, wanted = HeadTensors(*given), [number == TARGET for number in range(DIFFERENTIABLE)]
    with torch.autocast(tensors.input.device.type, enabled=False):
        outcome = loop.evaluate(LossSpec.decode(loss), tensors, memory_budget, wanted=wanted)
    found = outcome.gradients[TARGET]
    assert found is not None
    return [found]


def _fake_head_statistics(*arguments: Any) -> list[Tensor]:
    tensors, _ = HeadTensors.split(arguments)
    return [tensors.target.new_empty(tensors.target.shape)]


torch.library.register_fake("softcurve::head_statistics", _fake_head_statistics, lib=LIBRARY)


@torch.library.impl(LIBRARY, "head_top_classes", "CompositeExplicitAutograd")
def _head_top_classes(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the ``k`` most probable classes of each row and their log-probabilities, ``(n, k)`` each."""
    *given, loss, k, memory_budget = arguments
    tensors = HeadTensors(*given)
    with torch.autocast(tensors.input.device.type, enabled=False):
        return topk.top_classes(LossSpec.decode(loss), tensors, k, memory_budget)


def _fake_head_top_classes(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, _, k, _ = arguments
    tensors = HeadTensors(*given)
    shape = (tensors.input.shape[0], k)
    return tensors.input.new_empty(shape, dtype=torch.int64), tensors.input.new_empty(shape, dtype=tensors.dtype)


torch.library.register_fake("softcurve::head_top_classes", _fake_head_top_classes, lib=LIBRARY)
torch.library.register_fake("softcurve::head_losses", _fake_head_losses, lib=LIBRARY)
torch.library.register_fake("softcurve::head_hessian_product", _fake_head_hessian_product, lib=LIBRARY)


def one_by_one(
    function: Callable[..., Sequence[Tensor]], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> list[Tensor]:
    """Loop over the problems of a ``vmap``, each of which fills the machine; the results are stacked in front."""
    pairs = list(zip(arguments, in_dims, strict=True))
    results = [
        function(*(a if dim is None or not isinstance(a, Tensor) else a.select(dim, i) for a, dim in pairs))
        for i in range(size)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def batched(operator: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """Return ``operator(*arguments)``, one by one where ``is_grads_batched`` has batched a gradient.

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
    return [torch._add_batch_dim(part, 0, level) for part in one_by_one(operator, size, in_dims, whole)]


def _like(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.new_empty(tensor.shape, dtype=dtype)


def _present(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]
