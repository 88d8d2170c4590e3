"""Which rows curve the objective so little, all of them together, that products may pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from softcurve.array_types import Float64, Int64
from softcurve.fit.group import Group

__all__ = ["settled_rows"]

# Places that are looked at together in a search over all processes' rows.
BRANCHES = 256


def settled_rows(
    curving: Float64[Tensor, " rows"],
    most: float,
    of_logits: Float64[Tensor, " rows"],
    share: float,
    together: Group,
) -> tuple[Int64[Tensor, " settled"], int]:
    """The rows that curve least, with a sum of at most ``most``, and of ``of_logits`` at most that share of all.

    Equals ``order[: count]`` with ``order = curving.argsort()`` and the largest ``count`` that keeps to both. Also how
    many they are in all processes; there, of rows that curve equally, all are taken or none.
    """
    order = curving.argsort()
    curves, logits = curving[order].cumsum(0), of_logits[order].cumsum(0)
    if together.size == 1:
        count = int(((curves <= most) & (logits <= share * of_logits.sum())).sum())
        return order[:count], count
    none = curves.new_zeros(1)
    curves, logits, ranks = torch.cat([none, curves]), torch.cat([none, logits]), _ranks(curving[order])
    total = torch.cat([none, logits[-1:]])[1:].clone()
    with together.summed(total):
        pass
    # Rows below ``low`` may be left out, those below ``high`` may not.
    low, high, found = 0, 2**63 - 1, 0
    while high - low > 1:
        places = torch.tensor(sorted({low + (high - low) * i // BRANCHES for i in range(1, BRANCHES)} - {low}))
        at = torch.searchsorted(ranks, places)
        sums = torch.stack([curves[at], logits[at], at.double()])
        with together.summed(sums):
            pass
        within = int(((sums[0] <= most) & (sums[1] <= share * total)).sum())
        if within:
            low, found = int(places[within - 1]), int(sums[2, within - 1])
        if within < len(places):
            high = int(places[within])
    return order[: int(torch.searchsorted(ranks, low))], found


def _ranks(sorted_values: Float64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    """Integers in the order of numbers of 0 or more: their bits. ``-0.0`` would be the least of all."""
    return (sorted_values + 0.0).view(torch.int64)
