"""The losses of dense float64 logits in closed form, with their gradients: no autograd and nothing of softcurve.

Each quantity is a sum without cancellation: ``−log p`` of the largest class by ``log1p``, a divergence as a sum of terms
``q − p + p log(p/q) ≥ 0``, a residual as ``Σ_j (y_j p_k − y_k p_j)``. Beside each gradient stands the size of its terms,
by which rounding in the dtype of the computation is judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .differential import CROSS_ENTROPY, FEATURES, LISTS, Call, Problem, live_classes, moved

# A tail is computed as 1 minus the mass of its list, so its rounding error is that of 1. In units of RELATIVE.
TAIL = 0.1
# The loss changes by Σ |gradient| ε when logits of unit size are rounded, however small it is. In units of RELATIVE.
PERTURBED = 0.6


@dataclass(frozen=True)
class Truth:
    """The value and gradients of a call; ``sizes`` hold the sum of the absolute terms of each gradient."""

    value: Tensor
    size: Tensor  # of the terms of the value
    gradients: dict[str, Tensor]
    sizes: dict[str, Tensor]
    lse: Tensor  # (*rows)
    entropy: Tensor


def log_softmax(z: Tensor) -> Tensor:
    """Return ``log softmax(z)``, accurate relative to each entry, also for the largest."""
    if z.shape[-1] == 1:
        return torch.zeros_like(z)
    top = z.argmax(-1, keepdim=True)
    apart = z - z.gather(-1, top)
    return apart - torch.log1p(apart.exp().scatter(-1, top, 0.0).sum(-1, keepdim=True))


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``q − p + p log(p/q)``, which is 0 where both are 0 and infinite where only ``q`` is 0."""
    p, q = log_p.exp(), log_q.exp()
    apart = torch.where(p == 0, 0.0, log_q) - torch.where(p == 0, 0.0, log_p)
    near = apart.abs() < 1e-3
    small = torch.where(near, apart, 0.0)
    series = small.square() * (0.5 + small * (1 / 6 + small * (1 / 24 + small / 120)))
    terms = p * torch.where(near, series, torch.expm1(apart) - apart)
    return torch.where(p == 0, q, terms)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return the product with ``0 · ∞ = 0``."""
    return torch.where(a == 0, 0.0, a * b)


def _residual(y: Tensor, p: Tensor) -> Tensor:
    """Return ``(Σy) p − y`` as ``Σ_j (y_j p_k − y_k p_j)``, whose terms do not cancel for one-hot ``y``."""
    return y.sum(-1, keepdim=True) * p - y if y.shape[-1] > 400 else _exact_residual(y, p)


def _exact_residual(y: Tensor, p: Tensor) -> Tensor:
    products = y.unsqueeze(-2) * p.unsqueeze(-1)
    return (products - products.transpose(-1, -2)).sum(-1)


# --- a row -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcomes:
    """The outcomes that a loss compares: the classes, or the listed ones and one outcome for all others."""

    z: Tensor  # (R, M)
    indices: Tensor | None  # (R, k), of a bucket
    inner: Tensor  # (R, C): each class's share of its outcome

    @staticmethod
    def of(z: Tensor, indices: Tensor | None) -> _Outcomes:
        if indices is None or indices.shape[-1] == z.shape[-1]:
            outcomes = z if indices is None else z.gather(-1, indices)
            return _Outcomes(outcomes, indices, torch.ones_like(z))
        others = z.scatter(-1, indices, -math.inf)
        rest = torch.logsumexp(others, -1, keepdim=True)
        share = torch.where(rest == -math.inf, 0.0, (others - torch.where(rest == -math.inf, 0.0, rest)).exp())
        return _Outcomes(torch.cat([z.gather(-1, indices), rest], -1), indices, share.scatter(-1, indices, 1.0))

    def coarse(self, of_classes: Tensor) -> Tensor:
        """Sum a quantity of the classes over each outcome."""
        if self.indices is None:
            return of_classes
        listed = of_classes.gather(-1, self.indices)
        if self.z.shape[-1] == self.indices.shape[-1]:
            return listed
        return torch.cat([listed, of_classes.scatter(-1, self.indices, 0.0).sum(-1, keepdim=True)], -1)

    def back(self, gradient: Tensor) -> Tensor:
        """Pull a gradient with respect to the outcomes back to the classes."""
        if self.indices is None:
            return gradient
        k = self.indices.shape[-1]
        rest = gradient[:, k:] if gradient.shape[-1] > k else torch.zeros_like(gradient[:, :1])
        return (rest * self.inner).scatter(-1, self.indices, gradient[:, :k])


def _target_log_probs(p: Problem, clean: dict[str, Any], outcomes: _Outcomes, rows: int) -> Tensor:
    """Return ``log y`` over the outcomes; the divergences divide the target's logits by the temperature."""
    temperature = 1.0 if p.loss == CROSS_ENTROPY else p.temperature
    values = clean["values"].double().reshape(rows, clean["values"].shape[-1])
    if p.kind == "teacher":
        values = values @ clean["weight"].double().T + clean["bias"].double()
    elif p.kind == "probabilities":
        values = values.log()
    elif p.kind in LISTS:
        values = _list_log_probs(p, clean, values, outcomes)
    return log_softmax(values / temperature)


def _list_log_probs(p: Problem, clean: dict[str, Any], listed: Tensor, outcomes: _Outcomes) -> Tensor:
    indices = clean["indices"].reshape(listed.shape)
    if p.kind == "renormalize":
        return torch.full((len(listed), p.classes), -math.inf, dtype=listed.dtype).scatter(-1, indices, listed)
    if outcomes.z.shape[-1] == listed.shape[-1]:
        return listed
    rest = 1 - listed.exp().sum(-1, keepdim=True)
    # Below the rounding of the list there is no mass, where a bucket of masked classes has no room for it.
    rounding = listed.shape[-1] * torch.finfo(clean["values"].dtype).eps
    nothing = (rest <= 0) | ((outcomes.z[:, -1:] == -math.inf) & (rest <= rounding))
    return torch.cat([listed, torch.where(nothing, -math.inf, rest.clamp(min=1e-300).log())], -1)


def _mixture(p: Problem, call: Call, outcomes: _Outcomes, rows: int, live: Tensor) -> Tensor:
    """Return the factors of ``−log p``: the target, smoothed over the live classes, times the class weights."""
    values = call.clean["values"]
    if p.by_indices:
        index = values.long().reshape(rows)
        kept = index != p.ignored_index
        y = torch.zeros(rows, p.classes, dtype=torch.float64).scatter(
            -1, torch.where(kept, index, 0).unsqueeze(-1), 1.0
        )
    elif p.kind in ("float", "probabilities"):
        y = values.double().reshape(rows, p.classes)
    else:
        y = _target_log_probs(p, call.clean, outcomes, rows).exp()
    uniform = live.double() / live.sum(-1, keepdim=True)
    y = (1 - p.label_smoothing) * y + p.label_smoothing * outcomes.coarse(uniform)
    return y if call.weight is None else y * call.weight.double()


def _cross_entropy(p: Problem, call: Call, outcomes: _Outcomes, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(live)
    y = _mixture(p, call, outcomes, rows, live)
    log_p = log_softmax(outcomes.z)
    probability, nats = log_p.exp(), math.log(p.base)
    one_hot = p.by_indices and not p.label_smoothing
    gradient = _residual(y, probability)
    size = gradient.abs() if one_hot else y.sum(-1, keepdim=True) * probability + y
    return _times(y, -log_p).sum(-1) / nats, gradient / nats, size / nats


def _divergence(p: Problem, call: Call, outcomes: _Outcomes, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    log_y, log_p = _target_log_probs(p, call.clean, outcomes, rows), log_softmax(outcomes.z)
    y, probability, nats = log_y.exp(), log_p.exp(), math.log(p.base)
    beta = {"forward": 0.0, "reverse": 1.0}.get(p.loss, p.beta)
    if beta == 0:
        value, gradient, size = kl_terms(log_y, log_p).sum(-1), _residual(y, probability), y + probability
        return value / nats, gradient / nats, size / nats
    if beta == 1:
        value, ratio, factor = kl_terms(log_p, log_y).sum(-1), log_p - log_y, 1.0
    else:
        log_m = torch.logaddexp(math.log(beta) + log_y, math.log1p(-beta) + log_p)
        terms = beta * kl_terms(log_y, log_m) + (1 - beta) * kl_terms(log_p, log_m)
        value, ratio, factor = terms.sum(-1), log_p - log_m, 1 - beta
    ratio = torch.where(probability == 0, 0.0, ratio)
    apart = ratio.unsqueeze(-1) - ratio.unsqueeze(-2)
    gradient = factor * probability * (probability.unsqueeze(-2) * apart).sum(-1)
    mean = (probability * ratio.abs()).sum(-1, keepdim=True)
    return value / nats, gradient / nats, probability * (1 + ratio.abs() + mean) / nats


# --- a call ------------------------------------------------------------------------------------------------------------


def _mapped(p: Problem, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits after soft cap and temperature, and the derivative of that map."""
    if p.softcap is None:
        return z / p.temperature, torch.full_like(z, 1 / p.temperature)
    finite = torch.where(z == -math.inf, 0.0, z)
    value = torch.where(z == -math.inf, z, p.softcap * torch.tanh(finite / p.softcap))
    return value / p.temperature, torch.cosh(finite / p.softcap).pow(-2) / p.temperature


def _row_weights(p: Problem, call: Call) -> tuple[Tensor, Tensor]:
    """Return the factor of each row's loss, and the divisor of the reduction."""
    ones = torch.ones(p.rows, dtype=torch.float64)
    kept, of_class = ones.bool(), ones
    if p.by_indices:
        index = moved(p, call.clean["values"].long(), p.ignored_index)
        kept = index != p.ignored_index
        if call.weight is not None:
            of_class = call.weight.double()[torch.where(kept, index, 0)]
    sampled = ones if call.sample_weight is None else moved(p, call.sample_weight.double(), 0.0)
    weight = torch.where(kept, sampled, 0.0)
    batch = float(p.leading[0] if p.leading else 1)
    divisor = {"none": 1.0, "sum": 1.0, "batchmean": batch}.get(p.reduction)
    return weight, torch.tensor(divisor) if divisor is not None else (weight * of_class).sum()


def truth(call: Call, cotangent: Tensor) -> Truth:
    """Return the truth of a call without a fault; ``cotangent`` weighs the rows where they are not reduced."""
    p, count = call.problem, math.prod(call.problem.rows)
    weight, divisor = _row_weights(p, call)
    alive = weight != 0
    z = torch.where(alive.unsqueeze(-1), call.exact_logits(), torch.where(live_classes(p), 0.0, -math.inf))
    z = z.reshape(count, p.classes)
    mapped, slope = _mapped(p, z)
    shifted = _shifted_target(p, call)
    indices = None
    if p.kind == "bucket":
        indices = call.clean["indices"].reshape(count, call.clean["indices"].shape[-1])
    outcomes = _Outcomes.of(mapped, indices)
    live = (z > -math.inf).expand(count, p.classes)
    if p.loss == CROSS_ENTROPY:
        rows, gradient, size = _cross_entropy(p, shifted, outcomes, live)
    else:
        rows, gradient, size = _divergence(p, shifted, outcomes, count)
    lse, probability = torch.logsumexp(mapped, -1), log_softmax(mapped).exp()
    pull = 2 * p.z_loss * lse.unsqueeze(-1) * probability
    if p.kind == "bucket" and outcomes.z.shape[-1] > indices.shape[-1]:
        size[:, -1] += TAIL
    gradient, size = outcomes.back(gradient) + pull, outcomes.back(size) + pull.abs()
    gradient, size = (torch.where(live, part * slope, 0.0) for part in (gradient, size))
    unsure = PERTURBED * gradient.abs().sum(-1).nan_to_num(0.0)
    rows = _times(weight.flatten(), rows + p.z_loss * lse.square())
    unsure = _times(weight.flatten(), unsure)
    scale = torch.where(divisor == 0, 0.0, weight / torch.where(divisor == 0, 1.0, divisor)).reshape(count, 1)
    if p.reduction == "none":
        value, unsure = rows.reshape(p.rows), unsure.reshape(p.rows)
        scale = scale * cotangent.double().reshape(count, 1)
    else:
        value = torch.where(divisor == 0, math.nan, rows.sum() / divisor)
        unsure = unsure.sum() / divisor.clamp(min=1e-3)
    gradient, size = _times(scale, gradient), _times(scale, size)
    gradients, sizes = _through_head(call, gradient), _through_head(call, size, absolute=True)
    return Truth(value, value.abs() + unsure, gradients, sizes, *_statistics(call))


def _statistics(call: Call) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and entropy of every row, whether it counts or not."""
    mapped, _ = _mapped(call.problem, call.exact_logits())
    log_p = log_softmax(mapped)
    return torch.logsumexp(mapped, -1), _times(log_p.exp(), -log_p).sum(-1)


def _shifted_target(p: Problem, call: Call) -> Call:
    if not p.shift:
        return call
    values = moved(p, call.clean["values"], p.ignored_index)
    return Call(**{**vars(call), "clean": {"values": values}})


def _through_head(call: Call, gradient: Tensor, *, absolute: bool = False) -> dict[str, Tensor]:
    """Return ``∂L/∂e = g W``, ``∂L/∂W = gᵀ e`` and ``∂L/∂b = Σ g``, or the same sums of absolute values."""
    p = call.problem
    count = math.prod(p.positions)
    e = call.input.double().reshape(math.prod(p.leading), FEATURES).nan_to_num(0.0)
    w = call.linear_weight.double().reshape(p.classes, count, FEATURES)
    e, w = (e.abs(), w.abs()) if absolute else (e, w)
    g = gradient.reshape(len(e), count, p.classes)
    return {
        "logits": gradient.reshape(*p.rows, p.classes),
        "input": torch.einsum("npc,cpd->nd", g, w).reshape(call.input.shape),
        "linear_weight": torch.einsum("npc,nd->cpd", g, e).reshape(call.linear_weight.shape),
        "linear_bias": g.sum(0).T.reshape(p.classes, *p.positions),
    }
