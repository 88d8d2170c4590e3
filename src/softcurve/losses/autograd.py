"""Make a :class:`~softcurve.losses.rows.RowLoss` differentiable by its closed forms.

``_Value`` is the loss of each row; its backward applies ``_Gradient``, whose own backward and jvp are the closed-form
Hessian product. So ``backward``, ``create_graph``, forward mode and every ``torch.func`` transform work, and nothing
of second order is computed until it is asked for. The Hessian product is made of differentiable operations, so
derivatives of third and higher order work as well. Nothing of size N×C is saved but the inputs: the residual is formed
again in the backward pass, for less memory traffic than reading it would cost. The exception is ``_SmallValue``: few
logits stay in the cache, and the residual is formed with the value.

``torch.compile`` traces the plain pair; a custom ``jvp`` or ``vmap`` would break its graph, so those live in subclasses
that eager mode and ``torch.func`` use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from softcurve import checks
from softcurve.array_types import Rows, Values
from softcurve.losses.rows import Gradients, RowLoss, total_of

# The number of logits in a tile. On the CPU two megabytes of float32: few enough for the passes over a tile to stay in
# cache, and enough to be worth starting two threads.
TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
# The number of logits up to which the residual is formed with the value and kept for the backward pass, in 8 MB.
SMALL_ELEMENTS = 2**21


def row_losses(loss: RowLoss, logits: Rows, target: Tensor) -> Values:
    """Return ``loss.value(logits, target)``, differentiable, in float32 or wider; ``target`` has the logits' rows."""
    if not torch.compiler.is_compiling():
        learns = logits.requires_grad or target.requires_grad
        if learns and logits.numel() <= SMALL_ELEMENTS and not in_transform():
            return super(Function, _SmallValue).apply(loss, logits, target)  # type: ignore[no-any-return, no-untyped-call]
        return _applied(_TransformableValue, loss, logits, target)  # type: ignore[no-any-return]
    if torch._C._are_functorch_transforms_active():
        # Inside a compiled transform torch drops a custom backward (pytorch#193279): leave it to torch's own.
        return loss.value(logits, target)
    return _Value.apply(loss, logits, target)  # type: ignore[no-any-return]


def _applied(function: type[Function], *arguments: Any) -> Any:
    """Return ``function.apply(*arguments)``, outside of transforms without its binding of arguments, which is slow."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def differentiable_gradients(
    loss: RowLoss, scale: Tensor, z: Tensor, target: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``loss.gradient(scale, z, target, wanted)``, differentiable."""
    if torch.compiler.is_compiling():
        in_z, in_target = _Gradient.apply(loss, wanted, scale, z, target)
    elif not torch.is_grad_enabled() and not in_transform():
        return _Gradient.by_tiles(loss, wanted, scale, z, target)
    else:
        in_z, in_target = _applied(_TransformableGradient, loss, wanted, scale, z, target)
    return in_z if wanted[0] else None, in_target if wanted[1] else None


class _Value(Function):
    @staticmethod
    def forward(loss: RowLoss, z: Tensor, target: Tensor) -> Tensor:
        (rows,) = _by_tiles(lambda *tile: (loss.value(*tile),), z.shape[:-1], z, target)
        assert rows is not None
        return rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.loss, z, target = inputs
        ctx.save_for_backward(z, target)
        ctx.save_for_forward(z, target)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        z, target = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        return None, *differentiable_gradients(ctx.loss, scale, z, target, wanted)


class _TransformableValue(_Value):
    @staticmethod
    def jvp(ctx: Any, _: None, v_z: Tensor | None, v_target: Tensor | None) -> Tensor:
        with outer_tangents(ctx) as (z, target):
            ones = z.new_ones(z.shape[:-1], dtype=checks.wide_dtype(z.dtype))
            gradients = differentiable_gradients(ctx.loss, ones, z, target, (v_z is not None, v_target is not None))
            return _inner(gradients, (v_z, v_target))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], loss: RowLoss, z: Tensor, target: Tensor) -> tuple[Tensor, int]:
        return _TransformableValue.apply(loss, *_batched(info, in_dims[1:], (z, target))), 0


class _SmallValue(Function):
    """The same as ``_Value`` outside of transforms and of forward mode, for few logits."""

    @staticmethod
    def forward(ctx: Any, loss: RowLoss, z: Tensor, target: Tensor) -> Tensor:
        wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        both = loss.value_and_residuals(z, target, wanted) if any(wanted) else None
        rows, *residuals = (_Value.forward(loss, z, target), None, None) if both is None else both
        ctx.loss, ctx.wanted, ctx.is_ready = loss, wanted, both is not None
        ctx.save_for_backward(z, target, *residuals)
        return rows

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        z, target, *residuals = ctx.saved_tensors
        if not ctx.is_ready or torch.is_grad_enabled() or in_transform():
            return None, *differentiable_gradients(ctx.loss, scale, z, target, ctx.wanted)
        column = scale.unsqueeze(-1)
        return None, *(None if part is None else part * column for part in residuals)


class _Gradient(Function):
    """The gradients of a loss; one that is not wanted is replaced by ``zeros_like(scale)`` without a derivative."""

    @staticmethod
    def by_tiles(loss: RowLoss, wanted: tuple[bool, bool], scale: Tensor, z: Tensor, target: Tensor) -> Gradients:
        in_z, in_target = _by_tiles(lambda s, z, y: loss.gradient(s, z, y, wanted), scale.shape, scale, z, target)
        return in_z, in_target

    @staticmethod
    def forward(
        loss: RowLoss, wanted: tuple[bool, bool], scale: Tensor, z: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts = _Gradient.by_tiles(loss, wanted, scale, z, target)
        in_z, in_target = (torch.zeros_like(scale) if part is None else part for part in parts)
        return in_z, in_target

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.loss, ctx.wanted, scale, z, target = inputs
        ctx.mark_non_differentiable(*(o for o, wanted in zip(output, ctx.wanted, strict=True) if not wanted))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, z, target)
        ctx.save_for_forward(scale, z, target)

    @staticmethod
    def backward(ctx: Any, v_z: Tensor | None, v_target: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, z, target = ctx.saved_tensors
        directions = (v_z if ctx.wanted[0] else None, v_target if ctx.wanted[1] else None)
        present = (directions[0] is not None, directions[1] is not None)
        if not any(present):
            return None, None, None, None, None
        in_scale = None
        if ctx.needs_input_grad[2]:
            in_scale = _inner(
                differentiable_gradients(ctx.loss, torch.ones_like(scale), z, target, present), directions
            )
        in_z, in_target = _hessian_product(ctx.loss, scale, z, target, *directions)
        return None, None, in_scale, in_z, in_target if ctx.needs_input_grad[4] else None


def in_transform() -> bool:
    """Return whether a transform or forward mode is active, which differentiate or map what is computed."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _hessian_product(loss: RowLoss, scale: Tensor, *tensors: Tensor | None) -> Gradients:
    """Return ``loss.hessian_product``, by tiles if neither a third derivative nor a transform needs its operations."""
    if torch.is_grad_enabled() or not checks.values_visible(scale, *(t for t in tensors if t is not None)):
        return loss.hessian_product(scale, *tensors)  # type: ignore[arg-type]
    in_z, in_target = _by_tiles(loss.hessian_product, scale.shape, scale, *tensors)
    return in_z, in_target


class _TransformableGradient(_Gradient):
    @staticmethod
    def jvp(
        ctx: Any, _: None, __: None, v_scale: Tensor | None, v_z: Tensor | None, v_target: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        changes: list[Gradients] = []
        with outer_tangents(ctx) as (scale, z, target):
            if v_scale is not None:
                changes.append(differentiable_gradients(ctx.loss, v_scale, z, target, ctx.wanted))
            if v_z is not None or v_target is not None:
                changes.append(ctx.loss.hessian_product(scale, z, target, v_z, v_target))
            in_z, in_target = (total_of([change[i] for change in changes]) if ctx.wanted[i] else None for i in (0, 1))
        # A gradient that does not change has a tangent of zeros: torch requires one for each output.
        in_z = torch.zeros_like(z) if in_z is None and ctx.wanted[0] else in_z
        in_target = torch.zeros_like(target) if in_target is None and ctx.wanted[1] else in_target
        return in_z, in_target

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], loss: RowLoss, wanted: tuple[bool, bool], *tensors: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _TransformableGradient.apply(loss, wanted, *_batched(info, in_dims[2:], tensors)), (0, 0)


@contextmanager
def outer_tangents(ctx: Any) -> Iterator[list[Tensor]]:
    """Yield the saved tensors inside a ``jvp`` with the tangents of enclosing forward-mode levels.

    torch turns forward mode off around a custom ``jvp``, for the level at hand and, wrongly, for those around it too:
    ``jacfwd(jacfwd(f))`` would silently lose terms. So it is turned on again, and only this level's tangent taken off.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield [
            forward_ad.unpack_dual(t).primal if t is not None and t.is_floating_point() else t
            for t in ctx.saved_tensors
        ]


def _inner(gradients: Gradients, directions: Gradients) -> Tensor:
    """Return ``Σ gradient · direction`` of each row, over those that are not ``None``."""
    pairs = zip(gradients, directions, strict=True)
    total = total_of([(g * checks.widened(v)).sum(-1) for g, v in pairs if g is not None and v is not None])
    assert total is not None
    return total


def _batched(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with the batch dimension first; one without it is expanded."""
    pairs = zip(tensors, in_dims, strict=True)
    return [t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in pairs]


def _by_tiles(
    function: Callable[..., tuple[Tensor | None, ...]], rows: torch.Size, *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return ``function(*tensors)``, computed by tiles of rows; every tensor starts with the dimensions ``rows``."""
    present = [tensor for tensor in tensors if tensor is not None]
    size = max([tensor.numel() for tensor in present])
    limit, count = TILE_ELEMENTS.get(present[0].device.type, size), math.prod(rows)
    if size <= limit or count < 2 or torch.compiler.is_compiling():
        return function(*tensors)
    whole: list[Tensor | None] = []
    for tile in _tiles(rows, max(1, limit * count // size)):
        parts = function(*(None if each is None else each[tile] for each in tensors))
        if not whole:
            whole = [None if part is None else _room(part, rows, present) for part in parts]
        for out, part in zip(whole, parts, strict=True):
            if out is not None and part is not None:
                out[tile] = part
    return tuple(whole)


def _tiles(rows: torch.Size, count: int) -> Iterator[tuple[slice, ...]]:
    """Yield slices of about ``count`` rows, up to twice as many, of which the first dimensions are cut.

    The rows are not flattened, which would copy logits whose classes are not last in memory.
    """
    inner = math.prod(rows[1:])
    if inner <= 2 * count:
        step = max(1, count // inner)
        yield from ((slice(start, start + step),) for start in range(0, rows[0], step))
    else:
        for start in range(rows[0]):
            yield from ((slice(start, start + 1), *rest) for rest in _tiles(rows[1:], count))


def _room(part: Tensor, rows: torch.Size, tensors: Sequence[Tensor]) -> Tensor:
    """Return an empty tensor for the parts of all tiles, in the memory order of a tensor of its shape."""
    shape = (*rows, *part.shape[len(rows) :])
    like = next((tensor for tensor in tensors if tensor.shape == shape), None)
    return part.new_empty(shape) if like is None else torch.empty_like(like, dtype=part.dtype)
