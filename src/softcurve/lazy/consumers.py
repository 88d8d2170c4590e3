"""The operations that take numbers from a record: losses, log-probabilities and the largest classes.

Each is computed by the function on a head that means the same, so that the logits are not made. As in
:mod:`softcurve.lazy.shapes`, a handler returns :data:`NotImplemented` for what no such function means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcurve import checks
from softcurve.head.plan import DEFAULT_BUDGET
from softcurve.head.sharded import lies_over_processes
from softcurve.lazy.record import LinearRecord
from softcurve.lazy.shapes import Result, handles, is_of_classes
from softcurve.linear import linear_cross_entropy, linear_kl_divergence
from softcurve.linear_softmax import linear_log_probs, linear_topk
from softcurve.losses.low_rank import LowRankWeight, matrix_of

MOST_LISTED = 1024  # classes that linear_topk lists


def _streams(record: LinearRecord, dim: Any) -> bool:
    """Return whether a function on a head gives a result for each row, with ``dim`` that of the classes."""
    return record.streams and record.classes_last and is_of_classes(record, dim)


# --- losses ----------------------------------------------------------------------------------------------------------


def _has_loss(record: LinearRecord, *, kind: str, legacy: tuple[Any, Any]) -> bool:
    """Return whether torch's losses take the classes where they are: first, or second behind a batch."""
    plain = record.kind == kind and record.factor == 1 and record.streams
    return plain and record.dim == min(1, record.ndim - 1) and legacy == (None, None)


def _is_teacher(target: LinearRecord, record: LinearRecord) -> bool:
    """Return whether a softmax can be the target of a loss, which multiplies both heads in one dtype."""
    alike = target.dim == record.dim and target.lowered == record.lowered
    return alike and target.factor == 1 and target.streams


@handles("cross_entropy", functional=True)
def _cross_entropy(
    record: LinearRecord, target: Any, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: Any = "mean", label_smoothing: float = 0.0,
) -> Result:  # fmt: skip
    if not _has_loss(record, kind="logits", legacy=(size_average, reduce)):
        return NotImplemented
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "weight": weight, "reduction": reduction}
    if isinstance(target, LinearRecord):
        if target.kind != "softmax" or not _is_teacher(target, record):
            return NotImplemented
        target = target.as_teacher()
    elif target.is_floating_point():
        target = target.movedim(record.dim, -1)
    else:
        options["ignore_index"] = ignore_index
    with record.autocast():
        return record.widened(linear_cross_entropy(record.input, record.weight, target, **options, **record.options))


@handles("nll_loss", functional=True)
def _nll_loss(
    record: LinearRecord, target: Any, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: Any = "mean",
) -> Result:  # fmt: skip
    labels = isinstance(target, Tensor) and not target.is_floating_point()
    if not labels or not _has_loss(record, kind="log_softmax", legacy=(size_average, reduce)):
        return NotImplemented
    logits = record.but(kind="logits")
    return _cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction=reduction)


@handles("kl_div", functional=True)
def _kl_div(
    record: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: Any = "mean",
    log_target: bool = False,
) -> Result:  # fmt: skip
    """Return ``D(target‖record)`` of two softmaxes, whose classes may be anywhere."""
    kind = "log_softmax" if log_target else "softmax"
    if not isinstance(record, LinearRecord) or not isinstance(target, LinearRecord) or record.shape != target.shape:
        return NotImplemented
    if record.kind != "log_softmax" or target.kind != kind or not _is_teacher(target, record):
        return NotImplemented
    if record.factor != 1 or not record.streams:
        return NotImplemented
    if (size_average, reduce) != (None, None) or reduction not in ("sum", "batchmean", "mean"):
        return NotImplemented
    teacher = target.as_teacher(record.options["temperature"])
    with record.autocast():
        loss = linear_kl_divergence(record.input, record.weight, teacher, reduction="sum", **record.options)
    return record.widened(loss) / {"sum": 1, "batchmean": record.shape[0], "mean": record.shape.numel()}[reduction]


# --- numbers of each row ---------------------------------------------------------------------------------------------


@handles("gather")
def _gather(record: LinearRecord, dim: Any, index: Tensor, *, sparse_grad: bool = False) -> Result:
    if not _streams(record, dim) or sparse_grad or index.shape[:-1] != record.shape[:-1]:
        return NotImplemented
    if record.kind == "logits":
        values = _chosen_logits(record, index)
    else:
        with record.autocast():
            log_probs = linear_log_probs(record.input, record.weight, index, **record.options).log_probs
        values = record.widened(record.factor * (log_probs if record.kind == "log_softmax" else log_probs.exp()))
    if record.returned is not None:
        record.returned.append((index, values.detach()))
    return values


@handles("take_along_dim")
def _take_along_dim(record: LinearRecord, indices: Tensor, dim: Any = None) -> Result:
    return _gather(record, dim, indices)


def _chosen_logits(record: LinearRecord, index: Tensor) -> Tensor:
    """Return the logits of the classes that an index names, from their rows of the weight alone if these are few.

    A copy of the rows is kept for the backward pass. Where it exceeds the memory budget, the log-probabilities are
    computed tile by tile.
    """
    weight, bias, matrix = record.weight, record.bias, matrix_of(record.weight)
    budget = record.memory_budget or DEFAULT_BUDGET.get(matrix.device.type, 2**30)
    copied = index.numel() * matrix.shape[1] * matrix.dtype.itemsize
    if index.shape[-1] * matrix.shape[1] > record.classes or copied > budget or lies_over_processes(matrix):
        with record.autocast():
            stats = linear_log_probs(record.input, weight, index, **record.options)
        return (stats.log_probs + stats.lse.unsqueeze(-1)).to(record.dtype)
    checks.require_class_indices("index", index, record.classes)
    rows, e = index.reshape(-1), record.input.unsqueeze(-2)
    with record.autocast():
        z = record.multiplied(e, matrix[rows].unflatten(0, index.shape)).squeeze(-2)
        if isinstance(weight, LowRankWeight):
            low = weight.widened(record.input, z.dtype)[..., record.input.shape[-1] :].unsqueeze(-2)
            z = z + record.multiplied(low, weight.a[rows].unflatten(0, index.shape)).squeeze(-2)
    z = (z if bias is None else z + bias[rows].view(index.shape)).to(torch.promote_types(z.dtype, record.dtype))
    z = z if record.scale == 1 else z * record.scale
    return (z if record.after is None else torch.tanh(z) * record.after).to(record.dtype)


@handles("logsumexp")
def _logsumexp(record: LinearRecord, dim: Any, keepdim: bool = False) -> Result:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not _streams(record, dim) or record.kind != "logits":
        return NotImplemented
    with record.autocast():
        lse = linear_log_probs(record.input, record.weight, None, **record.options).lse
    return record.widened(lse.unsqueeze(-1) if keepdim else lse)


@handles("sum")
def _sum(record: LinearRecord, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Result:
    """Return ``Σ log p``, which a label-smoothed loss takes: ``−C`` times the cross-entropy of the uniform target."""
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not _streams(record, dim) or record.kind != "log_softmax":
        return NotImplemented
    anything = torch.zeros(record.shape[:-1], dtype=torch.int64, device=record.input.device)
    with record.autocast():
        loss = linear_cross_entropy(
            record.input, record.weight, anything, label_smoothing=1.0, reduction="none", **record.options
        )
    if record.bias is not None:  # the log-probability of a masked class is −∞, where label smoothing leaves it out
        loss = loss.masked_fill((record.bias == -torch.inf).any(), torch.inf)
    total = -record.factor * record.classes * loss
    total = record.widened(total) if dtype is None else total.to(dtype)
    return total.unsqueeze(-1) if keepdim else total


@handles("mean")
def _mean(record: LinearRecord, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Result:
    total = _sum(record, dim, keepdim, dtype=dtype)
    return total if total is NotImplemented else total / record.classes


# --- the largest classes ---------------------------------------------------------------------------------------------


def _largest(record: LinearRecord, k: int) -> Tensor:
    """Return the classes of the ``k`` largest entries of each row."""
    with record.autocast():
        return linear_topk(record.input, record.weight, k, **record.options).indices


@handles("argmax")
def _argmax(record: LinearRecord, dim: Any = None, keepdim: bool = False) -> Result:
    if not _streams(record, dim) or record.factor <= 0:
        return NotImplemented
    classes = _largest(record, 1)
    return classes if keepdim else classes.squeeze(-1)


@handles("max")
def _max(record: LinearRecord, dim: Any = None, keepdim: bool = False) -> Result:
    classes = _argmax(record, dim, keepdim=True)
    if classes is NotImplemented:
        return NotImplemented
    values = _gather(record, -1, classes)
    pair = (values, classes) if keepdim else (values.squeeze(-1), classes.squeeze(-1))
    return torch.return_types.max(pair)


@handles("topk")
def _topk(record: LinearRecord, k: int, dim: Any = -1, largest: bool = True, sorted: bool = True) -> Result:
    if not _streams(record, dim) or record.factor <= 0 or not largest or not 0 < k <= min(MOST_LISTED, record.classes):
        return NotImplemented
    classes = _largest(record, k)
    return torch.return_types.topk((_gather(record, -1, classes), classes))
