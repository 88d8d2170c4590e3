"""The penalised mean loss and its gradient in float64, block by block, and the probabilities on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.fit import DataError
from softcurve.fit.data.source import RowBlock, Source, share_of
from softcurve.fit.data.sparse_features import Features, SparseFeatures
from softcurve.fit.group import Group
from softcurve.fit.losses import refuse_zeros, row_losses
from softcurve.fit.solver.coordinates import Coordinates
from softcurve.fit.solver.tiles import DenseTile, SparseTile, Tile
from softcurve.losses.divergences import CrossEntropy, Divergence, ForwardKL, divergence_of
from softcurve.records import ShortRepr

Keep = Callable[[int, Tensor], None]
Loss = str | Divergence


@dataclass(frozen=True, eq=False)
class FitProblem:
    """The rows of a fit, their weights, which sum to one over all processes, and the loss and penalty of the objective.

    ``rows_at_once`` is the largest number of rows in a block.
    """

    source: Source
    weights: Float64[Tensor, " rows"]
    loss: Loss
    penalty: float
    rows_at_once: int

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.source.classes)

    @property
    def group(self) -> Group:
        """The processes that have the rows."""
        return share_of(self.source).group

    def blocks(self) -> Iterator[tuple[RowBlock, Float64[Tensor, " rows"]]]:
        """Yield the rows block by block, with their weights."""
        for block in self.source.blocks(self.rows_at_once):
            yield block, self.weights[block.start : block.start + len(block)]


@dataclass(frozen=True, eq=False, repr=False)
class Point(ShortRepr):
    """Parameters, the objective in nats, its gradient, and the largest entry of the gradient in weight and bias."""

    parameters: Float64[Tensor, "classes size"]
    value: float
    gradient: Float64[Tensor, "classes size"]
    gradient_max: float

    @property
    def finite(self) -> bool:
        """Whether the objective and all of its gradient are finite, which they may not be after too long a step."""
        return math.isfinite(self.value) and bool(self.gradient.isfinite().all()) and math.isfinite(self.gradient_max)


class Objective:
    """``Σ_i w_i loss_i + ½ penalty ‖W‖²`` with weights that sum to one."""

    def __init__(self, problem: FitProblem, coordinates: Coordinates) -> None:
        self.problem, self.coordinates = problem, coordinates
        # Allocating memory for every block would take longer than what is computed in it.
        most = min(problem.rows_at_once, problem.source.rows)
        width = 0 if coordinates.sparse else problem.source.width
        self._features = torch.empty(most, width, dtype=torch.float64)
        self._logits = torch.empty(most, problem.classes, dtype=torch.float64)

    def at(self, parameters: Float64[Tensor, "classes size"], keep: Keep | None = None) -> Point:
        """Pass over the rows; ``keep`` is called with the first row of each block and a view of its probabilities."""
        weight, bias = self.coordinates.about_mean(parameters)
        weight_out = torch.zeros_like(weight)
        bias_out = weight.new_zeros(len(weight))
        total = torch.zeros(1, dtype=torch.float64)
        loss, penalty = self.problem.loss, self.problem.penalty
        convex = type(divergence_of(loss)) in (CrossEntropy, ForwardKL)
        row_losses_of = _cross_entropy if convex else _any_loss
        with self.problem.group.summed(weight_out, bias_out, total):
            for block, weights in self.problem.blocks():
                features = self._centred(block.features)
                logits = features.times(weight, bias, self._logits[: len(block)])
                losses, residual = row_losses_of(loss, logits, block, keep)
                # A row of weight zero has no part in the sums, even if its loss is infinite.
                total += (weights * torch.where(weights > 0, losses, 0.0)).sum()
                residual *= weights[:, None]
                if not (weights > 0).all():
                    residual[weights == 0] = 0.0
                features.add_transposed(residual, weight_out, None if bias is None else bias_out)
        value = float(total) + 0.5 * penalty * float(weight.square().sum())
        weight_out.add_(weight, alpha=penalty)
        gradient = self.coordinates.from_mean(weight_out, bias_out)
        return Point(parameters, value, gradient, self.coordinates.largest_gradient(weight_out, bias_out))

    def _centred(self, features: Features) -> Tile:
        mean = self.coordinates.mean
        if isinstance(features, SparseFeatures):
            return SparseTile.centred(features, mean, torch.float64)
        out = self._features[: len(features)]
        if features.dtype == mean.dtype:
            return DenseTile(torch.sub(features, mean, out=out))
        # Converting first is three times as fast as subtracting a float64 vector from float32 rows.
        return DenseTile(out.copy_(features).sub_(mean))

    def refuse_rows(self) -> None:
        """Raise DataError for rows whose loss or gradient is not finite before any step is taken."""
        with self.problem.group.agreed():
            for block, weights in self.problem.blocks():
                refuse_zeros(self.problem.loss, block, weights)
        raise DataError(
            f"data: the {self.problem.loss} of some row, or its gradient, is not finite; scale the features to the "
            "order of 1, and give targets for which this loss is finite"
        )


def _cross_entropy(loss: Loss, logits: Tensor, block: RowBlock, keep: Keep | None) -> tuple[Tensor, Tensor]:
    """Return the losses and the residuals ``Σy p − y``, which overwrite the logits."""
    target = block.target
    if not isinstance(target, Tensor):
        return _any_loss(loss, logits, block, keep)
    logits -= logits.amax(1, keepdim=True)
    y = target.double() if target.is_floating_point() else None
    mass = logits.new_ones(1) if y is None else y.sum(1)
    losses = -(logits.gather(1, target[:, None])[:, 0] if y is None else (y * logits).sum(1))
    if y is not None and type(divergence_of(loss)) is ForwardKL:
        losses += torch.xlogy(y, y).sum(1)
    total = logits.exp_().sum(1, keepdim=True)
    losses += mass * total.log()[:, 0]
    logits /= total
    if keep is not None:
        keep(block.start, logits)
    if y is not None:
        return losses, logits.mul_(mass[:, None]).sub_(y)
    return losses, logits.scatter_add_(1, target[:, None], logits.new_full((1, 1), -1.0).expand(len(logits), 1))


def _any_loss(loss: Loss, logits: Tensor, block: RowBlock, keep: Keep | None) -> tuple[Tensor, Tensor]:
    """Return the losses and their gradients with respect to the logits by automatic differentiation."""
    assert block.target is not None
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = row_losses(loss, leaf, block.target)
        (residual,) = torch.autograd.grad(losses.sum(), leaf)
    if keep is not None:
        keep(block.start, torch.softmax(logits.detach(), 1))
    return losses.detach(), residual
