"""Numbers of each row that the passes of second order find: gradient norms, masses of targets, classes drawn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.curvature import curvature_tiles
from softcurve.head.dense import DenseKernel
from softcurve.head.kernel import class_factors, row_groups, smoothing_of_rows
from softcurve.head.products import WIDENED_ENTRIES
from softcurve.head.tensors import RowLosses
from softcurve.head.tiles import Tile
from softcurve.losses.rows import HESSIAN
from softcurve.processes import max_over, sum_over


def gradient_norms(rows: RowLosses) -> Tensor:
    """Return ``‖∂ loss_i/∂z_i‖`` of each row, not weighted; 0 for rows of weight 0."""
    t = rows.tensors
    norms = torch.zeros(len(t.input), dtype=torch.float64, device=t.input.device)
    for tile, kernel in curvature_tiles(rows, "", columns=False):
        loaded = tile.accumulate(kernel)
        kernel.prepare_residuals()
        for block, _ in tile.residuals(kernel, loaded):
            factor = 1.0 if kernel.row_factor is None else kernel.row_factor.double().squeeze(-1)
            # In float64: the square of a small residual is below float32's range.
            squares = [block.z[some].double().square_().sum(-1) for some in row_groups(block.z, kernel.data.cached)]
            norms[tile.rows] += torch.cat(squares) * factor**2
    sum_over([norms], rows.loss.processes)
    return norms.sqrt().mul_(rows.loss.scale)


def row_masses(rows: RowLosses) -> Tensor:
    """Return ``Σ_k w_k y_k`` of each row, ``(n,)``, smoothing and class weights ``w`` included; 1 for a divergence."""
    loss, t = rows.loss, rows.tensors
    ones = torch.ones_like(t.row_weight)
    if not loss.is_cross_entropy or (loss.target == "sparse" and t.target is None):
        return ones
    weights, shares = (None if factors is None else factors.to(ones.dtype) for factors in class_factors(t.class_weight))
    smoothed: Tensor | float = loss.smoothing * (1.0 if shares is None else shares.mean())
    if t.excluded is not None and loss.smoothing:
        smoothed = loss.smoothing * torch.as_tensor(smoothing_of_rows(t.class_weight, t.excluded)[1]).to(ones).squeeze(
            -1
        )
    if loss.target == "sparse" and t.target is not None:
        return t.target.to(ones.dtype).sum(-1) + smoothed
    if loss.target == "probabilities" and t.target is not None:
        held = t.target.shape[1]
        own = ones.new_ones(held) if weights is None else weights[loss.first : loss.first + held]
        parts = t.target.split(max(1, WIDENED_ENTRIES // max(1, held)))
        sums = torch.cat([part.to(ones.dtype) @ own for part in parts])
        sum_over([sums], loss.processes)
        return (1 - loss.smoothing) * sums + smoothed
    if weights is None:
        return ones
    for tile, kernel in curvature_tiles(rows, HESSIAN, columns=False):
        assert isinstance(kernel, DenseKernel)
        tile.accumulate(kernel)
        ones[tile.rows] = -kernel.totals.score.squeeze(-1).to(ones.dtype)
    return ones


def sample_classes(rows: RowLosses, uniforms: Tensor) -> Tensor:
    """Draw classes from each row's softmax: where the cumulated ``p`` passes its ``uniforms (n, s)`` in [0, 1)."""
    classes = torch.zeros(uniforms.shape, dtype=torch.int64, device=rows.tensors.input.device)
    for tile, _ in curvature_tiles(rows, "", columns=False):
        classes[tile.rows] = _sampled(tile, uniforms[tile.rows].to(torch.float64).contiguous())
    return classes


def _sampled(tile: Tile, wanted: Tensor) -> Tensor:
    """Return the classes of one tile: one pass for the mass of each row, one to find where it is reached."""
    spec, group = tile.tiles.spec, tile.tiles.group
    top = tile.model.input.new_full((len(wanted), 1), -torch.inf)
    total = torch.zeros_like(top, dtype=torch.float64)
    for block, _ in tile.blocks():
        z = spec.logit_map.value(block.z)
        new = torch.maximum(top, z.amax(-1, keepdim=True))
        shift = torch.where(new == -torch.inf, 0.0, new)  # every class so far is masked
        total = total * torch.exp((top - shift).double()) + (z - shift).exp_().sum(-1, keepdim=True).double()
        top = new
    left, mine = wanted * total, None
    if group is not None:
        top, left, mine = _own_part(top, total, wanted, group)
    found = torch.zeros_like(left, dtype=torch.bool)
    chosen = torch.zeros_like(left, dtype=torch.int64)
    for block, _ in tile.blocks():
        mass = (spec.logit_map.value(block.z) - top).exp_()
        cumulated = mass.cumsum(-1, dtype=torch.float64)
        at, last = _reached(cumulated, left)
        chosen = torch.where(~found & (cumulated[:, -1:] > 0), torch.minimum(at, last) + block.classes.start, chosen)
        left = left - cumulated[:, -1:]
        found |= at < mass.shape[-1]
    if mine is not None:
        chosen = torch.where(mine, chosen + spec.first, 0)
        sum_over([chosen], group)
    return chosen


def _own_part(top: Tensor, total: Tensor, wanted: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit of all processes, what a draw has left at this one's first class, and if it is here."""
    highest = top.clone()
    max_over([highest], group)
    lowered = torch.where(highest == -torch.inf, 0.0, (top - highest).double())
    masses = total.new_zeros(len(total), group.size())
    masses[:, group.rank()] = (total * torch.where(top == -torch.inf, 0.0, torch.exp(lowered))).squeeze(-1)
    sum_over([masses], group)
    cumulated = masses.cumsum(-1)
    left = wanted * cumulated[:, -1:]
    owner = torch.minimum(*_reached(cumulated, left))
    before = cumulated[:, group.rank()] - masses[:, group.rank()]
    return highest, left - before.unsqueeze(-1), owner == group.rank()


def _reached(cumulated: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Return where sums pass what is left, and the last with mass, for where rounding leaves all short of it."""
    last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
    return torch.searchsorted(cumulated, left, right=True), last
