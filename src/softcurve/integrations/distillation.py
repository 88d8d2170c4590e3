"""The distillation loss of a training step: unmade logits of a student, and those or cached lists of a teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcurve import checks
from softcurve.integrations.heads import record_of_logits, unmade_logits
from softcurve.lazy.record import LinearRecord
from softcurve.linear import FORWARD_KL, linear_distillation
from softcurve.losses.divergences import Divergence
from softcurve.losses.targets import Target
from softcurve.losses.topk import TopK, TopKCache
from softcurve.typing import Integer, Number

ROWS = "teacher_rows"  # the column of a batch that names rows of a cache


@dataclass(frozen=True)
class Distillation:
    """The teacher and the options of :func:`softcurve.linear_distillation`.

    ``teacher`` is a model, or a :class:`~softcurve.TopKCache` of its lists. ``classes`` are the classes of a model that
    are the student's, as for :class:`~softcurve.LinearTeacher`.
    """

    teacher: nn.Module | TopKCache
    alpha: Number
    temperature: Number = 1.0
    divergence: Divergence = FORWARD_KL
    entropy_bonus: Number = 0.0
    shift: Integer = 1
    classes: Any = None
    label_smoothing: Number = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module | TopKCache):
            raise TypeError(
                "teacher must be a torch.nn.Module or a softcurve.TopKCache of its lists, got "
                f"{type(self.teacher).__name__}; open a cache by softcurve.TopK.load(path)"
            )
        checks.require_between("alpha", self.alpha, 0.0, 1.0)
        checks.require_positive("temperature", self.temperature)
        checks.require_between("label_smoothing", self.label_smoothing, 0.0, 1.0)

    def target(self, inputs: Mapping[str, Any]) -> Target:
        """Return the teacher's distributions at the positions of a batch."""
        if isinstance(self.teacher, TopKCache):
            return lists_of_batch(self.teacher, inputs)
        arguments = {name: value for name, value in inputs.items() if name not in ("labels", ROWS)}
        self.teacher.eval()
        with torch.no_grad(), unmade_logits(self.teacher):
            record = _require_record(logits_of(self.teacher(**arguments)), "teacher")
        target = record.as_teacher(1.0)
        return target if self.classes is None else replace(target, classes=self.classes)

    def loss(self, logits: Tensor, labels: Tensor, target: Target, items: Tensor | int | None) -> Tensor:
        """Return the loss of a batch: the mean over its labels, or the sum over them divided by ``items``.

        It is NaN where one of the models has diverged.
        """
        record = _require_record(logits, "model")
        # A scale of the logits belongs to the student at every temperature, so that the features have it.
        factor = record.scale if record.after is None else record.scale * record.after
        e, bias = record.input, record.bias
        if factor != 1:
            e, bias = e * factor, None if bias is None else bias * factor
        try:
            with record.autocast():
                loss = linear_distillation(
                    e, record.weight, labels, target, alpha=self.alpha, temperature=self.temperature,
                    divergence=self.divergence, entropy_bonus=self.entropy_bonus, linear_bias=bias,
                    softcap=record.after, shift=self.shift, label_smoothing=self.label_smoothing,
                    memory_budget=record.memory_budget, reduction="mean" if items is None else "sum",
                )  # fmt: skip
        except checks.InvalidEntriesError:  # a Trainer goes on where a model has NaN; its gradients are NaN, too
            parts = [part.float().sum() for part in record.tensors() if part is not None]
            loss = torch.stack(parts).sum() * torch.nan
        return loss if items is None else loss / items


def logits_of(outputs: Any) -> Any:
    """Return the logits of a model's outputs, a record or a tuple."""
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits


def lists_of_batch(cache: TopKCache, inputs: Mapping[str, Any]) -> TopK:
    """Return the cached lists of a batch at the positions of its labels, fillers where there is none.

    ``inputs["teacher_rows"]`` holds rows of the cache: one for each label, negative where there is none; or one for
    each sequence, of which the cache holds either the lists of all positions as one row, or the first of consecutive
    rows, one for each position that ``inputs["attention_mask"]`` does not mask. A negative row of a sequence is that of
    all of its positions.

    Raises:
        ValueError: If the batch has no such rows, or they have another shape.
    """
    labels, rows = inputs["labels"], inputs.get(ROWS)
    if rows is None:
        raise ValueError(
            f"inputs must hold {ROWS!r}, the rows of the cache, got {sorted(inputs)}; add the column to the data set, "
            "and keep it by TrainingArguments(remove_unused_columns=False)"
        )
    rows = torch.as_tensor(rows)
    if rows.shape not in (labels.shape, labels.shape[:1]):
        raise ValueError(
            f"{ROWS} must have the shape of the labels {tuple(labels.shape)}, or one row for each sequence, got "
            f"{checks.describe(rows)}; pad them with -1"
        )
    per_position = len(cache.shards[0].shape) == 2  # rows, listed classes
    if per_position and rows.ndim < labels.ndim:
        mask = inputs.get("attention_mask", torch.ones_like(labels)).to(rows.device)
        first = rows.unsqueeze(1)
        rows = torch.where((mask == 0) | (first < 0), -1, first + mask.cumsum(1) - 1)
    lists = cache[rows.clamp(min=0).cpu()].to(labels.device)
    indices, log_probs = lists.indices, lists.log_probs
    missing = (rows < 0).to(labels.device)
    log_probs = log_probs.masked_fill(missing.view(*missing.shape, *(1,) * (log_probs.ndim - missing.ndim)), -math.inf)
    if not per_position:
        pad = (0, 0, 0, labels.shape[1] - indices.shape[1])  # cuts off where it is negative
        indices, log_probs = F.pad(indices, pad), F.pad(log_probs, pad, value=-math.inf)
    return TopK(indices, log_probs, lists.tail)


def _require_record(logits: Any, name: str) -> LinearRecord:
    record = record_of_logits(logits)
    if record is None:
        raise TypeError(
            f"{name} must return the logits of its head, scaled or capped at most, got {checks.describe(logits)} made "
            "by other operations; compute its loss by softcurve.linear_distillation from features and a head instead"
        )
    return record
