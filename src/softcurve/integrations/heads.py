"""The unmade logits of a model's outputs, for functions that take them apart."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from softcurve.lazy import LazyLogits, lazy_logits
from softcurve.lazy.heads import head_of, is_lazy
from softcurve.lazy.record import LinearRecord


def unmade_logits(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which the head of a model answers with unmade logits, as it may do already."""
    return nullcontext() if is_lazy(head_of(model, None)) else lazy_logits(model)


def record_of_logits(logits: object) -> LinearRecord | None:
    """Return what unmade logits are, if a loss on a head can take them; ``None`` for any other tensor."""
    if not isinstance(logits, LazyLogits) or logits.is_made:
        return None
    record = logits.record
    return record if record.kind == "logits" and record.streams and record.classes_last else None
