"""Random features, heads and labels that resemble a trained model, with rows of all confidences.

A logit is the log-frequency ``−log(k + 1)`` of Zipf's law plus noise of standard deviation ``SPREAD``. In three
quarters of the rows the feature is moved along the weight of the label until the log-odds of the label are about a
number drawn from ``MARGINS``. In most of these rows the entry ``p − 1`` of the residual cancels, by up to nine digits.
The other rows have random features and a random label. For cross-entropy, one row in ``IGNORED`` is ignored. All
numbers are drawn in float32 and rounded to the dtype; the exact results are those of the rounded numbers.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Generator, Tensor

from bench.heads import Inputs, Shape

SPREAD, MARGINS = 2.0, (-10.0, 20.0)
UNTRAINED, IGNORED = 4, 16  # one row in 4 has a random label, one in 16 is ignored
IGNORE_INDEX = -100


def of_cross_entropy(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return inputs with class indices."""
    generator = torch.Generator(device).manual_seed(0)
    labels, margins = _labels_and_margins(shape, generator)
    wanted = _student(shape, labels, margins, generator, dtype)
    labels[:: min(IGNORED, shape.rows)] = IGNORE_INDEX
    return Inputs(wanted, (labels,))


def of_divergence(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return inputs with a teacher of the student's width, for the same labels and other noise."""
    generator = torch.Generator(device).manual_seed(0)
    labels, margins = _labels_and_margins(shape, generator)
    wanted = _student(shape, labels, margins, generator, dtype)
    return Inputs(wanted, _head(shape, labels, margins, generator, dtype))


def _student(
    shape: Shape, labels: Tensor, margins: Tensor, generator: Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    features, weight = _head(shape, labels, margins, generator, dtype)
    return features.requires_grad_(), weight.requires_grad_()


def _labels_and_margins(shape: Shape, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return labels and margins; a margin of NaN marks a row with random features and label."""
    on = partial(torch.empty, shape.rows, device=generator.device)
    labels = torch.multinomial(_log_frequencies(shape, generator).exp(), shape.rows, True, generator=generator)
    margins = on().uniform_(*MARGINS, generator=generator)
    untrained = on().uniform_(generator=generator) < 1 / UNTRAINED
    anything = torch.randint(shape.classes, (shape.rows,), generator=generator, device=generator.device)
    return torch.where(untrained, anything, labels), margins.masked_fill(untrained, math.nan)


def _head(
    shape: Shape, labels: Tensor, margins: Tensor, generator: Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return features and weight; the first feature is 1, and its weights are the log-frequencies."""
    prior = _log_frequencies(shape, generator)
    noise = partial(torch.randn, generator=generator, device=generator.device)
    weight = noise(shape.classes, shape.width).mul_(SPREAD / math.sqrt(shape.width))
    features = noise(shape.rows, shape.width)
    own = weight[labels, 1:]
    others = prior.logsumexp(0) + SPREAD**2 / 2  # the mean of the log-sum-exp
    lacking = torch.nan_to_num(margins + others - prior[labels], nan=0.0)
    features[:, 1:] += (lacking / own.square().sum(1))[:, None] * own
    features[:, 0], weight[:, 0] = 1.0, prior
    return features.to(dtype), weight.to(dtype)


def _log_frequencies(shape: Shape, generator: Generator) -> Tensor:
    return -torch.arange(1, shape.classes + 1, device=generator.device).log()
