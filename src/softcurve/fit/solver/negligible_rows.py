"""Which rows have so little curvature, all of them together, that products with the curvature may leave them out."""

from __future__ import annotations

import torch
from torch import Tensor

from softcurve.array_types import Float64, Int64
from softcurve.fit.group import Group

__all__ = ["negligible_rows"]

BRANCHES = 256  # candidates that one message compares in the search over the rows of all processes


def negligible_rows(
    curvatures: Float64[Tensor, " rows"],
    most: float,
    logit_curvatures: Float64[Tensor, " rows"],
    share: float,
    group: Group,
) -> tuple[Int64[Tensor, " negligible"], int]:
    """Return the rows of least curvature, and their number in all processes.

    Their curvatures sum to at most ``most``, their logit curvatures to at most this share of the sum over all rows.
    They are ``order[:count]`` with ``order = curvatures.argsort()`` and the largest such count. In several processes,
    all or none are taken of rows with equal curvatures.
    """
    order = curvatures.argsort()
    sums, logit_sums = curvatures[order].cumsum(0), logit_curvatures[order].cumsum(0)
    if group.size == 1:
        count = int(((sums <= most) & (logit_sums <= share * logit_curvatures.sum())).sum())
        return order[:count], count
    # The bits of numbers that are not negative, as integers, are in the order of the numbers. -0.0 would be the least.
    keys = (curvatures[order] + 0.0).view(torch.int64)
    zero = sums.new_zeros(1)
    sums, logit_sums = torch.cat([zero, sums]), torch.cat([zero, logit_sums])
    total = logit_sums[-1:].clone()
    with group.summed(total):
        pass
    # Rows with a key below ``low`` are negligible, those below ``high`` together are not.
    low, high, count = 0, 2**63 - 1, 0
    while high - low > 1:
        candidates = torch.tensor(sorted({low + (high - low) * i // BRANCHES for i in range(1, BRANCHES)} - {low}))
        places = torch.searchsorted(keys, candidates)
        at = torch.stack([sums[places], logit_sums[places], places.double()])
        with group.summed(at):
            pass
        within = int(((at[0] <= most) & (at[1] <= share * total)).sum())
        if within:
            low, count = int(candidates[within - 1]), int(at[2, within - 1])
        if within < len(candidates):
            high = int(candidates[within])
    return order[: int(torch.searchsorted(keys, low))], count
