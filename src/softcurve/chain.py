"""The chain rule on a model: closed forms for every gradient, and one vector-Jacobian product for the features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softcurve import checks, reference
from softcurve.array_types import Float, Rows, Values
from softcurve.losses import softmax
from softcurve.losses.divergences import MEMBERS, divergence_of
from softcurve.losses.rows import DenseCrossEntropy
from softcurve.losses.spec import LogitMap
from softcurve.losses.targets import Probabilities, Target, as_target
from softcurve.losses.topk import TopK
from softcurve.records import ShortRepr
from softcurve.typing import ChainLoss

LOSSES = tuple(MEMBERS)


@dataclass(frozen=True, eq=False, repr=False)
class ChainRule(ShortRepr):
    """The stages ``x → e → z → p → L`` of a model and the gradient at each of them.

    The following fields belong to the loss of each row: ``loss (...)``; ``e, dL_de (..., d)``;
    ``z, p, dL_dp, dL_dz (..., C)``; ``dL_dx``, with the shape of ``x``, or ``None`` for integers such as tokens. These
    belong to the mean loss: ``dL_dW (C, d)``; ``dL_db (C,)``, or ``None`` without bias; ``dL_dtheta``, by name.
    """

    e: Float[Tensor, "*rows features"]
    z: Rows
    p: Rows
    loss: Values
    dL_dp: Rows
    dL_dz: Rows
    dL_de: Float[Tensor, "*rows features"]
    dL_dx: Tensor | None
    dL_dW: Float[Tensor, "classes features"]
    dL_db: Float[Tensor, " classes"] | None
    dL_dtheta: dict[str, Tensor]


def chain_rule(
    features: nn.Module, head: nn.Linear, x: Tensor, target: Tensor | Target, *, loss: ChainLoss = "cross_entropy"
) -> ChainRule:
    """Compute the gradients of ``loss(head(features(x)), target).backward()`` stage by stage from their formulas.

    Args:
        features: Any module that maps a batch ``x`` to features ``e (..., d)``. It runs once, in its current mode.
        head: An ``nn.Linear`` from ``d`` to ``C``.
        x: The batch.
        target: Class indices ``(...)`` or a distribution ``(..., C)``, as in :func:`softcurve.cross_entropy`.
        loss: ``"cross_entropy"``, ``"forward_kl"`` (``D(y‖p)``) or ``"reverse_kl"`` (``D(p‖y)``), in nats.

    The result contains gradients also for parameters that do not require one, and zeros for parameters that the
    features do not use. ``dL_dx`` is the gradient of each row's loss if the features process rows independently, and
    the gradient of the sum of the losses otherwise (for example with batch normalisation).

    Raises:
        TypeError, ValueError: If ``head`` is not an ``nn.Linear`` of the right width, if the target does not match it,
            or if the target of ``reverse_kl`` contains a zero, which makes the loss infinite.

    Source: ``∂L/∂z = p − y`` (Bishop 2006, eq. 4.109) and the chain rule: ``∂L/∂e = Wᵀ(p − y)``,
    ``∂L/∂x = (∂e/∂x)ᵀWᵀ(p − y)``, ``∂L/∂W = (p − y)eᵀ``.

    Example:
        >>> features, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)
        >>> softcurve.chain_rule(features, head, torch.randn(2, 3), torch.tensor([0, 1])).dL_dW.shape
        torch.Size([5, 4])
    """
    checks.require_choice("loss", loss, LOSSES)
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"head must be a torch.nn.Linear, got {type(head).__name__}; put what precedes it into features"
        )
    if not isinstance(features, nn.Module):
        raise TypeError(f"features must be a torch.nn.Module, got {type(features).__name__}; wrap it in one")
    checks.require_tensor("x", x)
    if x.is_floating_point():
        checks.require_numbers("x", x)
    with torch.inference_mode(False), torch.enable_grad():
        parameters = {name: _leaf(p) for name, p in features.named_parameters() if p.is_floating_point()}
        x = _leaf(x) if x.is_floating_point() else x
        e = torch.func.functional_call(features, parameters, (x.clone(),))  # features may modify their input in place
    if not isinstance(e, Tensor) or e.ndim == 0 or e.shape[-1] != head.in_features:
        came = checks.describe(e) if isinstance(e, Tensor) else type(e).__name__
        raise ValueError(
            f"features must map x to a tensor of shape (..., {head.in_features}), as wide as head, got {came}"
        )
    with torch.no_grad():
        z = head(e)
        y = _distribution(target, z)
        p = softmax.softmax_rows(z).probabilities
        value, dL_dp, dL_dz = _at_logits(loss, z, y, p)
        dL_de = reference.dL_de(dL_dz, head.weight)
        rows = max(1, math.prod(z.shape[:-1]))
        dL_dz_rows, e_rows = dL_dz.reshape(-1, z.shape[-1]), e.reshape(-1, e.shape[-1])
    with torch.inference_mode(False):
        in_x, in_theta = _pull_back(e, x, parameters, dL_de)
    return ChainRule(
        e=e.detach(), z=z, p=p, loss=value, dL_dp=dL_dp, dL_dz=dL_dz, dL_de=dL_de, dL_dx=in_x,
        dL_dW=dL_dz_rows.mT @ e_rows.detach() / rows,  # the mean of reference.dL_dW, without one C×d per row
        dL_db=None if head.bias is None else dL_dz_rows.sum(0) / rows,
        dL_dtheta={name: gradient / rows for name, gradient in in_theta.items()},
    )  # fmt: skip


def _leaf(tensor: Tensor) -> Tensor:
    """Return a leaf of a new graph; a tensor created under inference mode must be cloned for this."""
    tensor = tensor.detach()
    return (tensor.clone() if tensor.is_inference() else tensor).requires_grad_()


def _distribution(target: Tensor | Target, z: Tensor) -> Tensor:
    """Return the target of each row as probabilities."""
    if isinstance(target, Tensor) and target.is_floating_point():
        target = Probabilities(target)
    target = as_target(target)
    if isinstance(target, Target):
        if target.merges_tail:
            raise ValueError("target must be a distribution over all classes, got a TopK with tail='bucket'")
        if isinstance(target, TopK):
            target.require_fit(z.shape)
        return target.checked(None, z.shape[-1]).distribution_against(z)[1].detach().to(z.dtype)
    checks.require_rows("target", target, z.shape[:-1], "the head's logits")
    checks.require_class_indices("target", target, z.shape[-1])
    return nn.functional.one_hot(target, z.shape[-1]).to(z.dtype)


def _at_logits(loss: str, z: Tensor, y: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``L``, ``∂L/∂p`` and ``∂L/∂z`` of each row; the forward KL has the gradients of the cross-entropy."""
    divergence, pair = divergence_of(loss), softmax.pair(z, torch.log(y))
    if loss == "reverse_kl":
        if not (y > 0).all():
            raise ValueError(
                "target must be above 0 for every class when loss='reverse_kl', got a 0: D(p‖y) is infinite there; "
                "mix in a little of the uniform distribution, or use loss='forward_kl'"
            )
        in_z = softmax.divergence_gradient(divergence, pair)
        return divergence.value(pair), reference.kl_gradient_in_first(p, y), in_z
    value = divergence.value(pair) if loss == "forward_kl" else DenseCrossEntropy(LogitMap()).loss(z, y)
    return value, reference.dL_dp(y, p), softmax.dense_residual(z.new_ones(z.shape[:-1]), z, y)


def _pull_back(
    e: Tensor, x: Tensor, parameters: dict[str, Tensor], dL_de: Tensor
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return ``(∂e/∂x)ᵀ dL_de`` and ``(∂e/∂θ)ᵀ dL_de``, with zeros for tensors that the features do not use."""
    inputs = [*parameters.values(), *([x] if x.requires_grad else [])]
    pulled: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if e.requires_grad:
        pulled = torch.autograd.grad(e, inputs, dL_de, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, pulled, strict=True)]
    in_x = gradients.pop() if x.requires_grad else None
    return in_x, dict(zip(parameters, gradients, strict=True))
