"""Conversions between tensors that are sharded over processes (DTensor) and the local tensors of a pass.

The classes of a head are sharded over one dimension of a device mesh, its rows over the others. A DTensor says where it
lies; a plain tensor is the same on every process. Each process knows only its own classes' part of the features'
gradient; the passes sum these parts before they round the gradient. The conversions are adjoint linear maps, each the
derivative of the other, so derivatives of every order keep their placements.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.losses.class_map import GroupedTarget
from softcurve.losses.low_rank import LowRankWeight, matrix_of
from softcurve.losses.targets import Target
from softcurve.losses.teacher import LinearTeacher
from softcurve.processes import max_over, named_group, part_of

__all__ = [
    "PlainHead", "ShardedHead", "class_group", "dtensors", "from_local", "head_layout", "lies_over_processes",
    "own_classes", "to_local",
]  # fmt: skip

T = TypeVar("T")

PIECE = 256  # rows that are compared at a time

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


def class_group(weight: Tensor) -> ProcessGroup | None:
    """Return the processes that share the classes of a weight, if it is sharded."""
    head = ShardedHead.of(torch.empty(0, weight.shape[1], device="meta"), [weight])
    return None if head is None or head.group is None else named_group(head.group)


def own_classes(weight: Tensor) -> slice:
    """Return the classes of a weight that this process has."""
    head = ShardedHead.of(torch.empty(0, weight.shape[1], device="meta"), [weight])
    return slice(None) if head is None else slice(head.first, head.first + head.local_class_count)


def head_layout(input: Tensor, linear_weight: Tensor | LowRankWeight, target: object, **others: object) -> PlainHead:
    """Return how the arguments of a public call lie over the processes.

    Raises ``ValueError`` for a DTensor beside plain ``input`` and weights, for chosen classes of a sharded teacher, and
    for what :meth:`ShardedHead.of` refuses.
    """
    compared = target.teacher if isinstance(target, GroupedTarget) else target
    teacher = [compared] if isinstance(compared, LinearTeacher) else []
    if any(each.classes is not None and lies_over_processes(matrix_of(each.linear_weight)) for each in teacher):
        raise ValueError(
            "LinearTeacher classes must be None where its linear_weight is a DTensor: the chosen classes may be on "
            "other processes; pass the weight of those classes, distributed as that of the model, or a plain one"
        )
    sharded = ShardedHead.of(input, [matrix_of(linear_weight), *(matrix_of(each.linear_weight) for each in teacher)])
    if sharded is not None:
        return sharded
    for name, value in {"target": target, "linear_weight": linear_weight, **others}.items():
        if any(map(lies_over_processes, _parts_of(value))):
            raise ValueError(
                f"{name} must be plain where input and linear_weight are, got a DTensor; make input one too, "
                "replicated or sharded on rows, by DTensor.from_local"
            )
    return PlainHead(input.shape[:-1], linear_weight.shape[0])


def _parts_of(value: object) -> list[object]:
    """Return the attributes of a target or of a weight of low rank, and any other value itself."""
    if not isinstance(value, Target | LowRankWeight):
        return [value]
    return [part for attribute in vars(value).values() for part in _parts_of(attribute)]


@dataclass(frozen=True, eq=False)
class PlainHead:
    """A head on one process: arguments are local as they are, and so are results."""

    leading: torch.Size  # of the rows of all processes
    classes: int  # of all processes

    @property
    def shard(self) -> dict[str, Any]:
        """The fields of :class:`~softcurve.losses.spec.LossSpec` that say which classes are here."""
        return {}

    def agreed(self, make: Callable[[], T]) -> T:
        """Return ``make()``; an error in one process is an error in all, and none is left waiting."""
        return make()

    def cuts_classes_of(self, tensor: Tensor) -> bool:
        """Return whether processes have different classes of a tensor ``(..., C)``."""
        return False

    def full(self, name: str, tensor: Tensor) -> Tensor:
        """Return the whole of a small tensor on every process; raise ``ValueError`` if a DTensor requires gradients."""
        return tensor

    def require_leading(self, name: str, shape: Sequence[int], description: str) -> None:
        """Raise ``ValueError`` for rows that are not those of all processes."""

    def _as_it_is(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return a tensor of one process, whose part of it is the whole; see :class:`ShardedHead`."""
        return tensor

    local_rows = local_distributions = local_classes = local_whole = _as_it_is
    summed = restored = restored_features = restored_classes = _as_it_is


@dataclass(frozen=True, eq=False)
class ShardedHead(PlainHead):
    """A head whose tensors lie over a mesh: how, by placement on each of its dimensions."""

    mesh: DeviceMesh
    by_class: int | None  # the dimension of the mesh over which the classes are sharded
    rows: Placements  # of rows: replicated over ``by_class``, and over the others as ``input`` has them
    returns_dtensor: bool

    @staticmethod
    def of(input: Tensor, weights: Sequence[Tensor]) -> ShardedHead | None:
        """Return how features and ``weights``, those of the model and a teacher, are sharded; ``None`` if they are not.

        Raises ``ValueError`` for meshes that differ, weights sharded on classes in two ways, and for a plain ``input``
        that is not the same on every process; ``NotImplementedError`` in forward mode.
        """
        sharded: list[Any] = [tensor for tensor in (input, *weights) if lies_over_processes(tensor)]
        if not sharded:
            return None
        _refuse_transforms(input, *weights)
        mesh = sharded[0].device_mesh
        if any(tensor.device_mesh != mesh for tensor in sharded):
            raise ValueError(
                f"input and linear_weight must lie on the same device mesh, got {[t.device_mesh for t in sharded]}; "
                "redistribute them on one"
            )
        of_input = sharded[0] if lies_over_processes(input) else None
        replicated = dtensors().Replicate()
        placements = (replicated,) * mesh.ndim if of_input is None else of_input.placements
        of_weights = sharded if of_input is None else sharded[1:]
        by_classes = {
            dim for weight in of_weights for dim, placement in enumerate(weight.placements) if placement.is_shard(0)
        }
        # A weight that is sharded over the rows' dimension too, as FSDP's, is gathered there; over one it stays.
        of_classes = {dim for dim in by_classes if not placements[dim].is_shard()} or {*sorted(by_classes)[-1:]}
        if len(of_classes) > 1:
            raise ValueError(
                "linear_weight must be sharded on classes over one dimension of the mesh, got "
                f"{sorted(of_classes)} of {mesh}; redistribute it"
            )
        by_class = min(of_classes, default=None)
        kept = tuple(
            placement if dim != by_class and placement.is_shard() and placement.dim < input.ndim - 1 else replicated
            for dim, placement in enumerate(placements)
        )
        head = ShardedHead(input.shape[:-1], weights[0].shape[0], mesh, by_class, kept, of_input is not None)
        if checks.values_visible(*map(_local_part, (input, *weights))):
            # On more dimensions the local part of a weight is not yet that of its classes.
            one_dimension = mesh.ndim == 1 and by_class is not None
            counted = [each for each in of_weights if one_dimension and each.placements[0].is_shard(0)]
            head._require_the_same(input if of_input is None else None, counted)
        return head

    @property
    def group(self) -> str | None:
        """The name of the processes that share the classes of the same rows."""
        return None if self.by_class is None else str(self.mesh.get_group(self.by_class).group_name)

    @property
    def first(self) -> int:
        """The first class of this process."""
        return self._part_of(self.classes).start  # type: ignore[no-any-return]

    @property
    def local_class_count(self) -> int:
        """The number of classes of this process."""
        return self._count_of(self.classes)

    def _count_of(self, classes: int) -> int:
        """Return how many of ``classes`` this process has."""
        part = self._part_of(classes)
        return int(part.stop - part.start)

    def _part_of(self, classes: int) -> slice:
        """Return which of ``classes`` this process has."""
        if self.by_class is None:
            return slice(0, classes)
        return part_of(classes, self.mesh.get_local_rank(self.by_class), self.mesh.size(self.by_class))

    def cuts_classes_of(self, tensor: Any) -> bool:  # noqa: D102
        if self.by_class is None or not lies_over_processes(tensor):
            return False
        return bool(tensor.placements[self.by_class].is_shard(tensor.ndim - 1))

    @property
    def shard(self) -> dict[str, Any]:  # noqa: D102
        return {"group": self.group, "first": self.first, "classes": self.classes}

    # --- to local tensors --------------------------------------------------------------------------------------------

    def local_rows(self, tensor: Tensor) -> Tensor:
        """Return the part of ``(..., d)`` or ``(...)`` with the rows of this process."""
        return to_local(tensor, self.mesh, self.rows, self.rows)

    def local_distributions(self, tensor: Tensor) -> Tensor:
        """Return the part of ``(..., C)`` with the rows and classes of this process."""
        placements = self._with_classes(self.rows, dtensors().Shard(tensor.ndim - 1))
        return to_local(tensor, self.mesh, placements, placements)

    def local_classes(self, tensor: Tensor) -> Tensor:
        """Return the part of ``(C, ...)`` with the classes of this process."""
        placements = self._with_classes(self._replicated, dtensors().Shard(0))
        return to_local(tensor, self.mesh, placements, self._sums_by_class)

    def local_whole(self, tensor: Tensor, *, by_class: bool = False) -> Tensor:
        """Return the whole of a tensor that all rows use and, if ``by_class``, of which each process needs a part."""
        sums = self._with_classes(self._sums, dtensors().Partial()) if by_class else self._sums
        return to_local(tensor, self.mesh, self._replicated, sums)

    def full(self, name: str, tensor: Any) -> Tensor:  # noqa: D102
        if not lies_over_processes(tensor):
            return cast("Tensor", tensor)
        if tensor.requires_grad:
            raise ValueError(f"{name} must not require gradients where it is gathered from many processes; detach it")
        return cast("Tensor", tensor.full_tensor())

    def require_leading(self, name: str, shape: Sequence[int], description: str) -> None:  # noqa: D102
        if tuple(shape[: len(self.leading)]) != tuple(self.leading):
            raise ValueError(
                f"{name} must have the rows {tuple(self.leading)} of input over all processes, got "
                f"{description}; a plain tensor is the same on every process, and one that holds only this "
                "process's rows is made one by DTensor.from_local"
            )

    # --- back to tensors of all processes ----------------------------------------------------------------------------

    def summed(self, part: Tensor, *, divides_rows: bool = False) -> Tensor:
        """Return the sum over the processes that have other rows, which all of them receive.

        If each process divides its own rows by it, it has a part of its gradient.
        """
        if not self._cuts_rows:
            return part
        total = from_local(part, self.mesh, self._sums, None, self._replicated, part.shape)
        return to_local(total, self.mesh, self._replicated, self._sums) if divides_rows else total

    def restored(self, tensor: Tensor, *, per_row: bool) -> Tensor:
        """Return what a public call returns: a DTensor if ``input`` is one, sharded like ``input`` if ``per_row``."""
        if not self.returns_dtensor and not (per_row and self._cuts_rows):
            return tensor
        placements = self.rows if per_row else self._replicated
        shape = torch.Size([*self.leading, *tensor.shape[len(self.leading) :]]) if per_row else tensor.shape
        outside = placements if self.returns_dtensor else None
        return from_local(tensor, self.mesh, placements, outside, placements, shape)

    def restored_features(self, part: Tensor, like: Tensor) -> Tensor:
        """Return the sum over classes of a tensor that lies like the features, from the part of each process."""
        placements = self._with_classes(self.rows, dtensors().Partial())
        return from_local(part, self.mesh, placements, placements_of(like), placements, like.shape)

    def restored_classes(self, part: Tensor, like: Tensor) -> Tensor:
        """Return the sum over rows of a tensor that lies like a weight or bias, from the part of each process."""
        return from_local(part, self.mesh, self._sums_by_class, placements_of(like), self._sums_by_class, like.shape)

    @property
    def _cuts_rows(self) -> bool:
        return any(placement.is_shard() for placement in self.rows)

    @property
    def _replicated(self) -> Placements:
        return (dtensors().Replicate(),) * self.mesh.ndim

    @property
    def _sums(self) -> Placements:
        """The placements of a sum over rows, of which each process has the part of its own rows."""
        pairs = zip(self.rows, self._replicated, strict=True)
        return tuple(dtensors().Partial() if rows.is_shard() else replicated for rows, replicated in pairs)

    @property
    def _sums_by_class(self) -> Placements:
        return self._with_classes(self._sums, dtensors().Shard(0))

    def _with_classes(self, placements: Placements, of_classes: Placement) -> Placements:
        return tuple(of_classes if dim == self.by_class else placement for dim, placement in enumerate(placements))

    # --- agreement between the processes -----------------------------------------------------------------------------

    def agreed(self, make: Callable[[], T]) -> T:  # noqa: D102
        if not self._cuts_rows or self.mesh.device_type != "cpu" or torch.compiler.is_compiling():
            return make()  # No process looks at values there.
        flag = torch.zeros(1)
        try:
            made = make()
        except (TypeError, ValueError) as error:
            self._max_over_mesh(flag.fill_(2 if isinstance(error, checks.InvalidEntriesError) else 1))
            raise
        self._max_over_mesh(flag)
        if flag:
            kind = checks.InvalidEntriesError if flag == 2 else ValueError
            raise kind("the arguments must be right in all processes, got an error in another; see what it says")
        return made

    def _max_over_mesh(self, *tensors: Tensor) -> None:
        for dim in range(self.mesh.ndim):
            max_over(tensors, self.mesh.get_group(dim))

    def _require_the_same(self, input: Tensor | None, weights: Sequence[Tensor]) -> None:
        """Compare what the processes have, with one small message on each dimension of the mesh.

        A plain ``input`` is compared by two numbers, which rounding may move a little; ``weights`` are those that are
        sharded on their classes.
        """
        local = torch.zeros(4, dtype=torch.float64)
        counts = [_local_part(weight).shape[0] for weight in weights]
        even = [self._count_of(len(weight)) for weight in weights]
        local[0] = float(counts != even)
        if input is not None:
            local[1] = input.numel()
            local[2:] = torch.stack(_fingerprint(input.detach().reshape(-1, input.shape[-1])))
        tolerance = 0.0 if input is None else torch.finfo(input.dtype).eps ** 0.5
        most, least = local.clone(), -local
        self._max_over_mesh(most, least)
        distance = most + least
        if most[0]:
            raise ValueError(
                f"linear_weight must be sharded evenly, {' and '.join(map(str, even))} classes on this process (as "
                f"distribute_tensor does), got {' and '.join(map(str, counts))}; redistribute it"
            )
        if input is not None and (distance[1] != 0 or (distance[2:] > tolerance * most[3]).any()):
            raise ValueError(
                "input must be the same on every process where it is a plain tensor and linear_weight is sharded, "
                f"got {checks.describe(input)} here and something else elsewhere; say by DTensor.from_local where "
                "its rows lie"
            )


def _local_part(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local() if lies_over_processes(tensor) else tensor
    return part


def _fingerprint(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a number that depends on every entry and its place, and the norm."""
    number, square = torch.zeros(2, dtype=torch.float64).unbind()
    along = torch.arange(rows.shape[1], dtype=torch.float64).cos()
    for start in range(0, len(rows), PIECE):
        piece = rows[start : start + PIECE].double().nan_to_num()
        of_rows = torch.arange(start, start + len(piece), dtype=torch.float64).cos()
        number, square = number + of_rows @ (piece @ along), square + piece.square().sum()
    return number, square.sqrt()


def _refuse_transforms(*tensors: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    forward = forward_ad._current_level >= 0
    moves = forward and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if moves or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "a head over many processes has derivatives in reverse mode alone, and no torch.func transforms; for a "
            "Hessian product differentiate a gradient made with create_graph=True, or use softcurve.curvature"
        )


# --- the maps between a tensor that lies over processes and its local parts, each the derivative of the other ---------


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
