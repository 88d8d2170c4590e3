"""A derivative along a weight as one in more features, whose columns of the weight are the direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softcurve.head.products import FACTORS, ClassRows, MapParts, columns_of


def of_classes(rows: ClassRows, of: MapParts) -> MapParts:
    """Return a teacher's tensors, or changes of them, with the weight's rows in the order of the classes."""
    factors = {name: getattr(of, name) for name in FACTORS}
    return of._replace(**{name: None if t is None else rows(t, slice(None)) for name, t in factors.items()})


def with_columns(of_head: Sequence[MapParts]) -> tuple[MapParts, MapParts]:
    """Return a head with its first change, of the weights, as low-rank columns, and its second as one of that head."""
    at, u, v = of_head
    of_bias = None if u.bias is None else u.bias.unsqueeze(-1)
    columns = [c for c in (u.weight, u.low_rank, of_bias) if c is not None]
    if not columns:
        return at, v
    more = (0, sum(c.shape[1] for c in columns))
    low_rank = torch.cat([*([] if at.low_rank is None else [at.low_rank]), *columns], -1)

    def padded(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.nn.functional.pad(tensor, more)

    return (
        at._replace(input=padded(at.input), low_rank=low_rank),
        v._replace(input=padded(v.input), low_rank=padded(v.low_rank)),
    )


def change_along(of_head: Sequence[MapParts], change: Tensor, gradient: Tensor) -> Tensor:
    """Return the part of one head from the change and the gradient in the features of :func:`_with_columns`."""
    at, u, v = of_head
    assert at.input is not None
    start = at.input.shape[1]
    total = change.new_zeros(len(change)) if u.input is None else (change[:, :start] * u.input).sum(-1)
    for name in FACTORS:
        moved = getattr(u, name)
        if moved is None:
            continue
        columns, features = slice(start, start + moved.shape[1]), columns_of(name, moved)
        total = total + (change[:, columns] * at.input[:, features]).sum(-1)
        if v.input is not None:
            total = total + (gradient[:, columns] * v.input[:, features]).sum(-1)
        start = columns.stop
    return total if u.bias is None else total + change[:, -1]
