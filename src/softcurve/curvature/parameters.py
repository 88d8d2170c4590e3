"""Where each parameter of features and a head lies in a flat vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Layout:
    """The trainable parameters of ``features``, then of ``head``, in ``named_parameters`` order, a tied one once."""

    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]
    slices: tuple[slice, ...]
    of_features: tuple[int, ...]  # those that the features use
    head_weight: int | None  # None where it is frozen
    head_bias: int | None

    @staticmethod
    def of(features: nn.Module, head: nn.Linear) -> Layout:
        """Raises ``ValueError`` if nothing requires a gradient."""
        places: dict[int, int] = {}
        names: list[str] = []
        tensors: list[nn.Parameter] = []
        for prefix, module in (("features", features), ("head", head)):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and id(parameter) not in places:
                    places[id(parameter)] = len(tensors)
                    names.append(f"{prefix}.{name}")
                    tensors.append(parameter)
        if not tensors:
            raise ValueError("features and head must have a parameter that requires a gradient, got none; unfreeze one")
        slices, start = [], 0
        for tensor in tensors:
            slices.append(slice(start, start + tensor.numel()))
            start += tensor.numel()
        used = {places[id(p)] for p in features.parameters() if id(p) in places}
        bias = None if head.bias is None else places.get(id(head.bias))
        return Layout(
            tuple(names), tuple(tensors), tuple(slices), tuple(sorted(used)), places.get(id(head.weight)), bias
        )

    def __repr__(self) -> str:
        """One line; the names are in :attr:`names`."""
        return f"Layout(size={self.size}, parameters={len(self.names)}, dtype={str(self.dtype).removeprefix('torch.')})"

    @property
    def size(self) -> int:
        """Entries of the flat vector."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Of the flat vector: at least float32."""
        dtype = torch.float32
        for tensor in self.tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def view(self, flat: Tensor, number: int) -> Tensor:
        """A parameter's part of a flat vector, in its shape."""
        return flat[self.slices[number]].view(self.tensors[number].shape)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector by names."""
        return {name: self.view(flat, i) for i, name in enumerate(self.names)}
