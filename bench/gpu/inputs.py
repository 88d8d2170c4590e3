"""Features, heads and labels as after training: rows of all confidences, from hopeless to all but certain.

A logit is ``−log(k + 1)``, as log-frequencies by Zipf's law, plus noise of deviation ``SPREAD``. Three quarters of the
rows lean towards their label: their feature is moved along the label's own weight until the label's log-odds are about
a number drawn from ``MARGINS``, so that in most of them the residual's true-class entry ``p − 1`` cancels, by up to
nine digits. The other rows have random features and a random label. Of cross-entropy one row in ``IGNORED`` has none.
All are drawn in float32 and rounded to the dtype; the truth is that of the rounded numbers.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Generator, Tensor

from bench.heads import Inputs, Shape

SPREAD, MARGINS = 2.0, (-10.0, 20.0)
UNTRAINED, IGNORED = 4, 16  # one row in so many
IGNORE_INDEX = -100


def of_cross_entropy(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """With class indices."""
    generator = torch.Generator(device).manual_seed(0)
    labels, margins = _labels_and_margins(shape, generator)
    wanted = _student(shape, labels, margins, generator, dtype)
    labels[:: min(IGNORED, shape.rows)] = IGNORE_INDEX
    return Inputs(wanted, (labels,))


def of_divergence(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """With a teacher as wide as the student, which leans towards the same labels by other noise."""
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
    """A margin of NaN is a row of no training."""
    on = partial(torch.empty, shape.rows, device=generator.device)
    labels = torch.multinomial(_log_frequencies(shape, generator).exp(), shape.rows, True, generator=generator)
    margins = on().uniform_(*MARGINS, generator=generator)
    untrained = on().uniform_(generator=generator) < 1 / UNTRAINED
    anything = torch.randint(shape.classes, (shape.rows,), generator=generator, device=generator.device)
    return torch.where(untrained, anything, labels), margins.masked_fill(untrained, math.nan)


def _head(
    shape: Shape, labels: Tensor, margins: Tensor, generator: Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Features and weight; the first feature is 1 and has the log-frequencies for weights."""
    prior = _log_frequencies(shape, generator)
    noise = partial(torch.randn, generator=generator, device=generator.device)
    weight = noise(shape.classes, shape.width).mul_(SPREAD / math.sqrt(shape.width))
    features = noise(shape.rows, shape.width)
    own = weight[labels, 1:]
    others = prior.logsumexp(0) + SPREAD**2 / 2  # what the log-sum-exp is on average
    lacking = torch.nan_to_num(margins + others - prior[labels], nan=0.0)
    features[:, 1:] += (lacking / own.square().sum(1))[:, None] * own
    features[:, 0], weight[:, 0] = 1.0, prior
    return features.to(dtype), weight.to(dtype)


def _log_frequencies(shape: Shape, generator: Generator) -> Tensor:
    return -torch.arange(1, shape.classes + 1, device=generator.device).log()
