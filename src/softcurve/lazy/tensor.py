"""Logits that are not made: a tensor without memory that knows how it came about.

``__torch_function__`` sees every call of a torch function with such a tensor. Handlers record it or compute what it
asks for by a function on a head; for any other function the logits are made, once, and the tensor keeps them. An
operation that writes into the logits makes them first, and those that it is a view of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from softcurve.lazy import consumers  # noqa: F401
from softcurve.lazy.record import LinearRecord, Plan, shape_of
from softcurve.lazy.shapes import COMMUTATIVE, HANDLERS, VIEWS

if TYPE_CHECKING:
    from softcurve.lazy.heads import LazyHead

TENSORS = ("_input", "_weight", "_bias", "_a", "_b", "_low_rank_scale")

_DATA = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_meta",
         "is_sparse", "is_nested", "is_quantized", "itemsize", "nbytes", "output_nr", "_backward_hooks")  # fmt: skip
_METHODS = ("size", "dim", "numel", "nelement", "ndimension", "element_size", "get_device", "is_floating_point",
            "is_complex", "is_signed", "__len__", "__hash__", "register_hook", "is_inference")  # fmt: skip
# What is known of a tensor without its entries.
METADATA = {getattr(Tensor, name).__get__ for name in _DATA} | {getattr(Tensor, name) for name in _METHODS}
METADATA |= {getattr(torch, name) for name in _METHODS if hasattr(torch, name)}


class LazyLogits(Tensor):
    """The logits of a head, or a view or softmax of them, which are made only if a function needs their entries.

    Created by a model's head within :func:`softcurve.lazy_logits`. ``materialize()`` returns them as a plain tensor.
    """

    head: LazyHead | None = None  # None in compiled code, which does not count what it makes
    _dense: Tensor | None = None
    _view_of: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None = None

    # torch.compile takes the object apart into tensors and numbers, so these are its arguments.
    @staticmethod
    def __new__(cls, plan: Plan, input: Tensor, weight: Tensor, *others: Tensor | None) -> LazyLogits:  # noqa: D102
        numbers = dict(plan)
        shape = shape_of(input, weight, numbers["dim"])
        make: Any = Tensor._make_wrapper_subclass
        lazy: LazyLogits = make(cls, shape, dtype=numbers["dtype"], device=input.device, requires_grad=False)
        return lazy

    def __init__(
        self, plan: Plan, input: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
        low_rank_scale: Tensor | None,
    ) -> None:  # fmt: skip
        self._plan, self._input, self._weight, self._bias = plan, input, weight, bias
        self._a, self._b, self._low_rank_scale = a, b, low_rank_scale

    @property
    def record(self) -> LinearRecord:
        """What the logits are."""
        return record_of(self)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, kind={self.record.kind!r})"

    def materialize(self) -> Tensor:
        """Return the logits as a plain tensor, which the object keeps."""
        return self._made("materialize", writes=False)

    # --- what torch asks for -----------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in HANDLERS:
            result = _handled(func, args, kwargs)
            if result is not NotImplemented:
                return result
        name = getattr(func, "__name__", str(func))
        writes = _writes(name) or "out" in kwargs
        made, options = pytree.tree_map_only(LazyLogits, lambda lazy: lazy._made(name, writes=writes), (args, kwargs))
        result = func(*made, **options)
        return args[0] if writes and made and result is made[0] else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A call from C++, below autograd; the gradient of its result comes back to _Link.
        made, options = pytree.tree_map_only(LazyLogits, lambda lazy: lazy._entries(str(func)), (args, kwargs or {}))
        return func(*made, **options)

    def __tensor_flatten__(self) -> tuple[list[str], Plan]:
        return [name for name in TENSORS if getattr(self, name) is not None], self._plan

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], plan: Plan, size: Any, stride: Any) -> LazyLogits:
        return LazyLogits(plan, *(inner.get(name) for name in TENSORS))  # type: ignore[arg-type]

    # --- making the logits -------------------------------------------------------------------------------------------

    def _made(self, reason: str, *, writes: bool) -> Tensor:
        """Return the made logits. If an operation ``writes``, they share memory with what they are a view of."""
        if self._dense is None:
            base = self._view_of
            if base is not None and (writes or base[0].is_made):
                self._dense = base[1](base[0]._made(reason, writes=writes))
            else:
                self._report(reason)
                made = record_of(self).materialize()
                if torch.compiler.is_compiling():
                    return made
                self._dense = made
        return self._dense

    @property
    def is_made(self) -> bool:
        """Whether the logits, or those that they are a view of, have been made."""
        return self._dense is not None or (self._view_of is not None and self._view_of[0].is_made)

    def _entries(self, reason: str) -> Tensor:
        if self._dense is None:
            self._report(reason)
            with torch.no_grad():
                return self.record.materialize().detach()
        return self._dense.detach()

    def _report(self, reason: str) -> None:
        if self.head is not None:
            self.head.report(self.record, reason)


def record_of(lazy: LazyLogits) -> LinearRecord:
    """Return what unmade logits are."""
    return LinearRecord.of_plan(
        lazy._plan, lazy._input, lazy._weight, lazy._bias, lazy._a, lazy._b, lazy._low_rank_scale
    )


def lazy_logits_of(record: LinearRecord, head: LazyHead | None) -> LazyLogits:
    """Return a tensor for a record, with a place in the graph of autograd if its tensors have one."""
    if torch.compiler.is_compiling():
        return LazyLogits(record.plan(), *record.tensors())
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in record.tensors())
    if wants and torch._C._functorch.maybe_current_level() is None:
        lazy: LazyLogits = _Link.apply(record.plan(), *record.tensors())  # type: ignore[no-untyped-call]
    else:
        lazy = LazyLogits(record.plan(), *record.tensors())
    lazy.head = head
    return lazy


class _Link(torch.autograd.Function):
    """The place of a :class:`LazyLogits` in the graph, where hooks and searches for parameters find it.

    A handler's gradient does not pass here. That of a call from C++ does.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> LazyLogits:
        ctx.plan, ctx.tensors = plan, tensors
        return LazyLogits(plan, *tensors)  # type: ignore[arg-type]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors: list[Any] = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in ctx.tensors]
        with torch.enable_grad():
            made = LinearRecord.of_plan(ctx.plan, *tensors).materialize()
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        gradients = iter(torch.autograd.grad(made, wanted, gradient))
        return (None, *(next(gradients) if t is not None and t.requires_grad else None for t in tensors))


def _writes(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _handled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what the handler of a function returns, with records as tensors."""
    options = {{"axis": "dim", "keepdims": "keepdim"}.get(name, name): value for name, value in kwargs.items()}
    if not args and "input" in options:
        args = (options.pop("input"),)
    if func in COMMUTATIVE and len(args) > 1 and not isinstance(args[0], LazyLogits):
        args = (args[1], args[0], *args[2:])
    lazy = args[0] if args else None
    if not isinstance(lazy, LazyLogits) or "out" in options:
        return NotImplemented
    if not torch.compiler.is_compiling():
        every = [arg for arg in (*args, *options.values()) if isinstance(arg, LazyLogits)]
        if any(each.is_made for each in every):
            return NotImplemented
        for each in every:
            require_unchanged(each)
    positional = [record_of(arg) if isinstance(arg, LazyLogits) else arg for arg in args]
    named = {name: record_of(arg) if isinstance(arg, LazyLogits) else arg for name, arg in options.items()}
    result = HANDLERS[func](*positional, **named)
    if result is positional[0] and func in VIEWS:
        return lazy
    if isinstance(result, LinearRecord):
        return _derived(lazy, result, func, args, options)
    if isinstance(result, list):
        return tuple(_derived(lazy, part, func, args, options, i) for i, part in enumerate(result))
    return result


def _derived(
    lazy: LazyLogits, record: LinearRecord, func: Any, args: tuple[Any, ...], options: dict[str, Any],
    number: int | None = None,
) -> LazyLogits:  # fmt: skip
    """Return the unmade result of a function, or one of several, which knows what it is a view of."""
    result = lazy_logits_of(record, lazy.head if not torch.compiler.is_compiling() else None)
    if func in VIEWS and not torch.compiler.is_compiling():

        def replay(dense: Tensor) -> Tensor:
            every = func(dense, *args[1:], **options)
            part: Tensor = every if number is None else every[number]
            return part

        result._view_of = (lazy, replay)
    return result


def require_unchanged(lazy: LazyLogits) -> None:
    """Raise ``RuntimeError`` if the weight is not what the head multiplied any more."""
    if lazy.head is not None:
        lazy.head.require_unchanged(lazy.record)
