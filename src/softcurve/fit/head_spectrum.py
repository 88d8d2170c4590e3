"""The eigenvalues of the curvature at a fitted head, as cheaply as a report may have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from softcurve.array_types import Float, Float64
from softcurve.curvature import GGN, HeadCurvature
from softcurve.curvature.class_factors import DenseClassFactor
from softcurve.fit import DataError
from softcurve.fit.data.source import BlockTarget, Source, share_of
from softcurve.fit.losses import Loss
from softcurve.fit.together import Together
from softcurve.losses.targets import TopK
from softcurve.records import ShortRepr

__all__ = ["CurvatureSpectrum", "curvature_spectrum"]

ROWS = 2000
FEWEST_ROWS = 200
WORK = 5e6  # rows · d · C, which some 150 products take a second or two for
DENSE_SIZE = 1500  # up to here the matrix itself is made, and all its eigenvalues are found in half a second
DENSE_WORK = 3e8  # rows · C · C (d + 1), of which it is made in a second
KRONECKER_SIDE = 2048  # classes and features up to here, of which the eigenvalues take three seconds
PROBES, STEPS = 2, 40
TOLERANCE = 1e-3  # relative, of the largest eigenvalues: finer than a picture shows
QUANTILES = 400


Method = Literal["dense", "products", "kronecker"]
RESOLUTION: dict[Method, float] = {"dense": 1e-9, "products": 1e-3, "kronecker": 1e-9}


@dataclass(frozen=True, eq=False, repr=False)
class CurvatureSpectrum(ShortRepr):
    """Eigenvalues of the Gauss-Newton matrix of the mean loss in weight and bias, ``size × size``, on ``rows`` rows.

    ``largest`` come from the largest down; those that are not found are left out. ``shares`` sum to 1 and say how large
    a share of all eigenvalues lies at each of ``nodes``, which rise; below ``resolution`` times the largest one they
    are not told apart. ``trace`` is exact on the rows. The ``method`` is ``"dense"``, ``"products"`` (Lanczos, on a
    matrix that is known by its products alone) or ``"kronecker"`` (all eigenvalues of its Kronecker factors).
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
    source: Source,
    weight: Float[Tensor, "classes d"],
    bias: Float[Tensor, " classes"] | None,
    *,
    loss: str = "cross_entropy",
    k: int = 20,
    rows: int = ROWS,
    seed: int = 0,
) -> CurvatureSpectrum | str:
    """The spectrum on at most ``rows`` rows drawn without replacement, or the reason why it is left out.

    Without ``bias`` it is that of the weight alone.

    A matrix of up to 1,500 columns is made. For larger ones products are taken, on as many rows as ``rows · d · C`` of
    5e6 allows; for more than that the Kronecker factors, up to 2,048 classes and features. Beyond, it is left out. The
    penalty of a fit is no part of the matrix. Where the source is a share, the rows are drawn from those of all
    processes, and the first one takes the time; the others are told that it does. Raises DataError for rows without
    targets.
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
        return (
            f"{classes:,} classes of {width:,} features are too many for a quick look; "
            "softcurve spectrum takes the time that it needs"
        )
    features, target = _sampled(source, sample, seed)
    if not share.together.first:
        return "the first process has it"
    if loss == "forward_kl" and source.kind == "labels":
        loss = "cross_entropy"  # H(y) = 0 for a label
    if isinstance(target, Tensor) and not target.is_floating_point() and loss != "cross_entropy":
        target = nn.functional.one_hot(target, classes).double()
    if isinstance(target, TopK) and target.coarsens and method == "dense":
        method = "products"  # its outcomes are not the classes
    weight, bias = weight.double(), None if bias is None else bias.double()
    here = HeadCurvature(features, weight, target, linear_bias=bias, loss=cast("Loss", loss))
    if method == "products":
        largest, nodes, shares = _by_products(features, target, weight, bias, loss, k, seed)
    else:
        values = _of_factors(here) if method == "kronecker" else _of_matrix(features, target, weight, bias, loss)
        places = torch.linspace(0, size - 1, min(QUANTILES, size)).round().long()
        largest, nodes = values.flip(0)[:k], values[places]
        shares = torch.full_like(nodes, 1 / len(nodes))
    return CurvatureSpectrum(largest, nodes, shares, here.trace(), size, sample, method, RESOLUTION[method])


def _of_matrix(
    features: Float64[Tensor, "rows d"],
    target: BlockTarget,
    weight: Float64[Tensor, "classes d"],
    bias: Float64[Tensor, " classes"] | None,
    loss: str,
) -> Float64[Tensor, " size"]:
    """All eigenvalues of the mean of ``B ⊗ ẽẽᵀ``, ``B = diag(q) − q pᵀ − p qᵀ + (Σq) p pᵀ``, ``ẽ = [e; 1]``.

    Of JS at β = ½ it is ``q = ¼ p y / m``, ``m = ½ (p + y)``; of the other losses ``q = p``.
    """
    z = nn.functional.linear(features, weight, bias)
    p = z.softmax(-1)
    q = p
    if loss == "js":
        y = target.distribution_against(z)[1] if isinstance(target, TopK) else target.double()
        q = (p * y / (2 * (p + y))).nan_to_num(0.0)
    wide = features if bias is None else torch.cat([features, torch.ones_like(features[:, :1])], 1)
    classes, width = len(weight), wide.shape[1]
    matrix = p.new_zeros(classes, width, classes, width)
    total = q.sum(1, keepdim=True)
    for j in range(classes):
        to_j = slice(j + 1)  # the lower triangle alone is read
        mass = (total * p[:, j, None] - q[:, j, None]) * p[:, to_j] - p[:, j, None] * q[:, to_j]
        mass[:, j] += q[:, j]
        weighted = mass[:, :, None] * wide[:, None]
        matrix[j, :, to_j] = (wide.T @ weighted.flatten(1)).view(width, -1, width)
    values: Tensor = torch.linalg.eigvalsh(matrix.view(classes * width, -1) / len(wide))
    return values.clamp(min=0)


def _by_products(
    features: Float64[Tensor, "rows d"],
    target: BlockTarget,
    weight: Float64[Tensor, "classes d"],
    bias: Float64[Tensor, " classes"] | None,
    loss: str,
    k: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")  # nothing is drawn
    head.weight = nn.Parameter(weight)
    if bias is not None:
        head.bias = nn.Parameter(bias)
    operator = GGN(nn.Identity(), head, [(features, target)], loss=cast("Loss", loss))
    size = operator.shape[0]
    density = operator.spectral_density(probes=PROBES, steps=min(STEPS, size), seed=seed)
    try:
        largest = operator.eigsh(min(k, size), tol=TOLERANCE, seed=seed).values.double()
    except RuntimeError:  # it did not converge: eigenvalues that are too close, or all but zero
        largest = density.nodes.new_zeros(0)
    nodes, order = density.nodes.flatten().sort()
    shares = density.weights.flatten()[order]
    return largest, nodes, shares / shares.sum()


def _of_factors(here: HeadCurvature) -> Float64[Tensor, " size"]:
    """The eigenvalues of ``B ⊗ A`` are the products of theirs."""
    factors = here.kfac(form="dense")
    assert isinstance(factors.form, DenseClassFactor)
    of_features = torch.linalg.eigvalsh(factors.features).clamp(min=0)
    return factors.form.values.outer(of_features).flatten().sort().values


def _sampled(source: Source, rows: int, seed: int) -> tuple[Float64[Tensor, "rows d"], BlockTarget]:
    """Features and targets of rows drawn at random, in their order."""
    share = share_of(source)
    drawn = np.random.default_rng(seed).choice(share.total, rows, replace=False, shuffle=False)  # holds those alone
    wanted = torch.from_numpy(drawn).sort().values - share.first
    features, targets, last = [], [], int(wanted[-1])
    with share.together.agreed():
        for block in source.blocks(max(1, 1_000_000 // max(source.width, len(source.classes)))):
            here = wanted[(wanted >= block.start) & (wanted < block.start + len(block))] - block.start
            if len(here):
                assert block.target is not None
                features.append(block.features[here].double())
                targets.append(_at(block.target, here))
            if block.start + len(block) > last:
                break
    return _of_all(features, targets, source, share.together)


def _of_all(
    features: list[Tensor], targets: list[Tensor | TopK], source: Source, together: Together
) -> tuple[Float64[Tensor, "rows d"], BlockTarget]:
    """The rows that all processes have drawn, in their order."""
    if together.size == 1:
        return torch.cat(features), _joined(targets)
    none = torch.zeros(0, source.width, dtype=torch.float64)
    all_features = torch.cat(together.gathered(torch.cat([none, *features])))
    if source.kind != "top_k":
        like = torch.zeros(0, dtype=torch.int64)
        if source.kind == "distributions":
            like = torch.zeros(0, len(source.classes), dtype=torch.float64)
        own = torch.cat([like, *(target for target in targets if isinstance(target, Tensor))])
        return all_features, torch.cat(together.gathered(own))
    own_lists = _joined(targets) if targets else None
    k, bytes_each = together.largest(
        *((own_lists.indices.shape[1], own_lists.log_probs.itemsize) if isinstance(own_lists, TopK) else (0, 0))
    )
    indices, log_probs = torch.zeros(0, int(k), dtype=torch.int64), torch.zeros(0, int(k), dtype=torch.float64)
    if isinstance(own_lists, TopK):
        indices, log_probs = own_lists.indices, own_lists.log_probs.double()
    indices, log_probs = (torch.cat(together.gathered(each)) for each in (indices, log_probs))
    return all_features, TopK(indices, log_probs if bytes_each == 8 else log_probs.float())


def _at(target: BlockTarget, places: Tensor) -> Tensor | TopK:
    if isinstance(target, TopK):
        return TopK(target.indices[places], target.log_probs[places], target.tail)
    return target[places]


def _joined(targets: list[Tensor | TopK]) -> BlockTarget:
    lists = [target for target in targets if isinstance(target, TopK)]
    if lists:
        indices, log_probs = (torch.cat([getattr(each, name) for each in lists]) for name in ("indices", "log_probs"))
        return TopK(indices, log_probs, lists[0].tail)
    return torch.cat([target for target in targets if isinstance(target, Tensor)])
