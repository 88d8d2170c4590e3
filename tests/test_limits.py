"""Masked classes, infinities, large offsets: never NaN where there is an answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import softcurve

from . import oracle

INF = math.inf

# --- infinities, exact values, masks -----------------------------------------------------------------------------------


def probabilities(*values: float) -> softcurve.Probabilities:
    return softcurve.Probabilities(torch.tensor(values))


def test_support() -> None:
    half, certain = probabilities(0.5, 0.5), probabilities(1.0, 0.0)
    assert softcurve.kl_divergence(half, certain, reduction="none").item() == INF
    assert softcurve.kl_divergence(certain, half, reduction="none", base=2.0).item() == 1.0
    assert softcurve.kl_divergence(certain, certain, reduction="none").item() == 0.0
    assert softcurve.js_divergence(certain, probabilities(0.0, 1.0), reduction="none", base=2.0).item() == 1.0
    assert softcurve.kl_divergence(certain, probabilities(0.0, 1.0), reduction="none").item() == INF
    z = torch.tensor([0.0, 0.0])
    assert softcurve.kl_divergence(z, torch.tensor([0.0, -INF]), reduction="none").item() == INF
    assert softcurve.kl_divergence(torch.tensor([3.0, -INF]), z, reduction="none", base=2.0).item() == 1.0
    assert softcurve.entropy(z, base=2.0).item() == 1.0
    assert softcurve.entropy(torch.tensor([3.0, -INF])).item() == 0.0
    assert softcurve.cross_entropy(torch.tensor([0.0, -INF]), torch.tensor(1)).item() == INF
    assert softcurve.cross_entropy(torch.tensor([0.0, -INF]), torch.tensor([0.5, 0.5])).item() == INF


MASKED = torch.tensor([[0.3, -INF, -1.2, 2.0, -INF], [-INF, 0.1, 0.2, -0.3, -INF]], dtype=torch.float64)
FILLED = torch.tensor([[0.9, -0.4, 0.7, 0.0, 0.5], [0.2, -1.1, 0.6, 1.4, -0.8]], dtype=torch.float64)
KEPT = MASKED > -INF
INSIDE = torch.where(KEPT, FILLED, -INF)


MASKED_LOSSES = {
    "index": lambda z, t: softcurve.cross_entropy(z, torch.tensor([3, 2]), reduction="sum"),
    "logits": lambda z, t: softcurve.cross_entropy(z, softcurve.Logits(t), reduction="sum"),
    "probabilities": lambda z, t: softcurve.cross_entropy(
        z, softcurve.Probabilities(torch.softmax(t, -1)), reduction="sum"
    ),
    "z_loss": lambda z, t: softcurve.cross_entropy(z, torch.tensor([3, 2]), z_loss=0.2, softcap=3.0, reduction="sum"),
    "forward": lambda z, t: softcurve.kl_divergence(t, z, reduction="sum"),
    "reverse": lambda z, t: softcurve.kl_divergence(z, t, reduction="sum", temperature=1.3),
    "js": lambda z, t: softcurve.js_divergence(t, z, beta=0.3, reduction="sum"),
    "entropy": lambda z, t: softcurve.entropy(z).sum(),
}


@pytest.mark.parametrize("name", MASKED_LOSSES)
def test_masked_classes_are_as_if_absent(name: str) -> None:
    """Value, gradient and Hessian products equal those of the rows without the masked classes; zero at these."""
    loss = MASKED_LOSSES[name]
    z, t = MASKED.clone().requires_grad_(), INSIDE.clone().requires_grad_()
    value = loss(z, t)
    first = torch.autograd.grad(value, (z, t), create_graph=True, materialize_grads=True)
    direction = torch.where(KEPT, torch.arange(10, dtype=torch.float64).reshape(2, 5).cos(), 0.7)
    along = sum((g * direction).sum() for g in first)
    second = torch.autograd.grad(along, (z, t), materialize_grads=True)

    far = -700.0  # below every float64 sum's last digit once exponentiated, finite all the same
    z, t = torch.where(KEPT, MASKED, far).requires_grad_(), torch.where(KEPT, FILLED, far).requires_grad_()
    if name == "z_loss":  # a soft cap lifts what is merely far
        seen = 3.0 * torch.tanh(z / 3.0)
        seen = torch.where(KEPT, seen, far)
        lse = torch.logsumexp(seen, -1)
        plain = (lse - seen.gather(-1, torch.tensor([[3], [2]])).squeeze(-1) + 0.2 * lse.square()).sum()
    else:
        plain = DENSE_MASKED[name](z, t)
    expected_first = torch.autograd.grad(plain, (z, t), create_graph=True, materialize_grads=True)
    expected_along = sum((g * direction).sum() for g in expected_first)
    expected_second = torch.autograd.grad(expected_along, (z, t), materialize_grads=True)

    torch.testing.assert_close(value, plain, rtol=1e-13, atol=1e-14)
    for got, expected in zip((*first, *second), (*expected_first, *expected_second), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        assert (got[~KEPT] == 0).all()


def dense_ce(z: Tensor, y: Tensor) -> Tensor:
    return oracle.cross_entropy_rows(z, y).sum()


DENSE_MASKED = {
    "index": lambda z, t: torch.nn.functional.cross_entropy(z, torch.tensor([3, 2]), reduction="sum"),
    "logits": lambda z, t: dense_ce(z, torch.softmax(t, -1)),
    "probabilities": lambda z, t: dense_ce(z, torch.softmax(t, -1)),
    "forward": lambda z, t: oracle.kl_rows(torch.log_softmax(t, -1), torch.log_softmax(z, -1)).sum(),
    "reverse": lambda z, t: oracle.kl_rows(torch.log_softmax(z / 1.3, -1), torch.log_softmax(t / 1.3, -1)).sum(),
    "js": lambda z, t: oracle.js_rows(torch.log_softmax(t, -1), torch.log_softmax(z, -1), 0.3).sum(),
    "entropy": lambda z, t: oracle.entropy_rows(z).sum(),
}


def test_a_mask_of_one_side_only() -> None:
    """``D(p‖q)`` where p alone is masked is finite and smooth; where q alone is, infinite without a NaN in the gradient."""
    p = torch.tensor([0.3, -INF, 1.1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.5, -0.4], dtype=torch.float64, requires_grad=True)
    for loss in (softcurve.kl_divergence(p, q), softcurve.js_divergence(p, q), softcurve.js_divergence(q, p, beta=0.2)):
        assert 0 < loss.item() < INF
        first = torch.autograd.grad(loss, (p, q), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (p, q))
        assert all(g.isfinite().all() for g in (*first, *second))
        assert first[0][1] == 0
    infinite = softcurve.kl_divergence(q, p)
    assert infinite.item() == INF
    assert not any(g.isnan().any() for g in torch.autograd.grad(infinite, (p, q)))


def test_ties_are_smooth() -> None:
    """Where the maximum is shared, the derivatives of first, second and third order are those of the smooth function."""
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.5, 0.5, 0.1, -0.2], dtype=torch.float64, requires_grad=True)
    for ours, dense in (
        (lambda: softcurve.cross_entropy(z, torch.tensor(1)), lambda: -torch.log_softmax(z, -1)[1]),
        (lambda: softcurve.cross_entropy(z, softcurve.Logits(t)), lambda: dense_ce(z, torch.softmax(t, -1))),
        (lambda: softcurve.kl_divergence(z, t), lambda: oracle.kl_rows(z.log_softmax(-1), t.log_softmax(-1))),
        (lambda: softcurve.kl_divergence(t, z), lambda: oracle.kl_rows(t.log_softmax(-1), z.log_softmax(-1))),
        (lambda: softcurve.entropy(z), lambda: oracle.entropy_rows(z)),
    ):
        for got, expected in zip(derivatives(ours(), z, 3), derivatives(dense(), z, 3), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def derivatives(value: Tensor, z: Tensor, order: int) -> list[Tensor]:
    """The value and its derivatives along fixed directions, by repeated backward passes."""
    found = [value]
    for n in range(order):
        (gradient,) = torch.autograd.grad(found[-1], z, create_graph=True)
        found.append((gradient * torch.arange(n, n + z.numel(), dtype=z.dtype).sin()).sum())
    return found


# --- offsets -----------------------------------------------------------------------------------------------------------

OFFSET_LOSSES = {
    "index": lambda z, t: softcurve.cross_entropy(z, torch.arange(5), reduction="none"),
    "smoothed": lambda z, t: softcurve.cross_entropy(z, torch.arange(5), label_smoothing=0.1, reduction="none"),
    "dense": lambda z, t: softcurve.cross_entropy(z, torch.eye(9, dtype=z.dtype)[:5], reduction="none"),
    "logits": lambda z, t: softcurve.cross_entropy(z, softcurve.Logits(t), reduction="none"),
    "forward": lambda z, t: softcurve.kl_divergence(t, z, reduction="none"),
    "reverse": lambda z, t: softcurve.kl_divergence(z, t, reduction="none"),
    "js": lambda z, t: softcurve.js_divergence(t, z, beta=0.3, reduction="none"),
    "entropy": lambda z, t: softcurve.entropy(z),
}


@pytest.mark.parametrize("offset", [1e4, -1e4, 1.0])
@pytest.mark.parametrize("name", OFFSET_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offset(name: str, offset: float, dtype: torch.dtype) -> None:
    """Logits on a grid that the offset leaves exact: the loss and its gradients know nothing of it."""
    grid = 2.0**10 if dtype == torch.float32 else 2.0**38
    ulps = 8 * torch.finfo(dtype).eps
    base = (3 * torch.randn(2, 5, 9, dtype=dtype) * grid).round() / grid
    results = []
    for of_z, of_t in ((0, 0), (offset, 0), (0, offset), (offset, -offset)):
        z, t = (base[0] + of_z).requires_grad_(), (base[1] + of_t).requires_grad_()
        assert torch.equal(z.detach() - of_z, base[0])
        rows = OFFSET_LOSSES[name](z, t)
        results.append((rows, *torch.autograd.grad(rows.sum(), (z, t), materialize_grads=True)))
    for shifted in results[1:]:
        for got, expected in zip(shifted, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=ulps, atol=ulps / 4)


@pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
def test_huge_logits(scale: float) -> None:
    """Gaps far beyond what exp can hold: the loss is the gap itself, the gradient that of a certain row."""
    z = torch.tensor([[scale, -scale / 4, 0.0]], requires_grad=True)
    for target, truth in ((0, 0.0), (2, scale)):
        loss = softcurve.cross_entropy(z, torch.tensor([target]))
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.item() == torch.tensor(truth).item()
        assert gradient.tolist() == [[1.0 - (target == 0), 0.0, -1.0 if target == 2 else 0.0]]
    assert softcurve.entropy(z).item() == 0
    assert softcurve.kl_divergence(z, z.detach()).item() == 0
