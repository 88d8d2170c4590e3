"""Where each trained parameter of the features and the head lies in a flat vector."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Layout:
    """The trained parameters of ``features``, then of ``head``, in ``named_parameters`` order, a tied one once."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    slices: tuple[slice, ...]
    of_features: tuple[int, ...]  # the parameters that the features use
    head_weight: int | None  # None where it is frozen
    head_bias: int | None
    size: int  # of the flat vector
    dtype: torch.dtype  # of the flat vector: at least float32

    @staticmethod
    def of(features: nn.Module, head: nn.Linear) -> Layout:
        """Raises ``ValueError`` if nothing requires a gradient."""
        named: dict[Tensor, str] = {}
        for prefix, module in (("features", features), ("head", head)):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    named.setdefault(parameter, f"{prefix}.{name}")
        if not named:
            raise ValueError("features and head must have a parameter that requires a gradient, got none; unfreeze one")
        places = {parameter: number for number, parameter in enumerate(named)}
        ends = list(itertools.accumulate((parameter.numel() for parameter in named), initial=0))
        return Layout(
            tuple(named.values()),
            tuple(named),
            tuple(itertools.starmap(slice, itertools.pairwise(ends))),
            tuple(sorted({places[p] for p in features.parameters() if p in places})),
            places.get(head.weight),
            None if head.bias is None else places.get(head.bias),
            ends[-1],
            functools.reduce(torch.promote_types, (parameter.dtype for parameter in named), torch.float32),
        )

    def __repr__(self) -> str:
        return f"Layout(size={self.size}, parameters={len(self.names)}, dtype={str(self.dtype).removeprefix('torch.')})"

    def view(self, flat: Tensor, number: int) -> Tensor:
        """A parameter's part of a flat vector, in the parameter's shape."""
        return flat[self.slices[number]].view(self.tensors[number].shape)
