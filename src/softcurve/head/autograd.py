"""Derivatives of first and second order of the passes over a head's tiles.

``_Losses`` returns ``Σ weight · loss``, each row's loss and, when a derivative will be wanted of the sum, the gradients
from the same pass. Its backward hands them over, where it is the last to see them, or applies ``_Gradients``, which
scales them, or computes them where the rows' weights come from above (``reduction="none"``). The backward and the jvp
of ``_Gradients`` are the streaming Hessian product, ``_Products``; the change of the rows' losses along a direction is
``_Tangents``. Nothing is computed again until a second derivative is asked for; a third is an error. A derivative of a
product in its direction is of second order.

``torch.compile`` sees the operators alone, whose derivatives these classes are too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import Function

from softcurve.checks import is_plain, values_visible
from softcurve.head import operators
from softcurve.head.columns import change_along, of_classes, with_columns
from softcurve.head.kernel import Statistics
from softcurve.head.loop import evaluate, rounded
from softcurve.head.products import ClassRows
from softcurve.head.tensors import (
    DIFFERENTIABLE,
    NONE,
    NOTHING,
    STATISTICS,
    TARGET,
    Directions,
    HeadTensors,
    Wanted,
    joined,
    sides,
)  # fmt: skip
from softcurve.head.third_order import raise_third, without_third
from softcurve.losses.autograd import in_transform, outer_tangents
from softcurve.losses.rows import total_of
from softcurve.losses.spec import LossSpec


def head_outcome(
    loss: LossSpec, tensors: HeadTensors, memory_budget: int | None, *, per_row: bool, weighs: bool, stats: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the weighted sum of the rows' losses, the losses themselves, and their statistics if ``stats``.

    The losses are differentiable if ``per_row``, otherwise their sum. ``weighs`` says whether the caller gave
    weights of the rows, in which a transform may differentiate.
    """
    wanted = NOTHING
    if torch.is_grad_enabled() and not per_row:
        wanted = [tensor is not None and tensor.requires_grad for tensor in tensors.differentiable]
    compiling = torch.compiler.is_compiling()
    transformed = compiling or in_transform()
    # A weight's own gradient is its row's loss, which otherwise is not computed for a row of weight 0.
    weight_moves = tensors.row_weight.requires_grad or (weighs and transformed)
    all_rows = tensors.row_weight.requires_grad or (transformed and not compiling)
    # Outside of transforms without the binding of arguments that torch has for them.
    function: Any = _Losses.apply if transformed else super(Function, _Losses).apply
    if compiling:
        function = torch.ops.softcurve.head_losses
    outputs = function(*tensors, loss.encode(), memory_budget, stats, all_rows, per_row, weight_moves, list(wanted))
    total, rows, statistics, _ = operators.parted(outputs)
    return total, rows, statistics


def _looped(function: type[Function]) -> type[Function]:
    """Give a function the ``vmap`` rule that loops over the problems."""

    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        stacked = operators.one_by_one(function.apply, info.batch_size, in_dims, inputs)
        return tuple(stacked), (0,) * len(stacked)

    function.vmap = staticmethod(vmap)  # type: ignore[method-assign]
    return function


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


@_looped
class _Losses(Function):
    """The loop of first order; its arguments are those of the operator ``head_losses``.

    Eager calls evaluate the loop itself, without the dispatcher; whatever wraps its tensors goes by the operator.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, loss, memory_budget, stats, all_rows, _, _, wanted = arguments
        if not values_visible(*(tensor for tensor in given if tensor is not None)):
            return _below_autograd(torch.ops.softcurve.head_losses, *arguments)
        tensors, spec = HeadTensors(*given), LossSpec.decode(loss)
        with torch.autocast(tensors.input.device.type, enabled=False):
            outcome = evaluate(spec, tensors, memory_budget, wanted=wanted, stats=stats, all_rows=all_rows)
        return tuple(operators.flattened(outcome, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, loss, ctx.memory_budget, _, _, ctx.per_row, ctx.weight_moves, ctx.made = inputs
        ctx.loss = LossSpec.decode(loss)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        _, rows, _, gradients = operators.parted(output)
        _save(ctx, *tensors, rows, *gradients)

    @staticmethod
    def backward(ctx: Any, v_total: Tensor | None, v_rows: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        tensors, (rows, *ready) = HeadTensors.split(ctx.saved_tensors)
        needs, _ = HeadTensors.split(ctx.needs_input_grad)
        gradients: Directions = NONE
        in_weight = None
        if v_rows is not None:
            weight = v_rows if v_total is None else v_rows + v_total * tensors.row_weight
            gradients = _gradients(ctx, tensors._replace(row_weight=weight), needs.differentiable, weight.new_ones(()))
        elif v_total is not None and _may_hand_over(v_total):
            gradients = [g if n else None for g, n in zip(ready, needs.differentiable, strict=True)]
            if not values_visible(v_total) or v_total != 1:
                gradients = _scaled(gradients, v_total, tensors)
            gradients = rounded(gradients, tensors)
        elif v_total is not None:
            gradients = _gradients(ctx, tensors, needs.differentiable, v_total, ready)
        if needs.row_weight and v_total is not None:
            in_weight = v_total * _finite_where_left_out(rows, tensors.row_weight)
        return *HeadTensors.derivatives(gradients, in_weight), *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        moves, _ = HeadTensors.split(tangents)
        with outer_tangents(ctx) as saved:
            tensors, (rows, *_) = HeadTensors.split(saved)
            wanted = [v is not None for v in moves.differentiable]
            change, total = torch.zeros_like(rows), rows.new_zeros(())
            if any(wanted) and (ctx.per_row or ctx.weight_moves):
                change = _tangents(ctx, tensors, moves.differentiable)
            if any(wanted) and not ctx.per_row:
                found = _gradients(ctx, tensors, wanted, rows.new_ones(()))
                total = total + _inner(found, moves.differentiable)
            if moves.row_weight is not None:
                total = total + (moves.row_weight * _finite_where_left_out(rows, tensors.row_weight)).sum()
            return total, change, *(None,) * (len(Statistics._fields) + len(NONE))


def head_statistics(
    loss: LossSpec, tensors: HeadTensors, indices: Tensor, memory_budget: int | None, known: Tensor | None = None
) -> Tensor:
    """Return the statistics of each row's softmax, ``(n, k + 4)``, differentiable; see :mod:`.statistics`.

    ``indices (n, k)`` are the classes whose log-probabilities are wanted. ``known`` are the statistics, if another pass
    has found them: then only their derivatives are computed.
    """
    n, k = indices.shape
    of_model = tensors._replace(
        target=tensors.row_weight.new_zeros((n, k + STATISTICS), dtype=tensors.dtype if known is None else known.dtype),
        target_weight=None, target_bias=None, target_low_rank=None, indices=indices, target_classes=None,
        groups=None, target_groups=None,
        row_weight=torch.ones_like(tensors.row_weight, requires_grad=False), class_weight=None,
    )  # fmt: skip
    function: Any = torch.ops.softcurve.head_statistics if torch.compiler.is_compiling() else _Statistics.apply
    (found,) = function(*of_model, loss.of_statistics().encode(), memory_budget, known)
    return found  # type: ignore[no-any-return]


@_looped
class _Statistics(Function):
    """The statistics of the operator ``head_statistics``: the gradient of their combination in its coefficients.

    So their derivatives are the gradients of the combination whose coefficients are the incoming gradient.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _below_autograd(torch.ops.softcurve.head_statistics, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, loss, ctx.memory_budget, _ = inputs
        ctx.loss = LossSpec.decode(loss)
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = HeadTensors(*ctx.saved_tensors), HeadTensors.split(ctx.needs_input_grad)[0]
        weight = tensors.row_weight
        if not torch.is_grad_enabled():  # Otherwise the gradients may be differentiated in coefficients of 0, too.
            weight = weight * (v != 0).any(-1)
        combined = tensors._replace(target=v, row_weight=weight)
        gradients = _gradients(ctx, combined, needs.differentiable, weight.new_ones(()))
        return *HeadTensors.derivatives(gradients), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor]:
        moves, _ = HeadTensors.split(tangents)
        with outer_tangents(ctx) as saved:
            tensors = HeadTensors(*saved)
            wanted = [number == TARGET for number in range(len(NONE))]
            change = _products(ctx, tensors, moves.differentiable, wanted, False)[1 + TARGET]
            assert tensors.target is not None
            return (torch.zeros_like(tensors.target) if change is None else change,)


def _finite_where_left_out(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the losses of rows; 0 for an infinite one of weight 0, which has no part."""
    return torch.where((weight == 0) & ~rows.isfinite(), 0.0, rows)


def _may_hand_over(scale: Tensor) -> bool:
    """Return whether saved gradients may be handed over as they are: this backward is the last to see them."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or in_transform() or not is_plain(scale):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _gradients(
    ctx: Any, tensors: HeadTensors, wanted: Wanted, scale: Tensor, ready: Directions | None = None
) -> list[Tensor | None]:
    """Return ``scale`` times the gradients of ``Σ weight · loss``, differentiable; ``ready`` are known ones."""
    if not any(wanted):
        return list(NONE)
    if ready is None or any(w and not made for made, w in zip(ctx.made, wanted, strict=True)):
        ready = NONE
    found: Any = _Gradients.apply(*tensors, *ready, ctx.loss, ctx.memory_budget, tuple(wanted), scale)  # type: ignore[no-untyped-call]
    return [part if is_wanted else None for part, is_wanted in zip(found, wanted, strict=True)]


@_looped
class _Gradients(Function):
    """The gradients that are wanted, times a scale."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, loss, memory_budget, wanted, scale = arguments
        tensors, ready = HeadTensors.split(given)
        if any(g is not None for g in ready):
            found = [g * scale if g is not None and w else None for g, w in zip(ready, wanted, strict=True)]
            return tuple(tensors.input.new_empty(0) if g is None else g for g in rounded(found, tensors))
        weighted = tensors._replace(row_weight=tensors.row_weight * scale)
        outputs = operators.batched(
            torch.ops.softcurve.head_losses, *weighted, loss.encode(), memory_budget, False, False, False, False,
            list(wanted),
        )  # fmt: skip
        return tuple(rounded(operators.parted(outputs)[-1], tensors))  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, ctx.loss, ctx.memory_budget, ctx.wanted, scale = inputs
        ctx.mark_non_differentiable(*(o for o, wanted in zip(output, ctx.wanted, strict=True) if not wanted))
        ctx.set_materialize_grads(False)
        tensors, _ = HeadTensors.split(given)
        _save(ctx, *tensors, scale)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        directions = tuple(v if wanted else None for v, wanted in zip(directions, ctx.wanted, strict=True))
        if all(v is None for v in directions):
            return (*HeadTensors.derivatives(NONE), *NONE, *(None,) * 4)
        tensors, (scale,) = HeadTensors.split(ctx.saved_tensors)
        needs, (*_, in_scale) = HeadTensors.split(ctx.needs_input_grad)
        weighted = tensors._replace(row_weight=tensors.row_weight * scale)
        tangents = bool(in_scale or needs.row_weight)
        change, *products = _products(ctx, weighted, directions, needs.differentiable, tangents)
        in_scale = (tensors.row_weight * change).sum() if in_scale else None
        in_weight = scale * change if needs.row_weight else None
        return *HeadTensors.derivatives(products, in_weight), *NONE, None, None, None, in_scale

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        moves, (*_, v_scale) = HeadTensors.split(tangents)
        with outer_tangents(ctx) as saved:
            tensors, (scale,) = HeadTensors.split(saved)
            changes: list[list[Tensor | None]] = []
            if any(v is not None for v in moves.differentiable):
                weighted = tensors._replace(row_weight=tensors.row_weight * scale)
                changes.append(_products(ctx, weighted, moves.differentiable, ctx.wanted, False)[1:])
            if v_scale is not None:
                changes.append(_gradients(ctx, tensors, ctx.wanted, v_scale))
            if moves.row_weight is not None:
                changes.append(_gradients(ctx, tensors._replace(row_weight=moves.row_weight), ctx.wanted, scale))
        return tuple(map(total_of, zip(*changes, strict=True))) if changes else tuple(NONE)


def _products(ctx: Any, tensors: HeadTensors, directions: Directions, wanted: Wanted, tangents: bool) -> list[Any]:
    """Return the change of each row's loss, then of the gradients; ``None`` where it is not wanted."""
    if not (tangents or any(wanted)):
        return [None, *NONE]
    change, *products = _Products.apply(  # type: ignore[no-untyped-call]
        *without_third(tensors), *directions, ctx.loss.encode(), ctx.memory_budget, tangents, list(wanted)
    )
    return [change, *(part if is_wanted else None for part, is_wanted in zip(products, wanted, strict=True))]


@_looped
class _Products(Function):
    """The Hessian products of the operator ``head_hessian_product``, whose arguments it has.

    They are linear in the direction, and the Hessian is symmetric: the gradient of ``uᵀ H v`` in ``v`` is ``H u``. The
    changes of the rows' losses are ``gᵀ v`` each.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _below_autograd(torch.ops.softcurve.head_hessian_product, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, loss, ctx.memory_budget, ctx.tangents, ctx.wanted = inputs
        ctx.loss = LossSpec.decode(loss)
        ctx.set_materialize_grads(False)
        _save(ctx, *HeadTensors.split(given)[0])

    @staticmethod
    def backward(ctx: Any, u_change: Tensor | None, *u: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = HeadTensors(*ctx.saved_tensors)
        _, (*needs, _, _, _, _) = HeadTensors.split(ctx.needs_input_grad)
        u = tuple(part if wanted else None for part, wanted in zip(u, ctx.wanted, strict=True))
        parts: list[list[Tensor | None]] = []
        if any(part is not None for part in u):
            parts.append(_products(ctx, tensors, u, needs, False)[1:])
        if ctx.tangents and u_change is not None:
            parts.append(_gradients(ctx, tensors._replace(row_weight=u_change), needs, u_change.new_ones(())))
        in_directions = map(total_of, zip(*parts, strict=True)) if parts else NONE
        return *HeadTensors.derivatives(NONE), *in_directions, *(None,) * 4

    jvp = staticmethod(raise_third)  # type: ignore[assignment]


def _tangents(ctx: Any, tensors: HeadTensors, directions: Directions) -> Tensor:
    """Return the change of each row's loss along ``directions``, differentiable."""
    (change,) = _Tangents.apply(*tensors, *directions, ctx.loss, ctx.memory_budget)  # type: ignore[no-untyped-call]
    return change  # type: ignore[no-any-return]


@_looped
class _Tangents(Function):
    """The change of each row's loss along directions."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor]:
        *given, loss, memory_budget = arguments
        product = torch.ops.softcurve.head_hessian_product
        change, *_ = operators.batched(product, *given, loss.encode(), memory_budget, True, list(NOTHING))
        return (change,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        *given, ctx.loss, ctx.memory_budget = inputs
        _save(ctx, *given)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        tensors, directions = HeadTensors.split(ctx.saved_tensors)
        needs, (*of_directions, _, _) = HeadTensors.split(ctx.needs_input_grad)
        weighted = tensors._replace(row_weight=v)
        in_directions = _gradients(ctx, weighted, of_directions, v.new_ones(()))
        in_tensors = _products(ctx, weighted, directions, needs.differentiable, False)[1:]
        return *HeadTensors.derivatives(in_tensors), *in_directions, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor]:
        moves, (*v_directions, _, _) = HeadTensors.split(tangents)
        with outer_tangents(ctx) as saved:
            tensors, directions = HeadTensors.split(saved)
            change = torch.zeros_like(tensors.row_weight, dtype=tensors.dtype)
            if any(v is not None for v in v_directions):
                change = change + _tangents(ctx, tensors, v_directions)
            if any(v is not None for v in moves.differentiable):
                change = change + _second_tangents(ctx, tensors, directions, moves.differentiable)
            return (change,)


def _second_tangents(ctx: Any, tensors: HeadTensors, u: Directions, v: Directions) -> Tensor:
    """Return the second change ``uᵀ ∇² v`` of each row's loss.

    Features are per row, weights are not; but ``W e + t (Ẇ e + ḃ) = [W, Ẇ, ḃ] [e; t e; t]``, so a derivative along a
    weight is one in more features, with a ``t`` for each row, whose columns of the weight are low-rank columns.
    """
    if ctx.loss.pairs:
        raise NotImplementedError(
            "the losses of single pairs have no second derivative in forward mode; take the derivative of their sum"
        )
    is_teacher, rows = ctx.loss.target == "teacher", ClassRows(tensors.target_classes)
    of_model, of_target = zip(*(sides(each) for each in (tensors.differentiable, u, v)), strict=True)
    if rows.chosen is not None:  # ḃ is in the order of the classes, and so must be what stands beside it
        of_target = tuple(of_classes(rows, each) for each in of_target)
    model, along_model = with_columns(of_model)
    target, along_target = with_columns(of_target) if is_teacher else (of_target[0], of_target[2])
    fields: dict[str, Any] = dict(zip(HeadTensors._fields, joined(model, target), strict=False))
    wider = tensors._replace(row_weight=torch.ones_like(tensors.row_weight), target_classes=None, **fields)
    wanted = [n == 0 or (n == TARGET and (u[TARGET] is not None or is_teacher)) for n in range(DIFFERENTIABLE)]
    changes: list[Any] = _products(ctx, wider, joined(along_model, along_target), wanted, False)[1:]
    gradients: list[Any] = _gradients(ctx, wider, wanted, wider.row_weight.new_ones(()))
    total = torch.zeros_like(tensors.row_weight, dtype=tensors.dtype)
    total = total + change_along(of_model, changes[0], gradients[0])
    if is_teacher:
        total = total + change_along(of_target, changes[TARGET], gradients[TARGET])
    elif u[TARGET] is not None:
        total = total + (changes[TARGET] * u[TARGET]).sum(-1)
    return total


def _scaled(gradients: Directions, scale: Tensor, tensors: HeadTensors) -> list[Tensor | None]:
    """Return scaled gradients, rounded as they are scaled so that there is no second copy in single precision."""
    return [
        None if g is None or t is None else torch.mul(g, scale, out=torch.empty_like(g, dtype=t.dtype))
        for g, t in zip(gradients, tensors.differentiable, strict=True)
    ]


def _inner(gradients: Directions, directions: Directions) -> Tensor:
    products = [
        (g.to(torch.promote_types(g.dtype, torch.float32)) * v).sum()
        for g, v in zip(gradients, directions, strict=True)
        if g is not None and v is not None
    ]
    return sum(products[1:], start=products[0])


def _below_autograd(operator: Callable[..., list[Tensor]], *arguments: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return tuple(operators.batched(operator, *arguments))


def _differentiated(
    function: type[Function], prepared: Callable[[HeadTensors], HeadTensors] | None = None
) -> Callable[..., list[Tensor]]:
    """Return an operator's kernel for autograd: ``function``, at the one level of transforms of the dispatcher."""

    def kernel(*arguments: Any) -> list[Tensor]:
        with enable_single_level_autograd_function():
            if prepared is not None:
                tensors, others = HeadTensors.split(arguments)
                arguments = (*prepared(tensors), *others)
            return list(super(Function, function).apply(*arguments))  # type: ignore[misc]

    return kernel


operators.LIBRARY.impl("head_losses", _differentiated(_Losses), "Autograd")
operators.LIBRARY.impl("head_statistics", _differentiated(_Statistics), "Autograd")
operators.LIBRARY.impl("head_hessian_product", _differentiated(_Products, without_third), "Autograd")
