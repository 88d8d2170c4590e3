"""The two maps between a tensor that lies over processes (DTensor) and its local parts.

They are adjoint linear maps, each the derivative of the other, so derivatives of every order keep their placements.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

    Placements: TypeAlias = tuple[Placement, ...]


def lies_over_processes(tensor: object) -> bool:
    """Return whether a tensor is a DTensor; there is none unless their module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def dtensors() -> Any:
    """Return the module of DTensors, which is loaded once there is one."""
    return sys.modules["torch.distributed.tensor"]


def placements_of(tensor: Any) -> Placements | None:
    """Return where a tensor and its gradient lie; the gradient of a sum's parts is replicated."""
    if not lies_over_processes(tensor):
        return None
    replicated = dtensors().Replicate()
    return tuple(replicated if placement.is_partial() else placement for placement in tensor.placements)


class _ToLocal(Function):
    """The local part of a tensor redistributed by ``local``; ``gradient`` are the placements of its gradient."""

    @staticmethod
    def forward(tensor: Tensor, mesh: DeviceMesh, local: Placements, gradient: Placements) -> Tensor:
        whole: Any = tensor.detach()
        if not lies_over_processes(whole):
            whole = dtensors().DTensor.from_local(whole, mesh, (dtensors().Replicate(),) * mesh.ndim, run_check=False)
        part: Tensor = whole.redistribute(mesh, local).to_local()
        return part.view_as(part)  # The local part inside a DTensor must stay free of a graph.

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensor, ctx.mesh, ctx.local, ctx.gradient = inputs
        ctx.outside, ctx.shape = placements_of(tensor), tensor.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return from_local(gradient, ctx.mesh, ctx.gradient, ctx.outside, ctx.local, ctx.shape), None, None, None


class _FromLocal(Function):
    """A tensor of all processes from their parts: a DTensor placed by ``outside``, or a plain tensor.

    ``change`` are the placements of the part's gradient.
    """

    @staticmethod
    def forward(
        part: Tensor, mesh: DeviceMesh, local: Placements, outside: Placements | None, change: Placements,
        shape: torch.Size,
    ) -> Tensor:  # fmt: skip
        strides = torch.empty(shape, device="meta").stride()
        part = part.detach().contiguous()
        whole = dtensors().DTensor.from_local(part, mesh, local, run_check=False, shape=shape, stride=strides)
        replicated = (dtensors().Replicate(),) * mesh.ndim
        result: Tensor = whole.redistribute(mesh, replicated if outside is None else outside)
        return result if outside is not None else result.to_local()  # type: ignore[attr-defined]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.mesh, ctx.local, _, ctx.change, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return to_local(gradient, ctx.mesh, ctx.change, ctx.local), None, None, None, None, None


to_local: Callable[..., Tensor] = _ToLocal.apply
from_local: Callable[..., Tensor] = _FromLocal.apply
