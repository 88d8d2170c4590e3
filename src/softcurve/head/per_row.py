"""What a pass of second order finds for each row by itself: gradient norms, masses of targets, classes drawn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from softcurve.head.curvature import curvature_tiles, residuals
from softcurve.head.dense import DenseKernel
from softcurve.head.kernel import class_factors
from softcurve.head.products import WIDENED_ENTRIES
from softcurve.head.tensors import RowLosses
from softcurve.head.tiles import Tile
from softcurve.losses.rows import HESSIAN
from softcurve.processes import max_over, sum_over


def gradient_norms(rows: RowLosses) -> Tensor:
    """``‖∂ loss_i/∂z_i‖`` of each row, not weighted; 0 for rows of weight 0."""
    t = rows.tensors
    norms = torch.zeros(len(t.input), dtype=torch.float64, device=t.input.device)
    with curvature_tiles(rows, HESSIAN, columns=False) as tiles:
        for tile in tiles:
            kernel = tile.curvature_kernel()
            for block in residuals(tile, kernel):
                factor = 1.0 if kernel.row_factor is None else kernel.row_factor.double().squeeze(-1)
                # In float64: the square of a small residual is below float32's range.
                squares = [block.z[some].double().square_().sum(-1) for some in kernel.groups(block)]
                norms[tile.rows] += torch.cat(squares) * factor**2
        tiles.sum_over_classes(norms)
    return norms.sqrt().mul_(rows.loss.scale)


def row_masses(rows: RowLosses) -> Tensor:
    """``Σ_k w_k y_k`` of each row, ``(n,)``, smoothing and class weights ``w`` included; 1 for a divergence."""
    loss, t = rows.loss, rows.tensors
    ones = torch.ones_like(t.row_weight)
    if not loss.is_cross_entropy or (loss.target == "sparse" and t.target is None):
        return ones
    weights, shares = (None if factors is None else factors.to(ones.dtype) for factors in class_factors(t.class_weight))
    smoothed = loss.smoothing * (1.0 if shares is None else shares.mean())
    group = loss.processes
    if loss.target == "sparse":
        assert t.target is not None
        return t.target.to(ones.dtype).sum(-1) + smoothed
    if loss.target == "probabilities":
        assert t.target is not None
        held = t.target.shape[1]
        own = None if weights is None else weights[loss.first : loss.first + held]
        step = max(1, WIDENED_ENTRIES // max(1, held))
        parts = [
            part.sum(-1, dtype=ones.dtype) if own is None else part.to(ones.dtype) @ own
            for part in t.target.split(step)
        ]
        sums = torch.cat(parts)
        if group is not None:
            sum_over([sums], group)
        return (1 - loss.smoothing) * sums + smoothed
    if weights is None:
        return ones
    with curvature_tiles(rows, HESSIAN, columns=False) as tiles:
        for tile in tiles:
            kernel = tile.curvature_kernel(HESSIAN)
            assert isinstance(kernel, DenseKernel)
            tile.accumulate(kernel)
            ones[tile.rows] = -kernel.model.score.squeeze(-1).to(ones.dtype)
    return ones


def sample_classes(rows: RowLosses, uniforms: Tensor) -> Tensor:
    """Classes drawn from each row's softmax: where the cumulated ``p`` passes its ``uniforms (n, s)`` in [0, 1)."""
    classes = torch.zeros(uniforms.shape, dtype=torch.int64, device=rows.tensors.input.device)
    with curvature_tiles(rows, HESSIAN, columns=False) as tiles:
        for tile in tiles:
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
    left = wanted * total
    mine = None
    if group is not None:
        top, left, mine = _own_part(top, total, wanted, group)
    found = torch.zeros_like(left, dtype=torch.bool)
    chosen = torch.zeros_like(left, dtype=torch.int64)
    for block, _ in tile.blocks():
        mass = (spec.logit_map.value(block.z) - top).exp_()
        cumulated = mass.cumsum(-1, dtype=torch.float64)
        at = torch.searchsorted(cumulated, left, right=True)
        here = at < mass.shape[-1]
        if not here.all():
            # Where rounding leaves all classes short of the total, the last that has mass is taken.
            last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
            at = torch.where(here, at, last)
        has_mass = cumulated[:, -1:] > 0
        chosen = torch.where(~found & has_mass, at + block.classes.start, chosen)
        left = left - cumulated[:, -1:]
        found |= here
    if group is not None and mine is not None:
        chosen = torch.where(mine, chosen + spec.first, 0)
        sum_over([chosen], group)
    return chosen


def _own_part(top: Tensor, total: Tensor, wanted: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit of all processes, what each draw has left when this one's classes begin, and which are its."""
    highest = top.clone()
    max_over([highest], group)
    lowered = torch.where(highest == -torch.inf, 0.0, (top - highest).double())
    masses = total.new_zeros(len(total), group.size())
    masses[:, group.rank()] = (total * torch.where(top == -torch.inf, 0.0, torch.exp(lowered))).squeeze(-1)
    sum_over([masses], group)
    cumulated = masses.cumsum(-1)
    left = wanted * cumulated[:, -1:]
    # Where rounding leaves all short of the total, the last that has mass.
    last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())
    owner = torch.minimum(torch.searchsorted(cumulated, left, right=True), last)
    before = cumulated[:, group.rank()] - masses[:, group.rank()]
    return highest, left - before.unsqueeze(-1), owner == group.rank()
