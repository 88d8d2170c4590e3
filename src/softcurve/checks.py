"""Checks of the arguments of public functions, with the text of their errors.

Shapes and dtypes are always checked. Values are checked only on the CPU, outside ``torch.compile`` and ``torch.func``
transforms (:func:`values_visible`), where this neither synchronises a device nor breaks a graph. Elsewhere an invalid
value gives NaN or an assertion of the device, as in torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class InvalidEntriesError(ValueError):
    """Raised for entries that softcurve refuses, such as NaN, in a tensor of the right kind and shape.

    torch computes with them, so unmade logits (:mod:`softcurve.lazy`) leave them to torch, and what measures a model in
    training reports NaN.
    """


SUM_TOLERANCE = 1e-4  # for the sum of a row of probabilities; SUM_TOLERANCE_HALF is for half precision
SUM_TOLERANCE_HALF = 2e-2

_KEYS = torch._C.DispatchKey
_WRAPPERS = (_KEYS.FuncTorchBatched, _KEYS.FuncTorchGradWrapper, _KEYS.Python)


@functools.cache
def _kind(keys: int) -> tuple[bool, bool]:
    """Return whether a tensor with these dispatch keys is neither wrapped nor transformed, and whether on the CPU."""
    known = torch._C.DispatchKeySet.from_raw_repr(keys)
    return not any(map(known.has, _WRAPPERS)), known.has(_KEYS.CPU)


def is_plain(tensor: Tensor) -> bool:
    """Return whether Python code can branch on the entries: no batched, transformed or fake tensor has any."""
    plain, _ = _kind(torch._C._dispatch_keys(tensor).raw_repr())
    return plain and not torch._C._functorch.is_legacy_batchedtensor(tensor)


def values_visible(*tensors: Tensor) -> bool:
    """Return whether the entries of all tensors can be read without affecting the caller's graph."""
    # The second condition detects tracing modes such as make_fx.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for tensor in tensors:  # not by a generator, which would add a call for each tensor to every small loss
        if _kind(torch._C._dispatch_keys(tensor).raw_repr()) != (True, True):
            return False
        if torch._C._functorch.is_legacy_batchedtensor(tensor):
            return False
    return True


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the common dtype, float32 or wider, in which losses are computed."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider."""
    return tensor.to(wide_dtype(tensor.dtype))


def describe(value: object) -> str:
    """Return the shape and dtype of a tensor, or the type of any other value, for an error message."""
    return f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def require_floating(name: str, tensor: object, last: str = "(..., C) with the C >= 1 classes") -> None:
    """Require a real floating-point tensor whose ``last`` dimension is not empty."""
    if not isinstance(tensor, Tensor):
        remedy = f"; pass its weight as {name}, and its bias as linear_bias" if isinstance(tensor, nn.Linear) else ""
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {type(tensor).__name__}{remedy}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}; convert it with {name}.float()")
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must be of shape {last} last, got {describe(tensor)}")


def require_dim(value: object) -> int:
    """Return the number of a dimension as a Python int."""
    dim = as_integer(value)
    if dim is None:
        raise TypeError(f"dim must be an int, the dimension of the classes, got {describe(value)}; -1 is the last")
    return dim


def moved_last(tensor: Tensor, dim: int, name: str) -> Tensor:
    """Return a view of ``tensor`` in which dimension ``dim`` is the last."""
    if dim == -1:
        return tensor
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(
            f"dim must be a dimension of {name}, from {-tensor.ndim} to {tensor.ndim - 1}, got {dim} for "
            f"{describe(tensor)}; -1 is the last"
        )
    return tensor.movedim(dim, -1)


def require_features(name: str, tensor: object) -> None:
    """Require a real floating-point tensor whose last dimension contains at least one feature."""
    require_floating(name, tensor, "(..., d) with the d >= 1 features")


def require_head(input: Tensor, weight: Tensor, bias: Tensor | None, owner: str = "") -> None:
    """Require features, a weight ``(C, d)`` of the same width, and one bias per class; ``owner`` precedes the names."""
    require_features(f"{owner}input", input)
    require_features(f"{owner}linear_weight", weight)
    if weight.ndim != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{owner}linear_weight must be of shape (C, {input.shape[-1]}), as wide as input {tuple(input.shape)}, "
            f"got {describe(weight)}"
        )
    if len(weight) == 0:
        raise ValueError(f"{owner}linear_weight must have at least one class, got {describe(weight)}")
    if bias is not None:
        require_tensor(f"{owner}linear_bias", bias)
        if not bias.is_floating_point() or tuple(bias.shape) != (len(weight),):
            raise ValueError(
                f"{owner}linear_bias must be a floating-point tensor of shape ({len(weight)},), one entry per class, "
                f"got {describe(bias)}"
            )


def require_tensor(name: str, value: object) -> None:
    """Require a tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor")
    if value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}; take {name}.real")


def is_of_integers(tensor: Tensor) -> bool:
    """Return whether a tensor is of any integer dtype; booleans are none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def require_integers(name: str, tensor: object) -> None:
    """Require a tensor of class indices, of any integer dtype."""
    if not isinstance(tensor, Tensor) or not is_of_integers(tensor):
        what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"{name} must be a tensor of class indices of an integer dtype, such as int64, got {what}; convert it "
            "with .long()"
        )


def require_rows(name: str, tensor: object, rows: Sequence[int], against: str, classes: int | None = None) -> None:
    """Require one real entry for each row; ``classes`` is the size of the dimension after the rows of ``against``."""
    require_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tuple(tensor.shape) != tuple(rows):
        remedy = "" if classes is None else layout_remedy((*rows, classes), tensor.shape, against)
        if tuple(tensor.shape) == (*rows, 1):
            remedy = f"; drop the last dimension with {name}.squeeze(-1)"
        raise ValueError(
            f"{name} must have one entry per row, shape {tuple(rows)} (the leading dimensions of {against}), "
            f"got {describe(tensor)}{remedy}"
        )


def _in_torch_layout(shape: Sequence[int], classes_last: Sequence[int]) -> bool:
    """Return whether a shape is ``classes_last`` with the classes moved to the second dimension."""
    return len(classes_last) > 2 and tuple(shape) == (classes_last[0], classes_last[-1], *classes_last[1:-1])


def layout_remedy(logits: Sequence[int], rows: Sequence[int], name: str) -> str:
    """Return the remedy, as text, if ``logits`` differ from ``rows`` because of torch's layout ``(N, C, …)``."""
    if len(logits) > 2 and _in_torch_layout(logits, (*rows, logits[1])):
        here = "dim=1 or " if name == "logits" else ""
        return f"; for torch's layout (N, C, d_1, ...) pass {here}{name}.movedim(1, -1), which has the classes last"
    return ""


def shape_remedy(
    logits: Sequence[int], target: Sequence[int], cut_logits: str, cut_target: str = "target[..., :{classes}]"
) -> str:
    """Return the remedy, as text, if a distribution differs from ``logits`` in its layout or its number of classes.

    ``cut_logits`` and ``cut_target`` are templates of expressions that truncate either to ``{classes}`` classes.
    """
    if _in_torch_layout(logits, target) or _in_torch_layout(target, logits):
        return "; move the classes of the one in torch's layout (N, C, d_1, ...) to the end by .movedim(1, -1)"
    if tuple(logits[:-1]) != tuple(target[:-1]) or logits[-1] == target[-1]:
        return ""
    cut = cut_logits if logits[-1] > target[-1] else cut_target
    return f"; if one vocabulary is padded, cut it: {cut.format(classes=min(logits[-1], target[-1]))}"


def _number(name: str, value: object) -> float | None:
    """Convert a Python, numpy or 0-d tensor number to a float; return None if it is not a real number."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.is_complex():
            return None
        if value.requires_grad:
            raise ValueError(
                f"{name} must be a constant, got a tensor that requires gradients; apply it to the logits or the "
                f"features yourself, or pass {name}.detach()"
            )
    elif not isinstance(value, int | float | np.integer | np.floating | np.bool_):
        return None
    return float(value)


def require_number(name: str, value: object, holds: Callable[[float], bool], what: str) -> float:
    """Return a finite number for which ``holds`` as a Python number; raise ValueError for anything else."""
    number = _number(name, value)
    # torch.compile does not trace math.isfinite.
    if number is None or not -math.inf < number < math.inf or not holds(number):
        raise ValueError(f"{name} must be a finite number {what}, got {value!r}")
    return number


def require_positive(name: str, value: object) -> float:
    """Return a finite number above 0 as a Python number; raise ValueError for anything else."""
    return require_number(name, value, lambda number: number > 0, "above 0")


def require_between(name: str, value: object, low: float, high: float) -> float:
    """Return a finite number in ``[low, high]`` as a Python number; raise ValueError for anything else."""
    bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
    return require_number(name, value, lambda number: low <= number <= high, bounds)


def require_base(value: object) -> float:
    """Return the base of a logarithm as a Python number: finite, above 0 and not 1."""
    return require_number("base", value, lambda number: number > 0 and number != 1, "above 0 and not 1 (2 for bits)")


def as_integer(value: object) -> int | None:
    """Return a Python, numpy or 0-d tensor integer as a Python int; None for anything else, booleans included."""
    if isinstance(value, Tensor):
        unfit = value.ndim != 0 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
        return None if unfit else int(value)
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None


def require_count(name: str, value: object, least: int) -> None:
    """Require a Python or numpy integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def require_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return one of the given strings; raise ValueError for anything else."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def require_class_indices(name: str, indices: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Require entries in ``0 … classes − 1``, or ``ignore_index``."""
    if not values_visible(indices) or indices.numel() == 0:
        return
    outside = outside_classes(indices, classes)
    if ignore_index is not None:
        outside &= indices != ignore_index
    if outside.any():
        remedy = "" if ignore_index is None else f" or ignore_index ({ignore_index}) for a row that does not count"
        raise ValueError(f"{name} must hold classes in 0 … {classes - 1}{remedy}, got {int(indices[outside][0])}")


def names_classes(indices: Tensor, classes: int) -> bool:
    """Return whether every entry can be seen to be in ``0 … classes − 1``, by one pass."""
    if not values_visible(indices) or indices.numel() == 0:
        return False
    least, most = indices.aminmax()
    return bool(least.item() >= 0 and most.item() < classes)


def require_exclude(exclude: object, rows: Sequence[int], classes: int) -> Tensor | None:
    """Return the classes that each row leaves out, ``(*rows, k)`` in int64, or ``None`` if there are none."""
    if exclude is None:
        return None
    require_tensor("exclude", exclude)
    assert isinstance(exclude, Tensor)
    if exclude.is_floating_point() or exclude.dtype == torch.bool:
        raise TypeError(
            f"exclude must hold class indices (int64), got {exclude.dtype}; a mask of classes gives them by "
            "torch.where(mask, torch.arange(C), -1)"
        )
    if exclude.ndim == 0 or tuple(exclude.shape[:-1]) != tuple(rows):
        remedy = "; one class a row is exclude.unsqueeze(-1)" if tuple(exclude.shape) == tuple(rows) else ""
        raise ValueError(
            f"exclude must be of shape {tuple(rows)} + (k,), k classes a row, got {describe(exclude)}{remedy}"
        )
    if values_visible(exclude) and exclude.numel():
        least, most = (int(bound) for bound in exclude.aminmax())
        if least < -1 or most >= classes:
            raise ValueError(
                f"exclude must hold classes in 0 … {classes - 1}, or -1 for none, got {least if least < -1 else most}"
            )
    return exclude.long() if exclude.shape[-1] else None


def outside_classes(indices: Tensor, classes: int) -> Tensor:
    """Return where an index names no class."""
    return (indices < 0) | (indices >= classes)


def require_probabilities(name: str, rows: Tensor, counted: Tensor | None = None, *, of_any_sum: bool = False) -> None:
    """Require finite entries ≥ 0 that sum to 1 in the rows ``(..., C)`` that are ``counted``, by default all."""
    if rows.numel() == 0 or not values_visible(rows, *(() if counted is None else (counted,))):
        return
    if counted is None:
        least, most = _extremes(rows.detach())
    else:  # a row that does not count may hold NaN
        extremes = rows.detach().aminmax(dim=-1)
        zero = extremes.min.new_zeros(())
        least = torch.where(counted, extremes.min, zero).amin().item()
        most = torch.where(counted, extremes.max, zero).amax().item()
    if math.isnan(least):
        raise InvalidEntriesError(f"{name} must hold probabilities, got NaN; mask or drop the rows that hold it")
    if least < 0:
        raise InvalidEntriesError(
            f"{name} must hold probabilities >= 0, got {least:.6g}; "
            "if these are logits or log-probabilities, wrap them as softcurve.Logits(...)"
        )
    if most == math.inf:
        raise InvalidEntriesError(
            f"{name} must hold finite probabilities, got inf; divide each row by its sum, or mask it"
        )
    if of_any_sum:
        return
    sums = row_sums(rows) if counted is None else torch.where(counted, row_sums(rows), 1.0)
    distance = (sums - 1).abs()
    if not distance.max() <= sum_tolerance(rows.dtype):
        worst = sums.flatten()[distance.argmax()].item()
        raise InvalidEntriesError(
            f"{name} must hold rows that sum to 1, got a row that sums to {worst:.6g}; divide each row by its sum, or "
            "express its mass by sample_weight (class indices are integers: convert them with .long())"
        )


def _extremes(values: Tensor) -> tuple[float, float]:
    """Return the least and the largest entry, NaN beside NaN; ``aminmax`` would copy a tensor of another order."""
    if values.is_contiguous():
        least, most = values.aminmax()
    else:
        least, most = values.amin(), values.amax()
    return least.item(), most.item()


def look_like_probabilities(rows: Tensor, counted: Tensor | None = None) -> bool:
    """Return whether the rows of two or more classes that are ``counted`` are ≥ 0 and sum to 1, if that can be seen."""
    if not values_visible(rows) or rows.shape[-1] < 2:
        return False
    rows = rows.detach()
    if counted is not None and values_visible(counted) and not counted.all():
        rows = rows[counted]

    def are_probabilities(some: Tensor) -> bool:
        near_one = (row_sums(some) - 1).abs() <= sum_tolerance(rows.dtype)
        return bool(near_one.all()) and bool(some.amin() >= 0)

    # For most logits the first rows decide, without a pass over all of them.
    if rows.numel() == 0:
        return False
    first = rows
    while first.ndim > 2:  # a reshape would copy rows whose classes are not last in memory
        first = first[0]
    return are_probabilities(first[:4] if first.ndim == 2 else first) and are_probabilities(rows)


def row_sums(rows: Tensor) -> Tensor:
    """Return the sum of each row, in float32 or wider."""
    return rows.detach().sum(-1, dtype=wide_dtype(rows.dtype))


def sum_tolerance(dtype: torch.dtype) -> float:
    """Return the tolerance for the sum of a row of probabilities."""
    return SUM_TOLERANCE_HALF if dtype in (torch.bfloat16, torch.float16) else SUM_TOLERANCE


def require_numbers(name: str, tensor: Tensor) -> None:
    """Require a tensor without NaN."""
    if values_visible(tensor) and tensor.detach().isnan().any():
        raise ValueError(f"{name} must hold numbers, got NaN; look for where it came from")


def explain_nan(
    rows: Tensor, row_weight: Tensor | None, tensors: Mapping[str, Tensor | None],
    targets: Mapping[str, Sequence[Tensor | None]] | None = None,
) -> None:  # fmt: skip
    """If a row of nonzero weight has NaN as its loss, raise an error that names the argument at fault.

    ``tensors`` are logits, or features, weight and bias of a head; in logits and a bias −inf masks a class. ``targets``
    are the tensors of each argument that is a target.
    """
    if not values_visible(rows) or not math.isnan(rows.detach().sum().item()):
        return
    wrong = rows.detach().isnan()
    if not (wrong if row_weight is None else wrong & (row_weight != 0)).any():
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        values, masks = tensor.detach(), not name.startswith(("input", "linear_weight"))
        masked = values == -math.inf
        faults = {
            "hold numbers, got NaN; look for the step that made it, or mask those rows": values.isnan(),
            f"be {'below +inf' if masks else 'finite'}, got +inf; clamp it, or mask those rows": values == math.inf,
            "be finite, got -inf; clamp it, or mask those rows": masked & (not masks),
            "have at least one finite entry per row, got a row of -inf only; unmask a class or drop the row": (
                masked.all(-1) & masks
            ),
        }
        for fault, where in faults.items():
            if where.any():
                raise InvalidEntriesError(f"{name} must {fault}")
    for name, parts in (targets or {}).items():
        if any(part is not None and part.detach().isnan().any() for part in parts):
            raise InvalidEntriesError(
                f"{name} must hold numbers, got NaN; look for where it came from, or mask those rows"
            )
    raise InvalidEntriesError(
        "input or logits, and a target, must give every row finite logits and a class with mass that is neither masked "
        "nor excluded, got a row whose result is NaN; leave out that row, or one of its exclusions, and let a "
        "divergence of your own be a number or inf where a class has probability 0"
    )


def require_class_weight(weight: Tensor, classes: int) -> None:
    """Require one factor >= 0 per class."""
    require_tensor("weight", weight)
    if not weight.is_floating_point() or tuple(weight.shape) != (classes,):
        raise ValueError(
            f"weight must be a floating-point tensor of one factor per class, shape ({classes},), "
            f"got {describe(weight)}"
        )
    if weight.requires_grad:
        raise ValueError("weight must not require gradients, as in torch; detach it, or weigh rows by sample_weight")
    if values_visible(weight) and not (weight >= 0).all():
        raise InvalidEntriesError("weight must be >= 0 for every class, got a negative factor or NaN")
