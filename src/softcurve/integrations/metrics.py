"""Metrics of next tokens from a model's logits, made or not: accuracy, perplexity, entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from softcurve.checks import InvalidEntriesError
from softcurve.functional import cross_entropy, entropy
from softcurve.head.problem import require_shift
from softcurve.integrations.heads import record_of_logits
from softcurve.linear import linear_cross_entropy
from softcurve.typing import Integer


class MetricArguments(TypedDict):
    """Two arguments of ``transformers.Trainer``."""

    preprocess_logits_for_metrics: Callable[[Any, Tensor], Tensor]
    compute_metrics: Callable[[Any], dict[str, float]]


def token_metrics(*, shift: Integer = 1, ignore_index: Integer = -100) -> MetricArguments:
    """Return the arguments with which a ``Trainer`` evaluates the accuracy, perplexity and entropy of its predictions.

    All three come from one pass over the head. Within :func:`softcurve.lazy_logits` no logits are made. Four numbers
    are kept for each sequence instead of its logits.

    Args:
        shift: 1 if position ``i`` predicts the label of ``i + 1``, as in causal language models; 0 if it predicts its
            own, as in masked language models, encoder-decoders and classifiers.
        ignore_index: The label of positions that do not count.

    The metrics are means over all labels of the evaluation that count: ``accuracy`` is the fraction whose class is the
    most probable one, ``perplexity`` the exponential of the mean cross-entropy, and ``entropy`` is that of the
    predictions, in nats. They are NaN if no label counts, or if a prediction that counts is NaN.

    Example:
        >>> from softcurve.integrations.transformers import token_metrics
        >>> sorted(token_metrics())
        ['compute_metrics', 'preprocess_logits_for_metrics']

        A trainer with these arguments, ``Trainer(model, arguments, eval_dataset=data, **token_metrics())``, reports
        ``eval_accuracy``, ``eval_perplexity`` and ``eval_entropy``.
    """
    places, ignored = require_shift(shift), int(ignore_index)

    def preprocess(logits: Any, labels: Tensor) -> Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits  # behind them are other outputs of the model
        labels = F.pad(labels[..., places:], (0, places), value=ignored) if places else labels
        try:
            return sums_of_sequences(logits, labels, ignored)
        except InvalidEntriesError:  # a Trainer goes on where its model has NaN
            return torch.full((labels.shape[0], 4), torch.nan, device=labels.device)

    return {"preprocess_logits_for_metrics": preprocess, "compute_metrics": means_of_labels}


def sums_of_sequences(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return, for each index of the first dimension, the number of labels and the sums over them, ``(n, 4)``.

    They are sums of correct predictions, of losses and of entropies.
    """
    record = record_of_logits(logits)
    if record is None:
        losses = cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        entropies, correct = entropy(logits), logits.argmax(-1) == labels
    else:
        with record.autocast():
            losses, stats = linear_cross_entropy(
                record.input, record.weight, labels, ignore_index=ignore_index, reduction="none", return_stats=True,
                **record.options,
            )  # fmt: skip
        entropies, correct = stats.entropy, stats.correct
    counted = labels != ignore_index
    parts = torch.stack([counted.to(losses.dtype), correct & counted, losses, torch.where(counted, entropies, 0.0)])
    return (parts.sum(tuple(range(2, parts.ndim))) if parts.ndim > 2 else parts).T


def means_of_labels(prediction: Any) -> dict[str, float]:
    """Return the metrics of an ``EvalPrediction`` that holds the sums of its sequences."""
    count, correct, loss, uncertainty = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        means = {"accuracy": correct / count, "perplexity": np.exp(loss / count), "entropy": uncertainty / count}
    return {name: float(mean) for name, mean in means.items()}
