"""A head's weight as the sum of a matrix and a product of low rank, which is never formed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softcurve import checks
from softcurve.array_types import Float
from softcurve.records import ShortRepr
from softcurve.typing import Number

PEFT_ATTRIBUTES = ("base_layer", "lora_A", "lora_B", "scaling")


@dataclass(frozen=True, eq=False, repr=False)
class LowRankWeight(ShortRepr):
    """The weight ``weight + scale * a @ b`` of a head, such as a LoRA adapter makes; the sum is never formed.

    Every ``linear_*`` function, :class:`~softcurve.LinearTeacher` and :class:`~softcurve.curvature.HeadCurvature` take
    it as ``linear_weight``. Each of the four receives the gradients that it requires: if only ``a`` and ``b`` do, the
    gradient of ``weight`` is not computed.

    Args:
        weight: ``(C, d)``.
        a: ``(C, r)`` with ``r >= 1``.
        b: ``(r, d)``.
        scale: A number, or a 0-d tensor, which may require gradients.

    The logits are the product of the features ``[e, scale · e bᵀ]``, of width ``d + r``, with ``[weight, a]``, whose
    two parts are read tile by tile. The dtypes may differ: the factors of a product are widened to the common dtype,
    float32 or wider, a block of a half-precision ``weight`` at a time.

    Raises:
        TypeError, ValueError: If a tensor is not floating point, or the shapes do not fit together.

    Example:
        >>> w, a, b = torch.randn(5, 4), torch.randn(5, 2), torch.randn(2, 4)
        >>> weight = softcurve.LowRankWeight(w, a, b, scale=0.5)
        >>> loss = softcurve.linear_cross_entropy(torch.randn(3, 4), weight, torch.tensor([0, 4, 2]))

    Source: Hu et al. 2022, "LoRA: Low-rank adaptation of large language models".
    """

    weight: Float[Tensor, "classes features"]
    a: Float[Tensor, "classes rank"]
    b: Float[Tensor, "rank features"]
    scale: Number = 1.0

    def __post_init__(self) -> None:
        for name, factor in (("weight", self.weight), ("a", self.a), ("b", self.b)):
            checks.require_floating(f"LowRankWeight {name}", factor, "(rows, columns) with at least one column")
        (*classes, width), rank = self.weight.shape, self.a.shape[-1]
        for name, factor, shape in (("a", self.a, (*classes, rank)), ("b", self.b, (rank, width))):
            if tuple(factor.shape) != shape or len(shape) != 2:
                raise ValueError(
                    f"LowRankWeight {name} must be of shape {shape} so that weight + a @ b is defined, got "
                    f"{checks.describe(factor)} beside a weight {tuple(self.weight.shape)}; a is (C, r) and b (r, d)"
                )
        is_tensor = isinstance(self.scale, Tensor) and self.scale.ndim == 0 and self.scale.is_floating_point()
        if not is_tensor:
            checks.require_number("LowRankWeight scale", self.scale, lambda _: True, "or a 0-d floating-point tensor")

    @staticmethod
    def from_peft(module: nn.Module) -> LowRankWeight:
        """Return the weight of a LoRA ``Linear`` of peft with its active adapter, without copying a tensor.

        The bias is not part of it: pass ``linear_bias=module.base_layer.bias`` to the loss.

        Raises:
            TypeError: If the module is not a LoRA layer around a ``torch.nn.Linear``.
            ValueError: If its output is not ``W e + scaling · B A e``: more or fewer than one active adapter, an
                adapter that is merged or disabled, DoRA or another variant, a bias of the adapter, or dropout in
                training mode.

        Example:
            >>> weight = softcurve.LowRankWeight.from_peft(model.lm_head)  # doctest: +SKIP
        """
        name = _active_adapter(module)
        layer: Any = module
        return LowRankWeight(
            layer.base_layer.weight, layer.lora_B[name].weight, layer.lora_A[name].weight, layer.scaling[name]
        )

    @property
    def shape(self) -> torch.Size:
        """The shape ``(C, d)`` of the sum."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """The common dtype of the factors."""
        return torch.promote_types(self.weight.dtype, torch.promote_types(self.a.dtype, self.b.dtype))

    @property
    def factor(self) -> float | Tensor:
        """The scale as a Python number or a tensor."""
        return self.scale if isinstance(self.scale, Tensor) else float(self.scale)

    def __getitem__(self, classes: slice | Tensor) -> LowRankWeight:
        return replace(self, weight=self.weight[classes], a=self.a[classes])

    def detach(self) -> LowRankWeight:
        """Return the same weight without gradients."""
        scale = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
        return LowRankWeight(self.weight.detach(), self.a.detach(), self.b.detach(), scale)

    def widened(self, input: Float[Tensor, "*rows features"], dtype: torch.dtype) -> Float[Tensor, "*rows wide"]:
        """Return ``[e, scale · e bᵀ]`` in ``dtype``, the features that ``[weight, a]`` multiplies."""
        wide = checks.wide_dtype(input.dtype, self.dtype)
        with torch.autocast(input.device.type, enabled=False):
            e = input.to(wide)  # once, so that the sum of its two gradients is rounded once
            return torch.cat([e, self.factor * (e @ self.b.to(wide).mT)], -1).to(dtype)

    def narrowed(self, gradient: Float[Tensor, "*rows wide"]) -> Float[Tensor, "*rows features"]:
        """Return the gradient with respect to ``e`` from that with respect to :meth:`widened`."""
        width = self.weight.shape[1]
        return gradient[..., :width] + self.factor * (gradient[..., width:] @ self.b.to(gradient.dtype))


def matrix_of(weight: Tensor | LowRankWeight) -> Tensor:
    """Return the weight without its product of low rank."""
    return weight.weight if isinstance(weight, LowRankWeight) else weight


def lowered_by_autocast(*factors: Any) -> tuple[Any, ...]:
    """Return features, weight and bias in the dtype of autocast if that is on, as torch's ``linear`` takes them."""
    device = factors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return factors
    return tuple(_lowered(each, torch.get_autocast_dtype(device)) for each in factors)


def _lowered(tensor: Any, dtype: torch.dtype) -> Any:
    """Return a tensor, or a weight of low rank, with what is not float64 in ``dtype``."""
    if isinstance(tensor, LowRankWeight):
        return replace(tensor, **{n: _lowered(getattr(tensor, n), dtype) for n in ("weight", "a", "b")})
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def linear(
    input: Float[Tensor, "*rows features"], weight: Tensor | LowRankWeight, bias: Tensor | None, dtype: torch.dtype
) -> Float[Tensor, "*rows classes"]:
    """Return the logits ``input @ weight.T + bias`` computed in ``dtype``, also under autocast."""
    with torch.autocast(input.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        logits = nn.functional.linear(input.to(dtype), matrix_of(weight).to(dtype), bias)
        if not isinstance(weight, LowRankWeight):
            return logits
        low = weight.widened(input, dtype)[..., input.shape[-1] :]
        return logits + nn.functional.linear(low, weight.a.to(dtype))


# --- the layers of peft, which is not imported ------------------------------------------------------------------------


def _active_adapter(module: Any) -> str:
    """Return the name of the one adapter that is active in a LoRA layer, if it adds a product of low rank alone."""
    if not all(hasattr(module, name) for name in PEFT_ATTRIBUTES) or not isinstance(module.base_layer, nn.Linear):
        raise TypeError(
            "module must be a LoRA layer of peft around a torch.nn.Linear, with base_layer, lora_A, lora_B and "
            f"scaling, got {type(module).__name__}; of a head without an adapter pass the weight itself"
        )
    active = getattr(module, "active_adapters", getattr(module, "active_adapter", ()))
    names = [name for name in ([active] if isinstance(active, str) else active) if name in module.lora_A]
    if len(names) != 1:
        raise ValueError(
            f"module must have one active adapter, got {names or 'none'}; choose it by set_adapter, or merge the others"
        )
    name: str = names[0]
    dropout = getattr(module, "lora_dropout", {})
    p = getattr(dropout[name], "p", 0.0) if name in dropout else 0.0
    faults = {
        "not be merged, or the adapter would count twice; call unmerge()": getattr(module, "merged", False),
        "have its adapters enabled; or pass base_layer.weight": getattr(module, "disable_adapters", False),
        "not use DoRA or another variant, whose weight is no sum with a product; merge it": _has_variant(module, name),
        "have an adapter without a bias; merge it": getattr(module.lora_B[name], "bias", None) is not None,
        f"have no dropout in training mode, got p={p}; set lora_dropout=0 or call eval()": p > 0 and module.training,
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(f"module must {fault} (adapter {name!r})")
    return name


def _has_variant(module: Any, name: str) -> bool:
    variants = (getattr(module, attribute, {}) for attribute in ("use_dora", "lora_variant"))
    vectors = getattr(module, "lora_magnitude_vector", None) or {}
    return name in vectors or any(isinstance(of, dict) and of.get(name) for of in variants)
