"""The one description of a loss, from the public call to the kernels: which divergence, on which map of the logits.

A :class:`LossSpec` is frozen and hashable, and it is encoded as one string where only plain values may pass: the custom
operators of :mod:`softcurve.head.operators`.
"""

from __future__ import annotations

import functools
import math
from ast import literal_eval
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Float, Rows, Values
from softcurve.losses.divergences import CrossEntropy, Divergence
from softcurve.losses.reduction import Reduction
from softcurve.processes import named_group, part_of
from softcurve.records import short_repr
from softcurve.typing import Number

TargetForm = Literal["sparse", "statistics", "probabilities", "logits", "teacher"]


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

    @staticmethod
    def of_scaled(scale: float, softcap: float | None, temperature: float = 1.0) -> LogitMap:
        """Return ``κ tanh(s z/κ) / T``, which is the map of soft cap ``κ/s`` and temperature ``T/s``."""
        return LogitMap(temperature / scale, None if softcap is None else softcap / scale)

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


class Beside(NamedTuple):
    """The terms beside a divergence, of the model at temperature 1; see :func:`softcurve.linear_distillation`."""

    divergence: float  # the factors of the divergence, of the cross-entropy of labels and of the entropy, with −1
    labels: float
    entropy: float
    smoothing: float = 0.0  # of the labels
    z_loss: float = 0.0
    target: TargetForm = "sparse"  # of the labels: class indices and lists, or soft labels for every class


@dataclass(frozen=True, repr=False)
class LossSpec:
    """A loss of softmax rows; ``target`` says what its target tensors hold.

    ``sparse``: ``k`` classes a row, and a distribution ``(n, k + 1)`` over them and all other classes together, as
    probabilities for a cross-entropy (``None``: all mass on the first of one) and as logits for any other divergence.
    ``statistics``: ``k`` classes a row, and ``(n, k + 4)`` coefficients of statistics of the softmax, of which the loss
    is the combination; see :mod:`softcurve.head.statistics`.
    ``probabilities``, ``logits``: ``(n, C)``. ``teacher``: features, weight and bias of a second head, whose logits
    have a scale and a soft cap of their own.
    """

    divergence: Divergence
    target: TargetForm
    temperature: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    smoothing: float = 0.0
    beside: Beside | None = None
    # A sharded head holds the classes from ``first`` on of ``classes`` in all; ``group`` names the processes.
    group: str | None = None
    first: int = 0
    classes: int = 0
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    # Row i and class i are a pair, whose loss is the mean of the row's and of the column's cross-entropy.
    pairs: bool = False
    groups: int = 0  # into which the classes of both sides are merged before they are compared; 0: as they are
    cuts_target: bool = False  # whether the target of groups has its classes over the processes, rather than on each

    def __repr__(self) -> str:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return short_repr(self, {name: v for name, v in values.items() if v != getattr(LossSpec, name, ...)})

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

    def of_statistics(self) -> LossSpec:
        """Return the description of the statistics of the softmax that this loss sees."""
        temperature = self.temperature if self.beside is None else 1.0
        return LossSpec(
            CrossEntropy(), "statistics", temperature, self.softcap, group=self.group, first=self.first,
            classes=self.classes,
        )  # fmt: skip

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the target is probabilities, on which smoothing and class weights act, rather than logits."""
        return type(self.divergence) is CrossEntropy

    @property
    def lists_classes(self) -> bool:
        """Whether the target names some classes of each row, rather than giving a number for every class."""
        return self.target in ("sparse", "statistics")

    @property
    def compares_every_class(self) -> bool:
        """Whether a term has a number of its target for every class, so that its sums end with the residuals."""
        return not self.lists_classes or (self.beside is not None and self.beside.target != "sparse")

    @property
    def smooths_labels(self) -> bool:
        """Whether a term has label smoothing."""
        return bool(self.smoothing or (self.beside is not None and self.beside.smoothing))

    @property
    def scale(self) -> float:
        """The factor that the matrix product applies to the logits; with a soft cap it is 1."""
        return 1.0 if self.softcap is not None else 1 / self.temperature

    @property
    def target_scale(self) -> float:
        """The factor of the target's logits before a soft cap; see :attr:`teacher_map`."""
        return 1.0 if self.teacher_softcap is not None else self.teacher_scale / self._target_temperature

    @property
    def _target_temperature(self) -> float:
        """The temperature of the target: a divergence applies it to both sides."""
        return 1.0 if self.is_cross_entropy else self.temperature

    @functools.cached_property
    def teacher_map(self) -> LogitMap:
        """The map of a teacher's logits that remains after the product: its soft cap, scale and temperature."""
        if self.teacher_softcap is None:
            return LogitMap()
        return LogitMap.of_scaled(self.teacher_scale, self.teacher_softcap, self._target_temperature)

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
        return held if self.group is None else self.widest_part(self.classes)

    def widest_part(self, classes: int) -> int:
        """Return the largest number of ``classes`` that a process holds; see :meth:`part`."""
        processes = self.processes
        return classes if processes is None else part_of(classes, 0, processes.size()).stop

    def part(self, classes: int) -> slice:
        """Return which of ``classes`` this process holds, if they are sharded like those of the head."""
        processes = self.processes
        return slice(0, classes) if processes is None else part_of(classes, processes.rank(), processes.size())

    def encode(self) -> str:
        """Return a string from which :meth:`decode` makes an equal description."""
        # One number at a time: torch.compile formats a number that it traces, but no container of them.
        terms = "" if self.beside is None else ",".join([f"{number!r}" for number in self.beside])
        options = f"{self.temperature!r}|{self.softcap!r}|{self.z_loss!r}|{self.smoothing!r}|({terms})"
        shard = f"{self.group!r}|{self.first!r}|{self.classes!r}"
        others = f"{self.teacher_scale!r}|{self.teacher_softcap!r}|{self.pairs!r}|{self.groups!r}"
        others = f"{others}|{self.cuts_target!r}"
        return f"{self.target}|{options}|{shard}|{others}|{self.divergence.encode()}"

    @staticmethod
    @functools.lru_cache(256)
    def decode(text: str) -> LossSpec:
        """Return the description that :meth:`encode` wrote."""
        target, *options, divergence = text.split("|", 14)
        values = list(map(literal_eval, options))
        values[4] = Beside(*values[4]) if values[4] else None
        return LossSpec(Divergence.decode(divergence), target, *values)  # type: ignore[arg-type]
