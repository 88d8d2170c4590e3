"""A head whose tensors lie over the processes of a mesh: classes over one of its dimensions, rows over the others.

A DTensor says where it lies; a plain tensor is the same on every process. Each process works on its own classes and its
own rows. What it is given of a tensor (:class:`_Inside`) and what comes back of a gradient (:class:`_Outside`) are
adjoint linear maps, each the derivative of the other, so that derivatives of every order keep their placements. The
features' gradient, of which each process knows its own classes' part, is summed by the passes before it is rounded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.processes import max_over, named_group

T = TypeVar("T")

PIECE = 256  # rows that are compared at a time

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


def lies_over_processes(tensor: object) -> bool:
    """Whether it is a DTensor. Where their module is not loaded, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def class_group(weight: Tensor) -> ProcessGroup | None:
    """The processes that share the classes of a weight, if it is sharded."""
    spread = _alone(weight)
    return None if spread is None or spread.group is None else named_group(spread.group)


def own_classes(weight: Tensor) -> slice:
    """Those that this process has."""
    spread = _alone(weight)
    return slice(None) if spread is None else slice(spread.first, spread.first + spread.held)


def _alone(weight: Tensor) -> Spread | None:
    """How a weight lies that meets plain features."""
    if not lies_over_processes(weight):
        return None
    return Spread.of(torch.empty(0, weight.shape[1], device="meta"), [weight])


@dataclass(frozen=True, eq=False)
class Spread:
    """How the tensors of a head lie over a mesh: by placement on each of its dimensions."""

    mesh: DeviceMesh
    by_class: int | None  # the dimension of the mesh over which the classes are
    rows: tuple[Placement, ...]  # of rows: replicated there, and over the others as ``input`` has them
    leading: torch.Size  # of the rows of all processes
    classes: int  # of all processes
    returns_dtensor: bool

    @staticmethod
    def of(input: Tensor, weights: Sequence[Tensor]) -> Spread | None:
        """``None`` where all tensors are plain. ``weights``, of the model and a teacher, have the classes first.

        Raises ``ValueError`` for meshes that differ, weights sharded on classes in two ways, and for a plain ``input``
        that is not the same on every process; ``NotImplementedError`` in forward mode.
        """
        given: list[Any] = [tensor for tensor in (input, *weights) if lies_over_processes(tensor)]
        if not given:
            return None
        from torch.distributed.tensor import Replicate

        _refuse_transforms(input, *weights)
        mesh = given[0].device_mesh
        if any(tensor.device_mesh != mesh for tensor in given):
            raise ValueError(
                f"input and linear_weight must lie on the same device mesh, got {[t.device_mesh for t in given]}; "
                "redistribute them on one"
            )
        of_input = given[0] if lies_over_processes(input) else None
        placements = (Replicate(),) * mesh.ndim if of_input is None else of_input.placements
        of_weights = given if of_input is None else given[1:]
        sharded = {
            dim for weight in of_weights for dim, placement in enumerate(weight.placements) if placement.is_shard(0)
        }
        # A weight that lies over the rows' dimension too, as FSDP's, is gathered there; over one it stays as it lies.
        of_classes = {dim for dim in sharded if not placements[dim].is_shard()} or {*sorted(sharded)[-1:]}
        if len(of_classes) > 1:
            raise ValueError(
                "linear_weight must be sharded on classes over one dimension of the mesh, got "
                f"{sorted(of_classes)} of {mesh}; redistribute it"
            )
        by_class = min(of_classes, default=None)
        kept = tuple(
            placement if dim != by_class and placement.is_shard() and placement.dim < input.ndim - 1 else Replicate()
            for dim, placement in enumerate(placements)
        )
        classes = weights[0].shape[0]
        spread = Spread(mesh, by_class, kept, input.shape[:-1], classes, of_input is not None)
        plain = input if of_input is None else None
        if checks.values_visible(*map(_own_part, (input, *weights))):
            # Over more dimensions what is here of a weight is not yet what is here of its classes.
            whole = mesh.ndim == 1 and by_class is not None
            held = [_own_part(each).shape[0] for each in of_weights if each.placements[0].is_shard(0)]
            spread._require_the_same(plain, held if whole else [])
        return spread

    @property
    def group(self) -> str | None:
        """The name of the processes that share the classes of the same rows."""
        return None if self.by_class is None else str(self.mesh.get_group(self.by_class).group_name)

    @property
    def first(self) -> int:
        """This process's first class."""
        if self.by_class is None:
            return 0
        each = -(-self.classes // self.mesh.size(self.by_class))
        return min(each * self.mesh.get_local_rank(self.by_class), self.classes)

    @property
    def held(self) -> int:
        """How many of the classes this process has."""
        ways = 1 if self.by_class is None else self.mesh.size(self.by_class)
        return min(self.first - (-self.classes // ways), self.classes) - self.first

    # --- tensors of one process --------------------------------------------------------------------------------------

    def features(self, tensor: Tensor) -> Tensor:
        """``(..., d)`` of this process's rows. The passes sum its gradient over the classes of all."""
        return self._inside(tensor, self.rows, self.rows)

    def rows_of(self, name: str, tensor: Tensor) -> Tensor:
        """As :meth:`features`, of what every process knows the whole gradient of."""
        self.require_leading(name, tensor)
        return self._inside(tensor, self.rows, self.rows)

    def distributions(self, name: str, tensor: Tensor) -> Tensor:
        """``(..., C)``: of this process's rows and classes."""
        self.require_leading(name, tensor)
        placements = self._with_class_dim(self.rows, self._shard(tensor.ndim - 1))
        return self._inside(tensor, placements, placements)

    def classes_of(self, tensor: Tensor) -> Tensor:
        """``(C, ...)``: of this process's classes. Its gradient is the sum over the rows of all."""
        return self._inside(tensor, self._on_classes(), self._of_classes())

    def whole(self, tensor: Tensor) -> Tensor:
        """Of every process: what is small, and has no gradient."""
        return tensor.detach().full_tensor() if lies_over_processes(tensor) else tensor  # type: ignore[attr-defined]

    def require_leading(self, name: str, tensor: Tensor) -> None:
        """One entry for each row of all processes."""
        checks.require_tensor(name, tensor)
        if tensor.shape[: len(self.leading)] != self.leading:
            raise ValueError(
                f"{name} must have the rows {tuple(self.leading)} of input over all processes, got "
                f"{checks.describe(tensor)}; a plain tensor is the same on every process, and one that holds only this "
                "process's rows is made one by DTensor.from_local"
            )

    # --- results -----------------------------------------------------------------------------------------------------

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes that have other rows: a result, which all of them have."""
        if not self._cuts_rows:
            return part
        whole: Tensor = _Outside.apply(part, self.mesh, self._of_sums(), None, self._everywhere(), part.shape)  # type: ignore[no-untyped-call]
        return whole

    def divisor(self, part: Tensor) -> Tensor:
        """As :meth:`total`, of what each process divides its own rows by: of its gradient each has a part."""
        if not self._cuts_rows:
            return part
        whole: Tensor = _Inside.apply(self.total(part), self.mesh, self._everywhere(), self._of_sums())  # type: ignore[no-untyped-call]
        return whole

    def result(self, tensor: Tensor, *, per_row: bool) -> Tensor:
        """What a public call returns: a DTensor where ``input`` is one. Rows come as they lie; a sum everywhere."""
        placements = self.rows if per_row else self._everywhere()
        shape = torch.Size([*self.leading, *tensor.shape[len(self.leading) :]]) if per_row else tensor.shape
        outside = placements if self.returns_dtensor else None
        if outside is None and not any(placement.is_shard() for placement in placements):
            return tensor
        if not tensor.is_floating_point():
            return _outside(tensor, self.mesh, placements, outside, shape)
        returned: Tensor = _Outside.apply(tensor, self.mesh, placements, outside, placements, shape)  # type: ignore[no-untyped-call]
        return returned

    def features_back(self, part: Tensor, like: Tensor) -> Tensor:
        """What is of the features ``like``, from each process's part of the sum over classes."""
        placements = self._with_class_dim(self.rows, self._partial())
        return _outside(part, self.mesh, placements, _placements(like), like.shape)

    def rows_back(self, own: Tensor) -> Tensor:
        """``(n,)`` of this process's rows, as they lie."""
        return self.result(own, per_row=True)

    def classes_back(self, part: Tensor, like: Tensor) -> Tensor:
        """What is of the weight or bias ``like``, from each process's part of the sum over rows."""
        return _outside(part, self.mesh, self._of_classes(), _placements(like), like.shape)

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _cuts_rows(self) -> bool:
        return any(placement.is_shard() for placement in self.rows)

    def _everywhere(self) -> tuple[Placement, ...]:
        from torch.distributed.tensor import Replicate

        return (Replicate(),) * self.mesh.ndim

    def _of_sums(self) -> tuple[Placement, ...]:
        """A sum over rows."""
        pairs = zip(self.rows, self._everywhere(), strict=True)
        return tuple(self._partial() if rows.is_shard() else everywhere for rows, everywhere in pairs)

    @staticmethod
    def _partial() -> Placement:
        from torch.distributed.tensor import Partial

        return Partial()

    @staticmethod
    def _shard(dim: int) -> Placement:
        from torch.distributed.tensor import Shard

        return Shard(dim)

    def _on_classes(self) -> tuple[Placement, ...]:
        return self._with_class_dim(self._everywhere(), self._shard(0))

    def _of_classes(self) -> tuple[Placement, ...]:
        return self._with_class_dim(self._of_sums(), self._shard(0))

    def _with_class_dim(self, placements: Sequence[Placement], of_classes: Placement) -> tuple[Placement, ...]:
        return tuple(of_classes if dim == self.by_class else placement for dim, placement in enumerate(placements))

    def _inside(self, tensor: Tensor, inside: Sequence[Placement], gradient: Sequence[Placement]) -> Tensor:
        if not tensor.is_floating_point():
            return _inside(tensor, self.mesh, tuple(inside))
        local: Tensor = _Inside.apply(tensor, self.mesh, tuple(inside), tuple(gradient))  # type: ignore[no-untyped-call]
        return local

    def agreed(self, make: Callable[[], T]) -> T:
        """``make()``; what it finds wrong in the rows of one process is an error in all, and none is left waiting."""
        if not self._cuts_rows or self.mesh.device_type != "cpu" or torch.compiler.is_compiling():
            return make()  # nobody looks at values
        made: list[T] = []
        error = None
        try:
            made.append(make())
        except (TypeError, ValueError) as found:
            error = found
        self._agree(error)
        return made[0]

    def _agree(self, error: Exception | None) -> None:
        flag = torch.tensor([float(error is not None)])
        for dim in range(self.mesh.ndim):
            max_over([flag], self.mesh.get_group(dim))
        if error is not None:
            raise error
        if flag:
            raise ValueError("the arguments must be right in all processes, got an error in another; see what it says")

    def _require_the_same(self, input: Tensor | None, held: Sequence[int]) -> None:
        """Of what each process sees in its own way, by one small message on each dimension of the mesh.

        A plain ``input`` is compared by two numbers, which rounding may move a little; ``held`` are the classes that
        are here of each weight that is sharded on them.
        """
        own = torch.zeros(4, dtype=torch.float64)
        own[0] = float(any(count != self.held for count in held))
        if input is not None:
            own[1] = input.numel()
            own[2:] = torch.stack(_mark_of(input.detach().reshape(-1, input.shape[-1])))
        same = 0.0 if input is None else torch.finfo(input.dtype).eps ** 0.5
        most, least = own.clone(), -own
        for dim in range(self.mesh.ndim):
            max_over([most, least], self.mesh.get_group(dim))
        apart = most + least
        if most[0]:
            raise ValueError(
                f"linear_weight must be sharded evenly, {self.held} of {self.classes} classes on this process (as "
                f"distribute_tensor does), got {' and '.join(map(str, held))}; redistribute it"
            )
        if input is not None and (apart[1] != 0 or (apart[2:] > same * most[3]).any()):
            raise ValueError(
                "input must be the same on every process where it is a plain tensor and linear_weight is sharded, "
                f"got {checks.describe(input)} here and something else elsewhere; say by DTensor.from_local where "
                "its rows lie"
            )


def _own_part(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local() if lies_over_processes(tensor) else tensor
    return part


def _mark_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """A number that hangs on every entry and its place, and the norm."""
    mark, square = torch.zeros(2, dtype=torch.float64).unbind()
    along = torch.arange(rows.shape[1], dtype=torch.float64).cos()
    for start in range(0, len(rows), PIECE):
        piece = rows[start : start + PIECE].double().nan_to_num()
        of_rows = torch.arange(start, start + len(piece), dtype=torch.float64).cos()
        mark, square = mark + of_rows @ (piece @ along), square + piece.square().sum()
    return mark, square.sqrt()


def _refuse_transforms(*tensors: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    forward = forward_ad._current_level >= 0
    if torch._C._are_functorch_transforms_active() or (
        forward and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    ):
        raise NotImplementedError(
            "a head over many processes has derivatives in reverse mode alone, and no torch.func transforms; for a "
            "Hessian product differentiate a gradient made with create_graph=True, or use softcurve.curvature"
        )


# --- there and back --------------------------------------------------------------------------------------------------


def _placements(tensor: Tensor) -> tuple[Placement, ...] | None:
    """Where it lies, and so its gradient, of a sum that is not formed yet the gradient of each of its parts."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(tensor, DTensor):
        return None
    return tuple(Replicate() if placement.is_partial() else placement for placement in tensor.placements)


def _inside(tensor: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """What this process has of a tensor that lies by ``placements``."""
    from torch.distributed.tensor import DTensor, Replicate

    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, (Replicate(),) * mesh.ndim, run_check=False)
    local = tensor.redistribute(mesh, placements).to_local()
    return local.view_as(local)  # a DTensor keeps its own part free of a graph


def _outside(
    local: Tensor,
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    outside: tuple[Placement, ...] | None,
    shape: torch.Size,
) -> Tensor:
    """A tensor of all processes, from the part of each: a DTensor as ``outside`` says, or a plain one."""
    from torch.distributed.tensor import DTensor, Replicate

    strides = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(
        local.detach().contiguous(), mesh, placements, run_check=False, shape=shape, stride=strides
    )
    if outside is None:
        return whole.redistribute(mesh, (Replicate(),) * mesh.ndim).to_local()
    return whole.redistribute(mesh, outside)


class _Inside(Function):
    """From where a tensor lies to what this process has of it; ``gradient`` says what its gradient is a part of."""

    @staticmethod
    def forward(
        tensor: Tensor, mesh: DeviceMesh, inside: tuple[Placement, ...], gradient: tuple[Placement, ...]
    ) -> Tensor:
        return _inside(tensor, mesh, inside)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensor, ctx.mesh, ctx.inside, ctx.gradient = inputs
        ctx.outside, ctx.shape = _placements(tensor), tensor.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        whole = _Outside.apply(gradient, ctx.mesh, ctx.gradient, ctx.outside, ctx.inside, ctx.shape)  # type: ignore[no-untyped-call]
        return whole, None, None, None


class _Outside(Function):
    """From the parts of each process to the tensor ``outside``; ``inside`` is what of its change each is to have."""

    @staticmethod
    def forward(
        local: Tensor,
        mesh: DeviceMesh,
        placements: tuple[Placement, ...],
        outside: tuple[Placement, ...] | None,
        inside: tuple[Placement, ...],
        shape: torch.Size,
    ) -> Tensor:
        return _outside(local, mesh, placements, outside, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.mesh, ctx.placements, _, ctx.inside, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        local = _Inside.apply(gradient, ctx.mesh, ctx.inside, ctx.placements)  # type: ignore[no-untyped-call]
        return local, None, None, None, None, None
