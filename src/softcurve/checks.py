"""What the public doors check, and in which words.

Shapes and dtypes are always checked. Values are checked where looking costs no synchronisation and breaks no graph: on
the CPU, outside ``torch.compile`` and ``torch.func`` transforms (:func:`values_visible`). Elsewhere a bad value ends as
NaN or as the device's own assertion, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SUM_TOLERANCE = 1e-4  # of a row of probabilities; half-precision rows are rounded to SUM_TOLERANCE_HALF
SUM_TOLERANCE_HALF = 2e-2


_WRAPPERS = (  # batched, transformed and fake tensors, whose entries cannot be branched on
    torch._C.DispatchKey.FuncTorchBatched,
    torch._C.DispatchKey.FuncTorchGradWrapper,
    torch._C.DispatchKey.Python,
)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of numbers, and not a transform's or a tracer's stand-in."""
    wrapped = any(map(torch._C._dispatch_keys(tensor).has, _WRAPPERS))
    return not wrapped and not torch._C._functorch.is_legacy_batchedtensor(tensor)


def values_visible(*tensors: Tensor) -> bool:
    """Whether the entries of all tensors can be looked at here, at no cost to the caller's graph."""
    if (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    ):  # the latter: a tracing mode, such as make_fx
        return False
    on_cpu = torch._C.DispatchKey.CPU
    return all(torch._C._dispatch_keys(tensor).has(on_cpu) and is_plain(tensor) for tensor in tensors)


def describe(tensor: Tensor) -> str:
    """Shape and dtype of what came, for a message."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}"


def require_floating(name: str, tensor: object) -> None:
    """A real floating-point tensor with at least one dimension and one class."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}; convert it with {name}.float()")
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must be of shape (..., C) with the C >= 1 classes last, got {describe(tensor)}")


def require_features(name: str, tensor: object) -> None:
    """A real floating-point tensor whose last dimension is one of features, of which there is at least one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}; convert it with {name}.float()")
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must be of shape (..., d) with the d >= 1 features last, got {describe(tensor)}")


def require_tensor(name: str, value: object) -> None:
    """A tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor")
    if value.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}; take {name}.real")


def require_rows(name: str, tensor: object, rows: Sequence[int], against: str) -> None:
    """One real entry for each row."""
    require_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tuple(tensor.shape) != tuple(rows):
        raise ValueError(
            f"{name} must have one entry per row, shape {tuple(rows)} (the leading dimensions of {against}), "
            f"got {describe(tensor)}"
        )


def require_positive(name: str, value: float) -> None:
    """A finite number above 0."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):  # no math.isfinite: torch.compile traces this
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def require_between(name: str, value: float, low: float, high: float) -> None:
    """A number in ``[low, high]``, infinity excluded."""
    if not (isinstance(value, int | float) and low <= value <= high and value < math.inf):
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def require_class_indices(name: str, indices: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """Entries in ``0 … classes − 1``, or ``ignore_index``."""
    if not values_visible(indices) or indices.numel() == 0:
        return
    outside = (indices < 0) | (indices >= classes)
    if ignore_index is not None:
        outside &= indices != ignore_index
    if outside.any():
        found = int(indices[outside].flatten()[0])
        remedy = "" if ignore_index is None else f" or ignore_index ({ignore_index}) for a row that does not count"
        raise ValueError(f"{name} must hold classes in 0 … {classes - 1}{remedy}, got {found}")


def require_probabilities(name: str, probabilities: Tensor) -> None:
    """Entries ≥ 0 in rows that sum to 1."""
    if not values_visible(probabilities) or probabilities.numel() == 0:
        return
    values = probabilities.detach()
    least = values.amin().item()
    if math.isnan(least):
        raise ValueError(f"{name} must hold probabilities, got NaN; mask or drop the rows that hold it")
    if least < 0:
        raise ValueError(
            f"{name} must hold probabilities >= 0, got {least:.6g}; "
            "if these are logits or log-probabilities, wrap them as softcurve.Logits(...)"
        )
    half = values.dtype in (torch.bfloat16, torch.float16)
    sums = values.sum(-1, dtype=torch.float32 if half else values.dtype)
    worst = sums.flatten()[(sums - 1).abs().argmax()].item()
    if not abs(worst - 1) <= (SUM_TOLERANCE_HALF if half else SUM_TOLERANCE):
        raise ValueError(
            f"{name} must hold rows that sum to 1, got a row that sums to {worst:.6g}; divide each row by its sum, or "
            "express its mass by sample_weight (class indices are integers: convert them with .long())"
        )


def require_numbers(name: str, tensor: Tensor) -> None:
    """No NaN."""
    if values_visible(tensor) and tensor.detach().isnan().any():
        raise ValueError(f"{name} must hold numbers, got NaN; look for where it came from")


def explain_nan(rows: Tensor, sample_weight: Tensor | None, **logits: Tensor) -> None:
    """If the loss of a row that counts came out NaN, say which argument it came from."""
    if not values_visible(rows) or not rows.detach().isnan().any():
        return
    if sample_weight is not None and not (rows.detach().isnan() & (sample_weight != 0)).any():
        return
    for name, tensor in logits.items():
        values = tensor.detach()
        if values.isnan().any():
            raise ValueError(f"{name} must hold numbers, got NaN; look for the step that made it, or mask those rows")
        if (values == math.inf).any():
            raise ValueError(f"{name} must be below +inf, got +inf, whose softmax is undefined; clamp the logits")
        if (values == -math.inf).all(-1).any():
            raise ValueError(
                f"{name} must have at least one finite logit per row, got a row of -inf only; "
                "unmask a class or drop the row"
            )
    raise ValueError("target must give every row numbers and a class with mass, got a row whose loss is NaN; mask it")
