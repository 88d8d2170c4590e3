"""The eigenvalues of the curvature at a fitted head, computed within the few seconds that a report may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from softcurve.array_types import Float, Float64
from softcurve.curvature import GGN, HeadCurvature
from softcurve.curvature.kfac import DenseClassFactor
from softcurve.fit import DataError
from softcurve.fit.data.source import BlockTarget, Source, block_rows, share_of
from softcurve.fit.data.sparse_features import dense_features
from softcurve.fit.data.subset import rows_of
from softcurve.fit.head_matrix import add_rows
from softcurve.fit.losses import concatenated, is_soft
from softcurve.losses import softmax
from softcurve.losses.divergences import Divergence, divergence_of
from softcurve.losses.rows import GAUSS_NEWTON, divergence_second_order
from softcurve.losses.topk import TopK
from softcurve.records import ShortRepr
from softcurve.typing import FitLoss

ROWS = 2000
FEWEST_ROWS = 200
WORK = 5e6  # rows · d · C for which some 150 products take one or two seconds
DENSE_SIZE = 1500  # the largest matrix whose eigenvalues are all computed, which takes half a second
DENSE_WORK = 3e8  # rows · C · C (d + 1) for which the matrix is assembled in one second
KRONECKER_SIDE = 2048  # the largest number of classes or features whose eigenvalues are computed, in three seconds
PROBES, STEPS = 2, 40
TOLERANCE = 1e-3  # of the largest eigenvalues, relative: finer than a picture shows
QUANTILES = 400

Method = Literal["dense", "products", "kronecker"]
RESOLUTION: dict[Method, float] = {"dense": 1e-9, "products": 1e-3, "kronecker": 1e-9}


@dataclass(frozen=True, eq=False, repr=False)
class CurvatureSpectrum(ShortRepr):
    """Eigenvalues of the Gauss-Newton matrix of the mean loss in weight and bias, ``size × size``, on ``rows`` rows.

    ``largest`` are in descending order and may be missing. ``shares`` sum to 1 and are the shares of the eigenvalues
    that lie at each of the ascending ``nodes``; eigenvalues below ``resolution`` times the largest one are not
    distinguished. ``trace`` is exact on the rows. The ``method`` is ``"dense"``, ``"products"`` (Lanczos) or
    ``"kronecker"`` (all eigenvalues of the Kronecker approximation).
    """

    largest: Float64[Tensor, " k"]
    nodes: Float64[Tensor, " nodes"]
    shares: Float64[Tensor, " nodes"]
    trace: float
    size: int
    rows: int
    method: Method
    resolution: float


@torch.no_grad()
def curvature_spectrum(
    source: Source, weight: Float[Tensor, "classes d"], bias: Float[Tensor, " classes"] | None, *,
    loss: str | Divergence = "cross_entropy", k: int = 20, rows: int = ROWS, seed: int = 0,
) -> CurvatureSpectrum | str:  # fmt: skip
    """Return the spectrum on at most ``rows`` rows drawn without replacement, or the reason why it is left out.

    The matrix leaves out the penalty of a fit and, without ``bias``, the bias. It is assembled up to 1,500 columns. A
    larger one is multiplied with vectors, on as many rows as ``rows · d · C ≤ 5e6`` allows; beyond that its Kronecker
    factors are used, up to 2,048 classes and features. If the source is a share, the rows are drawn from those of all
    processes, of which only the first returns a spectrum. Raises DataError for rows without targets.
    """
    if source.kind is None:
        raise DataError("data: the curvature needs rows with targets")
    share = share_of(source)
    classes, width = weight.shape
    size, sample = classes * (width + (bias is not None)), min(rows, share.total)
    affordable = int(WORK / (classes * width))
    method: Method = "products"
    if size <= DENSE_SIZE:
        method = "dense"
        sample = min(sample, int(DENSE_WORK / (classes * size)))
    elif affordable >= min(FEWEST_ROWS, sample):
        sample = min(sample, affordable)
    elif max(classes, width) <= KRONECKER_SIDE:
        method = "kronecker"
    else:
        too_many = f"{classes:,} classes of {width:,} features are too many for a quick look"
        return f"{too_many}; softcurve spectrum takes the time that it needs"
    features, target = _sampled(source, sample, seed)
    if not share.group.first:
        return "the first process has it"
    if loss == "forward_kl" and source.kind == "labels":
        loss = "cross_entropy"  # H(y) = 0 for a label
    if isinstance(target, Tensor) and not is_soft(target) and loss != "cross_entropy":
        target = nn.functional.one_hot(target, classes).double()
    if isinstance(target, TopK) and target.merges_tail and method == "dense":
        method = "products"  # the outcomes are not the classes
    head = nn.Linear(width, classes, bias=bias is not None, device="meta")  # nothing is drawn
    head.weight = nn.Parameter(weight.double())
    if bias is not None:
        head.bias = nn.Parameter(bias.double())
    name = cast("FitLoss", loss)
    streamed = HeadCurvature(features, head.weight, target, linear_bias=head.bias, loss=name)
    if method == "products":
        operator = GGN(nn.Identity(), head, [(features, target)], loss=name)
        density = operator.spectral_density(probes=PROBES, steps=min(STEPS, size), seed=seed)
        try:
            largest = operator.eigsh(min(k, size), tol=TOLERANCE, seed=seed).values.double()
        except RuntimeError:  # it has not converged: the eigenvalues are too close, or nearly zero
            largest = density.nodes.new_zeros(0)
        nodes, order = density.nodes.flatten().sort()
        shares = density.weights.flatten()[order]
        shares /= shares.sum()
    else:
        if method == "dense":
            values = _of_matrix(features, target, head, loss)
        else:  # those of B ⊗ A are the products of the eigenvalues of B and of A
            factors = streamed.kfac(form="dense")
            assert isinstance(factors.form, DenseClassFactor)
            of_features = torch.linalg.eigvalsh(factors.features).clamp(min=0)
            values = factors.form.values.outer(of_features).flatten().sort().values
        places = torch.linspace(0, size - 1, min(QUANTILES, size)).round().long()
        largest, nodes = values.flip(0)[:k], values[places]
        shares = torch.full_like(nodes, 1 / len(nodes))
    return CurvatureSpectrum(largest, nodes, shares, streamed.trace(), size, sample, method, RESOLUTION[method])


def _of_matrix(features: Tensor, target: BlockTarget, head: nn.Linear, loss: str | Divergence) -> Tensor:
    """Return all eigenvalues of the mean of ``B ⊗ ẽẽᵀ``, ``B = diag(q) − q pᵀ − p qᵀ + (Σq) p pᵀ``, ``ẽ = [e; 1]``.

    ``q`` is ``p² φ″``, or ``p`` if the Hessian of the loss is ``J``.
    """
    z = head(features)
    p = z.softmax(-1)
    q, member = p, divergence_of(loss)
    if not member.hessian_is_fisher:
        y = target.distribution_against(z)[1] if isinstance(target, TopK) else target.double()
        q = divergence_second_order(member, GAUSS_NEWTON, softmax.pair(z, y.log())).nan_to_num(0.0)
    wide = features if head.bias is None else torch.cat([features, torch.ones_like(features[:, :1])], 1)
    classes, width = head.out_features, wide.shape[1]
    matrix = p.new_zeros(classes, width, classes, width)
    add_rows(matrix, p, q, q.sum(1, keepdim=True), wide)  # eigvalsh reads only the lower triangle
    values: Tensor = torch.linalg.eigvalsh(matrix.view(classes * width, -1) / len(wide))
    return values.clamp(min=0)


def _sampled(source: Source, rows: int, seed: int) -> tuple[Float64[Tensor, "rows d"], BlockTarget]:
    """Return the features and targets of rows drawn at random from those of all processes, in their order."""
    share = share_of(source)
    drawn = np.random.default_rng(seed).choice(share.total, rows, replace=False, shuffle=False)  # holds only those
    wanted = torch.from_numpy(drawn).sort().values - share.first
    parts: list[tuple[Tensor, BlockTarget | None]] = []
    with share.group.agreed():
        for block in source.blocks(block_rows(source)):
            here = wanted[(wanted >= block.start) & (wanted < block.start + len(block))] - block.start
            if len(here):
                parts.append((dense_features(block.features[here]).double(), rows_of(block.target, here)))
            if block.start + len(block) > wanted[-1]:
                break
    parts = [part for of_process in share.group.values(parts) for part in of_process]
    return torch.cat([features for features, _ in parts]), concatenated([target for _, target in parts])
