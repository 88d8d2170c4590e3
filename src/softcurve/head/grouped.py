"""The classes of a model and of a teacher, merged into groups before they are compared.

    c_g = log Σ_{i in g} e^{z_i},    ∂L/∂z_i = q_i ∂L/∂c_g,    q_i = e^{z_i − c_g}

A kernel for two softmaxes over the groups does the comparison: it sees a tile of the groups' logits ``c``, of the model
and of the teacher, and leaves residuals ``G`` there, which are taken back to the classes. Along a direction,

    ċ_g = Σ q ż,    (q G)˙ = q (Ġ + G (ż − ċ_g)).

The logits of a group need all of its classes, so a tile has whole rows. Soft caps, scales and the temperature act on
the classes. The shares ``q`` are formed again from the logits, which stay in the tile until the residuals replace them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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
    row_groups,
)
from softcurve.losses import softmax
from softcurve.losses.class_map import Groups, offset_of
from softcurve.losses.spec import LossSpec

Sides = tuple[Groups, Groups]  # of the model's classes and of the target's
MakeKernel = Callable[[LossSpec, RowData, Callable[[Tensor], Block]], Kernel]


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
            loss, target="teacher", temperature=1.0, softcap=None, teacher_softcap=None, groups=0
        )
        rows = dataclasses.replace(data, class_count=loss.groups, held=loss.groups, offset=None, excluded=None)
        self.inner = make(of_groups, rows, self._again)
        self.sweeps, self.row_factor = self.inner.sweeps, self.inner.row_factor

    # --- to groups ---------------------------------------------------------------------------------------------------

    def accumulate(self, number: int, block: Block) -> None:  # noqa: D102
        if number == 0:
            self.block, self.bend = block, None
            if block.raw is not None:
                self.bend = None if block.v is None else self.buffer("bend", block.classes)
                cap_logits(self.loss.logit_map, block.z, block.v, block.raw, self.bend, self.data.cached)
            if self.data.wants_stats:
                self._add_statistics()
            self._take_off_offsets()
            self.of_groups = self._merged_block()
        self.inner.accumulate(number, self.of_groups)

    def _take_off_offsets(self) -> None:
        """Subtract the largest logit of each row, on a side that the tile owns."""
        target = self.block.target if self.loss.target == "teacher" else None
        for logits in (self.block.z, target):
            if logits is not None:
                for rows in row_groups(logits, self.data.cached):
                    logits[rows].sub_(offset_of(logits[rows]))

    def finish(self, number: int) -> None:
        """Complete the statistics; a prediction is right if it is in the most probable group of the target."""
        self.inner.finish(number)
        predicted, group = self.statistics.predicted, self.inner.statistics.target
        if predicted is not None and group is not None:
            label = torch.where(self.sides[MODEL].of[predicted] == group, predicted, -1)
            self.statistics = self.statistics._replace(target=label)

    def _merged_block(self) -> Block:
        """Return the logits of the groups and their changes, in buffers."""
        block, directed = self.block, self.data.has_direction
        names = ("groups", "target groups", *["groups v", "target groups v"] * directed)
        z, target, *changes = (self.buffer(name, self.everything) for name in names)
        for rows in self._row_groups():
            for side, into in enumerate((z, target)):
                into[rows], change = self._merged(side, rows)
                if change is not None:
                    changes[side][rows] = change
        v, target_v = changes if directed else (None, None)
        merged = Block(self.everything, z, v=v, target=target, target_v=target_v)
        if block.target_out is not None:
            merged.target_out, merged.target_v_out = target, target_v
        return merged

    def _again(self, rows: Tensor) -> Block:
        z, target = (self._merged(side, rows)[0] for side in (MODEL, TARGET))
        return Block(self.everything, z, target=target, target_out=torch.empty_like(target))

    def _merged(self, side: int, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        groups, (z, v) = self.sides[side], self._classes(side, rows)
        merged = groups.log_sum_exp(z)
        return merged, None if v is None else groups.sums(weighted(groups.shares(z, merged), v))

    def _classes(self, side: int, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the softmax of one side sees, less the largest of each row, and its change."""
        block, of_model = self.block, side == MODEL
        z, v = (block.z, block.v) if of_model else (block.target, block.target_v)
        assert z is not None
        z, v = z[rows].to(block.z.dtype), None if v is None else v[rows]
        if not of_model:
            v = None if v is None else self._through_target(v, z)
            z = z.log() if self.loss.target == "probabilities" else z
            if self.loss.target != "teacher":
                z = z * self.loss.target_scale
                z -= offset_of(z)
        return z, v

    def _through_target(self, values: Tensor, given: Tensor) -> Tensor:
        """Return ``values`` times the derivative of the target's logits with respect to what the caller gave."""
        if self.loss.target == "teacher":
            return values
        if self.loss.target == "probabilities":
            values = torch.where(given > 0, values / given, 0.0)
        return values * self.loss.target_scale

    def _row_groups(self) -> list[slice]:
        """Return groups of rows of which the wider side stays in the cache."""
        target = self.block.target
        assert target is not None
        widest = target if target.shape[1] > self.block.z.shape[1] else self.block.z
        return list(row_groups(widest, self.data.cached))

    def _add_statistics(self) -> None:
        """Keep the statistics of the model's softmax over its classes."""
        z, found = self.block.z, []
        for rows in row_groups(z, self.data.cached):
            part = softmax.softmax_rows(z[rows])
            of_softmax = (softmax.entropy_rows(z[rows]), softmax.collision_rows(z[rows]))
            found.append((part.log_sum_exp, *of_softmax, z[rows].argmax(-1)))
        lse, entropy, collision, predicted = map(torch.cat, zip(*found, strict=True))
        lse = lse if self.data.offset is None else lse + self.data.offset.squeeze(-1)
        self.statistics = Statistics(lse, entropy, collision, None, predicted)

    # --- results -----------------------------------------------------------------------------------------------------

    def losses(self) -> Tensor:  # noqa: D102
        return self.inner.losses()

    def tangents(self, group: ProcessGroup | None) -> Tensor:  # noqa: D102
        return self.inner.tangents(group)

    def residuals(self, block: Block, fresh: bool) -> Residuals:
        """Take the residuals of the groups back to the classes."""
        found = self.inner.residuals(self.of_groups, fresh)
        if not self.data.wants_gradient:
            return Residuals(block.z)
        self._take_back(MODEL, found.z, found.v, block.z, block.v)
        if block.raw is not None:
            back_through_cap(self.loss.logit_map, block.raw, self.bend, block.z, block.v, self.data.cached)
        if block.target_out is not None and found.target is not None:
            self._take_back(TARGET, found.target, found.target_v, block.target_out, block.target_v_out)
        return Residuals(block.z, block.target_out, block.v, block.target_v_out)

    def _take_back(
        self, side: int, of_groups: Tensor, change: Tensor | None, out: Tensor, v_out: Tensor | None
    ) -> None:
        """``out = q G`` and ``v_out = q (Ġ + G (ż − ċ))``, in what the caller gave as the target."""
        groups, given = self.sides[side], self.block.target
        assert given is not None
        for rows in self._row_groups():
            z, v = self._classes(side, rows)
            shares = groups.shares(z, groups.log_sum_exp(z))
            gradient = weighted(shares, groups.spread(of_groups[rows]))
            moved = None
            if v is not None and change is not None:
                moved = weighted(shares, groups.spread(change[rows]))
                moved += gradient * (v - groups.spread(groups.sums(weighted(shares, v))))
            if side == TARGET:
                y = given[rows]
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
