"""Logits that are not made: a tensor without memory that knows how it came about.

``__torch_function__`` sees every call of a torch function with such a tensor. Handlers record it or compute what it
asks for by a function on a head; for any other function the logits are made, once, and the tensor keeps them. An
operation that writes into the logits makes them first, and those that it is a view of, so that every view sees it.

A handler differentiates the features and the weight, and no gradient passes the tensor itself. Where one must, because
an ``autograd.Function`` returned the tensor or a hook waits for its gradient, the logits are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from softcurve.checks import InvalidEntriesError
from softcurve.lazy import consumers, transforms  # noqa: F401
from softcurve.lazy.record import LinearRecord, Plan, require_unchanged, shape_of, version_of
from softcurve.lazy.shapes import COMMUTATIVE, HANDLERS, VIEWS

if TYPE_CHECKING:
    from softcurve.lazy.heads import LazyHead

TENSORS = ("_input", "_weight", "_bias", "_a", "_b", "_low_rank_scale")

_DATA = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu",
         "is_meta", "is_sparse", "is_nested", "is_quantized", "itemsize", "nbytes", "output_nr", "grad", "retains_grad",
         "_base", "_version", "_backward_hooks")  # fmt: skip
_METHODS = ("size", "stride", "storage_offset", "is_contiguous", "dim", "numel", "nelement", "ndimension",
            "element_size", "get_device", "is_floating_point", "is_complex", "is_signed", "is_inference",
            "__len__", "untyped_storage", "is_conj", "is_neg", "_is_view", "_is_zerotensor")  # fmt: skip
# What is known of a tensor without its entries.
METADATA = {getattr(Tensor, name).__get__ for name in _DATA} | {getattr(Tensor, name) for name in _METHODS}
METADATA |= {getattr(torch, name) for name in _METHODS if hasattr(torch, name)}
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
STRIDED = {Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous}

# What these return shares memory with the tensor, unseen by autograd, and may be written into.
SHARING = {Tensor.data.__get__, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}  # type: ignore[attr-defined]

IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or",
                                        "xor", "lshift", "rshift")}  # fmt: skip
IN_PLACE |= {"__setitem__", "__set__"}


class LazyLogits(Tensor):
    """The logits of a head, or a view or softmax of them, which are made only if a function needs their entries.

    Created by a model's head within :func:`softcurve.lazy_logits`. ``materialize()`` returns them as a plain tensor.
    """

    head: LazyHead | None = None  # None in compiled code, which does not count what it makes
    _dense: Tensor | None = None
    _view_of: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None = None
    _strided: Tensor | None = None
    _in_graph = False  # whether ``requires_grad`` says if gradients are wanted, which transforms and compiled code hide
    _left_compiled_code = False

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
        self._returned: list[tuple[Tensor, Tensor]] = []

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
            return _metadata(func, args, kwargs)
        if func is Tensor.__hash__:
            return id(args[0])
        every = [arg for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, LazyLogits)]
        for each in every:
            require_gradient_known(each, func)
        name = reason = getattr(func, "__name__", str(func))
        if func in HANDLERS:
            try:
                result = _handled(func, args, kwargs)
            except InvalidEntriesError as error:
                result, reason = NotImplemented, f"{name} ({error})"
            if result is not NotImplemented:
                return result
        if func is Tensor.register_hook and (handle := _hook_of_library(*args, **kwargs)) is not None:
            return handle
        writes = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        writes = writes or "out" in kwargs or kwargs.get("inplace") is True
        schema = getattr(func, "_schema", None)  # of an overload, such as torch.ops.aten.mul_.Tensor
        writes = writes or (schema is not None and schema.is_mutable)
        require_possible(name, writes=writes)
        if func is torch.autograd.grad:
            args, kwargs = _all_made(name, *_outputs_in_graph(*args, **kwargs), writes=False)
            return func(*args, **kwargs)
        made, options = _all_made(reason, args, kwargs, writes=writes or func in SHARING)
        result = func(*made, **options)
        if any(each._dense is None for each in every) and _is_view(result):
            made, options = _all_made(name, args, kwargs, writes=True)  # what is written into the view must be seen
            result = func(*made, **options)
        return args[0] if writes and made and result is made[0] else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A call from C++, below autograd; the gradient of its result comes back to _Link.
        writes = func._schema.is_mutable
        made, options = pytree.tree_map_only(
            LazyLogits, lambda lazy: lazy._entries(str(func), keep=writes), (args, kwargs or {})
        )
        return func(*made, **options)

    def __tensor_flatten__(self) -> tuple[list[str], Plan]:
        return [name for name in TENSORS if getattr(self, name) is not None], self._plan

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], plan: Plan, size: Any, stride: Any) -> LazyLogits:
        lazy = LazyLogits(plan, *(inner.get(name) for name in TENSORS))  # type: ignore[arg-type]
        lazy._left_compiled_code = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in inner.values())
        return lazy

    # --- making the logits -------------------------------------------------------------------------------------------

    def _made(self, reason: str, *, writes: bool) -> Tensor:
        """Return the made logits. If an operation ``writes``, they share memory with what they are a view of.

        A view of less than half of the logits is made alone, each time that it is needed: it would not see what is
        written into the others later.
        """
        if self._dense is not None:
            return self._dense
        if self._view_of is not None:
            base, replay = self._view_of
            if writes or base.is_made or 2 * self.numel() >= base.numel():
                is_new = not base.is_made
                dense = base._made(reason, writes=writes)
                with self._grad_mode():
                    made = replay(dense)
                self._dense = made if base._dense is not None else None
                return self._as_returned(made) if is_new else made
        self._report(reason)
        if torch.compiler.is_compiling():
            return self.record.materialize()
        with self._grad_mode():
            made = self.record.materialize() if _is_bypassed(self) else _Entries.apply(self)  # type: ignore[no-untyped-call]
            if self._view_of is None:
                self._dense = made = made.contiguous()
        return self._as_returned(made)

    def _as_returned(self, made: Tensor) -> Tensor:
        """Write into the logits what :func:`topk` or :func:`gather` returned of them, so that comparisons are exact.

        The logits must be newly made: others may have been written into since the functions returned.
        """
        for index, values in self._returned:
            made.data.scatter_(-1, index, values.to(made.dtype))  # the same number, rounded otherwise
        self._returned = self._returned if self._dense is None else []
        return made

    @contextmanager
    def _grad_mode(self) -> Iterator[None]:
        """Let the logits have the graph that they had if the head had made them, whatever the mode is now."""
        wants = self.requires_grad if self._in_graph else torch.is_grad_enabled()
        inference = torch.is_inference_mode_enabled() and self.is_inference()
        with torch.inference_mode(inference), torch.set_grad_enabled(wants):
            yield

    @property
    def is_made(self) -> bool:
        """Whether the logits, or those that they are a view of, have been made."""
        return self._dense is not None or (self._view_of is not None and self._view_of[0].is_made)

    @property
    def strided(self) -> Tensor:
        """A tensor without memory that has the strides of the logits, and shares its storage where they do."""
        if self._strided is None:
            with torch._C._DisableFuncTorch():
                self._strided = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self._strided

    def _entries(self, reason: str, *, keep: bool) -> Tensor:
        """Return the logits for a function below autograd, which writes into them if they are to be kept."""
        if self.is_made or self._view_of is not None:
            return self._made(reason, writes=keep).detach()
        if keep and self.requires_grad:
            raise RuntimeError(
                f"{reason} writes into unmade logits that require gradients, below autograd; pass it "
                "logits.materialize()"
            )
        if transforms.is_batched(self.record):
            raise RuntimeError(
                f"{reason} needs the entries of unmade logits that leave vmap out of a transform inside of it, as "
                "vmap(grad(..., has_aux=True)) returns them; let the function return logits.materialize()"
            )
        self._report(reason)
        with torch.no_grad():
            dense = self.record.detached().materialize()
        self._dense = dense if keep else None
        return dense

    def _report(self, reason: str) -> None:
        if self.head is not None:
            self.head.report(attached(self), reason)


def attached(lazy: LazyLogits) -> LinearRecord:
    """Return what unmade logits are, of the very tensors that the head multiplied."""
    return LinearRecord.of_plan(
        lazy._plan, lazy._input, lazy._weight, lazy._bias, lazy._a, lazy._b, lazy._low_rank_scale
    )


def record_of(lazy: LazyLogits) -> LinearRecord:
    """Return what unmade logits are, without gradients if they have none."""
    record = attached(lazy)
    if not lazy._in_graph and not torch.compiler.is_compiling():
        return transforms.unwrapped(record) if transforms.has_ended(*record.tensors()) else record
    record = record.but(returned=lazy._returned if lazy._in_graph else None)
    return record.detached() if lazy._in_graph and not lazy.requires_grad else record


def lazy_logits_of(record: LinearRecord, head: LazyHead | None) -> LazyLogits:
    """Return a tensor for a record, with a place in the graph of autograd if its tensors have one."""
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in record.tensors())
    if torch.compiler.is_compiling():
        record = record if torch.is_grad_enabled() else record.detached()
        return LazyLogits(record.but(wants=wants).plan(), *record.tensors())
    record = record.but(version=version_of(record))
    differentiates_forward = forward_ad._current_level >= 0
    is_transformed = differentiates_forward or torch._C._functorch.maybe_current_level() is not None
    if is_transformed and not torch.is_grad_enabled() and not differentiates_forward:
        record = record.detached()
    if wants and not is_transformed:
        lazy: LazyLogits = _Link.apply(record.plan(), *record.tensors())  # type: ignore[no-untyped-call]
    else:
        lazy = LazyLogits(record.plan(), *record.tensors())
    lazy.head, lazy._in_graph = head, not is_transformed
    return lazy


# --- the graph of autograd -------------------------------------------------------------------------------------------


class _Link(torch.autograd.Function):
    """The place of a :class:`LazyLogits` in the graph, where searches for parameters find it.

    A handler's gradient does not pass here. That of a call from C++ does.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> LazyLogits:
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        return LazyLogits(plan, *tensors)  # type: ignore[arg-type]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        every = ctx.saved_tensors
        tensors: list[Any] = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in every]
        with torch.enable_grad():
            made = LinearRecord.of_plan(ctx.plan, *tensors).materialize()
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        gradients = iter(torch.autograd.grad(made, wanted, gradient))
        return (None, *(next(gradients) if t is not None and t.requires_grad else None for t in tensors))


class _Entries(torch.autograd.Function):
    """Makes logits whose gradient passes their own place in the graph, as that of any tensor does."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> Tensor:
        return lazy.record.detached().materialize()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _is_bypassed(lazy: LazyLogits) -> bool:
    """Return whether the gradients may go to the features and the weight around the tensor's place in the graph."""
    node: Any = lazy.grad_fn
    if node is None or isinstance(node, _Link._backward_cls):
        return True
    # DDP passes outputs through the identity, to find unused parameters. With a static graph its backward does more.
    return type(node).__name__ == "_DDPSinkBackward" and not node.ddp_weakref().static_graph


def _hook_of_library(lazy: LazyLogits, hook: Any) -> Any:
    """Register a hook of FSDP, which marks the begin of the backward and not a gradient, on the features."""
    module = getattr(getattr(hook, "func", hook), "__module__", "")
    if module.startswith("torch.distributed.") and not lazy.is_made and lazy._input.requires_grad:
        return lazy._input.register_hook(hook)
    return None


# --- what cannot be right --------------------------------------------------------------------------------------------


def require_gradient_known(lazy: LazyLogits, func: Any) -> None:
    """Raise ``RuntimeError`` for logits out of compiled code whose gradients would be lost."""
    if lazy._left_compiled_code and dict(lazy._plan)["wants"] and torch.is_grad_enabled() and func != Tensor.detach:
        raise RuntimeError(
            "unmade logits left compiled code, which loses their gradients; compute the loss where the head is called, "
            "inside the compiled function and without a graph break between, or use logits.detach()"
        )


def require_possible(name: str, *, writes: bool) -> None:
    """Raise ``RuntimeError`` for what made logits could not do any more."""
    if writes and torch.compiler.is_compiling():
        raise RuntimeError(f"{name} writes into unmade logits, which compiled code cannot; use the form that returns")


def _outputs_in_graph(
    outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments of ``torch.autograd.grad`` with outputs that have a place in the graph.

    Raises:
        RuntimeError: If an input is unmade logits, which are in the graph of none of their results.
    """
    if any(isinstance(each, LazyLogits) and not each.is_made for each in pytree.tree_leaves(inputs)):
        raise RuntimeError(
            "the gradient with respect to unmade logits does not exist; call logits.materialize() before the loss"
        )
    whole = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs or [None] * len(whole))
    pairs: list[tuple[Tensor, Any]] = []
    for each, gradient in zip(whole, gradients, strict=True):
        if not isinstance(each, LazyLogits):
            pairs.append((each, gradient))
        elif gradient is not None and transforms.has_lost_graph(attached(each), each._dense):
            pairs += zip(*transforms.pulled_back(attached(each), gradient), strict=True)
        else:
            pairs.append((each._made("grad", writes=False), gradient))
    return ([output for output, _ in pairs], inputs, [gradient for _, gradient in pairs], *args), kwargs


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
        if any(each.is_made or not _is_bypassed(each) for each in every):
            return NotImplemented
        for each in every:
            require_unchanged(attached(each))
    positional = [record_of(arg) if isinstance(arg, LazyLogits) else arg for arg in args]
    named = {name: record_of(arg) if isinstance(arg, LazyLogits) else arg for name, arg in options.items()}
    result = HANDLERS[func](*positional, **named)
    if result is positional[0] and (func is not Tensor.contiguous or lazy.is_contiguous()):
        return lazy
    if not isinstance(result, LinearRecord | list):
        return result
    records = result if isinstance(result, list) else [result]
    derived = [lazy_logits_of(record, lazy.head) for record in records]
    if func in VIEWS and not torch.compiler.is_compiling():
        _share(lazy, derived, func, args[1:], options)
    return tuple(derived) if isinstance(result, list) else derived[0]


def _share(
    lazy: LazyLogits, derived: list[LazyLogits], func: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Let the results of a function know what they are views of, if it does not copy."""
    index = args[0] if func is Tensor.__getitem__ else ()
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts):
        return  # advanced indexing copies
    with torch._C._DisableFuncTorch():
        every = func(lazy.strided, *args, **options)
    results = every if isinstance(every, tuple | list) else [every]
    for number, (each, strided) in enumerate(zip(derived, results, strict=True)):
        if strided.untyped_storage()._cdata == lazy.strided.untyped_storage()._cdata:
            each._strided, each._view_of = strided, (lazy, _replay(func, args, options, number))


def _replay(func: Any, args: tuple[Any, ...], options: dict[str, Any], number: int) -> Callable[[Tensor], Tensor]:
    """Return a function that takes one result of a view function of the made logits."""

    def replay(dense: Tensor) -> Tensor:
        every = func(dense, *args, **options)
        part: Tensor = every[number] if isinstance(every, tuple | list) else every
        return part

    return replay


def _all_made(name: str, args: Any, kwargs: dict[str, Any], *, writes: bool) -> Any:
    """Return arguments with the logits that are made where they were not."""
    return pytree.tree_map_only(LazyLogits, lambda lazy: lazy._made(name, writes=writes), (args, kwargs))


def _is_view(result: Any) -> bool:
    """Return whether a function returned a view, which shares the memory of an argument."""
    eager = not torch.compiler.is_compiling()
    return eager and any(isinstance(each, Tensor) and each._is_view() for each in pytree.tree_leaves(result))


def _metadata(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a function says of a tensor without its entries."""
    lazy = args[0] if args else None
    if isinstance(lazy, LazyLogits) and not torch.compiler.is_compiling():
        if func == _REQUIRES_GRAD and not lazy._in_graph and not lazy._left_compiled_code:
            return any(each is not None and each.requires_grad for each in (lazy._dense, *attached(lazy).tensors()))
        if lazy._dense is not None:
            return func(lazy._dense, *args[1:], **kwargs)
        if func in STRIDED and lazy._strided is not None:
            return func(lazy._strided, *args[1:], **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)
