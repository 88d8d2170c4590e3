"""The training losses, each in two implementations: tile by tile with softcurve, and dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import softcurve as sc

# Bytes. Within the default of 128 MiB all logits of a small batch would fit into one tile. In 16 MiB, 64 whole rows of
# a divergence would not fit, so that the classes would be cut and each block computed again for each sweep.
BUDGET = 24 * 2**20

Features = Float[Tensor, "batch context width"]
Weight = Float[Tensor, "vocab width"]
Bias = Float[Tensor, " vocab"]
Target = Tensor | sc.LinearTeacher | sc.TopK
Loss = Callable[[Features, Weight, Bias, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss of features, a head and a target, in nats per token."""

    label: str
    streamed: Loss
    dense: Loss


def _streamed_cross_entropy(x: Features, weight: Weight, bias: Bias, tokens: Tensor) -> Tensor:
    return sc.linear_cross_entropy(x, weight, tokens, linear_bias=bias, shift=1, memory_budget=BUDGET)


def _dense_cross_entropy(x: Features, weight: Weight, bias: Bias, tokens: Tensor) -> Tensor:
    logits = F.linear(x[:, :-1], weight, bias)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _streamed_forward_kl(x: Features, weight: Weight, bias: Bias, teacher: sc.LinearTeacher | sc.TopK) -> Tensor:
    return sc.linear_kl_divergence(x, weight, teacher, linear_bias=bias, memory_budget=BUDGET)


def _streamed_reverse_kl(x: Features, weight: Weight, bias: Bias, teacher: sc.LinearTeacher) -> Tensor:
    return sc.linear_kl_divergence(x, weight, teacher, linear_bias=bias, direction="reverse", memory_budget=BUDGET)


def _dense_forward_kl(x: Features, weight: Weight, bias: Bias, teacher: sc.LinearTeacher) -> Tensor:
    p, q = _log_probs(*_head(teacher)), _log_probs(x, weight, bias)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def _dense_reverse_kl(x: Features, weight: Weight, bias: Bias, teacher: sc.LinearTeacher) -> Tensor:
    p, q = _log_probs(*_head(teacher)), _log_probs(x, weight, bias)
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def _dense_top_k(x: Features, weight: Weight, bias: Bias, teacher: sc.TopK) -> Tensor:
    return sc.kl_divergence(teacher, F.linear(x, weight, bias))


def _log_probs(x: Features, weight: Weight, bias: Bias | None) -> Float[Tensor, "tokens vocab"]:
    return F.log_softmax(F.linear(x, weight, bias).flatten(0, 1), -1)


def _head(teacher: sc.LinearTeacher) -> tuple[Features, Weight, Bias | None]:
    return teacher.input, teacher.linear_weight, teacher.linear_bias


OBJECTIVES = {
    "plain": Objective("cross-entropy", _streamed_cross_entropy, _dense_cross_entropy),
    "forward": Objective("forward KL", _streamed_forward_kl, _dense_forward_kl),
    "reverse": Objective("reverse KL", _streamed_reverse_kl, _dense_reverse_kl),
    "top_k": Objective("top-k KL", _streamed_forward_kl, _dense_top_k),
}
