"""The argument ``dim`` of the losses on logits: the dimension of the classes, without a copy and in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
import softcurve.losses.autograd
from softcurve import JensenShannon, LinearTeacher, Logits, Probabilities, SkewKL, TopK

ROWS, CLASSES = (3, 4), 5
DIMS = (0, 1, 2, -2, -3)


def targets() -> dict[str, Callable[[int], Any]]:
    """Every kind of target with its classes in dimension ``dim``."""
    t = torch.randn(*ROWS, CLASSES, dtype=torch.float64)
    index, y = t.argmin(-1), t.softmax(-1)
    listed = t.log_softmax(-1).topk(2)
    teacher = LinearTeacher(torch.randn(*ROWS, 2).double(), torch.randn(CLASSES, 2).double())
    at: Callable[[Tensor, int], Tensor] = lambda tensor, dim: tensor.movedim(-1, dim)  # noqa: E731
    return {
        "indices": lambda dim: index,
        "float": lambda dim: at(y, dim),
        "Probabilities": lambda dim: Probabilities(at(y, dim)),
        "Logits": lambda dim: Logits(at(t, dim)),
        "LinearTeacher": lambda dim: teacher,
        "bucket": lambda dim: TopK(at(listed.indices, dim), at(listed.values, dim)),
        "renormalize": lambda dim: TopK(at(listed.indices, dim), at(listed.values, dim), "renormalize"),
    }


OPTIONS: dict[str, Any] = {"temperature": 2.0, "reduction": "none"}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda z, t, **o: softcurve.cross_entropy(z, t, **OPTIONS, **o),
    "smoothed": lambda z, t, **o: softcurve.cross_entropy(z, t, label_smoothing=0.1, z_loss=1e-2, **OPTIONS, **o),
    "kl_divergence": lambda z, t, **o: softcurve.kl_divergence(t, z, **OPTIONS, **o),
    "js_divergence": lambda z, t, **o: softcurve.js_divergence(t, z, beta=0.3, **OPTIONS, **o),
    "divergence": lambda z, t, **o: softcurve.divergence(t, z, divergence=SkewKL(0.2), **OPTIONS, **o),
}
CASES = [
    (loss, kind)
    for loss in LOSSES
    for kind in targets()
    if loss in ("cross_entropy", "smoothed") or kind not in ("indices", "float")
]


@pytest.mark.parametrize(("loss", "kind"), CASES)
def test_moving_the_classes_changes_nothing(loss: str, kind: str) -> None:
    z = torch.randn(*ROWS, CLASSES, dtype=torch.float64)
    target, weight = targets()[kind], torch.rand(ROWS, dtype=torch.float64)
    exclude = torch.tensor([[[4, -1]]]).expand(*ROWS, 2) if kind != "bucket" else None
    run = LOSSES[loss]
    leaf = z.clone().requires_grad_()
    expected = run(leaf, target(-1), sample_weight=weight, exclude=exclude)
    (gradient,) = torch.autograd.grad(expected.nan_to_num(posinf=0.0).sum(), leaf)
    for dim in DIMS:
        leaf = z.movedim(-1, dim).contiguous().requires_grad_()
        moved = None if exclude is None else exclude.movedim(-1, dim)
        value = run(leaf, target(dim), sample_weight=weight, exclude=moved, dim=dim)
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
        (got,) = torch.autograd.grad(value.nan_to_num(posinf=0.0).sum(), leaf)
        torch.testing.assert_close(got.movedim(dim, -1), gradient, rtol=1e-12, atol=1e-15)


def test_functions_of_one_softmax() -> None:
    z, v = torch.randn(2, *ROWS, CLASSES, dtype=torch.float64)
    jacobian = softcurve.softmax_jacobian(z)
    for dim in DIMS:
        at, along = z.movedim(-1, dim).contiguous(), v.movedim(-1, dim).contiguous()
        entropy = -(at.softmax(dim) * at.log_softmax(dim)).sum(dim)
        torch.testing.assert_close(softcurve.entropy(at, dim=dim), entropy, rtol=1e-12, atol=0)
        torch.testing.assert_close(softcurve.softmax_jacobian(at, dim=dim), jacobian, rtol=1e-12, atol=1e-15)
        product = softcurve.softmax_jacobian_product(at, along, dim=dim)
        expected = torch.autograd.functional.jvp(lambda x, dim=dim: x.softmax(dim), at, along)[1]
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-15)


def torchs(name: str, z: Tensor, t: Tensor) -> Tensor:
    """The mean of a loss over rows whose classes are in dimension 1, by torch."""
    if name == "index":
        return F.cross_entropy(z, t)
    log_p, log_y = z.log_softmax(1), t.log_softmax(1)
    if name == "js":
        mixture = torch.logaddexp(log_p, log_y) - torch.log(torch.tensor(2.0, dtype=z.dtype))
        return (log_p.exp() * (log_p - mixture) + log_y.exp() * (log_y - mixture)).sum(1).mean() / 2
    return (log_y.exp() * (log_y - log_p)).sum(1).mean()


@pytest.mark.parametrize("elements", [200, 2**19])
@pytest.mark.parametrize("shape", [(2, 21, 9, 7), (1, 1, 5, 3), (5, 3), (0, 4, 2), (1, 400, 3)])
@pytest.mark.parametrize("name", ["index", "kl", "js"])
def test_layout_of_torch(name: str, shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(softcurve.losses.autograd.TILE_ELEMENTS, "cpu", elements)
    z = torch.randn(shape, requires_grad=True)
    rows = (shape[0], *shape[2:])
    t = torch.randint(shape[1], rows) if name == "index" else torch.randn(shape)
    if name == "index":
        loss = softcurve.nn.CrossEntropyLoss(dim=1)(z, t)
    else:
        module = softcurve.nn.KLDivergenceLoss(dim=1) if name == "kl" else softcurve.nn.JSDivergenceLoss(dim=1)
        loss = module(t, z)
    wide = z.detach().double().requires_grad_()
    truth = torchs(name, wide, t if name == "index" else t.double())
    torch.testing.assert_close(loss, truth.float(), rtol=1e-6, atol=1e-12, equal_nan=True)
    if z.numel():
        (got,), (expected,) = torch.autograd.grad(loss, z), torch.autograd.grad(truth, wide)
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-8)
        assert got.is_contiguous()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_second_derivatives_and_transforms_of_moved_classes() -> None:
    z, t = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for dim in (1, -2):
        of = lambda x, dim=dim: softcurve.divergence(t, x, divergence=JensenShannon(0.4), dim=dim)  # noqa: E731
        last = lambda x, dim=dim: softcurve.divergence(  # noqa: E731
            t.movedim(dim, -1), x.movedim(dim, -1), divergence=JensenShannon(0.4)
        )
        for make in (torch.func.hessian, lambda f: torch.func.vmap(torch.func.grad(f), in_dims=0)):
            many = torch.stack([z, 2 * z]) if make is not torch.func.hessian else z
            torch.testing.assert_close(make(of)(many), make(last)(many), rtol=1e-12, atol=1e-14)


def test_errors_name_dim_and_the_remedy() -> None:
    z = torch.randn(2, 5, 3)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"dim must be a dimension of logits, from -3 to 2, got 3"):
        softcurve.cross_entropy(z, labels, dim=3)
    with pytest.raises(TypeError, match="dim must be an int"):
        softcurve.nn.KLDivergenceLoss(dim=True)
    with pytest.raises(TypeError, match="dim must be an int"):
        softcurve.entropy(z, dim=True)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) \(the leading dimensions of logits.movedim\(1, -1\)\)"):
        softcurve.cross_entropy(z, labels.mT, dim=1)
    with pytest.raises(ValueError, match="pass dim=1 or"):
        softcurve.cross_entropy(z, labels)
