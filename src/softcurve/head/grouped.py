"""The classes of a model and of a teacher, merged into groups before they are compared.

    c_g = log Σ_{i in g} e^{z_i},    ∂L/∂z_i = q_i ∂L/∂c_g,    q_i = e^{z_i − c_g}

A kernel for two softmaxes over the groups does the comparison: it sees a tile of the groups' logits ``c``, of the model
and of the teacher, and leaves residuals ``G`` there, which are taken back to the classes. Along a direction,

    ċ_g = Σ q ż,    (q G)˙ = q (Ġ + G (ż − ċ_g)).

The logits of a group need all of its classes, so a tile has whole rows. Soft caps, scales and the temperature act on
the classes. The shares ``q`` are formed again from the logits, which stay in the tile until the residuals replace them.

On a sharded head each process merges its own classes, and a few messages give all processes the logits of all groups
(:class:`Side`). Every process compares all groups, and takes the residuals back to its own classes without a message.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.aten.dense_terms import MODEL, TARGET, weighted
from softcurve.head.kernel import (
    Block,
    Kernel,
    Residuals,
    RowData,
    Statistics,
    back_through_cap,
    cap_logits,
    first_of_largest,
    largest,
    row_groups,
)
from softcurve.losses import softmax
from softcurve.losses.class_map import Groups
from softcurve.losses.spec import LossSpec
from softcurve.processes import max_over, sum_over

MakeKernel = Callable[[LossSpec, RowData, Callable[[Tensor], Block]], Kernel]


class Side(NamedTuple):
    """The groups of the model's classes or of the target's, some of which may be on other processes.

    Most groups have all of their classes on one process, which tells the others their logit. Of a group with classes on
    several, they exchange the largest part before they sum the exponentials of all parts.
    """

    here: Groups  # of the classes of this process
    of: Tensor  # (C,): the group of every class
    cut: bool  # whether other processes have other classes
    several: Tensor  # (S,): the groups with classes on several processes
    elsewhere: Tensor  # (G,): whether all classes of a group are on one other process
    has_empty: bool  # whether a group has no class on any process

    @staticmethod
    def of_classes(loss: LossSpec, of: Tensor, *, cut: bool) -> Side:
        """Look where the classes of each group are; ``cut`` if they are sharded like those of a sharded head."""
        if not cut or loss.group is None:
            here = Groups.by(of, loss.groups)
            nowhere = torch.zeros(loss.groups, dtype=torch.bool, device=of.device)
            return Side(here, of, False, of[:0], nowhere, here.has_empty)
        part = loss.part(len(of))
        process = torch.arange(len(of), device=of.device) // loss.widest_part(len(of))
        nobody = of.new_full((loss.groups,), len(of))
        first = nobody.scatter_reduce(0, of, process, "amin")
        last = (-nobody).scatter_reduce(0, of, process, "amax")
        here = Groups.by(of[part], loss.groups)
        absent = torch.bincount(here.of, minlength=loss.groups) == 0
        several = (first < last).nonzero().squeeze(-1)
        return Side(here, of, True, several, (first == last) & absent, bool((first > last).any()))

    def log_sum_exp_over(self, merged: Tensor, buffer: Tensor, group: ProcessGroup, cached: int) -> None:
        """Replace the logits that the classes of this process give to each group by those of all classes.

        ``buffer (rows, S)`` is for the largest parts of the groups on several processes.
        """
        merged.masked_fill_(self.elsewhere, 0.0)
        if len(self.several):
            torch.index_select(merged, 1, self.several, out=buffer)
            max_over([buffer], group)
            buffer.masked_fill_(buffer == -math.inf, 0.0)
            for rows in row_groups(buffer, cached):
                parts = merged[rows].index_select(1, self.several)
                merged[rows].index_copy_(1, self.several, parts.sub_(buffer[rows]).exp_())
        sum_over([merged], group)  # of the other groups one number and zeros, which a maximum could hide if it is NaN
        for rows in row_groups(buffer, cached) if len(self.several) else ():
            total = merged[rows].index_select(1, self.several)
            merged[rows].index_copy_(1, self.several, total.log_().add_(buffer[rows]))


Sides = tuple[Side, Side]  # of the model's classes and of the target's


class GroupedKernel(Kernel):
    """The kernel of a divergence between groups.

    ``make(loss, data, again)`` returns the kernel that compares the groups, a teacher's logits beside the model's;
    ``again(rows)`` gives it both for some rows anew. ``buffer(name, classes)`` is a buffer of a tile.
    """

    def __init__(
        self, loss: LossSpec, data: RowData, sides: Sides, buffer: Callable[[str, slice], Tensor], make: MakeKernel
    ) -> None:
        super().__init__(loss, data)
        self.sides, self.buffer, self.everything = sides, buffer, slice(0, loss.groups)
        of_groups = dataclasses.replace(
            loss, target="teacher", temperature=1.0, softcap=None, teacher_softcap=None, groups=0, group=None, first=0,
            classes=0,
        )  # fmt: skip
        rows = dataclasses.replace(data, class_count=loss.groups, first=0, held=loss.groups, offset=None, excluded=None)
        # Of each side the groups' logits and their changes along a direction, where they come from several processes.
        self.kept: list[tuple[Tensor, Tensor | None]] = []
        self.inner = make(of_groups, rows, self._again)
        self.sweeps, self.row_factor = self.inner.sweeps, self.inner.row_factor

    # --- to groups ---------------------------------------------------------------------------------------------------

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        if number == 0:
            self.block, self.bend = block, None
            if block.raw is not None:
                self.bend = None if block.v is None else self.buffer("bend", block.classes)
                cap_logits(self.loss.logit_map, block.z, block.v, block.raw, self.bend, self.data.cached)
            self._find_tops()

    def reduce_over(self, number: int, group: ProcessGroup) -> None:
        """Give all processes the logits of all groups."""
        if number == 0:
            max_over([top for side, top in zip(self.sides, self.tops, strict=True) if side.cut], group)
            self._merge(group)

    def finish(self, number: int) -> None:
        """Complete the statistics; a prediction is right if it is in the most probable group of the target."""
        if number == 0 and self.loss.group is None:
            self._merge(None)
        self.inner.accumulate(number, self.of_groups)
        self.inner.finish(number)
        predicted, group = self.statistics.predicted, self.inner.statistics.target
        if predicted is not None and group is not None:
            label = torch.where(self.sides[MODEL].of[predicted] == group, predicted, -1)
            self.statistics = self.statistics._replace(target=label)

    def _find_tops(self) -> None:
        """Find the largest logit of each row on both sides, ``(rows, 1)``."""
        z, target = self.block.z, self.block.target
        assert target is not None
        top = largest(target).to(z.dtype)
        self.tops = [largest(z), torch.where(top == -math.inf, top, self._seen(top))]  # also of no class at all

    def _merge(self, group: ProcessGroup | None) -> None:
        """Form the logits of the groups and their changes, in buffers, of the classes of all processes."""
        self.tops = [torch.where(top == -math.inf, 0.0, top) for top in self.tops]
        names, sides = ("groups", "target groups"), (MODEL, TARGET)
        logits = [self.buffer(name, self.everything) for name in names]
        changes = [self.buffer(f"{name} v", self.everything) for name in names if self.data.has_direction]
        for side in sides:
            self._merge_side(side, logits[side], changes[side] if changes else None, group)
        if group is not None:
            copies = [
                [self.buffer(f"kept {number} {side}", self.everything).copy_(each[side]) for side in sides]
                for number, each in enumerate((logits, changes))
                if each
            ]
            self.kept = [(copies[0][side], copies[1][side] if changes else None) for side in sides]
        if self.data.wants_stats:
            self.statistics = self._statistics(group)
        (z, target), (v, target_v) = logits, changes or (None, None)
        self.of_groups = Block(self.everything, z, v=v, target=target, target_v=target_v)
        if self.block.target_out is not None:
            self.of_groups.target_out, self.of_groups.target_v_out = target, target_v

    def _merge_side(self, side: int, logits: Tensor, changes: Tensor | None, group: ProcessGroup | None) -> None:
        of_side, groups = self.sides[side], self.sides[side].here
        in_tile = self.block.z if side == MODEL else self.block.target if self.loss.target == "teacher" else None
        for rows in self._row_groups():
            if in_tile is not None:  # less the largest of each row, at whose size a log-sum-exp would be rounded
                in_tile[rows].sub_(self.tops[side][rows])
            logits[rows] = groups.log_sum_exp(self._classes(side, rows)[0])
        if of_side.cut and group is not None:
            buffer = self.buffer("groups of several", slice(0, len(of_side.several)))
            of_side.log_sum_exp_over(logits, buffer, group, self.data.cached)
        if changes is None:
            return
        for rows in self._row_groups():
            z, v = self._classes(side, rows)
            assert v is not None
            changes[rows] = groups.sums(weighted(groups.shares(z, logits[rows]), v))
        if of_side.cut:
            sum_over([changes], group)

    def _again(self, rows: Tensor) -> Block:
        z, target = (self._merged(side, rows) for side in (MODEL, TARGET))
        return Block(self.everything, z, target=target, target_out=torch.empty_like(target))

    def _merged(self, side: int, rows: slice | Tensor) -> Tensor:
        """Return the logits of the groups once more, which the kernel of the groups overwrites."""
        if self.kept:
            return self.kept[side][0][rows]
        return self.sides[side].here.log_sum_exp(self._classes(side, rows)[0])

    def _classes(self, side: int, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the softmax of one side sees, less the largest of each row, and its change."""
        block, of_model = self.block, side == MODEL
        z, v = (block.z, block.v) if of_model else (block.target, block.target_v)
        assert z is not None
        z, v = z[rows].to(block.z.dtype), None if v is None else v[rows]
        if not of_model:
            v = None if v is None else self._through_target(v, z)
            z = self._seen(z) if self.loss.target == "teacher" else self._seen(z) - self.tops[TARGET][rows]
        return z, v

    def _seen(self, target: Tensor) -> Tensor:
        """Return the logits that the softmax of a target sees."""
        if self.loss.target == "teacher":
            return target
        return (target.log() if self.loss.target == "probabilities" else target) * self.loss.target_scale

    def _through_target(self, values: Tensor, target: Tensor) -> Tensor:
        """Return ``values`` times the derivative of the target's logits with respect to what the caller gave."""
        if self.loss.target == "teacher":
            return values
        if self.loss.target == "probabilities":
            values = torch.where(target > 0, values / target, 0.0)
        return values * self.loss.target_scale

    def _row_groups(self) -> list[slice]:
        """Return groups of rows of which the wider side stays in the cache."""
        target = self.block.target
        assert target is not None
        widest = target if target.shape[1] > self.block.z.shape[1] else self.block.z
        return list(row_groups(widest, self.data.cached))

    def _statistics(self, group: ProcessGroup | None) -> Statistics:
        """Return the statistics of the model's softmax over its classes."""
        z, top = self.block.z, largest(self.block.z).squeeze(-1)
        numbers = torch.zeros(3, len(z), dtype=torch.float64, device=z.device)  # log-sum-exp, entropy, collision
        predicted = torch.zeros_like(top, dtype=torch.int64)
        for rows in row_groups(z, self.data.cached) if z.shape[1] else ():
            lse, entropy = softmax.softmax_rows(z[rows]).log_sum_exp, softmax.entropy_rows(z[rows])
            numbers[:, rows] = torch.stack([lse, entropy, softmax.collision_rows(z[rows])]).double()
            predicted[rows] = z[rows].argmax(-1)
        if group is not None:
            nothing = numbers.new_tensor([-math.inf, 0.0, 0.0]).unsqueeze(-1)
            numbers = _over_processes(torch.where(top == -math.inf, nothing, numbers), group)
            predicted = first_of_largest(top, predicted, group, self.data)
        lse, entropy, collision = numbers
        lse = lse + self.tops[MODEL].squeeze(-1).double()
        lse = lse if self.data.offset is None else lse + self.data.offset.squeeze(-1)
        return Statistics(lse, entropy, collision, None, predicted)

    # --- results -----------------------------------------------------------------------------------------------------

    def losses(self) -> Tensor:  # noqa: D102
        return self.inner.losses()

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        return self.inner.tangents(None)  # every process compares all groups

    def residuals(self, block: Block, fresh: bool) -> Residuals:
        """Take the residuals of the groups back to the classes."""
        merged = self.inner.residuals(self.of_groups, fresh)
        if not self.data.wants_gradient:
            return Residuals(block.z)
        self._take_back(MODEL, merged.z, merged.v, block.z, block.v)
        if block.raw is not None:
            back_through_cap(self.loss.logit_map, block.raw, self.bend, block.z, block.v, self.data.cached)
        if block.target_out is not None and merged.target is not None:
            self._take_back(TARGET, merged.target, merged.target_v, block.target_out, block.target_v_out)
        return Residuals(block.z, block.target_out, block.v, block.target_v_out)

    def _take_back(
        self, side: int, of_groups: Tensor, change: Tensor | None, out: Tensor, v_out: Tensor | None
    ) -> None:
        """``out = q G`` and ``v_out = q (Ġ + G (ż − ċ))``, in what the caller gave as the target."""
        groups, target = self.sides[side].here, self.block.target
        assert target is not None
        for rows in self._row_groups():
            z, v = self._classes(side, rows)
            shares = groups.shares(z, self._merged(side, rows))
            gradient = weighted(shares, groups.spread(of_groups[rows]))
            moved = None
            if v is not None and change is not None:
                moved = weighted(shares, groups.spread(change[rows]))
                kept = self.kept[side][1] if self.kept else None
                of_group = groups.sums(weighted(shares, v)) if kept is None else kept[rows]
                moved += gradient * (v - groups.spread(of_group))
            if side == TARGET:
                y = target[rows]
                if moved is not None and self.loss.target == "probabilities":
                    moved = moved - self._bend_of_logarithm(gradient, rows)
                gradient = self._through_target(gradient, y)
                moved = None if moved is None else self._through_target(moved, y)
            self._write(out, rows, gradient)
            if v_out is not None and moved is not None:
                self._write(v_out, rows, moved)

    def _bend_of_logarithm(self, gradient: Tensor, rows: slice) -> Tensor:
        """Return ``g ẏ / y``, of which the change of ``g / y`` is the part that is not ``ġ / y``."""
        y, v = self.block.target, self.block.target_v
        assert y is not None
        assert v is not None
        return torch.where(y[rows] > 0, gradient * v[rows] / y[rows], 0.0)

    def _write(self, out: Tensor, rows: slice, values: Tensor) -> None:
        """Write what rows have; 0 in a row of weight 0, where a factor may be NaN."""
        weight = self.data.weight[rows].unsqueeze(-1)
        out[rows] = values if values.device.type == "cpu" else values.masked_fill(weight == 0, 0.0)


def _over_processes(numbers: Tensor, group: ProcessGroup) -> Tensor:
    """Return log-sum-exp, entropy and collision of whole rows, ``(3, rows)``, from those of every process's classes.

    The softmax of a process is one class of a softmax over the processes.
    """
    parts = numbers.new_zeros(*numbers.shape, group.size())
    parts[..., group.rank()] = numbers
    sum_over([parts], group)
    lse, entropy, collision = parts
    whole_entropy = softmax.entropy_rows(lse) + (torch.softmax(lse, -1) * entropy).sum(-1)
    return torch.stack([softmax.softmax_rows(lse).log_sum_exp, whole_entropy, softmax.collision_rows(lse, collision)])
