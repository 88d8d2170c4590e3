"""The loss whose second-order matrix is computed: the options of the public losses, kept for many batches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args

from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.head.problem import HeadProblem, head_problem, require_budget, require_no_shift, require_shift
from softcurve.head.tensors import RowLosses
from softcurve.linear import linear_cross_entropy
from softcurve.losses.class_map import GroupedTarget
from softcurve.losses.divergences import Divergence, divergence_of
from softcurve.losses.low_rank import LowRankWeight
from softcurve.losses.reduction import Reduction
from softcurve.losses.spec import LossSpec
from softcurve.losses.targets import Probabilities, Target
from softcurve.records import ShortRepr
from softcurve.typing import Integer, Number

LossName = Literal["cross_entropy", "forward_kl", "reverse_kl", "js"]
ReductionName = Literal["mean", "sum", "batchmean"]

F = TypeVar("F", bound=Callable[..., Any])


class LikelihoodOptions(TypedDict, total=False):
    """The options of a cross-entropy as a negative log-likelihood, in nats and summed over rows."""

    weight: Tensor | None
    ignore_index: Integer | None
    label_smoothing: Number
    temperature: Number
    softcap: Number | None
    shift: Integer
    memory_budget: Integer | None


class CrossEntropyOptions(LikelihoodOptions, total=False):
    """The options of a reduced cross-entropy."""

    z_loss: Number
    reduction: ReductionName
    base: Number


class LossOptions(CrossEntropyOptions, total=False):
    """The options of a loss by name; their defaults are those of :meth:`HeadLosses.of`."""

    loss: LossName | Divergence
    beta: Number


class NetworkOptions(LossOptions, total=False):
    """The options of a matrix of a whole network over data, as :class:`softcurve.curvature.Hessian` describes them."""

    seed: int
    progress: bool
    process_group: ProcessGroup | None
    check_deterministic: bool


def with_options_of(source: Callable[..., Any], *, without: Sequence[str] = ()) -> Callable[[F], F]:
    """Give a function's ``**options`` the names and defaults of the keyword-only parameters of ``source``.

    ``inspect.signature`` shows them in place of ``**options``. The function gets all of them in each call, and a call
    with any other name raises ``TypeError``.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = {n: each for n, each in signature.parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
        shared = {
            name: each
            for name, each in inspect.signature(source).parameters.items()
            if each.kind is inspect.Parameter.KEYWORD_ONLY and name not in {*own, *without}
        }
        defaults = {name: each.default for name, each in shared.items()}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if unknown := kwargs.keys() - own.keys() - shared.keys():
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {min(unknown)!r}")
            return function(*args, **defaults | kwargs)

        call.__signature__ = signature.replace(parameters=[*own.values(), *shared.values()])  # type: ignore[attr-defined]
        return cast("F", call)

    return decorate


@dataclass(frozen=True, eq=False, repr=False)
class HeadLosses(ShortRepr):
    """The losses of a head's rows, batch by batch, with the options of :func:`softcurve.linear_cross_entropy`."""

    loss: LossName | Divergence
    spec: LossSpec
    reducer: Reduction
    class_weight: Tensor | None
    ignore_index: Integer | None
    shift: int
    memory_budget: int | None

    @staticmethod
    @with_options_of(linear_cross_entropy, without=("linear_bias", "sample_weight", "exclude", "return_stats"))
    def of(
        *, loss: LossName | Divergence = "cross_entropy", beta: Number = 0.5, **options: Unpack[CrossEntropyOptions]
    ) -> HeadLosses:
        """Check the options of a public call; the errors are those of the public losses."""
        beta = checks.require_between("beta", beta, 0.0, 1.0)
        divergence = divergence_of(loss, beta, argument="loss")
        if loss != "js" and beta != 0.5:
            raise ValueError(f"beta must not be given for loss={loss!r}, got {beta}")
        checks.require_choice("reduction", options["reduction"], get_args(ReductionName))
        reducer = Reduction.of(options["reduction"], options["base"])
        spec = LossSpec.of(
            divergence, reducer, temperature=options["temperature"], softcap=options["softcap"],
            z_loss=options["z_loss"], label_smoothing=options["label_smoothing"],
        )  # fmt: skip
        weight, ignore_index, shift = options["weight"], options["ignore_index"], require_shift(options["shift"])
        if not spec.is_cross_entropy:
            require_no_shift(shift)
            given = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": spec.smoothing or None}
            for name, value in (given | {"z_loss": spec.z_loss or None}).items():
                if value is not None:
                    raise ValueError(f"{name} must not be given for loss={loss!r}, got {dict(options)[name]}")
        return HeadLosses(loss, spec, reducer, weight, ignore_index, shift, require_budget(options["memory_budget"]))

    def problem(
        self, input: Tensor, weight: Tensor | LowRankWeight, bias: Tensor | None, target: Tensor | Target,
        sample_weight: Tensor | None, exclude: Tensor | None = None,
    ) -> HeadProblem:  # fmt: skip
        """Return the loss of a batch before the reduction; the errors are those of the public loss.

        A plain floating-point target is probabilities for every loss, because a data loader collates plain tensors.
        """
        if isinstance(target, GroupedTarget):
            raise NotImplementedError(
                "target must be over the model's own classes for a curvature matrix, got one of a ClassMap; "
                "differentiate the gradient of a loss with create_graph=True for a Hessian product"
            )
        if not self.spec.is_cross_entropy and isinstance(target, Tensor) and target.is_floating_point():
            target = Probabilities(target)
        return head_problem(
            self.spec, input.detach(), weight.detach(), target, linear_bias=None if bias is None else bias.detach(),
            weight=self.class_weight, sample_weight=sample_weight, ignore_index=self.ignore_index, shift=self.shift,
            exclude=exclude,
        )  # fmt: skip

    def rows(self, problem: HeadProblem) -> RowLosses:
        """Return the rows of a batch for the passes over tiles, weighted as in the whole sum, in units of ``base``."""
        tensors = problem.tensors._replace(row_weight=problem.tensors.row_weight / self.reducer.nats)
        tensors = tensors._replace(**{n: each.detach() for n, each in tensors._asdict().items() if each is not None})
        return RowLosses(problem.loss, tensors, problem.merges_tail, self.memory_budget)
