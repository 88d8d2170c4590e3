"""The contrastive loss beside the dense formulas of open_clip, SimCLR and supervised contrastive learning, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap
from torch.nn import functional as F

import softcurve
from softcurve.head import tiles

from . import process_cases
from .cases import assert_same, derivatives, least_of

D = 5
Leaves = tuple[Tensor, ...]


def embeddings(*shapes: int, size: float = 1.0) -> Leaves:
    return tuple((size * torch.randn(n, D, dtype=torch.float64)).requires_grad_() for n in shapes)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).T


# --- the dense losses, as their papers write them ----------------------------------------------------------------------


def clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on normalised features."""
    logits, labels = scale * cosines(a, b), torch.arange(len(a))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def nt_xent(views: Tensor, scale: Tensor) -> Tensor:
    """Chen et al. (2020), equation 1, row by row: the similarity of a view with itself is not among the others."""
    z, count = scale * cosines(views, views), len(views)
    rows = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        rows.append(torch.logsumexp(z[i, others], 0) - z[i, (i + count // 2) % count])
    return torch.stack(rows).mean()


def supervised(views: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Khosla et al. (2020), L_out: the mean over a row's positives is outside the logarithm."""
    z, rows = scale * cosines(views, views), []
    for i, label in enumerate(labels):
        others = torch.tensor([j for j in range(len(labels)) if j != i])
        log_p = z[i, others] - torch.logsumexp(z[i, others], 0)
        rows.append(-log_p[labels[others] == label].mean())
    return torch.stack(rows).mean()


def assert_equal(got: Tensor, expected: Tensor, leaves: Leaves, what: str = "", bound: float = 1e-10) -> None:
    """Values, gradients and a Hessian product."""
    assert_same(got.detach(), expected.detach(), what, bound)
    for i, (a, b) in enumerate(zip(derivatives(got, leaves), derivatives(expected, leaves), strict=True)):
        assert_same(a, b, f"{what}: {i}", bound)


# --- pairs in both directions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 13, 45])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_pairs_are_those_of_open_clip(count: int, scale: float) -> None:
    """Whole, in tiles of rows, and cut in both directions; similarities so far apart that exponentials differ."""
    a, b = embeddings(count, count)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="memory_budget") as refused:
        softcurve.contrastive_loss(a, b, memory_budget=1)
    for budget in (None, max(count * 400, least_of(str(refused.value))), least_of(str(refused.value))):
        got = softcurve.contrastive_loss(a, b, scale=s, memory_budget=budget)
        assert_equal(got, clip(a, b, s), (a, b, s), f"{budget}", 1e-9)


def test_four_products_instead_of_six(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile of similarities is computed twice, or once where one tile holds all of them."""
    loads: list[slice] = []
    load = tiles.Tile.load
    monkeypatch.setattr(tiles.Tile, "load", lambda self, classes: (loads.append(classes), load(self, classes))[1])
    a, b = embeddings(300, 300)
    for budget in (None, 200_000):
        loads.clear()
        softcurve.contrastive_loss(a, b, memory_budget=budget).backward()
        entries = sum(each.stop - each.start for each in loads)
        assert entries % 300 == 0
        assert (len(loads) == 1) == (budget is None)
        if budget:
            assert len(loads) > 4
            first = loads[: len(loads) // 2]
            assert first == loads[len(loads) // 2 :]


def test_excluded_pairs_have_no_part_in_rows_and_columns() -> None:
    a, b = embeddings(9, 9)
    exclude = torch.randint(9, (9, 3))
    exclude = torch.where(exclude == torch.arange(9).unsqueeze(-1), -1, exclude)
    mask = torch.zeros(9, 10, dtype=torch.bool).scatter(-1, exclude % 10, True)[:, :9]
    for reduction in ("mean", "none", "sum"):
        for budget in (None, 3000):
            z, y = 7.0 * (a @ b.T).masked_fill(mask, -math.inf), torch.arange(9)
            expected = sum(F.cross_entropy(each, y, reduction=reduction) for each in (z, z.T)) / 2
            got = softcurve.contrastive_loss(
                a, b, scale=7.0, normalize=False, exclude=exclude, reduction=reduction, memory_budget=budget
            )  # fmt: skip
            assert_equal(got, expected, (a, b), f"{reduction} {budget}")


def test_offsets_and_confident_pairs() -> None:
    """A common offset of 1e4 changes nothing; losses of 1e-20 keep their digits; a pair masked by itself is infinite."""
    a = torch.eye(6, D + 1, dtype=torch.float64)
    offset = torch.full((6, 1), 100.0, dtype=torch.float64)
    near, far = (torch.cat([a, each], -1).requires_grad_() for each in (0 * offset, offset))
    options: dict[str, Any] = {"scale": 45.0, "normalize": False, "reduction": "none"}
    truth = math.log1p(5 * math.exp(-45))
    for e in (near, far):
        loss = softcurve.contrastive_loss(e, e.detach(), **options)
        torch.testing.assert_close(loss, torch.full_like(loss, truth), rtol=1e-9, atol=0)
        (gradient,) = torch.autograd.grad(loss.sum(), e)
        p = math.exp(-45) / (1 + 5 * math.exp(-45))
        at_pair = gradient.diagonal()[: D + 1]
        torch.testing.assert_close(at_pair, torch.full_like(at_pair, -45 * 5 * p), rtol=1e-9, atol=0)
    loss = softcurve.contrastive_loss(near, near, exclude=torch.arange(6).unsqueeze(-1), **options)
    assert loss.isposinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, scale: float) -> None:
    """Beside float64 on the same numbers.

    At the larger scale the similarities of some rows are near −100 and those of others near 100, beyond what one
    exponential of float32 can hold.
    """
    a, b = (torch.randn(70, 3) / 4 + torch.tensor([1.0, 0.0, 0.0]) for _ in range(2))
    a[::7] *= -1
    given = tuple(t.to(dtype).requires_grad_() for t in (a, b))
    loss = softcurve.contrastive_loss(*given, scale=scale, memory_budget=30_000)
    wide = tuple(t.detach().double().requires_grad_() for t in given)
    truth = clip(*wide, torch.tensor(scale))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=3e-6, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, given), torch.autograd.grad(truth, wide), strict=True):
        assert got.dtype == dtype
        assert_same(got.double(), expected, bound={torch.float32: 2e-5}.get(dtype, 1e-2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms() -> None:
    """Reverse over reverse, forward over reverse and ``vmap``; forward mode of single pairs; a third derivative raises."""
    (a, b), (c, d) = embeddings(4, 4), embeddings(4, 4)
    a, b, c, d = (t.detach() for t in (a, b, c, d))
    scale = torch.tensor(3.0, dtype=torch.float64)

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return softcurve.contrastive_loss(a, b, scale=scale)

    def truth(a: Tensor, b: Tensor) -> Tensor:
        return clip(a, b, scale)

    for outer in (jacrev, jacfwd):
        for at in (0, 1):
            assert_same(outer(grad(ours, 0), at)(a, b), outer(grad(truth, 0), at)(a, b), f"{outer} {at}")
    stacked = torch.stack([a, c]), torch.stack([b, d])
    assert_same(vmap(grad(ours))(*stacked), vmap(grad(truth))(*stacked))

    def pairs(a: Tensor) -> Tensor:
        return softcurve.contrastive_loss(a, b, scale=scale, reduction="none")

    assert_same(jacfwd(pairs)(a), jacrev(pairs)(a))
    assert_same(jacrev(pairs)(a).mean(0), grad(truth)(a, b))
    with pytest.raises(NotImplementedError, match="pairs"):
        jacfwd(jacfwd(pairs))(a)
    with pytest.raises(NotImplementedError, match="third"):
        jacrev(jacrev(grad(ours)))(a, b)


# --- one direction, and given targets ----------------------------------------------------------------------------------


def test_nt_xent_of_simclr() -> None:
    (views,) = embeddings(12)
    each, s = torch.arange(12), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for budget in (None, 20_000):
        got = softcurve.contrastive_loss(
            views, views, (each + 6) % 12, scale=s, symmetric=False, exclude=each.unsqueeze(-1), memory_budget=budget
        )
        assert_equal(got, nt_xent(views, s), (views, s))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["list", "probabilities"])
def test_supervised_contrastive(kind: str, symmetric: bool) -> None:
    """Several positives a row. The similarities are symmetric here, so that both directions are the same loss."""
    (views,) = embeddings(12)
    labels = torch.arange(12) % 4
    positive = (labels.unsqueeze(-1) == labels) & ~torch.eye(12, dtype=torch.bool)
    if kind == "list":
        indices = positive.nonzero()[:, 1].reshape(12, 2)
        target: Any = softcurve.TopK(indices, torch.full((12, 2), 0.5, dtype=torch.float64).log(), tail="renormalize")
    else:
        target = softcurve.Probabilities(positive.double() / 2)
    exclude: Any = torch.arange(12).unsqueeze(-1)
    if symmetric:
        target, exclude = (target, target), (exclude, exclude)
    s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    got = softcurve.contrastive_loss(views, views, target, scale=s, symmetric=symmetric, exclude=exclude)
    assert_equal(got, supervised(views, labels, s), (views, s))


def test_rows_that_are_no_pairs() -> None:
    a, b = embeddings(4, 7)
    y = torch.tensor([6, 0, 0, 3])
    s = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    got = softcurve.contrastive_loss(a, b, y, scale=s, symmetric=False, normalize=False, reduction="sum")
    assert_equal(got, F.cross_entropy(s * a @ b.T, y, reduction="sum"), (a, b, s))
    got = softcurve.contrastive_loss(a, a.detach(), (y % 4, y % 4), scale=s)
    z = s * cosines(a, a.detach())
    assert_equal(got, (F.cross_entropy(z, y % 4) + F.cross_entropy(z.T, y % 4)) / 2, (a, s))


# --- the module --------------------------------------------------------------------------------------------------------


def test_module_learns_its_scale_up_to_a_bound() -> None:
    """The parameter takes the steps that open_clip's takes: a gradient at the clamped value, then a clamp."""
    a, b = (t.detach() for t in embeddings(6, 6))
    b = a + 0.5 * b
    module = softcurve.nn.ContrastiveLoss(7.0, max_scale=9.0).double()
    log_scale = module.log_scale.detach().clone().requires_grad_()
    ours, theirs = (torch.optim.SGD([p], lr=0.8) for p in (module.log_scale, log_scale))
    for _ in range(6):
        ours.zero_grad(), theirs.zero_grad()
        loss, expected = module(a, b), clip(a, b, log_scale.exp())
        assert_same(loss.detach(), expected.detach(), bound=1e-9)
        loss.backward(), expected.backward()
        ours.step(), theirs.step()
        with torch.no_grad():
            log_scale.clamp_(max=math.log(9.0))
    assert log_scale.item() == pytest.approx(math.log(9.0))
    with torch.no_grad():
        module.log_scale.fill_(math.log(9.5))
    assert module.eval().scale.item() == pytest.approx(9.5)
    module.train()(a, b)
    assert module.scale.item() == pytest.approx(9.0)
    assert list(module.state_dict()) == ["log_scale"]
    fixed = softcurve.nn.ContrastiveLoss(2.0, learnable_scale=False, symmetric=False, reduction="none")
    assert not list(fixed.parameters())
    y, exclude = torch.tensor([1, 2, 3, 4, 5, 0]), torch.arange(6).unsqueeze(-1)
    expected = softcurve.contrastive_loss(a, b, y, scale=2.0, symmetric=False, exclude=exclude, reduction="none")
    assert torch.equal(fixed(a, b, y, exclude=exclude), expected)
    assert "scale=2.0" in repr(fixed)


# --- bad input ---------------------------------------------------------------------------------------------------------

X = torch.randn(4, 3)
PAIR = torch.arange(4)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no rows": ((X[:0], X[:0]), {}, "input must be of shape .n, d."),
    "NaN": ((X, X * math.nan), {}, "other must be finite"),
    "other number of rows": ((X, X[:3]), {}, "other must have one row for each of the 4 rows"),
    "no positive scale": ((X, X), {"scale": 0.0}, "scale must be a finite number above 0"),
    "a scale of 0": ((X, X), {"scale": torch.tensor(0.0, requires_grad=True)}, "scale must be a finite number above 0"),
    "a negative scale": (
        (X, X),
        {"scale": torch.tensor(-2.0, requires_grad=True)},
        "scale must be a finite.* got .*-2",
    ),
    "a scale of NaN": ((X, X), {"scale": torch.tensor(math.nan)}, "scale must be a finite number above 0"),
    "an infinite scale": (
        (X, X),
        {"scale": torch.tensor(math.inf), "symmetric": False},
        "scale must be a finite number",
    ),
    "an integer scale": ((X, X), {"scale": torch.tensor(-1)}, "scale must be a finite number above 0"),
    "scale per row": ((X, X), {"scale": torch.ones(4)}, r"scale must be a number or a tensor of shape \(\)"),
    "one target for two directions": ((X, X, PAIR), {}, "target must be a pair for symmetric=True"),
    "two exclusions for pairs": ((X, X), {"exclude": (PAIR, PAIR)}, "exclude must be one tensor"),
    "excludes no class": ((X, X), {"exclude": torch.full((4, 1), 4)}, "exclude must hold classes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    arguments, options, text = BAD[name]
    with pytest.raises((TypeError, ValueError), match=text):
        softcurve.contrastive_loss(*arguments, **options)


def test_bad_options_of_the_module() -> None:
    with pytest.raises(ValueError, match="scale must be at most max_scale"):
        softcurve.nn.ContrastiveLoss(120.0)
    with pytest.raises(ValueError, match="memory_budget must be"):
        softcurve.nn.ContrastiveLoss(memory_budget=0)


# --- in processes of their own -----------------------------------------------------------------------------------------


def test_memory_and_a_compiled_call(run_python: Callable[[str], Any]) -> None:
    """16,384 pairs within the budget of 64 MB, where the similarities have a gigabyte; one graph when compiled."""
    code = """
import json, warnings, torch, softcurve
from pathlib import Path
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
torch.set_num_threads(1)
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))
learned = torch.tensor(14.0, requires_grad=True)
for n in (512, 16384):
    a, b = (torch.randn(n, 64, requires_grad=True) for _ in range(2))
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    softcurve.contrastive_loss(a, b, scale=learned, memory_budget=64 << 20).backward()
    extra = status("VmHWM") - before
a, b = (torch.randn(9, 4, requires_grad=True) for _ in range(2))
scale = torch.tensor(3.0, requires_grad=True)
def loss(a, b, scale):
    return softcurve.contrastive_loss(a, b, scale=scale)
found = []
for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
    value = function(a, b, scale)
    found.append([value.item(), *(g.norm().item() for g in torch.autograd.grad(value, (a, b, scale)))])
print(json.dumps([extra, found]))
"""
    extra, (eager, compiled) = json.loads(run_python(code).stdout)
    assert extra < 64 + 2 * 4 + 4  # the gradients are results; what is allocated otherwise is not counted
    assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_embeddings_over_processes(count: int) -> None:
    found = process_cases.run("sharded_contrastive", count)
    assert len(found) > 30
    assert not process_cases.wrong(found)
