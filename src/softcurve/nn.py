"""The public losses as modules, which store the options of a loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from softcurve import checks, functional, linear
from softcurve.array_types import Float
from softcurve.head.problem import LossStats, require_budget, require_shift
from softcurve.losses.reduction import Reduction
from softcurve.losses.spec import LogitMap
from softcurve.losses.targets import Target, resolve_ignore_index
from softcurve.typing import Integer, KLDirection, Number, ReductionKind

__all__ = [
    "CrossEntropyLoss",
    "JSDivergenceLoss",
    "KLDivergenceLoss",
    "LinearCrossEntropyLoss",
    "LinearJSDivergenceLoss",
    "LinearKLDivergenceLoss",
]


def __dir__() -> list[str]:
    return __all__


# torch types the call of a module as Any. Under TYPE_CHECKING each class declares __call__ with the types of forward.


class CrossEntropyLoss(torch.nn.Module):
    """:func:`softcurve.cross_entropy` with fixed options; ``weight`` is a buffer, as in torch."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, " classes"] | None = None,
        *,
        ignore_index: Integer | None = -100,
        label_smoothing: Number = 0.0,
        temperature: Number = 1.0,
        softcap: Number | None = None,
        z_loss: Number = 0.0,
        reduction: ReductionKind = "mean",
        base: Number = math.e,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = _checked(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            temperature=temperature,
            softcap=softcap,
            z_loss=z_loss,
            reduction=reduction,
            base=base,
        )

    def forward(
        self,
        logits: Float[Tensor, "*rows classes"],
        target: Tensor | Target,
        *,
        sample_weight: Float[Tensor, "*rows"] | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """See :func:`softcurve.cross_entropy`."""
        return functional.cross_entropy(logits, target, weight=self.weight, sample_weight=sample_weight, **self.options)

    if TYPE_CHECKING:

        def __call__(
            self,
            logits: Float[Tensor, "*rows classes"],
            target: Tensor | Target,
            *,
            sample_weight: Float[Tensor, "*rows"] | None = None,
        ) -> Float[Tensor, "*reduced"]:
            """See :meth:`forward`."""

    def extra_repr(self) -> str:
        """Return the options."""
        return _shown(self.options)


class KLDivergenceLoss(torch.nn.Module):
    """:func:`softcurve.kl_divergence` with fixed options."""

    def __init__(self, *, temperature: Number = 1.0, reduction: ReductionKind = "mean", base: Number = math.e) -> None:
        super().__init__()
        self.options: dict[str, Any] = _checked(temperature=temperature, reduction=reduction, base=base)

    def forward(
        self, p: Tensor | Target, q: Tensor | Target, *, sample_weight: Float[Tensor, "*rows"] | None = None
    ) -> Float[Tensor, "*reduced"]:
        """Return ``D(P‖Q)``; see :func:`softcurve.kl_divergence`."""
        return functional.kl_divergence(p, q, sample_weight=sample_weight, **self.options)

    if TYPE_CHECKING:

        def __call__(
            self, p: Tensor | Target, q: Tensor | Target, *, sample_weight: Float[Tensor, "*rows"] | None = None
        ) -> Float[Tensor, "*reduced"]:
            """See :meth:`forward`."""

    def extra_repr(self) -> str:
        """Return the options."""
        return _shown(self.options)


class JSDivergenceLoss(torch.nn.Module):
    """:func:`softcurve.js_divergence` with fixed options."""

    def __init__(
        self,
        *,
        beta: Number = 0.5,
        temperature: Number = 1.0,
        reduction: ReductionKind = "mean",
        base: Number = math.e,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = _checked(beta=beta, temperature=temperature, reduction=reduction, base=base)

    def forward(
        self, p: Tensor | Target, q: Tensor | Target, *, sample_weight: Float[Tensor, "*rows"] | None = None
    ) -> Float[Tensor, "*reduced"]:
        """See :func:`softcurve.js_divergence`."""
        return functional.js_divergence(p, q, sample_weight=sample_weight, **self.options)

    if TYPE_CHECKING:

        def __call__(
            self, p: Tensor | Target, q: Tensor | Target, *, sample_weight: Float[Tensor, "*rows"] | None = None
        ) -> Float[Tensor, "*reduced"]:
            """See :meth:`forward`."""

    def extra_repr(self) -> str:
        """Return the options."""
        return _shown(self.options)


class _LinearLoss(torch.nn.Module):
    """Base class of the losses that contain their head as the submodule ``linear``."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        positions: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes * positions, bias=bias, device=device, dtype=dtype)
        self.options: dict[str, Any] = {}

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            input: Float[Tensor, "*rows features"],
            target: Tensor | Target,
            *,
            sample_weight: Tensor | None = None,
            return_stats: Literal[False] = False,
        ) -> Float[Tensor, "*reduced"]: ...
        @overload
        def __call__(
            self,
            input: Float[Tensor, "*rows features"],
            target: Tensor | Target,
            *,
            sample_weight: Tensor | None = None,
            return_stats: Literal[True],
        ) -> tuple[Float[Tensor, "*reduced"], LossStats]: ...
        @overload
        def __call__(
            self,
            input: Float[Tensor, "*rows features"],
            target: Tensor | Target,
            *,
            sample_weight: Tensor | None = None,
            return_stats: bool,
        ) -> Float[Tensor, "*reduced"] | tuple[Float[Tensor, "*reduced"], LossStats]: ...
        def __call__(self, *args: Any, **options: Any) -> Any:
            """Call ``forward`` of the subclass."""

    def extra_repr(self) -> str:
        """Return the options."""
        return _shown(self.options)


class LinearCrossEntropyLoss(_LinearLoss):
    """:func:`softcurve.linear_cross_entropy` with a head ``linear``; replaces ``torch.nn.LinearCrossEntropyLoss``.

    Names, defaults and state-dict keys are torch's. Tie an embedding by ``module.linear.weight = embedding.weight``.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: ReductionKind = "mean",
        weight: Float[Tensor, " classes"] | None = None,
        ignore_index: Integer | None = None,
        label_smoothing: Number = 0.0,
        temperature: Number = 1.0,
        softcap: Number | None = None,
        z_loss: Number = 0.0,
        base: Number = math.e,
        shift: Integer = 0,
        memory_budget: Integer | None = None,
    ) -> None:
        if weight is not None:
            checks.require_class_weight(weight, num_classes)
        super().__init__(in_features, num_classes, math.prod(out_features), bias, device, dtype)
        self.num_classes, self.out_features = num_classes, out_features
        self.register_buffer("weight", weight)
        self.options = _checked(
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            temperature=temperature,
            softcap=softcap,
            z_loss=z_loss,
            base=base,
            shift=shift,
            memory_budget=memory_budget,
        )

    def forward(
        self,
        input: Float[Tensor, "*rows features"],
        target: Tensor | Target,
        *,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Float[Tensor, "*reduced"] | tuple[Float[Tensor, "*reduced"], LossStats]:
        """See :func:`softcurve.linear_cross_entropy`."""
        bias, shape = self.linear.bias, (self.num_classes, *self.out_features)
        return linear.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, -1),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            sample_weight=sample_weight,
            return_stats=return_stats,
            **self.options,
        )

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
        positions = {"out_features": self.out_features} if self.out_features else {}
        return _shown(positions | self.options)


class LinearKLDivergenceLoss(_LinearLoss):
    """:func:`softcurve.linear_kl_divergence` with a head ``linear``."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        direction: KLDirection = "forward",
        temperature: Number = 1.0,
        softcap: Number | None = None,
        reduction: ReductionKind = "mean",
        base: Number = math.e,
        memory_budget: Integer | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, 1, bias, device, dtype)
        self.options = _checked(
            direction=direction,
            temperature=temperature,
            softcap=softcap,
            reduction=reduction,
            base=base,
            memory_budget=memory_budget,
        )

    def forward(
        self,
        input: Float[Tensor, "*rows features"],
        target: Tensor | Target,
        *,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Float[Tensor, "*reduced"] | tuple[Float[Tensor, "*reduced"], LossStats]:
        """See :func:`softcurve.linear_kl_divergence`."""
        return linear.linear_kl_divergence(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            sample_weight=sample_weight,
            return_stats=return_stats,
            **self.options,
        )


class LinearJSDivergenceLoss(_LinearLoss):
    """:func:`softcurve.linear_js_divergence` with a head ``linear``."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        beta: Number = 0.5,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        temperature: Number = 1.0,
        softcap: Number | None = None,
        reduction: ReductionKind = "mean",
        base: Number = math.e,
        memory_budget: Integer | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, 1, bias, device, dtype)
        self.options = _checked(
            beta=beta,
            temperature=temperature,
            softcap=softcap,
            reduction=reduction,
            base=base,
            memory_budget=memory_budget,
        )

    def forward(
        self,
        input: Float[Tensor, "*rows features"],
        target: Tensor | Target,
        *,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Float[Tensor, "*reduced"] | tuple[Float[Tensor, "*reduced"], LossStats]:
        """See :func:`softcurve.linear_js_divergence`."""
        return linear.linear_js_divergence(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            sample_weight=sample_weight,
            return_stats=return_stats,
            **self.options,
        )


def _checked(**options: Any) -> dict[str, Any]:
    """Check the options of a loss and return them with Python numbers."""
    checked = dict(options)
    for name, (low, high) in {"label_smoothing": (0.0, 1.0), "z_loss": (0.0, math.inf), "beta": (0.0, 1.0)}.items():
        if name in options:
            checked[name] = checks.require_between(name, options[name], low, high)
    reduction = Reduction.of(options["reduction"], options["base"])
    logit_map = LogitMap.of(options["temperature"], options.get("softcap"))
    checked |= {"base": reduction.base, "temperature": logit_map.temperature}
    if "softcap" in options:
        checked["softcap"] = logit_map.softcap
    if "direction" in options:
        checks.require_choice("direction", options["direction"], ("forward", "reverse"))
    for name, convert in {"shift": require_shift, "memory_budget": require_budget}.items():
        if name in options:
            checked[name] = convert(options[name])
    if options.get("ignore_index") is not None:
        checked["ignore_index"] = resolve_ignore_index(options["ignore_index"])
    return checked


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
