"""Products with the damped Gauss-Newton matrix of the mean loss, tile by tile.

For one row it is ``((1 + τμ) κ J + μ diag|p − y|) ⊗ [u; 1][u; 1]ᵀ`` with ``J = diag(p) − ppᵀ``, and ``penalty`` is
added. κJ is the Hessian of cross-entropy and forward KL (κ = 1); of reverse KL and JS it is the Hessian where p = y,
and positive everywhere. The damping μ holds back the logits of rows in the measure in which they are still wrong: a
row that is certain of the wrong class has hardly any curvature, and Newton's step on it would be too long by far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64
from softcurve.fit.data.source import Block, BlockTarget, Source, share_of
from softcurve.fit.solver.coordinates import Coordinates
from softcurve.fit.solver.settled import settled_rows
from softcurve.losses.targets import TopK

__all__ = ["Curvature", "Tile"]

# τ: with it a long step is also held back where p = y.
OF_CURVATURE = 0.1
# Of the penalty's curvature, and of all rows', that rows without much of it may have together to be left out.
LEFT_OUT, LEFT_OUT_OF_INTERCEPTS = 0.1, 0.01


@dataclass(eq=False)
class Tile:
    """Some rows: turned features, probabilities, weights, and what damps them."""

    numbers: Tensor  # (r,)
    features: Tensor  # (r, size)
    probabilities: Tensor  # (r, C)
    weights: Tensor | None  # (r, 1); None where all are one
    target: BlockTarget | None


class Curvature:
    """The matrix at the probabilities last stored; kept in memory as far as ``memory`` bytes reach, else recomputed."""

    def __init__(
        self,
        source: Source,
        coordinates: Coordinates,
        weights: Float64[Tensor, " rows"],
        classes: int,
        *,
        scale: float,
        penalty: float,
        dtype: torch.dtype,
        rows_at_once: int,
        memory: int,
        on_product: Callable[[int], None] = lambda products: None,
    ) -> None:
        self.source, self.coordinates, self.classes = source, coordinates, classes
        self.scale, self.dtype, self.rows_at_once = scale, dtype, rows_at_once
        self.penalties = coordinates.penalties(penalty)
        self.on_product = on_product
        self.damping = 0.0
        self.products = 0
        share = share_of(source)
        self.all_rows, self.together = share.total, share.together
        rows, size = source.rows, coordinates.size
        heaviest, minus_lightest, most_rows = self.together.largest(
            *(float(extreme) for extreme in (weights.max(), -weights.min())) if rows else (-math.inf, -math.inf), rows
        )
        uniform = heaviest == -minus_lightest
        # Near one, so that float32 has room above and below.
        self.mean_weight = heaviest if uniform else 1.0 / self.all_rows
        self.weights = None if uniform else (weights / self.mean_weight).to(dtype)[:, None]
        # Of the process with most rows: all keep them, or none.
        kept_features = int(most_rows) * size * dtype.itemsize <= memory
        self.features = torch.empty(rows, size, dtype=dtype) if kept_features else None
        left = memory - (rows * size * dtype.itemsize if kept_features else 0)
        kept = min(rows, left // (classes * dtype.itemsize))
        self.probabilities = torch.empty(kept, classes, dtype=dtype)
        self.labels = torch.empty(rows, dtype=torch.int64) if source.kind == "labels" else None
        self.parameters: Tensor | None = None
        most = min(rows_at_once, rows)
        self._weights = weights
        self._left_out: Tensor | None = None
        self._unsettled = torch.empty(rows, dtype=torch.float64)  # 1 − the largest probability
        self._wrong = torch.empty(rows, dtype=torch.float64)  # 1 − the label's
        self._squares = torch.empty(rows, dtype=torch.float64)  # ‖u‖²
        self._buffers = torch.empty(3, most, classes, dtype=dtype)
        self._centred = torch.ones(most, source.width + coordinates.intercept, dtype=dtype)
        self._mean = coordinates.mean.to(dtype)
        with self.together.agreed():
            for block in source.blocks(rows_at_once):
                self._look_at(block)

    def _look_at(self, block: Block) -> None:
        here = slice(block.start, block.start + len(block))
        if self.features is not None:
            self.coordinates.turned_into(self.features[here], block.features)
        if self.labels is not None:
            assert isinstance(block.target, Tensor)
            self.labels[here] = block.target
        centred = torch.sub(block.features, self._mean, out=self._centred[: len(block), : self.source.width])
        self._squares[here] = centred.square().sum(1)

    def keep(self, start: int, probabilities: Tensor) -> None:
        """Store the probabilities of a block, as far as there is room, and how settled its rows are."""
        here = slice(start, start + len(probabilities))
        self._unsettled[here] = 1.0 - probabilities.amax(1)
        if self.labels is not None:
            self._wrong[here] = 1.0 - probabilities.gather(1, self.labels[here, None])[:, 0]
        end = min(start + len(probabilities), len(self.probabilities))
        if start < end:
            self.probabilities[start:end] = probabilities[: end - start]

    def move_to(self, parameters: Float64[Tensor, "classes size"]) -> None:
        """Where the probabilities that are not stored are computed."""
        self.parameters = self._on_rows(parameters)

    def leave_out_settled_rows(self) -> None:
        """Let products pass over the rows that together curve the objective less than a tenth of the penalty does.

        ``‖J‖ ≤ 2 max_k p_k (1 − p_k) ≤ 2 (1 − max p)`` bounds a row's part of the matrix; of the intercepts, which have
        no penalty, at most a hundredth of that is left out. What the matrix lacks then delays Newton's method a
        little and changes nothing that it converges to.
        """
        self._left_out = None
        penalty = float(self.penalties[0])
        if not penalty or (self.damping and self.labels is None):
            return
        of_logits = (2.0 * self.scale * (1.0 + OF_CURVATURE * self.damping)) * self._unsettled
        if self.damping:
            of_logits += self.damping * self._wrong
        of_logits *= self._weights
        settled, count = settled_rows(
            of_logits * self._squares, LEFT_OUT * penalty, of_logits, LEFT_OUT_OF_INTERCEPTS, self.together
        )
        # To gather the others costs as much as a few settled rows.
        if 2 * count > self.all_rows:
            self._left_out = torch.zeros(len(of_logits), dtype=torch.bool)
            self._left_out[settled] = True

    def __call__(self, direction: Float64[Tensor, "classes size"]) -> Float64[Tensor, "classes size"]:
        """The product with one direction."""
        self.products += 1
        along = self._on_rows(direction)
        out = torch.zeros_like(along)
        result = torch.empty_like(along, dtype=torch.float64)
        with self.together.summed(result):
            self.on_product(self.products)
            for tile in self._tiles():
                moved = torch.mm(tile.features, along.T, out=self._room(1, tile))
                out.addmm_(self._of_logits(tile, moved).T, tile.features)
            result.copy_(out)
        if self.features is None:
            result = self._from_rows(result)
        return result.mul_(self.mean_weight).addcmul_(direction, self.penalties)

    def _on_rows(self, direction: Tensor) -> Tensor:
        """What multiplies the features of a tile: those that are not kept are centred, but not turned."""
        if self.features is not None:
            return direction.to(self.dtype)
        weight, bias = self.coordinates.about_mean(direction)
        return (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).to(self.dtype)

    def _from_rows(self, out: Tensor) -> Tensor:
        width = self.source.width
        return self.coordinates.from_mean(out[:, :width], out[:, -1])

    def _of_logits(self, tile: Tile, moved: Tensor) -> Tensor:
        """``w ((1 + τμ) κ J + μ diag|p − y|) v`` in the place of ``v``."""
        p, mu = tile.probabilities, self.damping
        factor = self.scale * (1.0 + OF_CURVATURE * mu)
        wrong = named = at = None
        on_diagonal = factor
        if mu:
            at, change = _named(tile)
            if at is None:
                assert isinstance(tile.target, Tensor)
                wrong = torch.sub(p, tile.target, out=self._room(2, tile)).abs_().mul_(mu).mul_(moved)
            else:
                # |p − y| is p but for the few classes that a label or a list names.
                on_diagonal += mu
                named = moved.gather(1, at).mul_(change).mul_(mu)
        moved.mul_(p)
        moved.addcmul_(p, moved.sum(1, keepdim=True), value=-factor / on_diagonal)
        if on_diagonal != 1.0:
            moved.mul_(on_diagonal)
        if wrong is not None:
            moved += wrong
        if named is not None and at is not None:
            moved.scatter_add_(1, at, named)
        return moved if tile.weights is None else moved.mul_(tile.weights)

    def class_factor(self) -> Float64[Tensor, "classes classes"]:
        """The rows' own matrices over the classes, summed."""
        factor = torch.zeros(self.classes, self.classes, dtype=self.dtype)
        on_diagonal = torch.zeros(self.classes, dtype=torch.float64)
        scale = self.scale * (1.0 + OF_CURVATURE * self.damping)
        wide = torch.zeros_like(factor, dtype=torch.float64)
        with self.together.summed(wide, on_diagonal):
            for tile in self._tiles():
                weighted = tile.probabilities if tile.weights is None else tile.probabilities * tile.weights
                factor.addmm_(weighted.T, tile.probabilities, alpha=-scale)
                on_diagonal += scale * weighted.sum(0)
                if self.damping:
                    wrong = _wrong(tile)
                    on_diagonal += self.damping * (wrong if tile.weights is None else wrong * tile.weights).sum(0)
            wide.copy_(factor)
        wide.diagonal().add_(on_diagonal)
        return wide.mul_(self.mean_weight)

    def diagonal(
        self, basis: Float[Tensor, "classes classes"] | None, seen: Callable[[Tensor, Tensor], None] | None = None
    ) -> Float64[Tensor, "classes size"]:
        """In ``basis`` (the classes' own) ⊗ the axes of the features, with the penalty.

        ``seen`` is given the numbers of each tile's rows and the diagonals of their matrices over the classes.
        """
        diagonal = torch.zeros(self.classes, self.coordinates.size, dtype=torch.float64)
        squared = None if basis is None else basis.square()
        with self.together.summed(diagonal):
            for tile in self._tiles():
                of_classes = self._diagonals(tile, basis, squared)
                if seen is not None:
                    seen(tile.numbers, of_classes)
                features = tile.features if self.features is not None else self._rotated(tile.features)
                diagonal += of_classes.T @ features.square()
        return diagonal.clamp_(min=0.0).mul_(self.mean_weight).add_(self.penalties)

    def _diagonals(self, tile: Tile, basis: Tensor | None, squared: Tensor | None) -> Tensor:
        """Of each row's matrix over the classes."""
        p = tile.probabilities
        of_classes = p - p.square() if basis is None or squared is None else (p @ squared).sub_((p @ basis).square_())
        of_classes.mul_(self.scale * (1.0 + OF_CURVATURE * self.damping))
        if self.damping:
            wrong = _wrong(tile)
            of_classes.add_(wrong if squared is None else wrong @ squared, alpha=self.damping)
        return of_classes if tile.weights is None else of_classes.mul_(tile.weights)

    def _rotated(self, centred: Tensor) -> Tensor:
        if (basis := self.coordinates.basis) is None:
            return centred
        width = self.source.width
        return torch.cat([centred[:, :width] @ basis.to(self.dtype), centred[:, width:]], 1)

    def _room(self, index: int, tile: Tile) -> Tensor:
        return self._buffers[index, : len(tile.features)]

    def _tiles(self) -> Iterator[Tile]:
        for start, features, target in self._rows():
            numbers = torch.arange(start, start + len(features))
            if self._left_out is not None:
                kept = (~self._left_out[start : start + len(features)]).nonzero()[:, 0]
                if not len(kept):
                    continue
                numbers, features, target = numbers[kept], features[kept], _taken(target, kept)
                stored = self.probabilities[numbers] if int(numbers[-1]) < len(self.probabilities) else None
                weights = None if self.weights is None else self.weights[numbers]
            else:
                end = start + len(features)
                stored = self.probabilities[start:end] if end <= len(self.probabilities) else None
                weights = None if self.weights is None else self.weights[start:end]
            yield Tile(numbers, features, self._softmax(features) if stored is None else stored, weights, target)

    def _softmax(self, features: Tensor) -> Tensor:
        assert self.parameters is not None
        p = torch.mm(features, self.parameters.T, out=self._buffers[0, : len(features)])
        p -= p.amax(1, keepdim=True)
        p.exp_()
        p /= p.sum(1, keepdim=True)
        return p

    def _rows(self) -> Iterator[tuple[int, Tensor, BlockTarget | None]]:
        """First row, turned features and target of each tile, from memory where they are there."""
        labelled = self.labels is not None or not self.damping
        if self.features is not None and labelled:
            for start in range(0, self.source.rows, self.rows_at_once):
                end = min(start + self.rows_at_once, self.source.rows)
                yield start, self.features[start:end], None if self.labels is None else self.labels[start:end]
            return
        for block in self.source.blocks(self.rows_at_once):
            yield block.start, self._turned(block), self._in_dtype(block.target)

    def _turned(self, block: Block) -> Tensor:
        if self.features is not None:
            return self.features[block.start : block.start + len(block)]
        out = self._centred[: len(block)]
        torch.sub(block.features, self._mean, out=out[:, : self.source.width])
        return out

    def _in_dtype(self, target: BlockTarget | None) -> BlockTarget | None:
        return target.to(self.dtype) if isinstance(target, Tensor) and target.is_floating_point() else target


def _taken(target: Tensor | TopK | None, kept: Tensor) -> Tensor | TopK | None:
    if isinstance(target, TopK):
        return TopK(target.indices[kept], target.log_probs[kept], target.tail)
    return None if target is None else target[kept]


def _wrong(tile: Tile) -> Tensor:
    """``|p − y|``, all of it."""
    at, change = _named(tile)
    if at is not None:
        return tile.probabilities.scatter_add(1, at, change)
    assert isinstance(tile.target, Tensor)
    return (tile.probabilities - tile.target).abs_()


def _named(tile: Tile) -> tuple[Tensor | None, Tensor]:
    """The classes that a label or a list names, ``(r, k)``, and ``|p − y| − p`` there."""
    target, p = tile.target, tile.probabilities
    if isinstance(target, TopK):
        y = target.log_probs.to(p.dtype).exp()
        if target.tail == "renormalize":
            y = y / y.sum(1, keepdim=True)
        at = target.indices
    elif isinstance(target, Tensor) and not target.is_floating_point():
        at, y = target[:, None], p.new_ones(1, 1)
    else:
        return None, p
    listed = p.gather(1, at)
    return at, (listed - y).abs_().sub_(listed)
