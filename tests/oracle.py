"""Truths that owe nothing to softcurve: 50-digit closed forms, and dense formulas with torch's own derivatives.

The first half takes rows of exact numbers (lists of ``mpf``). The second half takes tensors, of float64 wherever it
judges something, and is written to be read, not to be fast or safe: a row of classes is the last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mpmath
import torch
from torch import Tensor

MP = mpmath.MPContext()
MP.dps = 50

Row = list[Any]  # of mpf

# --- 50 digits -------------------------------------------------------------------------------------------------------


def exact(values: Tensor | Sequence[float]) -> Row:
    """The very numbers that the tensor holds."""
    return [MP.mpf(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def exact_log_softmax(z: Row) -> Row:
    total = MP.log(MP.fsum(MP.exp(v) for v in z))
    return [v - total for v in z]


def exact_softmax(z: Row) -> Row:
    return [MP.exp(v) for v in exact_log_softmax(z)]


def exact_cross_entropy(y: Row, z: Row) -> Any:
    """``−Σ y_k log p_k``, ``0 log 0 = 0``."""
    return -MP.fsum(w * v for w, v in zip(y, exact_log_softmax(z), strict=True) if w != 0)


def exact_residual(y: Row, z: Row) -> Row:
    """``(Σ y) p − y``."""
    mass = MP.fsum(y)
    return [mass * p - w for w, p in zip(y, exact_softmax(z), strict=True)]


def exact_kl(p: Row, q: Row) -> Any:
    """``Σ p log(p/q)`` of two rows of probabilities."""
    terms = [(a, b) for a, b in zip(p, q, strict=True) if a != 0]
    return MP.inf if any(b == 0 for _, b in terms) else MP.fsum(a * MP.log(a / b) for a, b in terms)


def exact_js(p: Row, q: Row, beta: float) -> Any:
    """``β D(p‖m) + (1 − β) D(q‖m)``, ``m = β p + (1 − β) q``."""
    beta = MP.mpf(beta)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * exact_kl(p, m) + (1 - beta) * exact_kl(q, m)


def relative_error(got: Tensor | float, truth: Any) -> float:
    """``|got − truth| / |truth|``, in 50 digits; NaN is infinitely wrong."""
    got = float(got)
    if math.isnan(got):
        return math.inf
    return float(abs(MP.mpf(got) - truth) / abs(truth))


# --- nearly equal distributions, many classes --------------------------------------------------------------------------


def near_kl(z_p: Tensor, z_q: Tensor) -> Tensor:
    """``D(p‖q) = log E_p[e^δ] − E_p[δ]``, ``δ = z_q − z_p``: in float64 right to 1e-9 for δ of 1e-5."""
    p, delta = torch.softmax(z_p.double(), -1), z_q.double() - z_p.double()
    return torch.log1p((p * torch.expm1(delta)).sum(-1)) - (p * delta).sum(-1)


def near_js(z_p: Tensor, z_q: Tensor, beta: float) -> Tensor:
    """``−β E_p[log(m/p)] − (1−β) E_q[log(m/q)]`` from ``log(q/p) = δ − log E_p[e^δ]``."""
    p, q, delta = torch.softmax(z_p.double(), -1), torch.softmax(z_q.double(), -1), z_q.double() - z_p.double()
    ratio = delta - torch.log1p((p * torch.expm1(delta)).sum(-1, keepdim=True))
    of_p = -(p * torch.log1p((1 - beta) * torch.expm1(ratio))).sum(-1)
    of_q = -(q * torch.log1p(beta * torch.expm1(-ratio))).sum(-1)
    return beta * of_p + (1 - beta) * of_q


# --- dense, as in a textbook --------------------------------------------------------------------------------------------


def seen_by_softmax(z: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    """Soft cap, then temperature."""
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    return capped / temperature


def product(a: Tensor, log_b: Tensor) -> Tensor:
    """``a log b`` with ``0 · −inf = 0``, differentiable."""
    nothing = (a == 0) | (log_b == -math.inf) & (a == 0)
    return torch.where(nothing, 0.0, a * torch.where(nothing, 0.0, log_b))


def listed_and_rest(z: Tensor, indices: Tensor) -> Tensor:
    """Logits over the listed classes and one outcome for all others: ``log Σ e^z`` of these."""
    others = torch.ones_like(z, dtype=torch.bool).scatter(-1, indices, False)
    rest = torch.logsumexp(torch.where(others, z, -math.inf), -1, keepdim=True)
    return torch.cat([z.gather(-1, indices), rest], -1)


def cross_entropy_rows(
    z: Tensor,
    y: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    base: float = math.e,
    indices: Tensor | None = None,
) -> Tensor:
    """``−Σ_k w_k y_k log p_k`` in units of ``base``, and ``λ lse²`` in squared nats; ``y`` over list and rest if given."""
    z = seen_by_softmax(z, temperature, softcap)
    uniform = torch.full_like(z, 1 / z.shape[-1])
    if indices is not None:
        z, uniform = listed_and_rest(z, indices), listed_and_rest(uniform.log(), indices).exp()
    y = (1 - label_smoothing) * y + label_smoothing * uniform
    weighted = y if weight is None else y * weight
    loss = -product(weighted, torch.log_softmax(z, -1)).sum(-1) / math.log(base)
    return loss + z_loss * torch.logsumexp(z, -1).square()


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (product(p, log_p) - product(p, log_q)).sum(-1)


def js_rows(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta in (0, 1):
        return kl_rows(log_p, log_q) if beta == 0 else kl_rows(log_q, log_p)
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


def entropy_rows(z: Tensor) -> Tensor:
    log_p = torch.log_softmax(z, -1)
    return -product(log_p.exp(), log_p).sum(-1)


def reduced(
    rows: Tensor,
    reduction: str,
    sample_weight: Tensor | None = None,
    mass: Tensor | None = None,
    batch: int | None = None,
) -> Tensor:
    """``mean`` divides by the sum of the rows' weights, ``batchmean`` by the size of the first dimension, as in torch."""
    mass = torch.ones_like(rows) if mass is None else mass
    if sample_weight is not None:
        rows, mass = rows * sample_weight, mass * sample_weight
    if reduction == "none":
        return rows
    batch = batch if batch is not None else len(rows) if rows.ndim else 1
    divisor = {"sum": 1, "mean": mass.sum(), "batchmean": batch}[reduction]
    return rows.sum() / divisor
