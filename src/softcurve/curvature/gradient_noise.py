"""How noisy the gradients of single sequences are, as a number of sequences: the simple noise scale of a batch.

With ``n`` sequences of gradients ``g_i`` whose mean is the gradient ``G`` of the loss,

    tr Σ = Σ ‖g_i − G‖² / (n − 1) = n (mean ‖g_i‖² − ‖G‖²) / (n − 1)
    scale = tr Σ / (‖G‖² − tr Σ / n)

Both are unbiased, of the variance of a sequence's gradient and of the squared norm of the expected gradient. A batch of
``scale`` sequences has as much noise as signal; much larger ones hardly make a step better.

McCandlish, Kaplan, Amodei 2018, "An empirical model of large-batch training", appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import nn
from torch.distributed import ProcessGroup

from softcurve.curvature.losses import HeadLosses, LossOptions, with_options_of
from softcurve.curvature.network import Batch, SplitNetwork
from softcurve.records import ShortRepr


@dataclass(frozen=True, eq=False, repr=False)
class GradientNoise(ShortRepr):
    """The simple noise scale of the gradients of some sequences, in sequences.

    ``variance`` is ``tr Σ`` of a sequence's gradient, ``squared_norm`` the unbiased estimate of ``‖E g‖²``, and
    ``sequences`` the number of sequences that count. ``scale`` is ``inf`` if that estimate is not positive, because the
    sequences are too few to tell the gradient from the noise.
    """

    scale: float
    variance: float
    squared_norm: float
    sequences: int


@with_options_of(HeadLosses.of)
def gradient_noise(
    features: nn.Module, head: nn.Linear, data: Iterable[Batch], *, seed: int = 0, progress: bool = False,
    process_group: ProcessGroup | None = None, **options: Unpack[LossOptions],
) -> GradientNoise:  # fmt: skip
    """Return the noise scale of the gradients of the sequences in ``data``, in the trained parameters.

    A sequence is an index of the first dimension of the features, with all of its tokens; without positions, it is a
    row. Each takes a backward pass through the features of its batch, and two flat vectors are held.

    Args:
        features, head, data, seed, progress, process_group: As for :class:`~softcurve.curvature.Hessian`. The data are
            read once.
        loss, beta, ..., memory_budget: The loss and its options, see :class:`~softcurve.curvature.Hessian`. The scale
            is that of the mean over rows whatever the ``reduction``.

    Returns:
        :class:`GradientNoise`, in units of the loss: nats² for the variance and the squared norm.

    Raises:
        TypeError, ValueError: For an argument of the wrong type or value; for fewer than two sequences that count; what
            the loss raises for a batch.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> features, head = softcurve.curvature.split_head(model, "2")
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> softcurve.curvature.gradient_noise(features, head, data).sequences
        32
    """
    options["reduction"] = "mean"
    network = SplitNetwork(features, head, data, HeadLosses.of(**options), seed, progress, process_group)
    total = torch.zeros(network.layout.size, dtype=network.layout.dtype, device=network.device)
    squares, counted, weight = 0.0, 0.0, 0.0
    for rows in network.rows("Gradient noise"):
        weight += rows.divisor
        counted += float((rows.losses.tensors.row_weight != 0).reshape(rows.grouping("sequence")).any(1).sum())
        for gradient in map(network.sum_class_shards, network.gradients(rows, "sequence")):
            squares += gradient.double().square().sum().item()
            total += gradient
    n, weight = int(network.sum_number(counted)), network.require_rows(weight)
    if n < 2:
        raise ValueError(f"data must hold two sequences that count, got {n}; one gradient has no variance")
    norm = network.sum_data_shards(total).double().square().sum().item() / weight**2
    # Gradients n s_i / weight, whose mean over the sequences is the gradient of the mean over rows.
    variance = n * (n * network.sum_number(squares) / weight**2 - norm) / (n - 1)
    signal = norm - variance / n
    return GradientNoise(variance / signal if signal > 0 else math.inf, variance, signal, n)
