"""The implementations that are compared on CUDA, with the signature ``loss(input, linear_weight, *target)``.

The libraries are optional and are imported when they are run. Each is measured with its defaults, and with its options
for higher accuracy. Cross-entropies are means over the rows with a label, divergences over all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.heads import CASES
from bench.peers import Loss

OURS = "softcurve"
SMALL_BUDGET = 256 * 2**20


class Absent(Exception):
    """The installed version does not provide this function."""


def _upcast(e: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Return the loss in float32 from half-precision logits, as most training loops do."""
    return F.cross_entropy(F.linear(e, w).float(), target)


def _chunked(e: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return torch's chunked loss; ``options=None`` would select the dense reference."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"not in torch {torch.__version__}")
    return F.linear_cross_entropy(e, w, target, options=torch.nn.LinearCrossEntropyOptions(**options))


def _liger(e: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(**options)(w, e, target)
    return loss


def _liger_jsd(e: Tensor, w: Tensor, te: Tensor, tw: Tensor, *, beta: float, **options: Any) -> Tensor:
    """Return Liger's divergence, whose β agrees with softcurve's: 0 is the forward KL."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss: Tensor = LigerFusedLinearJSD(jsd_beta=beta, **options)(e, w, te, tw, None)
    return loss


def _liger_kl(e: Tensor, w: Tensor, te: Tensor, tw: Tensor, **options: Any) -> Tensor:
    """Return Liger's KL, which requires the dense probabilities of the teacher."""
    try:
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    except ModuleNotFoundError as error:
        if error.name == "liger_kernel.transformers.fused_linear_kl_div":
            raise Absent("not in the installed Liger") from error
        raise
    with torch.no_grad():
        probabilities = F.linear(te, tw).softmax(-1)
    loss: Tensor = LigerFusedLinearKLDivLoss(**options)(e, w, probabilities)
    return loss


def _cut(e: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(e, w, target, **options)
    return loss


def _quack(e: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(e, w, target, **options)
    return loss


def _quack_whole(e: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    loss: Tensor = linear_cross_entropy_func(e, w, None, target)
    return loss


# With filtering, cut-cross-entropy omits terms below bfloat16's resolution. "kahan" uses compensated summation, and
# "exact" neither filters nor rounds intermediate results; older versions have neither.
LOSSES: Mapping[str, Mapping[str, Loss]] = {
    "cross-entropy": {
        "torch eager, float32 logits": _upcast,
        "torch chunked": _chunked,
        "torch chunked, aspect ratio": partial(_chunked, chunking_method="aspect_ratio"),
        "torch chunked, accurate": partial(_chunked, acc_policy="accurate", acc_dtype=torch.float32),
        "Liger": _liger,
        "Liger, float32 sums": partial(_liger, accum_dtype=torch.float32),
        "cut-cross-entropy": partial(_cut, impl="cce"),
        "cut-cross-entropy, no filter": partial(_cut, impl="cce", filter_eps=None),
        "cut-cross-entropy, kahan": partial(_cut, impl="cce_kahan_full_c"),
        "cut-cross-entropy, exact": partial(_cut, impl="cce_exact"),
        "cut-cross-entropy, torch_compile": partial(_cut, impl="torch_compile"),
        "quack": _quack,
        "quack, whole logits": _quack_whole,
    },
    "forward-kl": {
        "Liger JSD": partial(_liger_jsd, beta=0.0),
        "Liger JSD, float32 sums": partial(_liger_jsd, beta=0.0, accum_dtype=torch.float32),
        "Liger KL, written-out teacher": _liger_kl,
    },
    "js": {
        "Liger JSD": partial(_liger_jsd, beta=0.5),
        "Liger JSD, float32 sums": partial(_liger_jsd, beta=0.5, accum_dtype=torch.float32),
    },
}


def contestants(name: str) -> dict[str, Loss]:
    """Return softcurve first, and the slowest to compile last, because the time limit may be reached by then."""
    case = CASES[name]
    return {
        OURS: partial(case.ours, memory_budget=None),
        f"{OURS}, 256 MiB": partial(case.ours, memory_budget=SMALL_BUDGET),
        "torch eager": case.dense,
        **LOSSES[name],
        "torch.compile": lambda *given: _compiled(case.dense)(*given),
    }


@cache
def _compiled(loss: Loss) -> Loss:
    """Compile a loss on its first run, because importing the compiler takes seconds."""
    return torch.compile(loss, dynamic=False)


def reason(error: Exception) -> str:
    """Return the note for a cell without figures."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    if isinstance(error, Absent):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first_line, _, _ = str(error).strip().partition("\n")
    return f"fails: {type(error).__name__}: {first_line[:120]}".replace("|", "/")
