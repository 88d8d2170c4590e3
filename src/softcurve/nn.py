"""The public losses as modules: the options once, the tensors at each call."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softcurve import checks, functional
from softcurve.objective import LogitMap, Reduction
from softcurve.targets import Target


class CrossEntropyLoss(torch.nn.Module):
    """:func:`softcurve.cross_entropy` with its options fixed; ``weight`` is a buffer, as in torch."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, " classes"] | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        reduction: str = "mean",
        base: float = math.e,
    ) -> None:
        super().__init__()
        Reduction(reduction, base)
        LogitMap(temperature, softcap)
        checks.require_between("label_smoothing", label_smoothing, 0.0, 1.0)
        checks.require_between("z_loss", z_loss, 0.0, math.inf)
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "temperature": temperature,
            "softcap": softcap,
            "z_loss": z_loss,
            "reduction": reduction,
            "base": base,
        }

    def forward(
        self,
        logits: Float[Tensor, "*rows classes"],
        target: Tensor | Target,
        *,
        sample_weight: Float[Tensor, "*rows"] | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """See :func:`softcurve.cross_entropy`."""
        return functional.cross_entropy(logits, target, weight=self.weight, sample_weight=sample_weight, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return _shown(self.options)


class KLDivergenceLoss(torch.nn.Module):
    """:func:`softcurve.kl_divergence` with its options fixed."""

    def __init__(self, *, temperature: float = 1.0, reduction: str = "batchmean", base: float = math.e) -> None:
        super().__init__()
        Reduction(reduction, base)
        LogitMap(temperature)
        self.options: dict[str, Any] = {"temperature": temperature, "reduction": reduction, "base": base}

    def forward(
        self, p: Tensor | Target, q: Tensor | Target, *, sample_weight: Float[Tensor, "*rows"] | None = None
    ) -> Float[Tensor, "*reduced"]:
        """``D(P‖Q)``; see :func:`softcurve.kl_divergence`."""
        return functional.kl_divergence(p, q, sample_weight=sample_weight, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return _shown(self.options)


class JSDivergenceLoss(torch.nn.Module):
    """:func:`softcurve.js_divergence` with its options fixed."""

    def __init__(
        self,
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        base: float = math.e,
    ) -> None:
        super().__init__()
        Reduction(reduction, base)
        LogitMap(temperature)
        checks.require_between("beta", beta, 0.0, 1.0)
        self.options: dict[str, Any] = {
            "beta": beta,
            "temperature": temperature,
            "reduction": reduction,
            "base": base,
        }

    def forward(
        self, p: Tensor | Target, q: Tensor | Target, *, sample_weight: Float[Tensor, "*rows"] | None = None
    ) -> Float[Tensor, "*reduced"]:
        """See :func:`softcurve.js_divergence`."""
        return functional.js_divergence(p, q, sample_weight=sample_weight, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return _shown(self.options)


def _shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
