"""Losses in few passes: as accurate as they claim on rows of every kind, and the exact forms on the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
import softcurve.losses.autograd
import softcurve.losses.few_logits
from softcurve import JensenShannon, Logits
from softcurve.losses import fast_forms
from softcurve.losses import rows as row_forms
from softcurve.typing import ReductionKind

LOSSES = ("index", "smoothed", "dense", "forward", "reverse", "js")
# How far a target is from the logits, and their scale: from unequal and confident to nearly equal rows.
KINDS = ((1.0, 1.0), (1.0, 0.1), (1.0, 1e-3), (4.0, 0.1), (12.0, 0.5))


def ours(name: str, z: Tensor, t: Tensor) -> Tensor:
    if name in ("index", "smoothed"):
        return softcurve.cross_entropy(
            z, t.argmax(-1), label_smoothing=0.1 if name == "smoothed" else 0.0, reduction="none"
        )
    if name == "dense":
        return softcurve.cross_entropy(z, Logits(t), reduction="none")
    if name == "js":
        return softcurve.divergence(t, z, divergence=JensenShannon(0.3), reduction="none")
    pair = (t, z) if name == "forward" else (z, t)
    return softcurve.kl_divergence(*pair, reduction="none")


def truth(name: str, z: Tensor, t: Tensor) -> Tensor:
    """The dense formulas in float64."""
    z, t = z.double(), t.double()
    log_p, log_y = z.log_softmax(-1), t.log_softmax(-1)
    p, y = log_p.exp(), log_y.exp()
    if name in ("index", "smoothed"):
        rate = 0.1 if name == "smoothed" else 0.0
        return F.cross_entropy(z, t.argmax(-1), label_smoothing=rate, reduction="none")
    if name == "dense":
        return -(y * log_p).sum(-1)
    if name == "js":
        log_m = (0.7 * p + 0.3 * y).log()
        return (0.3 * y * (log_y - log_m) + 0.7 * p * (log_p - log_m)).sum(-1)
    return (y * (log_y - log_p)).sum(-1) if name == "forward" else (p * (log_p - log_y)).sum(-1)


@pytest.mark.parametrize("classes", [2, 21, 1500])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_every_kind(name: str, classes: int) -> None:
    """A mixed batch: an error of a few 1e-7 in the sums leaves five digits, or the exact form is used."""
    parts = [(z := torch.randn(40, classes) * s, z + torch.randn(40, classes) * s * d) for s, d in KINDS]
    z, t = (torch.cat(side) for side in zip(*parts, strict=True))
    offset = 9 * torch.randn(len(z), 1)
    # The gradient in a softmax that is a target of a cross-entropy is torch's own.
    z, t = (z + offset).requires_grad_(), (t + offset).requires_grad_(name in ("forward", "reverse", "js"))
    sides = [side for side in (z, t) if side.requires_grad]
    value, expected = ours(name, z, t), truth(name, z, t)
    # The rounding of differences of logits moves the divergence of two nearly equal rows by as much.
    size = 3e-7 * (z.detach().abs().amax(-1) + t.detach().abs().amax(-1)) * expected.detach().clamp(min=0).sqrt()
    assert ((value - expected).abs() <= 4e-6 * expected.abs() + size + 1e-11).all()
    rounded = 4e-7 if name == "dense" else 0.0  # the target's probabilities are rounded before they are compared
    got, gradients = (torch.autograd.grad(each.sum(), sides) for each in (value, expected))
    for ours_, true in zip(got, gradients, strict=True):
        scale = true.norm(dim=-1)
        assert ((ours_ - true).norm(dim=-1) <= 3e-5 * scale + 1e-6 * scale.sqrt() + 1e-9 + rounded).all()


@pytest.mark.parametrize("name", LOSSES)
def test_only_unsure_rows_need_the_exact_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows and rows that are certain are computed again, each by itself, and no others."""
    monkeypatch.setattr(softcurve.losses.autograd, "SMALL_ELEMENTS", 0)
    z, t = torch.randn(2, 12, 300)
    t[:4] = z[:4] + 1e-4 * torch.randn(4, 300)
    z[8:10, 7], t[8:10, 7] = 60.0, 60.0
    again: list[int] = []
    original = fast_forms.completed

    def counting(results: Any, sure: Tensor | None, exact: Callable[..., Any], *tensors: Tensor) -> Any:
        again.append(0 if sure is None else int((~sure).sum()))
        return original(results, sure, exact, *tensors)

    monkeypatch.setattr(row_forms.fast_forms, "completed", counting)
    whole = ours(name, z.requires_grad_(), t)
    whole.sum().backward()
    rows = {"index": 2, "smoothed": 0, "dense": 2}.get(name, 6)
    assert again[0] == rows
    assert again[1] == (2 if name == "smoothed" else rows)
    torch.testing.assert_close(whole, torch.cat([ours(name, z[i : i + 1], t[i : i + 1]) for i in range(12)]))


@pytest.mark.parametrize("name", LOSSES[2:])
def test_masks_in_few_passes(name: str) -> None:
    """Masked on both sides, on one with and without mass on the other, and rows that are not masked."""
    z, t = torch.randn(2, 5, 6)
    z[0, 1] = t[0, 1] = z[1, 2] = t[2, 3] = z[4, 0] = -math.inf
    t[4, 0] = -60.0
    value = ours(name, z, t)
    log_p, log_y = (side.double().log_softmax(-1) for side in (z, t))
    p, y = log_p.exp(), log_y.exp()
    zero = lambda mass, log: torch.where(mass == 0, 0.0, mass * log)  # noqa: E731
    if name == "dense":
        expected = -zero(y, log_p).sum(-1)
    elif name == "js":
        log_m = (0.7 * p + 0.3 * y).log()
        expected = (0.3 * zero(y, log_y - log_m) + 0.7 * zero(p, log_p - log_m)).sum(-1)
    else:
        expected = (zero(y, log_y - log_p) if name == "forward" else zero(p, log_p - log_y)).sum(-1)
    assert expected.isinf().any() == (name != "js")
    torch.testing.assert_close(value, expected.float(), rtol=2e-6, atol=0)


def test_confident_class_takes_up_what_a_row_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is formed without the value, as that of more logits than are kept beside it."""
    monkeypatch.setattr(softcurve.losses.autograd, "SMALL_ELEMENTS", 0)
    z, y = torch.randn(3, 21), torch.zeros(3, 21)
    z[:, 4], y[:, 4] = torch.tensor([10.0, 12.0, 14.0]), 1.0
    (gradient,) = torch.autograd.grad(softcurve.cross_entropy(z.requires_grad_(), y, reduction="sum"), z)
    expected = z.detach().double().softmax(-1) - y
    torch.testing.assert_close(gradient, expected.float(), rtol=3e-6, atol=0)


def test_gradient_beside_a_mask_without_mass() -> None:
    """Rows of any mass: one has a masked class without mass, one has no mass, and one is certain."""
    z, y = torch.randn(6, 5), torch.rand(6, 5)
    z[1, 2], y[1, 2], y[2], z[3, 4] = -math.inf, 0.0, 0.0, 40.0
    z.requires_grad_()
    value = softcurve.cross_entropy(z, y, reduction="none")
    (gradient,) = torch.autograd.grad(value.sum(), z)
    p, mass = z.detach().double().softmax(-1), y.double().sum(-1, keepdim=True)
    expected = -torch.where(y == 0, 0.0, y.double() * z.detach().double().log_softmax(-1)).sum(-1)
    torch.testing.assert_close(value.detach(), expected.float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient, (mass * p - y).float(), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
@pytest.mark.parametrize("gap", [0.0, 12.0, 40.0])
def test_few_logits_have_the_derivatives_of_many(
    gap: float, leading: tuple[int, ...], reduction: ReductionKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of every confidence: torch's loss, value and gradient in few passes, and the exact forms."""
    z, v, target = torch.randn(*leading, 9), torch.randn(*leading, 9), torch.randint(9, leading)
    z.reshape(-1, 9)[0, target.reshape(-1)[0]] += gap
    z.requires_grad_()

    def derivatives() -> list[Tensor]:
        loss = softcurve.cross_entropy(z, target, reduction=reduction, base=2)
        (first,) = torch.autograd.grad(loss, z, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
        (product,) = torch.autograd.grad(gradient, z, v, create_graph=True)
        (third,) = torch.autograd.grad(product, z, v)
        return [loss, first, gradient, product, third]

    few = derivatives()
    for module in (softcurve.losses.autograd, softcurve.losses.few_logits):
        monkeypatch.setattr(module, "SMALL_ELEMENTS", 0)
    for one, many in zip(few, derivatives(), strict=True):
        torch.testing.assert_close(one, many, rtol=2e-6, atol=1e-7 if gap == 0 else 1e-8)


@pytest.mark.parametrize("gap", [0.0, 12.0])
def test_ignored_and_wrong_rows_of_few_logits(gap: float) -> None:
    z, target = torch.randn(4, 5), torch.tensor([0, -100, 2, 3])
    z[0, 0] += gap
    expected = F.cross_entropy(z.double(), target)
    torch.testing.assert_close(softcurve.cross_entropy(z, target), expected.float(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="target must hold classes in 0 … 4"):
        softcurve.cross_entropy(z, target.clamp(min=0) + 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3)])
def test_head_with_few_logits(shape: tuple[int, ...], bias: bool) -> None:
    """The same as with tiles, which a memory budget asks for, and as torch in float64."""
    x, w = torch.randn(*shape, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    b, target = torch.randn(11, requires_grad=True) if bias else None, torch.randint(11, shape)
    leaves = [leaf for leaf in (x, w, b) if leaf is not None]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.cross_entropy(F.linear(*wide).reshape(-1, 11), target.reshape(-1))
    results = []
    for budget in (None, 2**24):
        loss = softcurve.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget=budget)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        moved = sum((g * torch.cos(leaf.detach())).sum() for g, leaf in zip(gradients, leaves, strict=True))
        results.append((loss, *gradients, *torch.autograd.grad(moved, leaves)))
    for few, tiles in zip(*results, strict=True):
        torch.testing.assert_close(few, tiles, rtol=2e-5, atol=1e-6)
    for got, true in zip(results[0][1:], torch.autograd.grad(expected, wide), strict=False):
        torch.testing.assert_close(got, true.float(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(results[0][0], expected.float(), rtol=1e-6, atol=0)


def test_head_with_few_logits_names_what_is_wrong() -> None:
    x, w, target = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 5, 2])
    with pytest.raises(ValueError, match="target must hold classes in 0 … 4"):
        softcurve.linear_cross_entropy(x, w, target)
    with pytest.raises(ValueError, match="linear_weight must hold numbers"):
        softcurve.linear_cross_entropy(x, w.index_fill(0, torch.tensor(1), math.nan), target.clamp(max=4))


@pytest.mark.parametrize("loss", [softcurve.kl_divergence, softcurve.js_divergence])
def test_a_masked_class_has_no_gradient_where_the_target_has_mass(loss: Callable[..., Tensor]) -> None:
    z, target = torch.randn(3, 6).index_fill(1, torch.tensor([2]), -math.inf), torch.randn(3, 6)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = z.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(loss(softcurve.Logits(target.to(dtype)), leaf, reduction="sum"), leaf)[0])
        assert (gradients[-1][:, 2] == 0).all()
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-6)


def test_certain_rows_keep_the_differences_of_their_logits() -> None:
    """Of two logits that are far apart, the rounding of their difference, up to 1e-6, would be that of the loss."""
    z = torch.stack([24 + 7 * torch.rand(64), -torch.rand(64)], -1).requires_grad_()
    wide = z.detach().double()
    exact = torch.log1p((wide[:, 1] - wide[:, 0]).exp())
    loss = softcurve.cross_entropy(z, torch.zeros(64, dtype=torch.int64), reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    for got in (loss, gradient[:, 1]):  # −log(1 − p) = p to first order, and p is below 1e-10
        assert ((got.double() - exact).abs() <= 3e-7 * exact).all()


@pytest.mark.parametrize("loss", [softcurve.kl_divergence, softcurve.js_divergence])
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_of_nan_and_of_weight_0_has_gradient_0(side: int, loss: Callable[..., Tensor]) -> None:
    z, target = torch.randn(3, 6), torch.randn(3, 6)
    z[1] = math.nan
    z.requires_grad_()
    value = loss(*((z, target) if side else (target, z)), sample_weight=torch.tensor([1.0, 0.0, 1.0]))
    (gradient,) = torch.autograd.grad(value, z)
    assert (gradient[1] == 0).all()
    assert gradient[0].abs().sum() > 0
