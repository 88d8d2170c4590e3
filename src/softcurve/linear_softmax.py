"""What a head's softmax is, without its logits: log-probabilities, statistics, and the most probable classes."""

from __future__ import annotations

import math

from torch import Tensor

from softcurve.array_types import Float, Int
from softcurve.head.log_probs import head_top_classes, statistics_of_head
from softcurve.head.row_statistics import HeadStatistics
from softcurve.linear import Features, HeadBias, HeadWeight
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.reduction import Reduction
from softcurve.losses.spec import LossSpec
from softcurve.losses.topk import TopK
from softcurve.typing import Integer, Number


def linear_log_probs(
    input: Features, linear_weight: HeadWeight, index: Int[Tensor, "*rows_k"] | None, *,
    linear_bias: HeadBias | None = None, temperature: Number | Float[Tensor, "*rows"] = 1.0,
    softcap: Number | None = None, exclude: Tensor | None = None, memory_budget: Integer | None = None,
) -> HeadStatistics:  # fmt: skip
    """Return log-probabilities and other statistics of ``softmax(linear(input, ...))`` without holding the logits.

    Args:
        input: Features ``(..., d)``.
        linear_weight: ``(C, d)``.
        index: The classes whose log-probabilities are wanted: one for each row, ``(...)``, or ``k``, ``(..., k)``; or
            ``None`` for the other statistics alone, with ``log_probs`` of shape ``(..., 0)``.
        linear_bias: ``(C,)``; −inf masks a class.
        temperature: ``T`` of ``softmax(z / T)``, a number or one for each row, ``(...)``, without gradient.
        softcap: ``κ``: the logits become ``κ tanh(z / κ)`` before they are divided by ``T``.
        exclude: ``(..., k)``: class indices that have no part in a row's softmax, such as the items that a user has
            already seen, and −1 where a row has fewer; as in :func:`softcurve.cross_entropy`. If ``index`` lists one,
            its log-probability is −inf, and its logit has no gradient.
        memory_budget: Bytes for tiles; by default 128 MiB on the CPU and 1 GiB on CUDA.

    Returns:
        :class:`HeadStatistics`, in nats and float32 or wider: ``log_probs``, ``entropy``, ``lse``, ``mean_logit`` and
        ``collision``. All are differentiable in features, weight and bias, once and twice, with one more pass in the
        backward whichever of them are used. Rows whose incoming gradients are 0 are left out of it.

    Raises:
        TypeError, ValueError: If an argument has a wrong type, shape or value, such as an index that names no class.

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(5, 4)
        >>> statistics = softcurve.linear_log_probs(x, w, torch.tensor([0, 4, 2]), temperature=0.7)
        >>> loss = -(statistics.log_probs + 0.01 * statistics.entropy).mean()

    Source: ``∂ log p_k/∂z = δ_k − p``, ``∂H/∂z = −p ⊙ (z − p·z)``, ``∂(p·z)/∂z = p ⊙ (1 + z − p·z)`` and
    ``∂ log Σp²/∂z = 2 p ⊙ (p / Σp² − 1)``.
    """
    return statistics_of_head(
        input, linear_weight, index, linear_bias=linear_bias, temperature=temperature, softcap=softcap,
        exclude=exclude, memory_budget=memory_budget,
    )  # fmt: skip


def linear_topk(
    input: Features, linear_weight: HeadWeight, k: Integer, *, linear_bias: HeadBias | None = None,
    temperature: Number = 1.0, softcap: Number | None = None, exclude: Tensor | None = None,
    memory_budget: Integer | None = None,
) -> TopK:  # fmt: skip
    """Return the ``k`` most probable classes of each row of ``linear(input, linear_weight, linear_bias)``, detached.

    The list holds natural log-probabilities normalised over all classes, in falling order; of equally probable classes
    the lower comes first. It is a target of a loss, what :meth:`TopK.save` writes, or a list of recommendations, from
    which ``exclude`` leaves out the items that a user has already seen.

    Args:
        input: Features ``(..., d)``.
        linear_weight: ``(C, d)``.
        k: From 1 to ``min(C, 1024)``.
        linear_bias: ``(C,)``; −inf masks a class. Where fewer than ``k`` classes of a row are neither masked nor
            excluded, others follow with a log-probability of −inf, so that they are fillers.
        temperature: ``T`` in ``z / T``, after the soft cap.
        softcap: ``κ`` in ``κ tanh(z / κ)``.
        exclude: ``(..., m)``: class indices that have no part in a row's softmax, and −1 where a row has fewer; as in
            :func:`softcurve.cross_entropy`.
        memory_budget: Bytes for tiles; by default 128 MiB on the CPU and 1 GiB on CUDA.

    Returns:
        A :class:`~softcurve.TopK` with ``tail="bucket"``: int64 indices and log-probabilities ``(..., k)`` in float32,
        or float64 if an argument is. For a sharded head it lies as the rows do.

    Raises:
        TypeError, ValueError: If an argument has a wrong type, shape or value. NaN in a row is an error in eager mode
            on the CPU; elsewhere it is returned.

    Example:
        >>> x, w = torch.randn(3, 4), torch.randn(9, 4)
        >>> teacher = softcurve.linear_topk(x, w, 2)
        >>> loss = softcurve.linear_kl_divergence(x, w, teacher)

    Source: ``log p_k = z_k − log Σ_j e^{z_j}``.
    """
    loss = LossSpec.of(CrossEntropy(), Reduction.of("none", math.e), temperature, softcap)
    return TopK(*head_top_classes(loss, input, linear_weight, linear_bias, k, exclude, memory_budget))
