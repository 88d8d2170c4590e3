"""Dense implementations of the formulas, a few lines each, which the tests use as an oracle.

The functions are neither optimised nor protected against overflow. The classes are the last dimension, and results are
in nats unless ``base`` is given. ``x`` is the input, ``e`` features, ``z`` logits, ``p`` probabilities, ``y`` the
target and ``W`` (C×d) the weight of the head. ``Rows`` are of shape ``(..., C)``, ``Values`` of shape ``(...)``.
Source: Bishop (2006), section 4.3.4; Kullback and Leibler (1951).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from softcurve.array_types import Float, Rows, Values

__all__ = [
    "basic_identity", "cross_entropy", "dL_dW", "dL_de", "dL_dp", "dL_dtheta", "dL_dx", "dL_dz", "entropy",
    "forward_kl", "kl_divergence", "kl_from_cross_entropy", "kl_gradient_in_first", "kl_gradient_in_first_logits",
    "kl_gradient_in_second", "kl_gradient_in_second_logits", "reverse_kl", "softmax", "softmax_derivative",
    "softmax_jacobian",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


# --- the softmax -----------------------------------------------------------------------------------------------------


def softmax(z: Rows) -> Rows:
    """Return ``p_i = e^{z_i} / Σ_j e^{z_j}``; a common factor ``e^{−max z}`` cancels."""
    exponentials = torch.exp(z - z.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def softmax_derivative(p: Rows, i: int, j: int) -> Values:
    """Return ``∂p_i/∂z_j = p_i (1_{i=j} − p_j)``, one element of the Jacobian."""
    return p[..., i] * (float(i == j) - p[..., j])


def softmax_jacobian(p: Rows) -> Float[Tensor, "*rows classes classes"]:
    """Return the symmetric C×C Jacobian ``J = ∂p/∂z = diag(p) − p pᵀ``."""
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


# --- entropy, cross-entropy, KL --------------------------------------------------------------------------------------


def kl_divergence(p: Rows, q: Rows, base: float = math.e) -> Values:
    """Return ``KL(p‖q) = Σ_i p_i log(p_i / q_i)``, with ``0 log 0 = 0``; in bits for ``base=2``."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1) / math.log(base)


def entropy(p: Rows, base: float = math.e) -> Values:
    """Return ``H(p) = −Σ_i p_i log p_i``."""
    return -torch.xlogy(p, p).sum(-1) / math.log(base)


def cross_entropy(y: Rows, p: Rows, base: float = math.e) -> Values:
    """Return ``H(y, p) = −Σ_k y_k log p_k`` for a one-hot or a soft target ``y``."""
    return -torch.xlogy(y, p).sum(-1) / math.log(base)


def kl_from_cross_entropy(y: Rows, p: Rows, base: float = math.e) -> Values:
    """Return ``KL(y‖p) = −H(y) + H(y, p)``."""
    return -entropy(y, base) + cross_entropy(y, p, base)


# --- the gradients of cross-entropy ----------------------------------------------------------------------------------


def dL_dp(y: Rows, p: Rows) -> Rows:
    """Return ``∂L/∂p = −y ⊘ p``, elementwise."""
    return torch.where(y == 0, 0.0, -y / p)


def basic_identity(y: Rows, p: Rows) -> Rows:
    """Return ``J(y ⊘ p) = y − (Σ_k y_k) p``.

    Row i of ``J`` is ``p_i (δ_i − p)``, so ``J(y⊘p)_i = p_i y_i/p_i − p_i Σ_k p_k y_k/p_k = y_i − p_i Σ_k y_k``.
    """
    return y - y.sum(-1, keepdim=True) * p


def dL_dz(y: Rows, p: Rows) -> Rows:
    """Return ``∂L/∂z = J ∂L/∂p = −J(y⊘p) = (Σ_k y_k) p − y``, which is ``p − y`` if the target sums to one."""
    return -basic_identity(y, p)


def dL_de(dL_dz: Rows, W: Float[Tensor, "classes features"]) -> Float[Tensor, "*rows features"]:
    """Return ``∂L/∂e = (∂z/∂e)ᵀ ∂L/∂z = Wᵀ (p − y)``."""
    return dL_dz @ W


def dL_dx(pull_back: Callable[[Tensor], Tensor], dL_de: Float[Tensor, "*rows features"]) -> Tensor:
    """Return ``∂L/∂x = (∂e/∂x)ᵀ Wᵀ (p − y)``; ``pull_back`` is the function ``ē ↦ (∂e/∂x)ᵀ ē``."""
    return pull_back(dL_de)


def dL_dW(dL_dz: Rows, e: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows classes features"]:
    """Return ``∂L/∂W = (p − y) eᵀ``, with the shape C×d of ``W``."""
    return dL_dz.unsqueeze(-1) * e.unsqueeze(-2)


def dL_dtheta(
    pull_back: Callable[[Tensor], dict[str, Tensor]], dL_de: Float[Tensor, "*rows features"]
) -> dict[str, Tensor]:
    """Return ``∂L/∂θ = (∂e/∂θ)ᵀ Wᵀ (p − y)``; ``pull_back`` is the function ``ē ↦ (∂e/∂θ)ᵀ ē``."""
    return pull_back(dL_de)


# --- KL, in both directions and in both arguments --------------------------------------------------------------------


def forward_kl(y: Rows, p: Rows, base: float = math.e) -> Values:
    """Return ``D(y‖p) = Σ_k y_k log(y_k / p_k)``; mode-covering if it is minimised over ``p``."""
    return kl_divergence(y, p, base)


def reverse_kl(y: Rows, p: Rows, base: float = math.e) -> Values:
    """Return ``D(p‖y) = Σ_k p_k log(p_k / y_k)``; mode-seeking if it is minimised over ``p``."""
    return kl_divergence(p, y, base)


def kl_gradient_in_first(p: Rows, q: Rows) -> Rows:
    """Return ``∂D(p‖q)/∂p = log(p ⊘ q) + 1``."""
    return torch.log(p / q) + 1


def kl_gradient_in_second(p: Rows, q: Rows) -> Rows:
    """Return ``∂D(p‖q)/∂q = −p ⊘ q``, which equals the gradient of the cross-entropy with target ``p``."""
    return dL_dp(p, q)


def kl_gradient_in_first_logits(p: Rows, q: Rows) -> Rows:
    """Return ``∂D(p‖q)/∂z_p = J_p (log(p⊘q) + 1) = p ⊙ (log(p⊘q) − D(p‖q))``, as for the encoder of a VAE."""
    ratio = torch.log(p) - torch.log(q)
    return p * (ratio - (p * ratio).sum(-1, keepdim=True))


def kl_gradient_in_second_logits(p: Rows, q: Rows) -> Rows:
    """Return ``∂D(p‖q)/∂z_q = q − p``, which equals the gradient of the cross-entropy."""
    return q - p
