"""Half precision: losses in float32, gradients in the leaves' dtypes, with no more error than torch's dense computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve

from . import oracle

HALF = [torch.bfloat16, torch.float16]
SHAPES = [(5, 7), (33, 129), (507, 1013)]

Loss = Callable[[Tensor, Tensor], Tensor]


def classes(z: Tensor) -> Tensor:
    return torch.arange(z.shape[0]) * 7 % z.shape[1]


# The loss of model logits and teacher logits (or probabilities); ours, and what a user of torch writes.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "index": (
        lambda z, t: softcurve.cross_entropy(z, classes(z)),
        lambda z, t: F.cross_entropy(z, classes(z)),
    ),
    "smoothed": (
        lambda z, t: softcurve.cross_entropy(z, classes(z), label_smoothing=0.1),
        lambda z, t: F.cross_entropy(z, classes(z), label_smoothing=0.1),
    ),
    "probabilities": (
        lambda z, y: softcurve.cross_entropy(z, y),
        lambda z, y: F.cross_entropy(z, y),
    ),
    "logits": (
        lambda z, t: softcurve.cross_entropy(z, softcurve.Logits(t)),
        lambda z, t: F.cross_entropy(z, torch.softmax(t, -1)),
    ),
    "forward": (
        lambda z, t: softcurve.kl_divergence(t, z),
        lambda z, t: F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean"),
    ),
    "reverse": (
        lambda z, t: softcurve.kl_divergence(z, t),
        lambda z, t: F.kl_div(t.log_softmax(-1), z.log_softmax(-1), log_target=True, reduction="batchmean"),
    ),
    "js": (
        lambda z, t: softcurve.js_divergence(t, z, beta=0.3),
        lambda z, t: oracle.js_rows(t.log_softmax(-1), z.log_softmax(-1), 0.3).mean(),
    ),
    "entropy": (lambda z, t: softcurve.entropy(z).mean(), lambda z, t: oracle.entropy_rows(z).mean()),
}


def inputs(name: str, both: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Model and target in ``dtype``; what is lost by rounding probabilities is lost before any loss sees them."""
    return both[0].to(dtype), (torch.softmax(both[1], -1) if name == "probabilities" else both[1]).to(dtype)


def evaluated(loss: Loss, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, t = z.clone().requires_grad_(), t.clone().requires_grad_()
    value = loss(z, t)
    return value.detach(), *torch.autograd.grad(value, (z, t), materialize_grads=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", HALF)
def test_no_worse_than_dense(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Loss and both gradients, in norm, against float64 on the very same half-precision logits."""
    ours, dense = LOSSES[name]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        z, t = inputs(name, 2 * torch.randn(2, *shape, generator=generator), dtype)
        truth = evaluated(dense, z.double(), t.double())
        dtypes = (torch.float32, dtype, dtype)
        for got, plain, true, own in zip(evaluated(ours, z, t), evaluated(dense, z, t), truth, dtypes, strict=True):
            assert got.dtype == own
            assert (got.double() - true).norm() <= (plain.double() - true).norm(), (seed, got.shape)


@pytest.mark.parametrize("dtype", HALF)
def test_right_to_float32(dtype: torch.dtype) -> None:
    """A row's loss is float64's to 1e-6: neither computed nor returned in half precision."""
    z = (3 * torch.randn(200, 57)).to(dtype)
    rows = softcurve.cross_entropy(z, classes(z), reduction="none")
    truth = F.cross_entropy(z.double(), classes(z), reduction="none")
    assert rows.dtype == torch.float32
    assert (((rows.double() - truth) / truth).abs() <= 1e-6).all()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """A loss is float32 or wider; gradients, and the Jacobian and its product, have the dtype of the logits."""
    z, t = inputs(name, torch.randn(2, 4, 5), dtype)
    value, in_z, in_t = evaluated(LOSSES[name][0], z, t)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert in_z.dtype == in_t.dtype == dtype
    assert softcurve.softmax_jacobian(z).dtype == softcurve.softmax_jacobian_product(z, t).dtype == dtype


def test_mixed_dtypes() -> None:
    """A float32 teacher of a bfloat16 student, and the reverse: each leaf gets its gradient in its own dtype."""
    z = torch.randn(4, 5).to(torch.bfloat16).requires_grad_()
    t = torch.randn(4, 5, requires_grad=True)
    for loss in (softcurve.cross_entropy(z, softcurve.Logits(t)), softcurve.kl_divergence(t, z)):
        in_z, in_t = torch.autograd.grad(loss, (z, t), create_graph=True)
        assert (in_z.dtype, in_t.dtype) == (torch.bfloat16, torch.float32)
        second = torch.autograd.grad(in_z.float().square().sum() + in_t.square().sum(), (z, t))
        assert (second[0].dtype, second[1].dtype) == (torch.bfloat16, torch.float32)
    weight = torch.rand(5, dtype=torch.float64)
    assert softcurve.cross_entropy(t, torch.arange(4), weight=weight).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_large_sums_do_not_overflow(dtype: torch.dtype) -> None:
    """70,000 equal classes: their exponentials sum to more than float16 can hold, and their loss is log C."""
    z = torch.zeros(3, 70000, dtype=dtype)
    truth = torch.full((3,), math.log(70000.0))
    rows = softcurve.cross_entropy(z, torch.tensor([0, 5, 69999]), reduction="none")
    for got in (rows, softcurve.entropy(z)):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=0)


def test_autocast_keeps_losses_in_float32() -> None:
    """As torch's own losses do; the gradient flows back to the float32 weights."""
    x, head, y = torch.randn(9, 6), torch.nn.Linear(6, 5), torch.arange(9) % 5
    with torch.autocast("cpu", torch.bfloat16):
        z = head(x)
        assert z.dtype == torch.bfloat16
        ours, plain = softcurve.cross_entropy(z, y), F.cross_entropy(z, y)
        others = (softcurve.kl_divergence(z, z.flip(0)), softcurve.entropy(z), softcurve.js_divergence(z, z.flip(0)))
    assert ours.dtype == plain.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in others)
    torch.testing.assert_close(ours, F.cross_entropy(z.float(), y), rtol=1e-6, atol=0)
    for got, expected in zip(
        torch.autograd.grad(ours, head.parameters(), retain_graph=True),
        torch.autograd.grad(plain, head.parameters()),
        strict=True,
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-3)
