"""The figures of a head on rows, in a record and in a table."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

__all__ = ["HasFigures", "figure_lines", "figures"]


@runtime_checkable
class HasFigures(Protocol):
    """Means over rows, in nats."""

    @property
    def loss(self) -> float:
        """What was fitted."""

    @property
    def accuracy(self) -> float:
        """The share of rows whose most probable class is predicted."""

    @property
    def kl(self) -> float | None:
        """D(target‖model), for targets that are not labels."""


def figures(side: str, scores: HasFigures) -> dict[str, Any]:
    """The entries of a record; ``side`` stands before each name."""
    return {
        f"{side}loss_nats": scores.loss,
        f"{side}loss_bits": scores.loss / math.log(2.0),
        f"{side}accuracy": scores.accuracy,
        f"{side}kl_nats": scores.kl,
    }


def figure_lines(label: str, side: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of a table, from the entries of ``figures``; ``label`` stands before each."""
    lines = [
        (f"{label}loss", f"{record[f'{side}loss_nats']:.6f} nats = {record[f'{side}loss_bits']:.6f} bits"),
        (f"{label}accuracy", f"{record[f'{side}accuracy']:.4f}"),
    ]
    if record[f"{side}kl_nats"] is not None:
        lines.append((f"{label}KL(target||model)", f"{record[f'{side}kl_nats']:.6f} nats"))
    return lines
