"""What a pass over a head's tiles is given: the loss as a description of plain values, and the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.losses.divergences import Divergence, ForwardKL, ReverseKL, jensen_shannon
from softcurve.losses.rows import LogitMap
from softcurve.processes import named_group

FAMILIES = ("cross_entropy", "forward", "reverse", "js")


@dataclass(frozen=True)
class HeadLoss:
    """A loss of a linear head; ``target`` says what its target tensors are.

    ``list``: ``k`` classes a row, and over them and the rest a coarse distribution ``(n, k + 1)``, as probabilities for
    the cross-entropy (``None``: all mass on the first of one) and as logits for a divergence.
    ``probabilities``, ``logits``: ``(n, C)``. ``teacher``: features, weight and bias of a head of its own.
    """

    family: str
    target: str
    beta: float = 0.5
    temperature: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    smoothing: float = 0.0
    # Where a head is sharded, ``weight`` has the classes from ``first`` on of ``classes`` in all, and so has a target.
    group: str | None = None  # of the processes, each with its shard
    first: int = 0
    classes: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(map(repr, FAMILIES))}, got {self.family!r}")

    @property
    def divergence(self) -> Divergence:
        """The divergence, where the family is one."""
        if self.family == "cross_entropy":
            raise ValueError("a cross-entropy has no divergence between two distributions by their logits")
        if self.family == "js":
            return jensen_shannon(self.beta)
        return ForwardKL() if self.family == "forward" else ReverseKL()

    @property
    def scale(self) -> float:
        """What the matrix product multiplies the logits by; a soft cap wants them as they are."""
        return 1.0 if self.softcap is not None else 1 / self.temperature

    @property
    def target_scale(self) -> float:
        """The same of the target's logits: a divergence tempers both sides."""
        return 1.0 if self.family == "cross_entropy" else 1 / self.temperature

    @property
    def processes(self) -> ProcessGroup | None:
        """Those that share the classes."""
        return None if self.group is None else named_group(self.group)

    def class_count(self, held: int) -> int:
        """``C``, of which this process has ``held``."""
        return held if self.group is None else self.classes

    def widest(self, held: int) -> int:
        """The classes of the process that has most: all plan the same tiles, since they meet in each."""
        processes = self.processes
        return held if processes is None else -(-self.classes // processes.size())

    @property
    def logit_map(self) -> LogitMap:
        """What is left of the map after the product."""
        return LogitMap() if self.softcap is None else LogitMap(self.temperature, self.softcap)


class HeadTensors(NamedTuple):
    """The tensors of a head's loss, rows flattened; the first six may receive gradients."""

    input: Tensor  # (n, d)
    weight: Tensor  # (C, d)
    bias: Tensor | None  # (C,)
    target: Tensor | None  # see HeadLoss
    target_weight: Tensor | None
    target_bias: Tensor | None
    indices: Tensor | None  # (n, k)
    row_weight: Tensor  # (n,)
    # (C,); or (2, C) where masked classes have no share of label smoothing: in the target's own mass, in the smoothing.
    class_weight: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: at least float32."""
        dtype = torch.promote_types(self.input.dtype, self.weight.dtype)
        if self.target is not None and self.indices is None:
            dtype = torch.promote_types(dtype, self.target.dtype)
        return torch.promote_types(dtype, torch.float32)


Directions = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Wanted = tuple[bool, bool, bool, bool, bool, bool]

NOTHING: Wanted = (False, False, False, False, False, False)
