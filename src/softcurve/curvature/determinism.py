"""A check that features and data are the same in each pass, as a matrix that is known by its products needs.

Two passes are compared by one number of each row, made of its features, target and weight: by the numbers in their
order, and by the numbers sorted, which tells rows in another order from other rows. Neither a loss nor a sum over rows
would do: at a head of zeros all losses are equal, and batch normalisation keeps sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from softcurve.array_types import Float64
from softcurve.curvature.kfac import pieces_of
from softcurve.head.tensors import RowLosses

if TYPE_CHECKING:
    from softcurve.curvature.network import NetworkOperator

__all__ = ["require_deterministic", "require_fixed_order"]

SKIP = "check_deterministic=False skips this check"
IN_MEMORY = (list, tuple)  # these types themselves, whose batches are the same objects in each pass
TRAINED_DIFFERENTLY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def require_deterministic(network: NetworkOperator, name: str, *, ordered: bool) -> None:
    """Compare two passes over the network's features and data; ``ordered``: rows must come in the same order too.

    Of batches in a list only the features can differ, and the first batch tells. ``name`` is the argument's.

    Raises:
        ValueError: features or data differ, in any of the processes that share them.
    """
    problem = _problem(network, name, ordered)
    found = network.over_everyone(float(problem is not None))
    if problem is None and found:
        problem = f"{name} and features must be the same in each pass, got others in another process; {SKIP}"
    if problem is not None:
        raise ValueError(problem)


def require_fixed_order(name: str, data: Iterable[Any]) -> None:
    """No loader with a sampler that is known to be random: a value of each row is then of no known row.

    Raises:
        ValueError: there is one, at any depth.
    """
    if (sampler := _random_sampler(data)) is not None:
        raise ValueError(
            f"{name} must give its rows in a fixed order, got a {type(data).__name__} with a {sampler}; build it with "
            f"shuffle=False and without a random sampler, or pass the batches as a list; {SKIP}"
        )


def _random_sampler(data: object) -> str | None:
    for attribute in ("sampler", "batch_sampler"):
        sampler = getattr(data, attribute, None)
        if sampler is None or isinstance(sampler, Tensor):
            continue
        if isinstance(sampler, RandomSampler | WeightedRandomSampler | SubsetRandomSampler):
            return type(sampler).__name__
        # DistributedSampler, and others that are like it: the same order each time, but not that of the data set.
        if isinstance(sampler, DistributedSampler) or hasattr(sampler, "shuffle"):
            if sampler.shuffle is True:
                return f"{type(sampler).__name__} that shuffles"
        elif (inner := _random_sampler(sampler)) is not None:
            return inner
    return None


def _problem(network: NetworkOperator, name: str, ordered: bool) -> str | None:
    """What is wrong, if anything."""
    data = network.data
    # Restored afterwards; within, the second pass does not see the first one's random numbers.
    with torch.random.fork_rng([]):
        if type(data) in IN_MEMORY:
            return _problem_of_features(network)
        tolerance = _tolerance(network)
        first, second = _numbers(network), _numbers(network)
        if len(first) != len(second):
            return (
                f"{name} must give the same rows in each pass, got {len(first)} rows and then {len(second)}; pass the "
                f"batches as a list, or build the loader without a random sampler and without drop_last; {SKIP}"
            )
        verdict, gap = _comparison(first, second, tolerance)
        if verdict == "same" or (verdict == "reordered" and not ordered):
            return None
        if verdict == "reordered":
            return (
                f"{name} must give its rows in a fixed order, got another one in the second pass; build the loader "
                f"with shuffle=False, or pass the batches as a list; {SKIP}"
            )
        return _problem_of_features(network) or (
            f"{name} must give the same rows in each pass, got rows that differ by {gap:.1e}; leave out random "
            f"augmentation and random sampling (shuffle=False), or pass the batches as a list{_hint(network)}; {SKIP}"
        )


def _problem_of_features(network: NetworkOperator) -> str | None:
    """Of two evaluations of the first batch."""
    module = network.features
    if type(module) is nn.Identity and not module._forward_hooks and not module._forward_pre_hooks:
        return None
    for batch in network.data:
        first, second = (network.features_of(batch, 0, graph=False).detach() for _ in range(2))
        gap = math.inf
        if first.shape == second.shape:
            scale = float(torch.linalg.vector_norm(first.double().nan_to_num(0.0, 0.0, 0.0))) or 1.0
            difference = (first.double() - second.double()).nan_to_num(0.0, 0.0, 0.0)
            gap = float(torch.linalg.vector_norm(difference)) / scale
        if gap <= _tolerance(network, first.dtype):
            return None
        return (
            f"features must give the same result for the same batch, got a relative difference of {gap:.1e} between "
            "two evaluations; put them in evaluation mode by features.eval(), or draw their noise from torch's default "
            f"generator, which is seeded for each batch; {SKIP}"
        )
    return None


def _hint(network: NetworkOperator) -> str:
    for name, module in network.features.named_modules():
        if module.training and isinstance(module, TRAINED_DIFFERENTLY):
            return (
                f"; the {type(module).__name__} {name!r} of features is in training mode, in which features depend on "
                "the batch and its number: call features.eval()"
            )
    return ""


# --- a number of each row --------------------------------------------------------------------------------------------


def _numbers(network: NetworkOperator) -> Float64[Tensor, " n"]:
    found = [_numbers_of(rows.losses).cpu() for rows in network.rows("Determinism check", graph=False)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _numbers_of(rows: RowLosses) -> Float64[Tensor, " n"]:
    """Each part contributes about 1, so that none hides changes of another; 0 of a row that does not count."""
    t = rows.tensors
    found = _direction_and_length(t.input) + torch.sin(t.row_weight.double())
    if t.indices is not None:
        # The sine of a large multiple tells neighbouring classes apart.
        places = torch.arange(1, t.indices.shape[1] + 1, device=found.device, dtype=torch.float64)
        found += torch.sin(12.9898 * (t.indices.double() + 1) * places).sum(-1)
    if t.target is not None and len(t.target) == len(found):
        found += _direction_and_length(t.target)
    return torch.where(t.row_weight == 0, 0.0, found).nan_to_num(0.0, 0.0, 0.0)


def _direction_and_length(vectors: Tensor) -> Float64[Tensor, " n"]:
    """``v·r/‖v‖ + log ‖v‖`` with a random ``r``: a relative change of ``v`` changes it by about as much."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(vectors.shape[1], generator=generator, dtype=torch.float64).to(vectors.device)
    found = []
    for part in vectors.split(pieces_of(vectors)):
        wide = part.double().nan_to_num(0.0, 0.0, 0.0)
        lengths = torch.linalg.vector_norm(wide, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        found.append(wide @ probe / lengths + lengths.log())
    return torch.cat(found)


def _comparison(
    first: Float64[Tensor, " n"], second: Float64[Tensor, " n"], tolerance: float
) -> tuple[Literal["same", "reordered", "different"], float]:
    """And by how much the sorted numbers differ."""
    if len(first) == 0 or float((first - second).abs().max()) <= tolerance:
        return "same", 0.0
    gap = float((first.sort().values - second.sort().values).abs().max())
    return ("reordered" if gap <= tolerance else "different"), gap


def _tolerance(network: NetworkOperator, *more: torch.dtype) -> float:
    """Rounding errors of features that are computed in batches of other rows, a thousand times over."""
    kind = network.device.type
    dtypes = [*more, *(parameter.dtype for parameter in network.features.parameters())]
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=2.0**-23)
    return max(1e-9, min(0.05, 1e3 * eps))
