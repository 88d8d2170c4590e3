"""Unmade logits inside and behind the transforms of ``torch.func``.

A transform replaces tensors by wrappers, which it takes off what a function returns, but it finds none around unmade
logits. What they are made of stays wrapped, also after the transform has ended, and torch reads such a wrapper as the
tensor inside it; as an output of ``torch.autograd.grad`` it still has its place in the graph of the transform.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softcurve.lazy.record import LinearRecord
from softcurve.losses.low_rank import LowRankWeight


def innermost_is_vmap() -> bool:
    """Return whether ``vmap`` is the innermost transform, which takes its dimension off what a function returns."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Vmap


def is_batched(record: LinearRecord) -> bool:
    """Return whether a tensor of a record has a dimension of ``vmap``."""
    return any(each is not None and torch._C._functorch.is_batchedtensor(each) for each in record.tensors())


def has_ended(*tensors: Tensor | None) -> bool:
    """Return whether one of the tensors has the wrapper of a transform that has ended."""
    return any(each is not None and _inside(each) is not each for each in tensors)


def has_lost_graph(record: LinearRecord, dense: Tensor | None) -> bool:
    """Return whether a transform has ended, in whose graph the logits, if ``dense`` are made, have no place."""
    return has_ended(*record.tensors()) and not has_ended(dense)


def unwrapped(record: LinearRecord) -> LinearRecord:
    """Return a record without the wrappers of transforms that have ended."""
    return _of_tensors(record, [None if each is None else _inside(each) for each in record.tensors()])


def pulled_back(record: LinearRecord, gradient: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of a record that require gradients, and theirs for the ``gradient`` of what is recorded."""
    tensors = record.tensors()
    places = [place for place, each in enumerate(tensors) if each is not None and each.requires_grad]

    def recorded(*values: Tensor) -> Tensor:
        every: list[Any] = [None if each is None else _inside(each) for each in tensors]
        for place, value in zip(places, values, strict=True):
            every[place] = value
        return _of_tensors(record, every).materialize()

    pull = torch.func.vjp(recorded, *(_inside(tensors[place]) for place in places))[1]
    return [tensors[place] for place in places], list(pull(gradient))


def _inside(tensor: Tensor) -> Tensor:
    while (inner := torch._C._functorch.unwrap_if_dead(tensor)) is not tensor:
        tensor = inner
    return tensor


def _of_tensors(record: LinearRecord, tensors: list[Any]) -> LinearRecord:
    input, weight, bias, a, b, scale = tensors
    if isinstance(record.weight, LowRankWeight):
        weight = LowRankWeight(weight, a, b, record.weight.scale if scale is None else scale)
    return replace(record, input=input, weight=weight, bias=bias)
