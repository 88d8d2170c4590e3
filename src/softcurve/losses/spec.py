"""The one description of a loss, from the public call to the kernels: which divergence, on which map of the logits.

A :class:`LossSpec` is frozen and hashable, and it is encoded as one string where only plain values may pass: the custom
operators of :mod:`softcurve.head.operators`.
"""

from __future__ import annotations

import functools
import math
from ast import literal_eval
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Float, Rows, Values
from softcurve.losses.divergences import CrossEntropy, Divergence
from softcurve.losses.reduction import Reduction
from softcurve.processes import named_group
from softcurve.typing import Number

TargetForm = Literal["sparse", "probabilities", "logits", "teacher"]


@dataclass(frozen=True)
class LogitMap:
    """The map ``κ tanh(z/κ) / T`` of the logits; a masked class (−inf) stays masked, ``softcap=None`` is no cap."""

    temperature: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(temperature: Number = 1.0, softcap: Number | None = None) -> LogitMap:
        """Make the map from the numbers of a public call."""
        return LogitMap(
            checks.require_positive("temperature", temperature),
            None if softcap is None else checks.require_positive("softcap", softcap),
        )

    @property
    def is_identity(self) -> bool:
        """Whether the map changes nothing."""
        return self.softcap is None and self.temperature == 1

    def value(self, z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return ``m(z)``."""
        if self.softcap is not None:
            z = torch.where(z == -math.inf, z, self.softcap * torch.tanh(z / self.softcap))
        return z if self.temperature == 1 else z / self.temperature

    def shifted_value(self, z: Rows) -> tuple[Rows, Values | float]:
        """Return ``m(z)`` less a constant of each row, which no softmax sees, and the constant.

        Unless ``T`` is a power of two, the largest logit is subtracted before the division by ``T``, which would
        otherwise round at the size of a common offset.
        """
        if self.softcap is not None or math.frexp(self.temperature)[0] == 0.5:
            return self.value(z), 0.0
        top = z.detach().amax(-1, keepdim=True)
        top = torch.where(top == -math.inf, 0.0, top)
        return (z - top) / self.temperature, top.squeeze(-1) / self.temperature

    def slope(self, z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return ``m′(z) = (1 − tanh²(z/κ)) / T`` as ``4 e / (T (1 + e)²)``, ``e = e^{−2|z|/κ}``: nothing cancels."""
        if self.softcap is None:
            return torch.full_like(z, 1 / self.temperature)
        e = torch.exp(-2 * (z / self.softcap).abs())
        return 4 * e / ((1 + e).square() * self.temperature)

    def bend_ratio(self, z: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return ``m″/m′ = −(2/κ) tanh(z/κ)`` of a soft cap."""
        assert self.softcap is not None
        return (-2 / self.softcap) * torch.tanh(z / self.softcap)


@dataclass(frozen=True)
class LossSpec:
    """A loss of softmax rows; ``target`` says what its target tensors hold.

    ``sparse``: ``k`` classes a row, and a distribution ``(n, k + 1)`` over them and all other classes together, as
    probabilities for a cross-entropy (``None``: all mass on the first of one) and as logits for any other divergence.
    ``probabilities``, ``logits``: ``(n, C)``. ``teacher``: features, weight and bias of a second head.

    """

    divergence: Divergence
    target: TargetForm
    temperature: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    smoothing: float = 0.0
    # A sharded head holds the classes from ``first`` on of ``classes`` in all; ``group`` names the processes.
    group: str | None = None
    first: int = 0
    classes: int = 0
    # Row i and class i are a pair, whose loss is the mean of the row's and of the column's cross-entropy.
    pairs: bool = False

    @staticmethod
    def of(
        divergence: Divergence, reduction: Reduction, temperature: Number = 1.0, softcap: Number | None = None,
        z_loss: Number = 0.0, label_smoothing: Number = 0.0,
    ) -> LossSpec:  # fmt: skip
        """Check the numbers of a public call; its z-loss stays in squared nats in every unit of the ``reduction``."""
        logit_map = LogitMap.of(temperature, softcap)
        z_loss = checks.require_between("z_loss", z_loss, 0.0, math.inf) * reduction.nats
        smoothing = checks.require_between("label_smoothing", label_smoothing, 0.0, 1.0)
        return LossSpec(divergence, "logits", logit_map.temperature, logit_map.softcap, z_loss, smoothing)

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the target is probabilities, on which smoothing and class weights act, rather than logits."""
        return type(self.divergence) is CrossEntropy

    @property
    def scale(self) -> float:
        """The factor that the matrix product applies to the logits; with a soft cap it is 1."""
        return 1.0 if self.softcap is not None else 1 / self.temperature

    @property
    def target_scale(self) -> float:
        """The factor of the target's logits: a divergence applies the temperature to both sides."""
        return 1.0 if self.is_cross_entropy else 1 / self.temperature

    @functools.cached_property
    def logit_map(self) -> LogitMap:
        """The map of the logits that remains after the product."""
        return LogitMap() if self.softcap is None else LogitMap(self.temperature, self.softcap)

    @property
    def processes(self) -> ProcessGroup | None:
        """The processes that share the classes, or ``None``."""
        return None if self.group is None else named_group(self.group)

    def class_count(self, held: int) -> int:
        """Return ``C``, the number of classes of all processes, of which this process holds ``held``."""
        return held if self.group is None else self.classes

    def widest(self, held: int) -> int:
        """Return the largest number of classes of a process: all plan the same tiles, which exchange messages."""
        processes = self.processes
        return held if processes is None else -(-self.classes // processes.size())

    def encode(self) -> str:
        """Return a string from which :meth:`decode` makes an equal description."""
        options = f"{self.temperature!r}|{self.softcap!r}|{self.z_loss!r}|{self.smoothing!r}"
        shard = f"{self.group!r}|{self.first}|{self.classes}|{self.pairs}"
        return f"{self.target}|{options}|{shard}|{self.divergence.encode()}"

    @staticmethod
    @functools.lru_cache(256)
    def decode(text: str) -> LossSpec:
        """Return the description that :meth:`encode` wrote."""
        target, *options, divergence = text.split("|", 9)
        values = map(literal_eval, options)
        return LossSpec(Divergence.decode(divergence), target, *values)  # type: ignore[arg-type]
