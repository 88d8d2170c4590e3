"""DESIGN §7: right relatively where the naive formula cancels, and never NaN where there is an answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import softcurve

from . import oracle
from .pairwise import pairwise

INF = math.inf
GAPS = (5, 8, 12, 16, 17, 20, 30, 45, 60, 75, 80)


def with_gradient(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


# --- confident rows ----------------------------------------------------------------------------------------------------


def confident_logits(gap: float, others: int) -> Tensor:
    """Class 1 is above the best of the others by ``gap``; the others differ by rounding-prone amounts."""
    others_below = -gap - torch.linspace(0, 1.7, others)
    return torch.cat([others_below[:1], torch.zeros(1), others_below[1:]])


def one_hot(classes: int, at: int = 1) -> Tensor:
    return torch.eye(classes)[at]


def targets(classes: int, at: int) -> dict[str, object]:
    """The same certain target, said in five ways; exactly certain, so that they have one truth."""
    certain = one_hot(classes, at)
    return {
        "index": torch.tensor(at),
        "dense": certain,
        "Probabilities": softcurve.Probabilities(certain),
        "Logits": softcurve.Logits(certain.log()),
        "TopK": softcurve.TopK(torch.tensor([at]), torch.zeros(1)),
        "renormalized": softcurve.TopK(torch.tensor([at]), torch.zeros(1), tail="renormalize"),
    }


CONFIDENT = pairwise(
    {
        "kind": ("index", "dense", "Probabilities", "Logits", "TopK", "renormalized"),
        "others": (1, 2, 9, 1000),
        "right": (True, False),
    }
)


@pytest.mark.parametrize("setting", CONFIDENT, ids=lambda s: "-".join(map(str, s.values())))
def test_confident_row(setting: dict[str, Any]) -> None:
    kind, others, at = setting["kind"], setting["others"], 1 if setting["right"] else 0
    for gap in GAPS:
        z = confident_logits(gap, others).requires_grad_()
        y, row = oracle.exact(one_hot(others + 1, at)), oracle.exact(z)
        loss = softcurve.cross_entropy(z, targets(others + 1, at)[kind])
        (gradient,) = with_gradient(loss, z)
        assert oracle.relative_error(loss.item(), oracle.exact_cross_entropy(y, row)) <= 2e-6, gap
        residual = oracle.exact_residual(y, row)
        for k in (0, 1, others):
            assert oracle.relative_error(gradient[k].item(), residual[k]) <= 2e-6, (gap, k)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5}, {"softcap": 1000.0}, {"base": 2.0}, {"label_smoothing": 0.0}]
)
@pytest.mark.parametrize("gap", [6.0, 20.0, 40.0])
def test_confident_row_with_options(options: dict[str, float], gap: float) -> None:
    z = confident_logits(gap, 6).requires_grad_()
    loss = softcurve.cross_entropy(z, torch.tensor(1), **options)
    (gradient,) = with_gradient(loss, z)
    seen = oracle.seen_by_softmax(z.detach().double(), options.get("temperature", 1.0), options.get("softcap"))
    y, unit = oracle.exact(one_hot(7)), math.log(options.get("base", math.e))
    # The map itself rounds in float32, z of 40 by 2e-6 absolutely, and the loss is exp of it.
    bound = 2e-6 if "softcap" not in options else 2e-5
    assert oracle.relative_error(loss.item() * unit, oracle.exact_cross_entropy(y, oracle.exact(seen))) <= bound
    slope = 1 / options.get("temperature", 1.0)
    truth = oracle.exact_residual(y, oracle.exact(seen))[1] * slope
    assert oracle.relative_error(gradient[1].item() * unit, truth) <= bound


@pytest.mark.parametrize("gap", [5, 17, 40, 80])
def test_confident_row_second_order(gap: int) -> None:
    """``H e_top = p_top (e_top − p)``, whose own entry is ``p (1 − p)``: the small sum of the others."""
    z = confident_logits(gap, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(softcurve.cross_entropy(z, torch.tensor(1)), z, create_graph=True)
    (column,) = torch.autograd.grad(gradient[1], z)
    p = oracle.exact_softmax(oracle.exact(z))
    others = oracle.MP.fsum(v for k, v in enumerate(p) if k != 1)
    assert oracle.relative_error(column[1].item(), p[1] * others) <= 2e-6
    for k in (0, 2, 3, 4):
        assert oracle.relative_error(column[k].item(), -p[1] * p[k]) <= 2e-6
    jacobian = softcurve.softmax_jacobian(z.detach())
    assert oracle.relative_error(jacobian[1, 1].item(), p[1] * others) <= 2e-6
    product = softcurve.softmax_jacobian_product(z.detach(), one_hot(5))
    assert oracle.relative_error(product[1].item(), p[1] * others) <= 2e-6


@pytest.mark.parametrize("gap", [5, 17, 40, 80])
def test_confident_entropy(gap: int) -> None:
    z = confident_logits(gap, 4)
    p = oracle.exact_softmax(oracle.exact(z))
    truth = -oracle.MP.fsum(v * oracle.MP.log(v) for v in p)
    assert oracle.relative_error(softcurve.entropy(z).item(), truth) <= 2e-6


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_any_confidence(seed: int) -> None:
    """Random rows from the nearly uniform to the certain: the loss within a few ulp, whichever class is meant."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1e-3, 0.3, 1.0, 4.0, 15.0, 40.0]).unsqueeze(-1)
    z = (scale * torch.randn(6, 23, generator=generator)).requires_grad_()
    target = torch.stack([z[:3].argmin(-1), z[3:].argmax(-1)]).flatten()
    rows = softcurve.cross_entropy(z, target, reduction="none")
    (gradient,) = with_gradient(rows.sum(), z)
    for i in range(6):
        y = oracle.exact(one_hot(23, int(target[i])))
        assert oracle.relative_error(rows[i].item(), oracle.exact_cross_entropy(y, oracle.exact(z[i]))) <= 1e-6
        residual = oracle.exact_residual(y, oracle.exact(z[i]))
        for k in range(23):
            # exp of a difference d that is rounded to half an ulp: d · 6e-8 of p; below 1e-37 float32 itself gives out
            bound = 2e-6 + 6e-8 * (z[i].max() - z[i, k]).item()
            got, truth = gradient[i, k].item(), residual[k]
            assert oracle.relative_error(got, truth) <= bound or (abs(got) < 1e-37 and abs(truth) < 1e-37)


# --- nearly equal distributions ----------------------------------------------------------------------------------------

VOCABULARY = 50257


def neighbours(seed: int, distance: float, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(rows, VOCABULARY, generator=generator)
    return z, z + distance * torch.randn(rows, VOCABULARY, generator=generator)


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
@pytest.mark.parametrize("seed", range(3))
def test_nearly_equal_vocabulary(seed: int, distance: float) -> None:
    """Against float64 closed forms of the very float32 inputs, which torch's float32 ``kl_div`` misses altogether."""
    z_p, z_q = neighbours(seed, distance)
    # An offset of one side is none of a distribution's business, but it costs the differences their exactness.
    for shift, bound in ((0.0, 1e-6), *(((3.25, 1e-5),) if distance == 1e-3 else ())):
        kl = softcurve.kl_divergence(z_p, z_q + shift, reduction="none")
        truth = oracle.near_kl(z_p, z_q + shift)
        assert (kl >= 0).all()
        assert ((kl.double() - truth).abs() / truth).max() <= bound
        for beta in (0.5, 0.1):
            js = softcurve.js_divergence(z_p, z_q + shift, beta=beta, reduction="none")
            truth = oracle.near_js(z_p, z_q + shift, beta)
            assert (js >= 0).all()
            assert ((js.double() - truth).abs() / truth).max() <= bound


def test_oracle_of_the_nearly_equal() -> None:
    """The float64 oracles above, held to 50 digits."""
    z_p, z_q = neighbours(0, 1e-5, rows=1)
    z_p, z_q = z_p[:, :3000], z_q[:, :3000]
    p, q = (oracle.exact_softmax(oracle.exact(z[0])) for z in (z_p, z_q))
    assert oracle.relative_error(oracle.near_kl(z_p, z_q).item(), oracle.exact_kl(p, q)) <= 1e-8
    assert oracle.relative_error(oracle.near_js(z_p, z_q, 0.1).item(), oracle.exact_js(p, q, 0.1)) <= 1e-8


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_nearly_equal_gradient(distance: float) -> None:
    """``∂D(p‖q)/∂z_q = q − p`` of 50,257 classes: relative in norm, where q and p agree to three or five digits."""
    z_p, z_q = neighbours(7, distance)
    leaf_p, leaf_q = z_p.clone().requires_grad_(), z_q.clone().requires_grad_()
    in_p, in_q = with_gradient(softcurve.kl_divergence(leaf_p, leaf_q, reduction="sum"), leaf_p, leaf_q)
    p, q = torch.softmax(z_p.double(), -1), torch.softmax(z_q.double(), -1)
    ratio = torch.log_softmax(z_p.double(), -1) - torch.log_softmax(z_q.double(), -1)
    for got, truth in ((in_q, q - p), (in_p, p * (ratio - (p * ratio).sum(-1, keepdim=True)))):
        assert (got.double() - truth).norm() <= 1e-4 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_is_exactly_zero(dtype: torch.dtype) -> None:
    z = 5 * torch.randn(7, 1009, dtype=dtype)
    assert (softcurve.kl_divergence(z, z.clone(), reduction="none") == 0).all()
    for beta in (0.0, 0.2, 0.5, 1.0):
        assert (softcurve.js_divergence(z, z.clone(), beta=beta, reduction="none") == 0).all()
