"""The public losses as modules, which store the options of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve import checks, contrastive, functional, linear
from softcurve.array_types import Float, Values
from softcurve.head.problem import require_budget, require_shift
from softcurve.head.row_statistics import LossStats
from softcurve.losses.divergences import Divergence, divergence_of
from softcurve.losses.labels import resolve_ignore_index
from softcurve.losses.reduction import REDUCTIONS
from softcurve.losses.targets import Target
from softcurve.typing import Integer, KLDirection, Number, ReductionKind

__all__ = [
    "ContrastiveLoss", "CrossEntropyLoss", "DivergenceLoss", "JSDivergenceLoss", "KLDivergenceLoss",
    "LinearCrossEntropyLoss", "LinearDistillationLoss", "LinearDivergenceLoss", "LinearJSDivergenceLoss",
    "LinearKLDivergenceLoss",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


# The options of all losses; each check returns a Python value.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "alpha": lambda alpha: checks.require_between("alpha", alpha, 0.0, 1.0),
    "base": checks.require_base,
    "beta": lambda beta: checks.require_between("beta", beta, 0.0, 1.0),
    "dim": checks.require_dim,
    "direction": lambda direction: checks.require_choice("direction", direction, ("forward", "reverse")),
    "divergence": divergence_of,
    "entropy_bonus": lambda bonus: checks.require_between("entropy_bonus", bonus, 0.0, math.inf),
    "ignore_index": lambda index: None if index is None else resolve_ignore_index(index),
    "label_smoothing": lambda smoothing: checks.require_between("label_smoothing", smoothing, 0.0, 1.0),
    "memory_budget": require_budget,
    "reduction": lambda reduction: checks.require_choice("reduction", reduction, REDUCTIONS),
    "shift": require_shift,
    "softcap": lambda softcap: None if softcap is None else checks.require_positive("softcap", softcap),
    "temperature": lambda temperature: checks.require_positive("temperature", temperature),
    "z_loss": lambda z_loss: checks.require_between("z_loss", z_loss, 0.0, math.inf),
}


# torch types the call of a module as Any. Under TYPE_CHECKING a call has the types of forward.


class _Loss(torch.nn.Module):
    """Base class of the losses: a function, and its options, which are checked once and kept as Python values.

    A subclass passes the local variables of its ``__init__``, among which the options are those named in ``_CHECKS``.
    """

    _function: ClassVar[Callable[..., Any]]

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.options = {name: _CHECKS[name](value) for name, value in arguments.items() if name in _CHECKS}

    def extra_repr(self) -> str:
        """Return the options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CrossEntropyLoss(_Loss):
    """:func:`softcurve.cross_entropy` with fixed options; ``weight`` is a buffer, as in torch."""

    weight: Tensor | None

    def __init__(
        self, weight: Float[Tensor, " classes"] | None = None, *, ignore_index: Integer | None = -100,
        label_smoothing: Number = 0.0, temperature: Number = 1.0, softcap: Number | None = None, z_loss: Number = 0.0,
        reduction: ReductionKind = "mean", base: Number = math.e, dim: Integer = -1,
    ) -> None:  # fmt: skip
        super().__init__(locals())
        self.register_buffer("weight", weight)

    def forward(
        self, logits: Float[Tensor, "*any"], target: Tensor | Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> linear.Loss:  # fmt: skip
        """See :func:`softcurve.cross_entropy`."""
        return functional.cross_entropy(
            logits, target, weight=self.weight, sample_weight=sample_weight, exclude=exclude, **self.options
        )

    if TYPE_CHECKING:
        __call__ = forward


class _DivergenceLoss(_Loss):
    """Base class of the divergences between two distributions."""

    def forward(
        self, p: Tensor | Target, q: Tensor | Target, *, sample_weight: Values | None = None,
        exclude: Tensor | None = None,
    ) -> linear.Loss:  # fmt: skip
        """Return the divergence from target ``p`` to model ``q``; see the function of the class."""
        loss: Tensor = type(self)._function(p, q, sample_weight=sample_weight, exclude=exclude, **self.options)
        return loss

    if TYPE_CHECKING:
        __call__ = forward


class KLDivergenceLoss(_DivergenceLoss):
    """:func:`softcurve.kl_divergence` with fixed options."""

    _function = functional.kl_divergence

    def __init__(
        self, *, temperature: Number = 1.0, reduction: ReductionKind = "mean", base: Number = math.e, dim: Integer = -1
    ) -> None:
        super().__init__(locals())


class JSDivergenceLoss(_DivergenceLoss):
    """:func:`softcurve.js_divergence` with fixed options."""

    _function = functional.js_divergence

    def __init__(
        self, *, beta: Number = 0.5, temperature: Number = 1.0, reduction: ReductionKind = "mean",
        base: Number = math.e, dim: Integer = -1,
    ) -> None:  # fmt: skip
        super().__init__(locals())


class DivergenceLoss(_DivergenceLoss):
    """:func:`softcurve.divergence` with a fixed ``divergence`` and options; ``p`` is the target, ``q`` the logits.

    Example:
        >>> loss = softcurve.nn.DivergenceLoss(softcurve.AlphaDivergence(0.5))
        >>> value = loss(softcurve.Probabilities(torch.tensor([[0.7, 0.3]])), torch.zeros(1, 2))
    """

    _function = functional.divergence

    def __init__(
        self, divergence: Divergence, *, temperature: Number = 1.0, reduction: ReductionKind = "mean",
        base: Number = math.e, dim: Integer = -1,
    ) -> None:  # fmt: skip
        super().__init__(locals())


class _LinearLoss(_Loss):
    """Base class of the losses that contain their head as the submodule ``linear``."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        self.num_classes: int = arguments["num_classes"]
        self.out_features: tuple[int, ...] = arguments.get("out_features", ())
        rows = self.num_classes * math.prod(self.out_features)
        factory = {name: arguments[name] for name in ("bias", "device", "dtype")}
        self.linear = torch.nn.Linear(arguments["in_features"], rows, **factory)

    # fmt: off
    @overload
    def forward(
        self, input: linear.Features, target: Tensor | Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, return_stats: Literal[False] = False,
    ) -> linear.Loss: ...
    @overload
    def forward(
        self, input: linear.Features, target: Tensor | Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, return_stats: Literal[True],
    ) -> tuple[linear.Loss, LossStats]: ...
    @overload
    def forward(
        self, input: linear.Features, target: Tensor | Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, return_stats: bool,
    ) -> linear.Loss | tuple[linear.Loss, LossStats]: ...
    def forward(
        self, input: linear.Features, target: Tensor | Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, return_stats: bool = False,
    ) -> linear.Loss | tuple[linear.Loss, LossStats]:
        # fmt: on
        """Return the loss, and :class:`~softcurve.LossStats` if ``return_stats``; see the function of the class."""
        bias, shape = self.linear.bias, (self.num_classes, *self.out_features)
        weight = {"weight": self.weight} if "weight" in self._buffers else {}
        result: Tensor | tuple[Tensor, LossStats] = type(self)._function(
            input, self.linear.weight.reshape(*shape, -1), target,
            linear_bias=None if bias is None else bias.reshape(shape), sample_weight=sample_weight,
            exclude=exclude, return_stats=return_stats, **weight, **self.options,
        )  # fmt: skip
        return result

    if TYPE_CHECKING:
        __call__ = forward


class LinearCrossEntropyLoss(_LinearLoss):
    """:func:`softcurve.linear_cross_entropy` with a head ``linear``; replaces ``torch.nn.LinearCrossEntropyLoss``.

    Names, defaults and state-dict keys are torch's. Tie an embedding by ``module.linear.weight = embedding.weight``.
    """

    _function = linear.linear_cross_entropy
    weight: Tensor | None

    def __init__(
        self, in_features: int, num_classes: int, *, out_features: tuple[int, ...] = (), bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, reduction: ReductionKind = "mean",
        weight: Float[Tensor, " classes"] | None = None, ignore_index: Integer | None = None,
        label_smoothing: Number = 0.0, temperature: Number = 1.0, softcap: Number | None = None, z_loss: Number = 0.0,
        base: Number = math.e, shift: Integer = 0, memory_budget: Integer | None = None,
    ) -> None:  # fmt: skip
        if weight is not None:
            checks.require_class_weight(weight, num_classes)
        super().__init__(locals())
        self.register_buffer("weight", weight)

    @property
    def reduction(self) -> str:
        """The reduction, as in torch's module."""
        return str(self.options["reduction"])

    @property
    def ignore_index(self) -> int | None:
        """The class index of rows that do not contribute to the loss."""
        ignored: int | None = self.options["ignore_index"]
        return ignored

    @property
    def label_smoothing(self) -> float:
        """The label smoothing ``ε``."""
        return float(self.options["label_smoothing"])

    def extra_repr(self) -> str:
        """Return the options, with the positions if there are more than one."""
        return (f"out_features={self.out_features}, " if self.out_features else "") + super().extra_repr()


class LinearKLDivergenceLoss(_LinearLoss):
    """:func:`softcurve.linear_kl_divergence` with a head ``linear``."""

    _function = linear.linear_kl_divergence

    def __init__(
        self, in_features: int, num_classes: int, *, bias: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, direction: KLDirection = "forward", temperature: Number = 1.0,
        softcap: Number | None = None, reduction: ReductionKind = "mean", base: Number = math.e,
        memory_budget: Integer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())


class LinearJSDivergenceLoss(_LinearLoss):
    """:func:`softcurve.linear_js_divergence` with a head ``linear``."""

    _function = linear.linear_js_divergence

    def __init__(
        self, in_features: int, num_classes: int, *, beta: Number = 0.5, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, temperature: Number = 1.0,
        softcap: Number | None = None, reduction: ReductionKind = "mean", base: Number = math.e,
        memory_budget: Integer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())


class LinearDivergenceLoss(_LinearLoss):
    """:func:`softcurve.linear_divergence` with a fixed ``divergence`` and a head ``linear``.

    Example:
        >>> loss = softcurve.nn.LinearDivergenceLoss(4, 5, divergence=softcurve.SkewKL(0.1))
        >>> value = loss(torch.randn(3, 4), softcurve.Logits(torch.randn(3, 5)))
    """

    _function = linear.linear_divergence

    def __init__(
        self, in_features: int, num_classes: int, *, divergence: Divergence, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, temperature: Number = 1.0,
        softcap: Number | None = None, reduction: ReductionKind = "mean", base: Number = math.e,
        memory_budget: Integer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(locals())


class LinearDistillationLoss(_LinearLoss):
    """:func:`softcurve.linear_distillation` with a head ``linear``, that of the student.

    Example:
        >>> loss = softcurve.nn.LinearDistillationLoss(4, 5, alpha=0.5, temperature=2.0)
        >>> value = loss(torch.randn(3, 4), torch.tensor([0, 4, 2]), softcurve.Logits(torch.randn(3, 5)))
    """

    weight: Tensor | None

    def __init__(
        self, in_features: int, num_classes: int, *, alpha: Number, divergence: Divergence = linear.FORWARD_KL,
        bias: bool = False, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        temperature: Number = 1.0, entropy_bonus: Number = 0.0, ignore_index: Integer | None = None,
        label_smoothing: Number = 0.0, softcap: Number | None = None, z_loss: Number = 0.0,
        weight: Float[Tensor, " classes"] | None = None, reduction: ReductionKind = "mean", base: Number = math.e,
        shift: Integer = 0, memory_budget: Integer | None = None,
    ) -> None:  # fmt: skip
        if weight is not None:
            checks.require_class_weight(weight, num_classes)
        super().__init__(locals())
        self.register_buffer("weight", weight)

    # fmt: off
    @overload  # type: ignore[override]
    def forward(
        self, input: linear.Features, target: Tensor | Target, teacher: Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, return_stats: Literal[False] = False,
    ) -> linear.Loss: ...
    @overload
    def forward(
        self, input: linear.Features, target: Tensor | Target, teacher: Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, return_stats: Literal[True],
    ) -> tuple[linear.Loss, LossStats]: ...
    @overload
    def forward(
        self, input: linear.Features, target: Tensor | Target, teacher: Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, return_stats: bool,
    ) -> linear.Loss | tuple[linear.Loss, LossStats]: ...
    def forward(
        self, input: linear.Features, target: Tensor | Target, teacher: Target, *, sample_weight: Tensor | None = None,
        exclude: Tensor | None = None, return_stats: bool = False,
    ) -> linear.Loss | tuple[linear.Loss, LossStats]:
        # fmt: on
        """Return the loss of the labels ``target`` and of the ``teacher``; see the function of the class."""
        return linear.linear_distillation(
            input, self.linear.weight, target, teacher, linear_bias=self.linear.bias, weight=self.weight,
            sample_weight=sample_weight, exclude=exclude, return_stats=return_stats, **self.options,
        )  # fmt: skip

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]


class ContrastiveLoss(torch.nn.Module):
    """:func:`softcurve.contrastive_loss` with fixed options and a scale that may be learned.

    Args:
        scale: The initial scale of the similarities; CLIP's by default.
        learnable_scale: Whether the logarithm of the scale is the parameter ``log_scale``, as in CLIP.
        max_scale: The largest scale; a call in training mode clamps the parameter, as open_clip does after each step.

    The other arguments are those of the function.

    Example:
        >>> loss = softcurve.nn.ContrastiveLoss()
        >>> value = loss(torch.randn(8, 4), torch.randn(8, 4))
    """

    log_scale: torch.nn.Parameter | None

    def __init__(
        self, scale: Number = contrastive.CLIP_SCALE, *, learnable_scale: bool = True, max_scale: Number = 100.0,
        symmetric: bool = True, normalize: bool = True, reduction: ReductionKind = "mean",
        memory_budget: Integer | None = None, process_group: ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.initial_scale = checks.require_positive("scale", scale)
        self.max_scale = checks.require_positive("max_scale", max_scale)
        if self.initial_scale > self.max_scale:
            raise ValueError(f"scale must be at most max_scale ({self.max_scale:g}), got {self.initial_scale:g}")
        log_scale = torch.nn.Parameter(torch.tensor(math.log(self.initial_scale))) if learnable_scale else None
        self.register_parameter("log_scale", log_scale)
        checked = {"reduction": reduction, "memory_budget": memory_budget}
        self.options: dict[str, Any] = {name: _CHECKS[name](value) for name, value in checked.items()}
        self.options |= {"symmetric": bool(symmetric), "normalize": bool(normalize)}
        self.process_group = process_group

    @property
    def scale(self) -> Tensor | float:
        """The scale of the similarities, ``()``."""
        return self.initial_scale if self.log_scale is None else self.log_scale.exp()

    def forward(
        self, input: linear.Features, other: linear.Features,
        target: Tensor | Target | tuple[Tensor | Target, Tensor | Target] | None = None, *,
        exclude: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    ) -> linear.Loss:  # fmt: skip
        """See :func:`softcurve.contrastive_loss`."""
        if self.log_scale is not None and self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        return contrastive.contrastive_loss(
            input, other, target, scale=self.scale, exclude=exclude, process_group=self.process_group, **self.options
        )

    def extra_repr(self) -> str:
        """Return the options."""
        options = {"scale": self.initial_scale, "learnable_scale": self.log_scale is not None, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    if TYPE_CHECKING:
        __call__ = forward
