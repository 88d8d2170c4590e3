"""The implementations that the head is compared with: torch's losses on dense logits, and libraries.

All have the signature ``loss(input, linear_weight, *target)``, as in ``bench.heads``. The libraries use their defaults.
They are optional and are imported when they are run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]


def dense_cross_entropy(e: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy with class indices or probabilities."""
    return F.cross_entropy(F.linear(e, w), target)


def dense_float32_cross_entropy(e: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of half-precision logits in float32."""
    return F.cross_entropy(F.linear(e, w).float(), target)


def dense_kl(e: Tensor, w: Tensor, te: Tensor, tw: Tensor) -> Tensor:
    """Return ``D(teacher‖model)``."""
    log_p, log_q = F.linear(e, w).log_softmax(-1), F.linear(te, tw).log_softmax(-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def dense_reverse_kl(e: Tensor, w: Tensor, te: Tensor, tw: Tensor) -> Tensor:
    """Return ``D(model‖teacher)``."""
    log_p, log_q = F.linear(e, w).log_softmax(-1), F.linear(te, tw).log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def dense_js(e: Tensor, w: Tensor, te: Tensor, tw: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence with β = ½."""
    log_p, log_q = F.linear(e, w).log_softmax(-1), F.linear(te, tw).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1).mean() / 2


def dense_top_k(e: Tensor, w: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    """Return ``D(list‖model)``, in which all unlisted classes are one outcome."""
    log_p = F.linear(e, w).log_softmax(-1).gather(-1, indices)
    return F.kl_div(_with_rest(log_p), _with_rest(log_probs), log_target=True, reduction="batchmean")


def dense_log_probs(e: Tensor, w: Tensor, index: Tensor, advantage: Tensor) -> Tensor:
    """Return the log-probability of each row's token and the entropy of its softmax, ``(2, N)``."""
    log_p = F.linear(e, w).log_softmax(-1)
    return torch.stack([log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)])


def dense_list_of(k: int) -> Loss:
    """Return a function of the log-probabilities of the ``k`` most probable classes of each row."""
    return lambda e, w: F.linear(e, w).log_softmax(-1).topk(k).values


def policy_gradient_of(log_probs: Loss) -> Loss:
    """Return the loss ``−mean(advantage · log p + 0.01 · entropy)`` by a function that returns both."""

    def loss(e: Tensor, w: Tensor, index: Tensor, advantage: Tensor, **options: int | None) -> Tensor:
        chosen, entropy = log_probs(e, w, index, advantage, **options)
        return -(advantage * chosen + 0.01 * entropy).mean()

    return loss


def _trl_chunked(e: Tensor, w: Tensor, index: Tensor, advantage: Tensor) -> Tensor:
    """Return what ``add_fused_lm_head`` of TRL computes from hidden states, with its default size of chunks."""
    from trl.trainer import utils

    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    found = utils._ChunkedLogProbFunction.apply(e, w, None, index, 1.0, size, None, 1.0, ("log_probs", "entropy"))
    return torch.stack(found[:2])


def _trl_selective(e: Tensor, w: Tensor, index: Tensor, advantage: Tensor) -> Tensor:
    """Return what TRL computes from the logits of one sequence."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return torch.cat(selective_log_softmax_and_entropy(F.linear(e, w).unsqueeze(0), index.unsqueeze(0)))


def _with_rest(listed: Tensor) -> Tensor:
    return torch.cat([listed, torch.log1p(-listed.exp().sum(-1, keepdim=True))], -1)


def _torch_chunked(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(input, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def _cut_cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(input, weight, target, impl="torch_compile")
    return loss


def _liger(
    input: Tensor, weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, *, beta: float, compiled: bool = True
) -> Tensor:
    """Return Liger's divergence: β = 0 is the forward KL, 1 the reverse. It requires labels also for weight 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    divergence = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    labels = torch.zeros(input.shape[0], dtype=torch.int64)
    loss: Tensor = divergence(input, weight, teacher_input, teacher_weight, labels)
    return loss


TRL: Mapping[str, Loss] = {"TRL chunked": _trl_chunked, "TRL on logits": _trl_selective}

# The keys are the cases in bench.heads. torch's chunked operator and cut-cross-entropy support only class indices, and
# Liger's losses for the CPU only a linear teacher. None of them can be differentiated twice.
LOSSES: Mapping[str, Mapping[str, Loss]] = {
    "cross-entropy": {"torch chunked": _torch_chunked, "cut-cross-entropy": _cut_cross_entropy},
    "cross-entropy, bfloat16": {"torch eager, float32 loss": dense_float32_cross_entropy},
    **{
        name: {
            "Liger": partial(_liger, beta=beta),
            "Liger, not compiled": partial(_liger, beta=beta, compiled=False),
        }
        for name, beta in {"forward-kl": 0.0, "reverse-kl": 1.0, "js": 0.5}.items()
    },
    "log-probs": TRL,
    "policy-gradient": {name: policy_gradient_of(log_probs) for name, log_probs in TRL.items()},
}

COMPILING = ("torch.compile", "cut-cross-entropy", "Liger")


def reason(error: Exception) -> str:
    """Return the note for an implementation that failed."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    first_line, _, _ = str(error).strip().partition("\n")
    return f"fails: {type(error).__name__}: {first_line}"
