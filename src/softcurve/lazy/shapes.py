"""The operations that only change a record: of leading dimensions, dtypes, scales, caps and the softmax itself.

Each takes a record and the arguments of the torch function behind its first, and returns a record or a list of them;
or :data:`NotImplemented`, and then the logits are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from softcurve import checks
from softcurve.head.sharded import lies_over_processes
from softcurve.lazy.record import LinearRecord
from softcurve.losses.low_rank import matrix_of

Result: TypeAlias = Any  # LinearRecord | Sequence[LinearRecord] | Tensor | NotImplemented
Handler: TypeAlias = Callable[..., Result]

HANDLERS: dict[Any, Handler] = {}
VIEWS: set[Any] = set()  # the functions whose result shares memory with their argument, if they do not convert it
COMMUTATIVE = {getattr(owner, name) for name in ("add", "mul") for owner in (torch, Tensor)}
COMMUTATIVE |= {Tensor.__add__, Tensor.__mul__}


def handles(*names: str, views: bool = False, functional: bool = False) -> Callable[[Handler], Handler]:
    """Register a handler for the functions and methods of torch that have these names."""

    def register(handler: Handler) -> Handler:
        owners = (torch.Tensor, torch, *((F,) if functional else ()))
        functions = [getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)]
        HANDLERS.update(dict.fromkeys(functions, handler))
        VIEWS.update(functions if views else ())
        return handler

    return register


# --- leading dimensions ----------------------------------------------------------------------------------------------


def _integers(sizes: Sequence[Any]) -> tuple[int, ...] | None:
    """Return the sizes that a call names one by one or as one sequence."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    return tuple(sizes) if all(isinstance(size, (int, torch.SymInt)) for size in sizes) else None


@handles("view", "reshape", views=True)
def _reshape(record: LinearRecord, *sizes: Any, shape: Any = None) -> Result:
    whole = _integers(sizes if shape is None else (shape,))
    if whole is None or not whole or not record.classes_last:
        return NotImplemented
    *leading, last = whole
    if last == -1 and -1 not in leading and math.prod(leading) == math.prod(record.shape[:-1]):
        last = record.classes
    if last != record.classes:
        return NotImplemented
    return record.of_rows(record.input.reshape(*leading, record.input.shape[-1]))


@handles("flatten", views=True)
def _flatten(record: LinearRecord, start_dim: int = 0, end_dim: int = -1) -> Result:
    if not record.classes_last or end_dim % record.ndim == record.ndim - 1:
        return NotImplemented
    return record.of_rows(record.input.flatten(start_dim, end_dim))


@handles("unsqueeze", views=True)
def _unsqueeze(record: LinearRecord, dim: int) -> Result:
    at = dim % (record.ndim + 1)
    if not record.classes_last or at == record.ndim or not -record.ndim - 1 <= dim <= record.ndim:
        return NotImplemented
    return record.of_rows(record.input.unsqueeze(at))


def _along_rows(name: str, place: int, default: int | None) -> None:
    """Register a method that works along one dimension, which is the argument at ``place`` or by name."""

    def handler(record: LinearRecord, *args: Any, **kwargs: Any) -> Result:
        dim = kwargs.get("dim", args[place] if len(args) > place else default)
        if not isinstance(dim, int) or not record.classes_last or dim % record.ndim == record.ndim - 1:
            return NotImplemented
        parts = getattr(record.input, name)(*args, **kwargs)
        return record.of_rows(parts) if isinstance(parts, Tensor) else [record.of_rows(part) for part in parts]

    handles(name, views=True)(handler)


for _name, _place, _default in (
    ("squeeze", 0, None), ("select", 0, None), ("narrow", 0, None), ("unbind", 0, 0), ("split", 1, 0), ("chunk", 1, 0),
    ("tensor_split", 1, 0),
):  # fmt: skip
    _along_rows(_name, _place, _default)


@handles("__getitem__", views=True)
def _get(record: LinearRecord, index: Any) -> Result:
    if not record.classes_last:
        return NotImplemented
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(map(_is_plain, parts)):
        return NotImplemented
    taken = sum(_dimensions_of(part) for part in parts)
    here = [i for i, part in enumerate(parts) if part is Ellipsis]
    if taken > record.ndim or len(here) > 1:
        return NotImplemented  # torch says what is wrong
    if here:
        parts[here[0] : here[0] + 1] = [slice(None)] * (record.ndim - taken)
        taken = record.ndim
    if taken == record.ndim:
        *parts, of_classes = parts
        if not isinstance(of_classes, slice):
            return NotImplemented
        if (cut := _cut(record, of_classes)) is None:
            return NotImplemented
        record = cut
    return record.of_rows(record.input[tuple(parts)])


def _is_plain(part: Any) -> bool:
    """Return whether it is certain which dimensions an entry of an index takes, and whether it copies."""
    if isinstance(part, list):
        return all(type(number) is int for number in part)
    is_index = isinstance(part, Tensor) and part.ndim > 0 and not part.is_floating_point()
    return is_index or part is None or part is Ellipsis or type(part) in (int, slice)


def _dimensions_of(part: Any) -> int:
    """Return how many dimensions an entry of an index takes."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
        return part.ndim
    return 1


def _cut(record: LinearRecord, classes: slice) -> LinearRecord | None:
    """Return the record of some classes, as those of a vocabulary without its padding."""
    if classes.indices(record.classes) == (0, record.classes, 1):
        return record
    if record.kind != "logits" or (classes.step or 1) != 1 or lies_over_processes(matrix_of(record.weight)):
        return None
    return record.but(weight=record.weight[classes], bias=None if record.bias is None else record.bias[classes])


def _permuted(record: LinearRecord, order: Sequence[int]) -> LinearRecord:
    """Return the record with its dimensions in another order."""
    # The dimension of what is recorded that each dimension of the features, but for the last, stands for.
    rows = [dim for dim in range(record.ndim) if dim != record.dim]
    order = [dim % record.ndim for dim in order]
    input = record.input.permute(*(rows.index(dim) for dim in order if dim != record.dim), record.ndim - 1)
    return record.but(input=input, dim=order.index(record.dim))


@handles("permute", views=True)
def _permute(record: LinearRecord, *order: Any, dims: Any = None) -> Result:
    whole = _integers(order if dims is None else (dims,))
    return NotImplemented if whole is None or len(whole) != record.ndim else _permuted(record, whole)


@handles("transpose", "swapaxes", "swapdims", views=True)
def _transpose(record: LinearRecord, dim0: int, dim1: int) -> Result:
    order = list(range(record.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(record, order)


@handles("movedim", "moveaxis", views=True)
def _movedim(record: LinearRecord, source: Any, destination: Any) -> Result:
    if not isinstance(source, int) or not isinstance(destination, int):
        return NotImplemented
    order = [dim for dim in range(record.ndim) if dim != source % record.ndim]
    order.insert(destination % record.ndim, source % record.ndim)
    return _permuted(record, order)


# --- the same numbers ------------------------------------------------------------------------------------------------


@handles("contiguous", views=True)
def _contiguous(record: LinearRecord, memory_format: torch.memory_format = torch.contiguous_format) -> Result:
    return record if memory_format == torch.contiguous_format else NotImplemented


@handles("clone")
def _clone(record: LinearRecord, *, memory_format: torch.memory_format = torch.preserve_format) -> Result:
    return record.but()  # another tensor; where a handler returns the same record, torch returns the same tensor


@handles("detach", views=True)
def _detach(record: LinearRecord) -> Result:
    return record.detached()


def _cast(record: LinearRecord, dtype: torch.dtype) -> Result:
    if dtype == record.dtype:
        return record
    return record.but(dtype=dtype) if dtype.is_floating_point else NotImplemented


def _casts(name: str, dtype: torch.dtype) -> None:
    @handles(name)
    def handler(record: LinearRecord, **kwargs: Any) -> Result:
        return NotImplemented if kwargs else _cast(record, dtype)


for _name in ("float", "double", "half", "bfloat16"):
    _casts(_name, getattr(torch, _name))


@handles("to")
def _to(record: LinearRecord, *args: Any, **kwargs: Any) -> Result:
    options = dict(kwargs)
    switches = [arg for arg in args if isinstance(arg, bool)]  # non_blocking and copy
    for arg in args:
        if isinstance(arg, Tensor):
            options.update(dtype=arg.dtype, device=arg.device)
        elif isinstance(arg, torch.dtype):
            options["dtype"] = arg
        elif isinstance(arg, (torch.device, str)):
            options["device"] = arg
        elif not isinstance(arg, bool):
            return NotImplemented
    device, copies = options.pop("device", None), options.pop("copy", switches[1:] == [True])
    dtype = options.pop("dtype", None) or record.dtype
    if (device is not None and torch.device(device) != record.input.device) or set(options) - {"non_blocking"}:
        return NotImplemented
    cast = _cast(record, dtype)
    return record.but() if copies and cast is record else cast


# --- scale, cap and softmax ------------------------------------------------------------------------------------------


def _scaled(record: LinearRecord, number: float) -> Result:
    if not math.isfinite(number):
        return NotImplemented
    if record.kind != "logits":
        return record.but(factor=record.factor * number)
    if record.after is not None:
        return record.but(after=record.after * number)
    return record.but(scale=record.scale * number)  # another record even if the number is 1: torch copies


@handles("mul", "multiply", "__mul__", "__rmul__")
def _multiply(record: LinearRecord, other: Any) -> Result:
    if isinstance(other, Real):
        return _scaled(record, float(other))
    if not isinstance(other, Tensor) or record.kind != "logits" or record.after is not None:
        return NotImplemented
    # A learnable scale, or one of each row, is a factor of the features.
    of_rows = record.classes_last and other.shape == (*record.shape[:-1], 1)
    if not other.is_floating_point() or (other.ndim and (not of_rows or record.bias is not None)):
        return NotImplemented
    dtype = torch.result_type(torch.empty(0, dtype=record.dtype), other)
    bias = None if record.bias is None else record.bias * other
    return record.but(input=record.input * other, bias=bias, dtype=dtype)


@handles("div", "divide", "true_divide", "__truediv__")
def _divide(record: LinearRecord, other: Any, *, rounding_mode: str | None = None) -> Result:
    if rounding_mode is not None or (isinstance(other, Real) and other == 0):
        return NotImplemented
    if isinstance(other, Real):
        return _scaled(record, 1 / float(other))
    if not isinstance(other, Tensor) or not other.is_floating_point():
        return NotImplemented
    return _multiply(record, other.reciprocal())


@handles("neg", "negative", "__neg__")
def _negate(record: LinearRecord) -> Result:
    return _scaled(record, -1.0)


@handles("tanh")
def _tanh(record: LinearRecord) -> Result:
    if record.kind != "logits" or record.after is not None:
        return NotImplemented
    # The tanh of an infinite logit is finite, while a loss on a head takes −inf for a masked class, cap or not.
    parts = [part.detach() for part in record.tensors() if part is not None and part.numel()]
    # Extremes are not finite where an entry is not, and take no memory.
    extremes = [end for part in parts if checks.values_visible(part) for end in part.aminmax()]
    if not all(map(math.isfinite, extremes)):
        return NotImplemented
    return record.but(after=1.0)


@handles("add", "__add__", "__radd__")
def _add(record: LinearRecord, other: Any, *, alpha: Any = 1) -> Result:
    """Add a bias, as that of BART, whose logits have one beside the head."""
    if not isinstance(other, Tensor) or record.kind != "logits" or record.after is not None or alpha != 1:
        return NotImplemented
    if not record.classes_last or other.ndim == 0 or other.numel() != record.classes != 1 or record.scale == 0:
        return NotImplemented
    if other.shape[-1] != record.classes or other.ndim > record.ndim or not other.is_floating_point():
        return NotImplemented
    more = other.flatten() / record.scale
    dtype = torch.promote_types(record.dtype, other.dtype)
    return record.but(bias=more if record.bias is None else record.bias + more, dtype=dtype)


def is_of_classes(record: LinearRecord, dim: Any) -> bool:
    """Return whether a dimension is that of the classes."""
    return isinstance(dim, int) and -record.ndim <= dim < record.ndim and dim % record.ndim == record.dim


def _normalized(record: LinearRecord, dim: Any, dtype: torch.dtype | None, kind: Any) -> Result:
    if record.kind != "logits" or not is_of_classes(record, dim):
        return NotImplemented
    return record.but(kind=kind, dtype=dtype or record.dtype)


# F.softmax has a level of the stack in the place where Tensor.softmax has the dtype.


@handles("log_softmax", functional=True)
def _log_softmax(record: LinearRecord, dim: Any = None, second: Any = None, dtype: Any = None, **_: Any) -> Result:
    return _normalized(record, dim, second if isinstance(second, torch.dtype) else dtype, "log_softmax")


@handles("softmax", functional=True)
def _softmax(record: LinearRecord, dim: Any = None, second: Any = None, dtype: Any = None, **_: Any) -> Result:
    return _normalized(record, dim, second if isinstance(second, torch.dtype) else dtype, "softmax")


@handles("exp")
def _exp(record: LinearRecord) -> Result:
    return record.but(kind="softmax") if record.kind == "log_softmax" and record.factor == 1 else NotImplemented
