"""A check that features and data are the same in each pass, which a matrix known only by its products needs.

Two passes are compared by one number for each row, made of its features, target and weight, in order and then sorted,
which distinguishes reordered rows from other rows. Neither a loss nor a sum over rows would do: at a head of zeros all
losses are equal, and batch normalisation preserves sums.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from softcurve.array_types import Float64
from softcurve.curvature.kfac import split_rows
from softcurve.head.tensors import RowLosses

if TYPE_CHECKING:
    from softcurve.curvature.network import SplitNetwork

SKIP = "check_deterministic=False skips this check"
IN_MEMORY = (list, tuple)  # exactly these types, whose batches are the same objects in each pass
TRAINED_DIFFERENTLY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def require_deterministic(network: SplitNetwork, name: str, *, ordered: bool) -> None:
    """Compare two passes over the network's features and data, which the caller's argument ``name`` holds.

    ``ordered`` also requires the rows in the same order, because values or random draws belong to rows by their place;
    a sampler that is known to be random is then refused without a pass. Of batches in a list only the features can
    differ, and the first batch shows it.

    Raises:
        ValueError: features or data differ, in any of the processes that share them.
    """
    sampler = _random_sampler(network.data) if ordered else None
    if sampler is not None:
        raise ValueError(
            f"{name} must give its rows in a fixed order, got a {type(network.data).__name__} with a {sampler}; build "
            f"it with shuffle=False and without a random sampler, or pass the batches as a list; {SKIP}"
        )
    # Generators are restored afterwards; within, the second pass does not continue the first one's random numbers.
    with torch.random.fork_rng([]):
        in_memory = type(network.data) in IN_MEMORY
        problem = _problem_of_features(network) if in_memory else _problem_of_rows(network, name, ordered)
    failures = network.sum_number(float(problem is not None), over_classes=True)
    if problem is None and failures:
        problem = f"{name} and features must be the same in each pass, got others in another process"
    if problem is not None:
        raise ValueError(f"{problem}; {SKIP}")


def _random_sampler(data: object) -> str | None:
    """Return the name of a sampler at any depth of a loader that is known to be random."""
    for sampler in (getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        if isinstance(sampler, RandomSampler | WeightedRandomSampler | SubsetRandomSampler):
            return type(sampler).__name__
        # A DistributedSampler that shuffles gives the same order each time, but not that of the data set.
        if getattr(sampler, "shuffle", False) is True:
            return f"{type(sampler).__name__} that shuffles"
        if sampler is not None and (inner := _random_sampler(sampler)) is not None:
            return inner
    return None


def _problem_of_rows(network: SplitNetwork, name: str, ordered: bool) -> str | None:
    """Compare the rows of two passes; return the error message if they differ."""
    tolerance, passes = _tolerance(network), []
    for _ in range(2):
        numbers = [_numbers_of(rows.losses).cpu() for rows in network.rows("Determinism check", graph=False)]
        passes.append(torch.cat([torch.zeros(0, dtype=torch.float64), *numbers]))
    first, second = passes
    if len(first) != len(second):
        return (
            f"{name} must give the same rows in each pass, got {len(first)} rows and then {len(second)}; pass the "
            "batches as a list, or build the loader without a random sampler and without drop_last"
        )
    if torch.allclose(first, second, rtol=0, atol=tolerance):
        return None
    gap = float((first.sort().values - second.sort().values).abs().max())
    if gap > tolerance:
        return _problem_of_features(network) or (
            f"{name} must give the same rows in each pass, got rows that differ by {gap:.1e}; leave out random "
            f"augmentation and random sampling (shuffle=False), or pass the batches as a list{_hint(network)}"
        )
    in_order = f"{name} must give its rows in a fixed order, got another one in the second pass; build the loader with "
    return in_order + "shuffle=False, or pass the batches as a list" if ordered else None


def _problem_of_features(network: SplitNetwork) -> str | None:
    """Compare two evaluations of the first batch; return the error message if they differ."""
    module = network.features
    if type(module) is nn.Identity and not module._forward_hooks and not module._forward_pre_hooks:
        return None
    for batch in network.data:
        first, second = (network.features_of(batch, 0, graph=False).detach() for _ in range(2))
        gap = math.inf
        if first.shape == second.shape:
            pair = (first.double() - second.double(), first.double())
            difference, scale = (each.nan_to_num(0.0, 0.0, 0.0).norm().item() for each in pair)
            gap = difference / (scale or 1.0)
        if gap <= _tolerance(network, first.dtype):
            return None
        return (
            f"features must give the same result for the same batch, got a relative difference of {gap:.1e} between "
            "two evaluations; put them in evaluation mode by features.eval(), or draw their noise from torch's default "
            "generator, which is seeded for each batch"
        )
    return None


def _hint(network: SplitNetwork) -> str:
    for name, module in network.features.named_modules():
        if module.training and isinstance(module, TRAINED_DIFFERENTLY):
            return (
                f"; the {type(module).__name__} {name!r} of features is in training mode, in which features depend on "
                "the batch and its number: call features.eval()"
            )
    return ""


def _numbers_of(rows: RowLosses) -> Float64[Tensor, " n"]:
    """Return a number per row, 0 for one that does not count; each part adds about 1, so that none hides others."""
    t = rows.tensors
    numbers = _direction_and_length(t.input) + torch.sin(t.row_weight.double())
    if t.indices is not None:
        # The sine of a large multiple separates neighbouring classes.
        places = torch.arange(1, t.indices.shape[1] + 1, device=numbers.device, dtype=torch.float64)
        numbers += torch.sin(12.9898 * (t.indices.double() + 1) * places).sum(-1)
    if t.target is not None and len(t.target) == len(numbers):
        numbers += _direction_and_length(t.target)
    return torch.where(t.row_weight == 0, 0.0, numbers).nan_to_num(0.0, 0.0, 0.0)


def _direction_and_length(vectors: Tensor) -> Float64[Tensor, " n"]:
    """Return ``v·r/‖v‖ + log ‖v‖`` with a random ``r``: a relative change of ``v`` changes it by about as much."""
    probe = torch.randn(vectors.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = probe.to(vectors.device)
    numbers = []
    for (part,) in split_rows(vectors):
        wide = part.double().nan_to_num(0.0, 0.0, 0.0)
        lengths = torch.linalg.vector_norm(wide, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        numbers.append(wide @ probe / lengths + lengths.log())
    return torch.cat(numbers)


def _tolerance(network: SplitNetwork, *more: torch.dtype) -> float:
    """Return a thousand times the rounding errors of features, which depend on the other rows of a batch."""
    kind = network.device.type
    dtypes = [*more, *(parameter.dtype for parameter in network.features.parameters())]
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=2.0**-23)
    return max(1e-9, min(0.05, 1e3 * eps))
