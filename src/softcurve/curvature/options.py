"""Options that several public calls share: declared once, and spelled out in the signature of each call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeVar, cast

from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.losses.divergences import Divergence
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


class LossOptions(LikelihoodOptions, total=False):
    """The options of a loss by name; their defaults are those of :class:`softcurve.curvature.losses.HeadLosses`."""

    loss: LossName | Divergence
    beta: Number
    z_loss: Number
    reduction: ReductionName
    base: Number


class NetworkOptions(LossOptions, total=False):
    """The options of a matrix of a whole network over data, as :class:`softcurve.curvature.Hessian` describes them."""

    seed: int
    progress: bool
    process_group: ProcessGroup | None
    check_deterministic: bool


def with_options_of(source: Callable[..., Any], *, without: Sequence[str] = ()) -> Callable[[F], F]:
    """Give a function's ``**options`` the names and defaults of the keyword-only parameters of ``source``.

    ``inspect.signature`` shows them in place of ``**options``, and a call with any other name raises ``TypeError``.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        left_out = {each.name for each in own} | set(without)
        shared = [
            each
            for each in inspect.signature(source).parameters.values()
            if each.kind is inspect.Parameter.KEYWORD_ONLY and each.name not in left_out
        ]
        shown = signature.replace(parameters=[*own, *shared])

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in shown.parameters:
                    raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}")
            return function(*args, **kwargs)

        call.__signature__ = shown  # type: ignore[attr-defined]
        return cast("F", call)

    return decorate
