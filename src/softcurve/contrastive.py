"""The contrastive loss of two batches of embeddings, whose similarities are never held.

The similarities of ``n`` embeddings with ``m`` others are the logits of a linear head whose features are the former and
whose weight is the latter, so the passes over a head's tiles compute them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve import checks
from softcurve.array_types import Float
from softcurve.head.plan import DEFAULT_BUDGET
from softcurve.head.problem import pair_problem, require_budget
from softcurve.head.sharded import dtensors, from_local, lies_over_processes, to_local
from softcurve.linear import linear_cross_entropy
from softcurve.losses.reduction import Reduction
from softcurve.losses.targets import Target
from softcurve.processes import max_over
from softcurve.typing import Integer, Number, ReductionKind

CLIP_SCALE = 1 / 0.07  # the initial scale of CLIP
# How many tensors as large as the embeddings there are at a time, beside those of the caller and their gradients:
# scaled and normalised ones, and what their gradients pass through. Measured as resident memory.
COPIES = 8
LEAST_COUNTED = 2**20  # bytes; fewer are nothing beside what a process holds anyway
NORM_EPS = 1e-12  # the least norm, as of torch.nn.functional.normalize


def contrastive_loss(
    input: Float[Tensor, "rows features"], other: Float[Tensor, "classes features"],
    target: Tensor | Target | tuple[Tensor | Target, Tensor | Target] | None = None, *,
    scale: Number | Tensor = CLIP_SCALE, symmetric: bool = True, normalize: bool = True,
    exclude: Tensor | tuple[Tensor | None, Tensor | None] | None = None, reduction: ReductionKind = "mean",
    memory_budget: Integer | None = None, process_group: ProcessGroup | None = None,
) -> Float[Tensor, "*reduced"]:  # fmt: skip
    """Return the cross-entropy of the similarities ``z = scale · input @ other.T``, without holding them.

    With ``symmetric=True`` it is ``(cross_entropy(z, target) + cross_entropy(z.T, target)) / 2``, the loss of CLIP. For
    the default target rows and columns are computed together: with the gradients four matrix products instead of six.

    Args:
        input: Embeddings ``(n, d)``.
        other: Embeddings ``(m, d)`` that they are compared with, which may be ``input`` itself.
        target: Which of the others belong to each row: class indices ``(n,)``, or for several positives a
            :class:`~softcurve.Probabilities` ``(n, m)`` or :class:`~softcurve.TopK` ``(n, k)``. By default row ``i``
            belongs to row ``i`` of ``other``. With ``symmetric=True`` a pair: the target of the rows of ``input`` over
            those of ``other``, and the reverse; the two directions are then computed one after the other.
        scale: A factor of the similarities, the reciprocal of the temperature: a number, or a tensor ``()``, which
            receives its gradient. A constant added to all similarities would change nothing.
        symmetric: Whether to average the losses of both directions.
        normalize: Whether embeddings are divided by their norms, so that similarities are cosines. Embeddings that are
            normalised already may pass through once more: neither value nor their own derivatives change.
        exclude: ``(n, k)``: others that have no part in a row's softmax, and −1 where a row has fewer; ``arange(n)`` as
            a column leaves out the similarities of a batch with itself. Without a target and with ``symmetric=True``
            an excluded similarity has no part in its column either; with a target it is a pair as ``target`` is.
        reduction: As in :func:`softcurve.cross_entropy`; ``"none"`` gives one loss for each row.
        memory_budget: Bytes for tiles of similarities and for copies of the embeddings, such as normalised ones, of
            which at least half is for tiles; by default 128 MiB on the CPU and 1 GiB on CUDA.
        process_group: Processes that have some of the embeddings each, as many as the others: those of one process
            after another are the batch, to which indices refer, and every process returns the loss of the whole batch.
            ``target`` and ``exclude`` are those of the rows at hand. The gradients are those of this one loss: multiply
            it by the number of processes where a wrapper such as DDP averages gradients over them.

    ``input`` and ``other`` may be ``DTensor`` s as well, sharded on rows; similarities are not gathered in either case.

    Returns:
        The loss in float32, or float64 if an embedding is float64. Half-precision embeddings are normalised and scaled
        in float32.

    Raises:
        TypeError, ValueError: If an argument has a wrong type, shape or value.

    Example:
        >>> image, text = torch.randn(8, 4), torch.randn(8, 4)
        >>> clip = softcurve.contrastive_loss(image, text)
        >>> views, each = torch.randn(16, 4), torch.arange(16)  # two views of eight images, SimCLR's NT-Xent
        >>> nt_xent = softcurve.contrastive_loss(
        ...     views, views, (each + 8) % 16, scale=1 / 0.5, symmetric=False, exclude=each.unsqueeze(-1)
        ... )

    Source: Radford et al. (2021), "Learning transferable visual models from natural language supervision"; Chen et al.
    (2020), "A simple framework for contrastive learning of visual representations"; Khosla et al. (2020), "Supervised
    contrastive learning", whose ``L_out`` is the target of equal probabilities on a row's positives.
    """
    _require_embeddings(input, other, pairs=symmetric or target is None)
    scale = _checked_scale(scale)
    spread = _Spread.of(input, other, process_group)
    if spread is not None:
        input, other, scale = spread.local(input), spread.local(other), spread.local_scale(scale)
    if normalize:
        input, other = _scaled(input, scale), _scaled(other, 1.0)
    else:
        input, other = checks.widened(input) * scale, checks.widened(other)
    if spread is not None:
        input, other = spread.whole(input, spread.rows), spread.whole(other, spread.others)
        if process_group is not None:
            target, exclude = spread.of_rows(target), spread.of_rows(exclude)
    memory_budget = _left_for_tiles(memory_budget, COPIES * max(input.nbytes, other.nbytes), input.device.type)
    if symmetric and target is None:
        if isinstance(exclude, tuple):
            raise ValueError("exclude must be one tensor without a target, got a pair; it holds for rows and columns")
        reducer, problem = Reduction.of(reduction, math.e), pair_problem(input, other, exclude)
        loss = problem.computed(reducer, problem.divisor(reducer), memory_budget, return_stats=False)
    else:
        loss = _by_direction(input, other, target, exclude, symmetric, reduction, memory_budget)
    loss = cast("Tensor", loss)
    return loss if spread is None or process_group is None else spread.result(loss, per_row=reduction == "none")


def _by_direction(
    input: Tensor, other: Tensor, target: Any, exclude: Any, symmetric: bool, reduction: ReductionKind,
    memory_budget: Integer | None,
) -> Tensor:  # fmt: skip
    """Return the loss of one direction, or the mean of both, one after the other."""
    given = {"target": target, "exclude": exclude}
    if not symmetric:
        if target is None:
            given["target"] = torch.arange(len(input), device=input.device)
        sides = [(input, other, given)]
    else:
        for name, value in given.items():
            if (name == "target" or value is not None) and not (isinstance(value, tuple) and len(value) == 2):
                raise TypeError(
                    f"{name} must be a pair for symmetric=True with a target, of input's rows over other and of other's"
                    f" rows over input, got {checks.describe(value)}; pass both, or symmetric=False"
                )
        one, reverse = ({n: None if v is None else v[i] for n, v in given.items()} for i in (0, 1))
        sides = [(input, other, one), (other, input, reverse)]
    losses = [
        linear_cross_entropy(
            rows, classes, options["target"], exclude=options["exclude"], reduction=reduction,
            memory_budget=memory_budget,
        )
        for rows, classes, options in sides
    ]  # fmt: skip
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


def _require_embeddings(input: object, other: object, *, pairs: bool) -> None:
    for name, tensor in (("input", input), ("other", other)):
        checks.require_features(name, tensor)
        assert isinstance(tensor, Tensor)
        if tensor.ndim != 2 or len(tensor) == 0:
            raise ValueError(f"{name} must be of shape (n, d) with n >= 1 embeddings, got {checks.describe(tensor)}")
        if checks.values_visible(tensor) and not tensor.detach().isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinite entries; look for the step that made them")
    assert isinstance(input, Tensor)
    assert isinstance(other, Tensor)
    if input.shape[1] != other.shape[1]:
        raise ValueError(
            f"input and other must have embeddings of one width, got {tuple(input.shape)} and {tuple(other.shape)}; "
            "project one of them"
        )
    if pairs and len(input) != len(other):
        raise ValueError(
            f"other must have one row for each of the {len(input)} rows of input, got {len(other)}; pass a target and "
            "symmetric=False for rows that are no pairs"
        )


def _checked_scale(scale: Number | Tensor) -> Tensor | float:
    """Return a positive number, or a floating-point tensor ``()`` that may require gradients."""
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        return checks.require_positive("scale", scale)
    if scale.ndim:
        raise ValueError(f"scale must be a number or a tensor of shape (), got {checks.describe(scale)}; squeeze it")
    if checks.values_visible(scale):
        checks.require_positive("scale", scale.detach())
    return checks.widened(scale)


def _left_for_tiles(memory_budget: Integer | None, held: int, device: str) -> int:
    """Return what is left of a budget beside ``held`` bytes for embeddings; at least half of it."""
    budget = require_budget(memory_budget) or DEFAULT_BUDGET.get(device, 2**30)
    return budget if held < LEAST_COUNTED else budget - min(held, budget // 2)


def _scaled(rows: Tensor, scale: Tensor | float) -> Tensor:
    """Return ``scale · rows / ‖rows‖`` in float32 or wider, by one factor a row, so that no copy is saved."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=checks.wide_dtype(rows.dtype))
    factor: Tensor = scale / norm.clamp_min(NORM_EPS)
    return rows * factor


@dataclass(frozen=True)
class _Spread:
    """How embeddings lie over the processes of a mesh: sharded on rows over one of its dimensions, else replicated."""

    mesh: Any
    placements: tuple[Any, ...]
    rows: int  # of input, and of other, over all processes
    others: int

    @staticmethod
    def of(input: Tensor, other: Tensor, group: ProcessGroup | None) -> _Spread | None:
        """Return ``None`` for embeddings of one process."""
        sharded: list[Any] = [each for each in (input, other) if lies_over_processes(each)]
        if not sharded and group is None:
            return None
        if group is not None:
            if sharded:
                raise ValueError("process_group must be None for DTensors, which say themselves where they lie")
            import torch.distributed.tensor  # it takes half a second, and is seldom wanted
            from torch.distributed.device_mesh import DeviceMesh

            counts = torch.tensor([len(input), -len(input), len(other), -len(other)], device=input.device)
            max_over([counts], group)
            if counts[0] != -counts[1] or counts[2] != -counts[3]:
                raise ValueError(
                    f"input and other must have as many rows on every process, got {len(input)} and {len(other)} here; "
                    "drop the last rows of the larger batches, or pass DTensors"
                )
            mesh, size = DeviceMesh.from_group(group, input.device.type), group.size()
            return _Spread(mesh, (dtensors().Shard(0),), len(input) * size, len(other) * size)
        if len(sharded) == 1:
            raise ValueError("input and other must both be DTensors, or both plain; make the other one by from_local")
        mesh = sharded[0].device_mesh
        if sharded[1].device_mesh != mesh:
            raise ValueError("input and other must lie on the same device mesh; redistribute them on one")
        over = [dim for each in sharded for dim, place in enumerate(each.placements) if place.is_shard(0)]
        placements = [dtensors().Replicate()] * mesh.ndim
        placements[min(over, default=0)] = dtensors().Shard(0)
        return _Spread(mesh, tuple(placements), len(input), len(other))

    def local(self, tensor: Tensor) -> Tensor:
        """Return the rows of this process."""
        return to_local(tensor, self.mesh, self.placements, self.placements) if lies_over_processes(tensor) else tensor

    def local_scale(self, scale: Tensor | float) -> Tensor | float:
        """Return the scale, whose gradient is the sum over the rows of all processes."""
        if not isinstance(scale, Tensor):
            return scale
        replicated, parts = dtensors().Replicate(), dtensors().Partial()
        gradient = tuple(parts if place.is_shard() else replicated for place in self.placements)
        return to_local(scale, self.mesh, (replicated,) * self.mesh.ndim, gradient)

    def whole(self, part: Tensor, rows: int) -> Tensor:
        """Return the DTensor of the rows of all processes."""
        shape = torch.Size([rows, *part.shape[1:]])
        return from_local(part, self.mesh, self.placements, self.placements, self.placements, shape)

    def of_rows(self, value: Any) -> Any:
        """Return a target or ``exclude``, or a pair of them, of the rows of all processes."""
        if isinstance(value, tuple):
            return tuple(self.of_rows(each) for each in value)
        if isinstance(value, Tensor):
            return self.whole(value, len(value) * self.mesh.size())
        if not isinstance(value, Target):
            return value
        fields = {name: self.of_rows(each) for name, each in vars(value).items() if isinstance(each, Tensor)}
        return dataclasses.replace(value, **fields)  # type: ignore[type-var]

    def result(self, loss: Tensor, *, per_row: bool) -> Tensor:
        """Return the loss of the whole batch, or those of the rows of this process, as a plain tensor."""
        placements = self.placements if per_row else (dtensors().Replicate(),) * self.mesh.ndim
        return to_local(loss, self.mesh, placements, placements)
