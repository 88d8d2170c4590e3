"""Makes the passes over a head's tiles differentiable, twice.

``_Losses`` returns ``Σ weight · loss``, each row's loss and, when a derivative will be wanted of the sum, the gradients
from the same pass. Its backward hands them over, where it is the last to see them, or applies ``_Gradients``, which
scales them, or computes them where the rows' weights come from above (``reduction="none"``). The backward and the jvp
of ``_Gradients`` are the streaming Hessian product, ``_Products``; the change of the rows' losses along a direction is
``_Tangents``. Nothing is computed again until a second derivative is asked for; a third is an error.

``torch.compile`` sees the operators alone, whose derivatives these classes are too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import Function, forward_ad

from softcurve.checks import is_plain, values_visible
from softcurve.head import operators
from softcurve.head.kernel import Statistics
from softcurve.head.loop import evaluate
from softcurve.head.tensors import NOTHING, HeadTensors, Wanted
from softcurve.losses.autograd import outer_tangents
from softcurve.losses.rows import total_of
from softcurve.losses.spec import LossSpec

Optional6 = Sequence[Tensor | None]


class HeadOutcome(NamedTuple):
    """The weighted sum of the rows' losses, the losses, and statistics if they were asked for."""

    total: Tensor
    rows: Tensor
    statistics: Statistics


def head_outcome(
    loss: LossSpec, tensors: HeadTensors, memory_budget: int | None, *, per_row: bool, weighs: bool, stats: bool
) -> HeadOutcome:
    """The losses of a head, differentiable; of its two forms of result that one which ``per_row`` says is used.

    ``weighs`` says whether somebody's tensor is behind the rows' weights, which may then be differentiated in.
    """
    wanted = NOTHING
    if torch.is_grad_enabled() and not per_row:
        a, b, c, d, e, f = (tensor is not None and tensor.requires_grad for tensor in tensors[:6])
        wanted = (a, b, c, d, e, f)
    compiling = torch.compiler.is_compiling()
    transformed = compiling or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    # A weight's own gradient is its row's loss, which otherwise is not computed for a row of weight 0.
    weight_moves = tensors.row_weight.requires_grad or (weighs and transformed)
    all_rows = tensors.row_weight.requires_grad or (transformed and not compiling)
    function = torch.ops.softcurve.head_losses if compiling else _Losses.apply
    outputs = function(  # type: ignore[no-untyped-call]
        *tensors, loss.encode(), memory_budget,
        stats, all_rows, per_row, weight_moves, list(wanted),
    )  # fmt: skip
    total, rows, lse, entropy, predicted, label = outputs[:6]
    return HeadOutcome(total, rows, Statistics(lse, entropy, predicted, label) if stats else Statistics())


class _Losses(Function):
    """The loop of first order; its arguments are those of the operator ``head_losses``.

    Eager calls evaluate the loop itself, without the dispatcher; whatever wraps its tensors goes by the operator.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, loss, memory_budget, stats, all_rows, _, _, wanted = arguments
        if not values_visible(*(tensor for tensor in given if tensor is not None)):
            return _below_autograd(torch.ops.softcurve.head_losses, *arguments)
        tensors = HeadTensors(*given)
        with torch.autocast(tensors.input.device.type, enabled=False):
            outcome = evaluate(
                LossSpec.decode(loss), tensors, memory_budget, wanted=tuple(wanted), stats=stats, all_rows=all_rows
            )
        return tuple(operators.flattened(outcome, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, loss, ctx.memory_budget, _, _, ctx.per_row, ctx.weight_moves, ctx.made = inputs
        ctx.loss = LossSpec.decode(loss)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1], *output[6:])
        ctx.save_for_forward(*tensors, output[1], *output[6:])

    @staticmethod
    def backward(ctx: Any, v_total: Tensor | None, v_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        tensors, rows, ready = HeadTensors(*saved[:9]), saved[9], saved[10:]
        needs = ctx.needs_input_grad[:6]
        in_weight = None
        gradients: Optional6 = [None] * 6
        if v_rows is not None:
            weight = v_rows if v_total is None else v_rows + v_total * tensors.row_weight
            gradients = _gradients(ctx, tensors._replace(row_weight=weight), needs, torch.ones_like(weight.sum()), None)
        elif v_total is not None:
            if _may_hand_over(v_total):
                gradients = [g if n else None for g, n in zip(ready, needs, strict=True)]
                if not values_visible(v_total) or v_total != 1:
                    gradients = _scaled(gradients, v_total, tensors)
                gradients = _in_own_dtypes(gradients, tensors)
            else:
                gradients = _gradients(ctx, tensors, needs, v_total, ready)
        if ctx.needs_input_grad[7] and v_total is not None:
            in_weight = v_total * _finite_where_left_out(rows, tensors.row_weight)
        return *gradients, None, in_weight, *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        directions, v_weight = tangents[:6], tangents[7]
        with outer_tangents(ctx) as saved:
            tensors, rows = HeadTensors(*saved[:9]), saved[9]
            moved = any(v is not None for v in directions)
            change = torch.zeros_like(rows)
            if moved and (ctx.per_row or ctx.weight_moves):
                change = _tangents(ctx, tensors, directions)
            total = torch.zeros_like(rows.sum())
            if moved and not ctx.per_row:
                wanted = tuple(v is not None for v in directions)
                found = _gradients(ctx, tensors, wanted, torch.ones_like(rows.sum()), None)
                total = total + _inner(found, directions)
            if v_weight is not None:
                total = total + (v_weight * _finite_where_left_out(rows, tensors.row_weight)).sum()
            return total, change, *(None,) * 10

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(_Losses, info, in_dims, inputs)


def _finite_where_left_out(rows: Tensor, weight: Tensor) -> Tensor:
    """The losses of rows; 0 for an infinite one of weight 0, which has no part."""
    return torch.where((weight == 0) & ~rows.isfinite(), 0.0, rows)


def _may_hand_over(scale: Tensor) -> bool:
    """Whether saved gradients may be handed over as they are: this backward is the last to see them."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not is_plain(scale):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _gradients(
    ctx: Any, tensors: HeadTensors, wanted: Sequence[bool], scale: Tensor, ready: Sequence[Tensor] | None
) -> list[Tensor | None]:
    """``scale`` times the gradients of ``Σ weight · loss``, differentiable; from those at hand, if they are."""
    if not any(wanted):
        return [None] * 6
    complete = ready is not None and all(made or not w for made, w in zip(ctx.made, wanted, strict=True))
    given = ready if complete and ready is not None else [None] * 6
    settings = ctx.loss, ctx.memory_budget, tuple(wanted), scale
    found: tuple[Tensor, ...] = _Gradients.apply(*settings, *given, *tensors)  # type: ignore[no-untyped-call]
    return [part if is_wanted else None for part, is_wanted in zip(found, wanted, strict=True)]


class _Gradients(Function):
    @staticmethod
    def forward(
        loss: LossSpec,
        memory_budget: int | None,
        wanted: Wanted,
        scale: Tensor,
        g_input: Tensor | None,
        g_weight: Tensor | None,
        g_bias: Tensor | None,
        g_target: Tensor | None,
        g_target_weight: Tensor | None,
        g_target_bias: Tensor | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        target_weight: Tensor | None,
        target_bias: Tensor | None,
        indices: Tensor | None,
        row_weight: Tensor,
        class_weight: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ready = (g_input, g_weight, g_bias, g_target, g_target_weight, g_target_bias)
        if any(g is not None for g in ready):
            scaled = [g * scale if g is not None and w else None for g, w in zip(ready, wanted, strict=True)]
            scaled = _in_own_dtypes(scaled, (input, weight, bias, target, target_weight, target_bias))
            return tuple(input.new_empty(0) if g is None else g for g in scaled)
        found = operators.batched(
            torch.ops.softcurve.head_losses,
            input, weight, bias, target, target_weight, target_bias, indices, row_weight * scale, class_weight,
            loss.encode(), memory_budget, False, False, False, False, list(wanted),
        )  # fmt: skip
        tensors = (input, weight, bias, target, target_weight, target_bias)
        return tuple(_in_own_dtypes(found[6:], tensors))  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.loss, ctx.memory_budget, ctx.wanted, scale, *rest = inputs
        ctx.mark_non_differentiable(*(o for o, wanted in zip(output, ctx.wanted, strict=True) if not wanted))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, *rest[6:])
        ctx.save_for_forward(scale, *rest[6:])

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        directions = tuple(v if wanted else None for v, wanted in zip(directions, ctx.wanted, strict=True))
        if all(v is None for v in directions):
            return (None,) * 19
        scale, *rest = ctx.saved_tensors
        tensors = HeadTensors(*rest)
        needs = ctx.needs_input_grad
        tangents = bool(needs[3] or needs[17])
        weighted = tensors._replace(row_weight=tensors.row_weight * scale)
        change, *products = _products(ctx, weighted, directions, needs[10:16], tangents)
        in_scale = (tensors.row_weight * change).sum() if needs[3] else None
        in_weight = scale * change if needs[17] else None
        return None, None, None, in_scale, *(None,) * 6, *products, None, in_weight, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        v_scale, directions, v_weight = tangents[3], tangents[10:16], tangents[17]
        with outer_tangents(ctx) as (scale, *rest):
            tensors = HeadTensors(*rest)
            changes: list[list[Tensor | None]] = []
            if any(v is not None for v in directions):
                weighted = tensors._replace(row_weight=tensors.row_weight * scale)
                changes.append(_products(ctx, weighted, directions, ctx.wanted, False)[1:])
            if v_scale is not None:
                changes.append(_gradients(ctx, tensors, ctx.wanted, v_scale, None))
            if v_weight is not None:
                changes.append(_gradients(ctx, tensors._replace(row_weight=v_weight), ctx.wanted, scale, None))
        return tuple(total_of([change[i] for change in changes]) for i in range(6))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(_Gradients, info, in_dims, inputs)


def _products(
    ctx: Any, tensors: HeadTensors, directions: Optional6, wanted: Sequence[bool], tangents: bool
) -> list[Any]:
    """The change of each row's loss, then of the six gradients; ``None`` where it is not wanted."""
    if not (tangents or any(wanted)):
        return [None] * 7
    change, *products = _Products.apply(  # type: ignore[no-untyped-call]
        *tensors, *directions, ctx.loss.encode(), ctx.memory_budget, tangents, list(wanted)
    )
    return [change, *(part if is_wanted else None for part, is_wanted in zip(products, wanted, strict=True))]


class _Products(Function):
    """Of the arguments of ``head_hessian_product``."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _below_autograd(torch.ops.softcurve.head_hessian_product, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(THIRD)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(_Products, info, in_dims, inputs)


THIRD = (
    "a streamed head has exact first and second derivatives, but none of third order; for those use the loss on "
    "logits: softcurve.cross_entropy(linear(input, weight), ...)"
)


def _tangents(ctx: Any, tensors: HeadTensors, directions: Optional6) -> Tensor:
    """The change of each row's loss along ``directions``, differentiable."""
    (change,) = _Tangents.apply(ctx.loss, ctx.memory_budget, *directions, *tensors)  # type: ignore[no-untyped-call]
    return change  # type: ignore[no-any-return]


class _Tangents(Function):
    @staticmethod
    def forward(loss: LossSpec, memory_budget: int | None, *rest: Tensor | None) -> tuple[Tensor]:
        directions, tensors = rest[:6], rest[6:]
        change, *_ = operators.batched(
            torch.ops.softcurve.head_hessian_product,
            *tensors, *directions, loss.encode(), memory_budget, True, list(NOTHING),
        )  # fmt: skip
        return (change,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        ctx.loss, ctx.memory_budget, *rest = inputs
        ctx.save_for_backward(*rest)
        ctx.save_for_forward(*rest)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        directions, tensors = ctx.saved_tensors[:6], HeadTensors(*ctx.saved_tensors[6:])
        weighted = tensors._replace(row_weight=v)
        in_directions = _gradients(ctx, weighted, ctx.needs_input_grad[2:8], torch.ones_like(v.sum()), None)
        in_tensors = _products(ctx, weighted, directions, ctx.needs_input_grad[8:14], False)[1:]
        return None, None, *in_directions, *in_tensors, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor]:
        v_directions, v_tensors = tangents[2:8], tangents[8:14]
        with outer_tangents(ctx) as saved:
            directions, tensors = saved[:6], HeadTensors(*saved[6:])
            change = torch.zeros_like(tensors.row_weight, dtype=tensors.dtype)
            if any(v is not None for v in v_directions):
                change = change + _tangents(ctx, tensors, v_directions)
            if any(v is not None for v in v_tensors):
                change = change + _second_tangents(ctx, tensors, directions, v_tensors)
            return (change,)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(_Tangents, info, in_dims, inputs)


def _second_tangents(ctx: Any, tensors: HeadTensors, u: Optional6, v: Optional6) -> Tensor:
    """The second change ``uᵀ ∇² v`` of each row's loss.

    Features are per row, weights are not; but ``W e + t (Ẇ e + ḃ) = [W, Ẇ, ḃ] [e; t e; t]``, so a derivative along a
    weight is one in features of twice the width, with a ``t`` for each row.
    """
    tensors = tensors._replace(row_weight=torch.ones_like(tensors.row_weight))
    sides = (0, 3) if ctx.loss.target == "teacher" else (0,)
    given: Sequence[Any] = tensors
    wide, along = list(given), list(v)
    for i in sides:
        (e, weight), more, bias = given[i : i + 2], u[i + 1], u[i + 2]
        columns = [c for c in (more, None if bias is None else bias.unsqueeze(-1)) if c is not None]
        padding = (0, sum(c.shape[1] for c in columns))
        wide[i], wide[i + 1] = torch.nn.functional.pad(e, padding), torch.cat([weight, *columns], -1)
        along[i : i + 2] = [None if t is None else torch.nn.functional.pad(t, padding) for t in v[i : i + 2]]
    wider = HeadTensors(*wide)
    wanted = (True, False, False, u[3] is not None or len(sides) > 1, False, False)
    changes: list[Any] = _products(ctx, wider, along, wanted, False)[1:]
    gradients: list[Any] = _gradients(ctx, wider, wanted, torch.ones_like(tensors.row_weight.sum()), None)
    total = torch.zeros_like(tensors.row_weight, dtype=tensors.dtype)
    for i in sides:
        e, change, gradient = given[i], changes[i], gradients[i]
        d = e.shape[1]
        if u[i] is not None:
            total = total + (change[:, :d] * u[i]).sum(-1)
        if u[i + 1] is not None:
            total = total + (change[:, d : 2 * d] * e).sum(-1)
            if v[i] is not None:
                total = total + (gradient[:, d : 2 * d] * v[i]).sum(-1)
        if u[i + 2] is not None:
            total = total + change[:, -1]
    if len(sides) == 1 and u[3] is not None:
        total = total + (changes[3] * u[3]).sum(-1)
    return total


def _scaled(gradients: Optional6, scale: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Into the dtypes of the tensors at once: no second copy in single precision."""
    return [
        None if g is None or t is None else torch.mul(g, scale, out=torch.empty_like(g, dtype=t.dtype))
        for g, t in zip(gradients, tensors, strict=False)
    ]


def _in_own_dtypes(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Saved and scaled in the dtype of the computation, gradients are rounded to their tensors' here, once."""
    return [g if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=False)]


def _inner(gradients: Optional6, directions: Optional6) -> Tensor:
    products = [
        (g.to(torch.promote_types(g.dtype, torch.float32)) * v).sum()
        for g, v in zip(gradients, directions, strict=True)
        if g is not None and v is not None
    ]
    return sum(products[1:], start=products[0])


def _below_autograd(operator: Callable[..., list[Tensor]], *arguments: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return tuple(operators.batched(operator, *arguments))


def _one_by_one(
    function: type[Function], info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    stacked = operators.one_by_one(function.apply, info.batch_size, in_dims, inputs)
    return tuple(stacked), (0,) * len(stacked)


def _differentiated(function: type[Function]) -> Callable[..., list[Tensor]]:
    """An operator's kernel for autograd: ``function``, at the one level of transforms that the dispatcher is at."""

    def kernel(*arguments: Any) -> list[Tensor]:
        with enable_single_level_autograd_function():
            return list(super(Function, function).apply(*arguments))  # type: ignore[misc]

    return kernel


operators.LIBRARY.impl("head_losses", _differentiated(_Losses), "Autograd")
operators.LIBRARY.impl("head_hessian_product", _differentiated(_Products), "Autograd")
