"""A head in half precision, with masked classes, and with what is wrong: no NaN where there is an answer, none hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK

from . import oracle
from .cases import BIASLESS_TEACHER, BY_NAME, CASES, OTHER_TEACHER, Case, assert_same, problem
from .pairwise import pairwise
from .placement import DEVICE, ON_CPU
from .test_exactness import budgets

pytestmark = pytest.mark.usefixtures("without_shape_checks")

NAN, INF = math.nan, math.inf
GAPS = (5, 8, 12, 16, 17, 20, 30, 45, 60, 75, 80)


# --- half precision ----------------------------------------------------------------------------------------------------

# The loss of student and teacher as the head computes it, and as a user of torch writes it.
HALF: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "index": (
        lambda x, w, b, t, h: softcurve.linear_cross_entropy(x, w, torch.arange(len(x)) * 7 % len(w), linear_bias=b),
        lambda x, w, b, t, h: F.cross_entropy(F.linear(x, w, b), torch.arange(len(x)) * 7 % len(w)),
    ),
    "smoothed": (
        lambda x, w, b, t, h: softcurve.linear_cross_entropy(
            x, w, torch.arange(len(x)) * 7 % len(w), linear_bias=b, label_smoothing=0.1
        ),
        lambda x, w, b, t, h: F.cross_entropy(
            F.linear(x, w, b), torch.arange(len(x)) * 7 % len(w), label_smoothing=0.1
        ),
    ),
    "soft": (
        lambda x, w, b, t, h: softcurve.linear_cross_entropy(x, w, LinearTeacher(t, h), linear_bias=b),
        lambda x, w, b, t, h: F.cross_entropy(F.linear(x, w, b), F.linear(t, h).softmax(-1)),
    ),
    "forward": (
        lambda x, w, b, t, h: softcurve.linear_kl_divergence(x, w, LinearTeacher(t, h), linear_bias=b),
        lambda x, w, b, t, h: F.kl_div(
            F.linear(x, w, b).log_softmax(-1), F.linear(t, h).log_softmax(-1), log_target=True, reduction="batchmean"
        ),
    ),
    "reverse": (
        lambda x, w, b, t, h: softcurve.linear_kl_divergence(
            x, w, LinearTeacher(t, h), linear_bias=b, direction="reverse"
        ),
        lambda x, w, b, t, h: F.kl_div(
            F.linear(t, h).log_softmax(-1), F.linear(x, w, b).log_softmax(-1), log_target=True, reduction="batchmean"
        ),
    ),
    "js": (
        lambda x, w, b, t, h: softcurve.linear_js_divergence(x, w, LinearTeacher(t, h), linear_bias=b, beta=0.3),
        lambda x, w, b, t, h: oracle.js_rows(
            F.linear(t, h).log_softmax(-1), F.linear(x, w, b).log_softmax(-1), 0.3
        ).mean(),
    ),
}


HALVES = pairwise(
    {
        "name": tuple(HALF),
        "dtype": (torch.bfloat16, torch.float16),
        "shape": ((5, 3, 7), (33, 16, 129), (507, 123, 1013)),
    }
)


@pytest.mark.parametrize("setting", HALVES, ids=lambda s: "-".join(map(str, s.values())))
def test_half_precision_is_no_worse_than_dense(setting: dict[str, Any]) -> None:
    """Loss and every gradient, in norm, against float64 on the very same numbers."""
    (rows, features, classes), dtype = setting["shape"], setting["dtype"]
    ours, dense = HALF[setting["name"]]
    for _ in range(2):
        x, t = torch.randn(2, rows, features)
        w, h = 1.5 * torch.randn(2, classes, features) / math.sqrt(features)
        b = torch.randn(classes)
        leaves = tuple(a.to(dtype).requires_grad_() for a in (x, w, b, t, h))
        exact = tuple(a.detach().double().requires_grad_() for a in leaves)
        results = []
        for f, arguments in ((ours, leaves), (dense, leaves), (dense, exact)):
            value = f(*arguments)
            results.append((value.detach(), *torch.autograd.grad(value, arguments, materialize_grads=True)))
        for what, got, plain, true in zip(("loss", *"xwbth"), *results, strict=True):
            assert got.dtype == (torch.float32 if what == "loss" else dtype)
            # Products of half-precision factors round the residual once: in few entries that can be worse than torch by chance.
            unit = 0.0 if ON_CPU else torch.finfo(dtype).eps * true.norm().item()
            assert (got.double() - true).norm() <= max((plain.double() - true).norm().item(), unit), what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    """A row's loss is float64's to float32's rounding: logits and softmax are in float32, whatever the tiles."""
    x, w, target = torch.randn(64, 48).to(dtype), (torch.randn(311, 48) / 3).to(dtype), torch.randint(311, (64,))
    truth = F.cross_entropy(F.linear(x.double(), w.double()), target, reduction="none")
    for budget in budgets(lambda **given: softcurve.linear_cross_entropy(x, w, target, **given), times=40):
        rows = softcurve.linear_cross_entropy(x, w, target, reduction="none", memory_budget=budget)
        assert rows.dtype == torch.float32
        assert (((rows.double() - truth) / truth).abs() <= 2e-6).all()
        lse = softcurve.linear_cross_entropy(x, w, target, return_stats=True, memory_budget=budget)[1].lse
        assert ((lse.double() / torch.logsumexp(F.linear(x.double(), w.double()), -1) - 1).abs() <= 2e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradients_add_up_in_float32(dtype: torch.dtype) -> None:
    """4,096 rows push one class in many tiles: an accumulator of half precision would stop at 256 pushes of 1."""
    x, w = torch.ones(4096, 1, dtype=dtype), torch.zeros(64, 1, dtype=dtype)
    target = torch.zeros(4096, dtype=torch.int64)
    for budget in budgets(lambda **given: softcurve.linear_cross_entropy(x, w, target, **given), times=500):
        leaf = w.clone().requires_grad_()
        softcurve.linear_cross_entropy(x, leaf, target, reduction="sum", memory_budget=budget).backward()
        truth = torch.full((64, 1), 4096 / 64)
        truth[0] -= 4096
        torch.testing.assert_close(leaf.grad, truth.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_float32_accumulates_without_drift() -> None:
    """Many row tiles: no worse than one product over all rows by more than a few roundings."""
    x, w, target = torch.randn(4000, 8), torch.randn(301, 8), torch.randint(301, (4000,))
    exact = tuple(a.double().requires_grad_() for a in (x, w))
    truth = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target), exact)
    leaves = x.requires_grad_(), w.requires_grad_()
    for budget in budgets(lambda **given: softcurve.linear_cross_entropy(*leaves, target, **given), times=1000):
        loss = softcurve.linear_cross_entropy(*leaves, target, memory_budget=budget)
        for got, true in zip(torch.autograd.grad(loss, leaves), truth, strict=True):
            assert (got.double() - true).norm() <= 2e-6 * true.norm()


# --- masked classes ----------------------------------------------------------------------------------------------------

KEPT = torch.tensor([True, False, True, True, False, True])
MASK = torch.where(KEPT, 0.0, -INF).double()


def dense_without_masked(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    names = KEPT.cumsum(0) - 1
    return F.cross_entropy(F.linear(x, w[KEPT]), names[target])


@pytest.mark.parametrize("budget", [None, 1])
def test_a_bias_of_minus_infinity_masks_a_class(budget: int | None) -> None:
    """Value, gradients and Hessian product are those of the head without the class, and 0 at it."""
    x, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    target = torch.tensor([0, 2, 3, 5, 3])
    of_budget = budget and budgets(lambda **given: softcurve.linear_cross_entropy(x, w, target, **given))[1]
    results = []
    for f in (
        lambda x, w: softcurve.linear_cross_entropy(x, w, target, linear_bias=MASK, memory_budget=of_budget),
        lambda x, w: dense_without_masked(x, w, target),
    ):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = f(*leaves)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        results.append((value, *first, *torch.autograd.grad(first[0].sin().sum() + first[1].cos().sum(), leaves)))
    for got, truth in zip(*results, strict=True):
        assert_same(got, truth)
    assert (results[0][2][~KEPT] == 0).all()
    assert (results[0][4][~KEPT] == 0).all()
    bias = MASK.clone().requires_grad_()
    (in_b,) = torch.autograd.grad(softcurve.linear_cross_entropy(x, w, target, linear_bias=bias), bias)
    assert (in_b[~KEPT] == 0).all()
    assert (in_b[KEPT] != 0).all()


@pytest.mark.parametrize("route", ["logits", "head", "cut head", "bias"])
def test_probabilities_of_masked_classes_have_no_derivatives(route: str) -> None:
    """All derivatives in logits and probabilities are those without the class, and 0 at it, up to the second order."""
    x, w = torch.randn(5, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    y = torch.randn(5, 6, dtype=torch.float64).softmax(-1) * KEPT
    biased: dict[str, Any] = {"linear_bias": MASK} if route == "bias" else {}
    exclude = None if biased else (~KEPT).nonzero().squeeze(-1).expand(5, -1)
    budget = None
    if route == "cut head":
        budget = budgets(lambda **limit: softcurve.linear_cross_entropy(x, w, y, exclude=exclude, **limit))[1]
    along = [torch.randn_like(tensor) for tensor in (x, w, y)]

    def ours(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        if route == "logits":
            return softcurve.cross_entropy(F.linear(x, w).masked_fill(~KEPT, -INF), y, label_smoothing=0.1)
        return softcurve.linear_cross_entropy(
            x, w, y, exclude=exclude, label_smoothing=0.1, memory_budget=budget, **biased
        )

    def dense(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w)[:, KEPT], y[:, KEPT], label_smoothing=0.1)

    results = []
    for f in (ours, dense):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w, y)]
        first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, along, strict=True)), leaves)
        results.append((*first, *second))
    for got, truth in zip(*results, strict=True):
        assert_same(got, truth)


def test_masked_classes_of_divergences() -> None:
    """Masked in both, a class is as if it were not; in the second argument alone the divergence is infinite."""
    x, w, t, h = (torch.randn(s, dtype=torch.float64) for s in ((5, 3), (6, 3), (5, 2), (6, 2)))
    masked, open_ = LinearTeacher(t, h, MASK), LinearTeacher(t, h)
    z, y = F.linear(x, w[KEPT]), F.linear(t, h[KEPT])
    for direction, dense in (("forward", (y, z)), ("reverse", (z, y))):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = softcurve.linear_kl_divergence(*leaves, masked, linear_bias=MASK, direction=direction)
        assert_same(value.detach(), softcurve.kl_divergence(*dense))
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, leaves))
    value = softcurve.linear_js_divergence(x, w, masked, linear_bias=MASK, beta=0.3)
    assert_same(value, softcurve.js_divergence(y, z, beta=0.3))
    for direction, target, bias, infinite in (
        ("forward", masked, None, False),
        ("forward", open_, MASK, True),
        ("reverse", masked, None, True),
        ("reverse", open_, MASK, False),
    ):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = softcurve.linear_kl_divergence(*leaves, target, linear_bias=bias, direction=direction)
        sides = (F.linear(t, h, target.linear_bias), F.linear(*leaves, bias))
        dense = softcurve.kl_divergence(*(sides if direction == "forward" else sides[::-1]))
        assert value.item() == INF if infinite else 0 < value.item() < INF
        if not infinite or direction == "forward":
            for got, truth in zip(*(torch.autograd.grad(v, leaves) for v in (value, dense)), strict=True):
                assert_same(got, truth)
        assert infinite or abs(value.item() / dense.item() - 1) < 1e-12


def test_mass_on_a_masked_class_is_infinitely_wrong() -> None:
    x, w = torch.randn(2, 3), torch.randn(6, 3)
    y = torch.full((2, 6), 1 / 6)
    for target in (
        torch.tensor([1, 0]),
        y,
        Probabilities(y),
        Logits(y.log()),
        TopK(torch.tensor([[1], [1]]), y[:, :1].log()),
    ):
        rows = softcurve.linear_cross_entropy(x, w, target, linear_bias=MASK.float(), reduction="none")
        assert rows[0].item() == INF
        assert not rows.isnan().any()
    assert rows[1].item() == INF


def test_zeros_in_probabilities() -> None:
    """``0 log 0 = 0``: classes without mass, in a target that is dense."""
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    y = torch.softmax(torch.randn(4, 9, dtype=torch.float64), -1)
    y[:, ::2] = 0
    y /= y.sum(-1, keepdim=True)
    z, log_p = F.linear(x, w), F.linear(x, w).log_softmax(-1)
    kl = (torch.xlogy(y, y) - y * log_p).sum(-1)
    assert_same(softcurve.linear_cross_entropy(x, w, y, reduction="none"), -(y * log_p).sum(-1))
    for target in (Probabilities(y), Logits(y.log())):
        assert_same(softcurve.linear_cross_entropy(x, w, target, reduction="none"), -(y * log_p).sum(-1))
        assert_same(softcurve.linear_kl_divergence(x, w, target, reduction="none"), kl)
        leaf = w.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(softcurve.linear_kl_divergence(x, leaf, target, reduction="sum"), leaf)
        assert_same(gradient, (torch.softmax(z, -1) - y).mT @ x)
        assert (softcurve.linear_kl_divergence(x, w, target, direction="reverse", reduction="none") == INF).all()
        js = softcurve.linear_js_divergence(x, w, target, reduction="none")
        m = (y + log_p.exp()) / 2
        truth = (torch.xlogy(y, y) + log_p.exp() * log_p - 2 * m * m.log()).sum(-1) / 2
        assert_same(js, truth)


# --- nothing wrong passes silently -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "reduction", "poison"),
    [
        pytest.param(case, *(("none", NAN) if n % 2 else ("mean", INF)), id=str(case))
        for n, case in enumerate(CASES)
        # A soft cap makes an infinite logit finite, and of the last class of that teacher the model may have none.
        if case.kind not in (BIASLESS_TEACHER, OTHER_TEACHER)
    ],
)
def test_poison_is_never_a_plausible_number(case: Case, reduction: str, poison: float) -> None:
    """One bad entry in any argument, in a class far from the target's: an error, or a loss that is no finite number."""
    posed = problem(case, {"bias": True, "sample_weight": True}, reduction, (3,), 4, 61)
    # Features above 0, of teachers too: below it, an infinite weight would mask its class.
    frozen = [
        a.detach().abs() if n == "input" or (n == "target 0" and "Teacher" in str(case)) else a.detach()
        for n, a in zip(posed.names, posed.arguments, strict=True)
    ]
    for tiles in ("whole", "tiles"):
        budget = posed.budget(tiles)
        for at, name in enumerate(posed.names):
            arguments = [a.clone() for a in frozen]
            arguments[at].view(-1)[-1] = poison
            try:
                value = posed.ours(*(a.requires_grad_() for a in arguments), memory_budget=budget)
            except ValueError as refused:
                assert str(refused)  # noqa: PT017
                continue
            assert not value.isfinite().all(), (name, budget)
            if reduction == "none" and name in ("input", "sample_weight"):
                assert value[:-1].isfinite().all()
                assert not value[-1].isfinite()
            with torch.no_grad():
                assert not posed.ours(*arguments, memory_budget=budget).isfinite().all(), name


def test_nan_reaches_gradients_and_stats() -> None:
    x, w = torch.randn(3, 4), torch.randn(67, 4, requires_grad=True)
    x[2, 1] = NAN
    for budget in (None, 1):
        of_budget = (
            budget and budgets(lambda **given: softcurve.linear_cross_entropy(x[:2], w, torch.arange(2), **given))[1]
        )
        try:
            loss, stats = softcurve.linear_cross_entropy(
                x, w, torch.arange(3), reduction="sum", return_stats=True, memory_budget=of_budget
            )
        except ValueError as refused:
            assert "NaN" in str(refused)  # noqa: PT017
            continue
        assert loss.isnan()
        assert torch.autograd.grad(loss, w)[0].isnan().any()
        assert stats.lse[2].isnan()
        assert stats.entropy[2].isnan()
        assert not stats.correct[2]


@pytest.mark.parametrize("bad", [67, 1000, -1, -101])
def test_class_out_of_range(bad: int) -> None:
    x, w, target = torch.randn(3, 4), torch.randn(67, 4), torch.tensor([0, bad, 66])
    if not ON_CPU:  # where nobody looks at values, and no option indexes with them, the kernels answer NaN
        for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"shift": 1}, {"memory_budget": 1 << 20}):
            assert softcurve.linear_cross_entropy(x, w, target, **options).isnan().any()
        return
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"weight": torch.ones(67)}, {"shift": 1}):
        for budget in (None, 1 << 20):
            with pytest.raises(ValueError, match=rf"target.*{bad}"):
                softcurve.linear_cross_entropy(x, w, target, memory_budget=budget, **options)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"target.*{bad}"):
        softcurve.linear_cross_entropy(x, w, target)
    listed = torch.tensor([[0, 1], [bad, 1], [2, 1]])
    for f in (softcurve.linear_cross_entropy, softcurve.linear_kl_divergence, softcurve.linear_js_divergence):
        with pytest.raises(ValueError, match=rf"TopK indices.*{bad}"):
            f(x, w, TopK(listed, torch.full((3, 2), -1.0)))


def test_a_class_out_of_range_that_no_row_sees() -> None:
    """Before the first target of a causal shift stands no target; the ignored class may be any number."""
    x, w = torch.randn(3, 4), torch.randn(7, 4)
    expected = softcurve.linear_cross_entropy(x[:2], w, torch.tensor([1, 2]))
    got = softcurve.linear_cross_entropy(x, w, torch.tensor([1, 2, 999]), ignore_index=999)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["forward-LinearTeacher", "js0.3-Logits", "cross_entropy-indices"])
def test_the_same_every_time(name: str) -> None:
    """Bit for bit, within a process."""
    posed = problem(BY_NAME[name], {"bias": True}, "mean", (129,), 16, 301)
    for tiles in ("whole", "tiles"):
        runs = []
        for _ in range(2):
            value = posed.ours(*posed.arguments, memory_budget=posed.budget(tiles))
            runs.append((value, *torch.autograd.grad(value, posed.arguments)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- faults that were found by trying -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gap", [700.0, 800.0, 1000.0])
def test_label_smoothing_over_blocks_far_apart(gap: float, dtype: torch.dtype) -> None:
    """The tops of two blocks of classes so far apart that ``e^{−gap}`` is 0 even in float64."""
    w = torch.zeros(3000, 1, dtype=dtype)
    w[1500:] = gap
    x, target = torch.ones(1, 1, dtype=dtype), torch.tensor([0])
    loss = softcurve.linear_cross_entropy(x, w, target, label_smoothing=0.1, memory_budget=16000)
    truth = F.cross_entropy((x @ w.T).double(), target, label_smoothing=0.1)
    assert abs(loss.item() / truth.item() - 1) < 1e-6


def test_a_row_of_nan_leaves_its_neighbours_alone() -> None:
    z, y = torch.zeros(2, 50), torch.zeros(2, 50)
    z[:, 0], y[:, 0] = 17.0, 1.0
    alone = softcurve.linear_cross_entropy(z[:1], torch.eye(50), y[:1], reduction="none")
    z[1] = NAN
    # It must have no part, or its loss of NaN is an error.
    kept = torch.tensor([1.0, 0.0])
    both = softcurve.linear_cross_entropy(z, torch.eye(50), y, sample_weight=kept, reduction="none")
    assert both[1] == 0
    assert both[0] == alone[0]
    assert abs(alone.item() / (49 * math.exp(-17)) - 1) < 1e-6


@pytest.mark.parametrize("budget", [None, 16000], ids=["whole", "cut"])
def test_statistics_of_confident_and_weighted_rows(budget: int | None) -> None:
    """Entropy where all but one class have nearly nothing; what is correct goes by the target without class weights."""
    z = torch.full((1, 301), -40.0)
    z[0, 0] = 0.0
    target = Logits(torch.zeros_like(z))
    _, stats = softcurve.linear_cross_entropy(z, torch.eye(301), target, memory_budget=budget, return_stats=True)
    rest = 300 * math.exp(-40)
    truth = rest * 40 + rest  # −Σ p log p, the largest class giving −p log p = rest
    assert abs(stats.entropy.item() / truth - 1) < 1e-5
    y = torch.zeros(1, 301)
    y[0, :2] = torch.tensor([0.6, 0.4])
    weight, bias = torch.ones(301), torch.zeros(301)
    weight[0], bias[0] = 0.1, 9.0
    _, stats = softcurve.linear_cross_entropy(
        torch.zeros(1, 2),
        torch.zeros(301, 2),
        y,
        linear_bias=bias,
        weight=weight,
        memory_budget=budget,
        return_stats=True,
    )
    assert stats.correct.item()


@pytest.mark.parametrize("budget", [None, 16000], ids=["whole", "cut"])
def test_a_masked_class_of_weight_0_with_label_smoothing(budget: int | None) -> None:
    x, w = torch.ones(1, 2), torch.eye(3)[:, :2]
    bias, weight = torch.tensor([0.0, 0.0, -INF]), torch.tensor([1.0, 1.0, 0.0])
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}
    got = softcurve.linear_cross_entropy(x, w, torch.tensor([0]), linear_bias=bias, memory_budget=budget, **options)
    expected = math.log(2)  # of the two classes that are not masked, with all of the smoothing
    assert abs(got.item() - expected) < 1e-6


@pytest.mark.parametrize("scale", [3.3, 1 / 3, 0.7])
def test_half_precision_with_a_scaled_loss_is_no_worse_than_dense(scale: float) -> None:
    """Gradients are rounded once, after the scale that comes from above."""
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(s, generator=g).bfloat16().requires_grad_() for s in ((512, 16), (2000, 16)))
    target = torch.randint(2000, (512,), generator=g)
    exact = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    truth = torch.autograd.grad(scale * F.cross_entropy(exact[0] @ exact[1].T, target), exact)
    ours = torch.autograd.grad(scale * softcurve.linear_cross_entropy(x, w, target), (x, w))
    dense = torch.autograd.grad(scale * F.cross_entropy(x @ w.T, target), (x, w))
    for one, other, true in zip(ours, dense, truth, strict=True):
        assert (one - true).norm() <= (other - true).norm()


def test_small_gradients_in_float16_survive_under_a_loss_scale() -> None:
    """What a scale of 65,536 is for: rounding comes after it."""
    x, w = torch.randn(256, 4).half().float(), torch.randn(5000, 4).half().float().requires_grad_()
    target = torch.randint(50, (256,))
    with torch.autocast(DEVICE.type, torch.float16):
        loss = softcurve.linear_cross_entropy(x, w, target)
    (got,) = torch.autograd.grad(65536 * loss, w)
    wide = w.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(65536 * F.cross_entropy(x.double() @ wide.T, target), wide)
    assert ((got - truth).norm(dim=-1) <= 6e-4 * truth.norm(dim=-1))[50:].all()


def test_label_smoothing_under_autocast_is_summed_in_float32() -> None:
    g = torch.Generator().manual_seed(2)
    x, w = torch.randn(64, 32, generator=g) * 8, torch.randn(1000, 32, generator=g)
    target = torch.randint(1000, (64,), generator=g)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = softcurve.linear_cross_entropy(x, w, target, label_smoothing=0.1)
    lowered = (x.bfloat16().double() @ w.bfloat16().double().T, target)
    assert abs(got.item() / F.cross_entropy(*lowered, label_smoothing=0.1).item() - 1) < 1e-5
