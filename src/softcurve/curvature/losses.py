"""The loss whose second-order matrix is computed: the options of the public losses, kept for many batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from softcurve import checks
from softcurve.curvature.options import LossName, ReductionName
from softcurve.head.problem import HeadProblem, head_problem, require_budget, require_no_shift, require_shift
from softcurve.head.tensors import RowLosses
from softcurve.losses.divergences import CrossEntropy, Divergence, divergence_of
from softcurve.losses.reduction import Reduction as Reducer
from softcurve.losses.spec import LogitMap, LossSpec
from softcurve.losses.targets import Probabilities, Target
from softcurve.records import dataclass_repr
from softcurve.typing import Integer, Number


@dataclass(frozen=True, kw_only=True)
class HeadLosses:
    """A loss of features and a head, with the options of :func:`softcurve.linear_cross_entropy` and its divergences."""

    loss: LossName | Divergence = "cross_entropy"
    beta: Number = 0.5
    weight: Tensor | None = None
    ignore_index: Integer | None = None
    label_smoothing: Number = 0.0
    temperature: Number = 1.0
    softcap: Number | None = None
    z_loss: Number = 0.0
    shift: Integer = 0
    reduction: ReductionName = "mean"
    base: Number = math.e
    memory_budget: Integer | None = None

    __repr__ = dataclass_repr

    def __post_init__(self) -> None:
        divergence_of(self.loss, argument="loss")
        checks.require_choice("reduction", self.reduction, get_args(ReductionName))
        beta = checks.require_between("beta", self.beta, 0.0, 1.0)
        checks.require_between("label_smoothing", self.label_smoothing, 0.0, 1.0)
        checks.require_between("z_loss", self.z_loss, 0.0, math.inf)
        LogitMap.of(self.temperature, self.softcap)
        Reducer.of(self.reduction, self.base)
        if self.loss != "js" and beta != 0.5:
            raise ValueError(f"beta must not be given for loss={self.loss!r}, got {self.beta}")
        require_budget(self.memory_budget)
        require_shift(self.shift)
        if not self.is_cross_entropy:
            for name, neutral in {"weight": None, "ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0}.items():
                if (value := getattr(self, name)) is not neutral and value != neutral:
                    raise ValueError(f"{name} must not be given for loss={self.loss!r}, got {value}")
            require_no_shift(self.shift)

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the options of a cross-entropy apply."""
        return self.loss == "cross_entropy" or type(self.loss) is CrossEntropy

    @property
    def reducer(self) -> Reducer:
        """The reduction over rows, with its unit."""
        return Reducer.of(self.reduction, self.base)

    def problem(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | Target, sample_weight: Tensor | None
    ) -> HeadProblem:
        """The loss of a batch before the reduction; the errors are those of the public loss.

        A plain floating-point target is probabilities for every loss, because a data loader collates plain tensors.
        """
        if not self.is_cross_entropy and isinstance(target, Tensor) and target.is_floating_point():
            target = Probabilities(target)
        loss = LossSpec.of(
            divergence_of(self.loss, checks.require_between("beta", self.beta, 0.0, 1.0)), self.reducer,
            temperature=self.temperature, softcap=self.softcap, z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return head_problem(
            loss, input.detach(), weight.detach(), target, linear_bias=None if bias is None else bias.detach(),
            weight=self.weight, sample_weight=sample_weight, ignore_index=self.ignore_index,
            shift=require_shift(self.shift),
        )  # fmt: skip

    def rows(self, problem: HeadProblem) -> RowLosses:
        """The rows of a batch for the passes over tiles, weighted as in the sum over all rows, in units of ``base``."""
        tensors = problem.tensors((problem.weight / self.reducer.nats).detach())
        tensors = tensors._replace(
            **{name: value.detach() for name, value in tensors._asdict().items() if isinstance(value, Tensor)}
        )
        return RowLosses(problem.loss, tensors, problem.merges_tail, require_budget(self.memory_budget))
