"""DESIGN §7 through the head: right relatively where the naive formula cancels; no NaN where there is an answer, none hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK

from . import oracle
from .cases import BIASLESS_TEACHER, BY_NAME, CASES, Case, assert_same, least_of, problem
from .pairwise import pairwise
from .placement import DEVICE, ON_CPU

pytestmark = pytest.mark.usefixtures("without_shape_checks")

NAN, INF = math.nan, math.inf
GAPS = (5, 8, 12, 16, 17, 20, 30, 45, 60, 75, 80)


def head_of(z: Tensor) -> tuple[Tensor, Tensor]:
    """Features and a head whose logits are ``z`` to the last bit: each row picks its column of the weight."""
    return torch.eye(z.shape[0], dtype=z.dtype), z.mT.contiguous()


def budgets(call: Callable[..., Any], times: int = 1) -> tuple[int | None, ...]:
    """The default, and (so many times) the least that works, whose tiles cut the classes."""
    with pytest.raises(ValueError, match="memory_budget") as refused:
        call(memory_budget=1)
    return None, times * least_of(str(refused.value))


# --- confident rows ----------------------------------------------------------------------------------------------------


def one_hot(classes: int, at: int) -> Tensor:
    return torch.eye(classes)[at]


# The same certain target of every row, said in six ways; exactly certain, so that they have one truth.
CERTAIN: dict[str, Callable[[Tensor, int], Any]] = {
    "index": lambda at, classes: at,
    "float": lambda at, classes: torch.eye(classes)[at],
    "Probabilities": lambda at, classes: Probabilities(torch.eye(classes)[at]),
    "Logits": lambda at, classes: Logits(torch.eye(classes)[at].log()),
    "bucket": lambda at, classes: TopK(at[:, None], torch.zeros(len(at), 1)),
    "renormalize": lambda at, classes: TopK(at[:, None], torch.zeros(len(at), 1), tail="renormalize"),
}


def on_a_grid(gap: float, others: int) -> Tensor:
    """Class 1 above the best of the others by ``gap``, at 0: every difference is exact."""
    below = -gap - torch.linspace(0, 1.7, others)
    return torch.cat([below[:1], torch.zeros(1), below[1:]])


def off_the_grid(gap: float, others: int) -> Tensor:
    """Numbers of different exponents without a common binary grid: their differences round."""
    below = 3.3 - 1.01 * gap - torch.logspace(-3, 0.2, others) / 3
    return torch.cat([below[:1], torch.tensor([3.3]), below[1:]])


@cache
def confident_truth(
    made: Callable[[float, int], Tensor], gap: float, others: int, at: int
) -> tuple[Any, list[Any], Any]:
    """Loss, residual, and the residual's product with the logits, in 50 digits."""
    y, row = oracle.exact(one_hot(others + 1, at)), oracle.exact(made(gap, others))
    residual = oracle.exact_residual(y, row)
    return (
        oracle.exact_cross_entropy(y, row),
        residual,
        oracle.MP.fsum(r * v for r, v in zip(residual, row, strict=True)),
    )


CONFIDENT = [
    pytest.param(*s.values(), id=f"{s['kind']}-{s['made'].__name__}-{s['others']}-{'right' if s['right'] else 'wrong'}")
    for s in pairwise({"kind": tuple(CERTAIN), "made": (on_a_grid, off_the_grid), "others": (1, 9, 400), "right": (True, False)})
]  # fmt: skip


@pytest.mark.parametrize(("kind", "made", "others", "right"), CONFIDENT)
def test_confident_row(kind: str, made: Callable[[float, int], Tensor], others: int, right: bool) -> None:
    """Loss and gradients in float32, relatively right, from a hesitant row to one of e^−80; whole or in class tiles."""
    at = 1 if right else 0
    x, w = head_of(torch.stack([made(gap, others) for gap in GAPS]))
    target = CERTAIN[kind](torch.full((len(GAPS),), at), others + 1)
    leaves = x.requires_grad_(), w.requires_grad_()
    for budget in budgets(lambda **given: softcurve.linear_cross_entropy(*leaves, target, **given), others // 100 + 1):
        rows = softcurve.linear_cross_entropy(*leaves, target, reduction="none", memory_budget=budget)
        in_x, in_w = torch.autograd.grad(rows.sum(), leaves)
        for n, gap in enumerate(GAPS):
            loss, residual, in_feature = confident_truth(made, gap, others, at)
            # Half an ulp of a difference of logits is relative in its exponential.
            bound = 2e-6 + (0 if made is on_a_grid else 1.5e-7 * (gap + 5))
            assert oracle.relative_error(rows[n].item(), loss) <= bound, (gap, budget)
            # A dot product over the classes in float32: terms below half an ulp of the largest may each be lost.
            dot = 2 * bound + others * 2.0**-24
            assert oracle.relative_error(in_x[n, n].item(), in_feature) <= dot, (gap, budget)
            for k in {0, 1, others}:
                assert oracle.relative_error(in_w[k, n].item(), residual[k]) <= bound, (gap, budget, k)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"softcap": 1000.0},
        {"base": 2.0},
        {"label_smoothing": 0.0},
        {"sample_weight": torch.ones(1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("gap", [6.0, 20.0, 40.0])
def test_confident_row_with_options(options: dict[str, Any], gap: float) -> None:
    z = on_a_grid(gap, 6)
    leaves = torch.ones(1, 1), z.unsqueeze(-1).requires_grad_()
    for budget in budgets(
        lambda **given: softcurve.linear_cross_entropy(*leaves, torch.tensor([1]), **options, **given)
    ):
        loss = softcurve.linear_cross_entropy(*leaves, torch.tensor([1]), memory_budget=budget, **options)
        (gradient,) = torch.autograd.grad(loss, leaves[1])
        seen = oracle.seen_by_softmax(z.double(), options.get("temperature", 1.0), options.get("softcap"))
        y, unit = oracle.exact(one_hot(7, 1)), math.log(options.get("base", math.e))
        # The soft cap itself rounds in float32, a logit of 40 by 2e-6 absolutely, and the loss is exp of it.
        bound = 2e-6 if "softcap" not in options else 2e-5
        assert oracle.relative_error(loss.item() * unit, oracle.exact_cross_entropy(y, oracle.exact(seen))) <= bound
        truth = oracle.exact_residual(y, oracle.exact(seen))[1] / options.get("temperature", 1.0)
        assert oracle.relative_error(gradient[1].item() * unit, truth) <= bound


@pytest.mark.parametrize("name", ["index", "float", "Logits", "bucket"])
def test_rows_of_any_confidence(name: str) -> None:
    """A batch from the nearly uniform to the certain: every row's loss and gradient, whichever class is meant."""
    scale = torch.tensor([1e-3, 0.3, 1.0, 4.0, 15.0, 40.0]).unsqueeze(-1)
    z = scale * torch.randn(6, 23)
    at = torch.cat([z[:3].argmin(-1), z[3:].argmax(-1)])
    target = {
        "index": at,
        "float": torch.eye(23)[at],
        "Logits": Logits(torch.eye(23)[at].log()),
        "bucket": TopK(at[:, None], torch.zeros(6, 1)),
    }[name]
    x, w = head_of(z)
    w.requires_grad_()
    for budget in budgets(lambda **given: softcurve.linear_cross_entropy(x, w, target, **given)):
        rows = softcurve.linear_cross_entropy(x, w, target, reduction="none", memory_budget=budget)
        (gradient,) = torch.autograd.grad(rows.sum(), w)
        for i in range(6):
            y, row = oracle.exact(torch.eye(23)[at[i]]), oracle.exact(z[i])
            spread = (z[i].max() - z[i].min()).item()
            assert oracle.relative_error(rows[i].item(), oracle.exact_cross_entropy(y, row)) <= 1e-6 + 6e-8 * spread
            for k, truth in enumerate(oracle.exact_residual(y, row)):
                bound = 2e-6 + 1.2e-7 * spread
                got = gradient[k, i].item()
                assert oracle.relative_error(got, truth) <= bound or (abs(got) < 1e-37 and abs(truth) < 1e-37)


def test_torch_itself_fails_here() -> None:
    """What the tests above are about: torch's loss of a confident row is 0 from a gap of 17 on."""
    x, w = torch.ones(1, 1), on_a_grid(20, 1).unsqueeze(-1)
    assert F.linear_cross_entropy(x, w, torch.tensor([1])).item() == 0
    assert softcurve.linear_cross_entropy(x, w, torch.tensor([1])).item() > 2e-9


# --- nearly equal distributions ----------------------------------------------------------------------------------------

VOCABULARY = 50257


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_nearly_equal_vocabulary(distance: float) -> None:
    """50,257 classes and log-ratios of 1e-3: torch's float32 ``kl_div`` is 118 % wrong, or negative."""
    z_p = 2 * torch.randn(3, VOCABULARY)
    z_q = z_p + distance * torch.randn(3, VOCABULARY)
    x, w = head_of(z_q)
    for target in (Logits(z_p), LinearTeacher(*head_of(z_p))):
        for budget in (None, 1 << 19):
            given = {"reduction": "none", "memory_budget": budget}
            forward, reverse = (
                softcurve.linear_kl_divergence(x, w, target, direction=direction, **given)
                for direction in ("forward", "reverse")
            )
            for got, truth in (
                (forward, oracle.near_kl(z_p, z_q)),
                (reverse, oracle.near_kl(z_q, z_p)),
                (softcurve.linear_js_divergence(x, w, target, **given), oracle.near_js(z_p, z_q, 0.5)),
                (softcurve.linear_js_divergence(x, w, target, beta=0.1, **given), oracle.near_js(z_p, z_q, 0.1)),
            ):
                assert (got >= 0).all()
                assert ((got.double() - truth).abs() / truth).max() <= 1e-5


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_nearly_equal_gradient(distance: float) -> None:
    """``∂D(p‖q)/∂z_q = q − p`` relatively right in norm, where q and p agree to three or five digits."""
    z_p = 2 * torch.randn(3, VOCABULARY)
    z_q = z_p + distance * torch.randn(3, VOCABULARY)
    x, w = head_of(z_q)
    teacher = tuple(t.requires_grad_() for t in head_of(z_p))
    w.requires_grad_()
    p, q = torch.softmax(z_p.double(), -1), torch.softmax(z_q.double(), -1)
    ratio = torch.log_softmax(z_p.double(), -1) - torch.log_softmax(z_q.double(), -1)
    in_p = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    for budget in (None, 1 << 19):
        loss = softcurve.linear_kl_divergence(x, w, LinearTeacher(*teacher), reduction="sum", memory_budget=budget)
        got = torch.autograd.grad(loss, (w, teacher[1]))
        for one, truth in zip(got, (q - p, in_p), strict=True):
            assert (one.mT.double() - truth).norm() <= 1e-4 * truth.norm()


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward": lambda *a, **o: softcurve.linear_kl_divergence(*a, **o),
    "reverse": lambda *a, **o: softcurve.linear_kl_divergence(*a, direction="reverse", **o),
    "js": lambda *a, **o: softcurve.linear_js_divergence(*a, **o),
    "js0.9": lambda *a, **o: softcurve.linear_js_divergence(*a, beta=0.9, **o),
    "js0": lambda *a, **o: softcurve.linear_js_divergence(*a, beta=0.0, **o),
    "js1": lambda *a, **o: softcurve.linear_js_divergence(*a, beta=1.0, **o),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in DIVERGENCES for dtype in (torch.float64, torch.float32, torch.bfloat16)
     if name not in ("js0", "js1") or dtype == torch.float32],
)  # fmt: skip
def test_never_negative_and_zero_at_itself(name: str, dtype: torch.dtype) -> None:
    """A teacher that is the student, one that is nearly so, and anything between."""
    divergence = DIVERGENCES[name]
    x, w, b = (torch.randn(shape, dtype=dtype) for shape in ((3, 16), (401, 16), (401,)))
    itself = LinearTeacher(x.clone(), w.clone(), b.clone())
    for options in ({}, {"temperature": 2.0}):
        given = {"linear_bias": b, "reduction": "none", **options}
        for budget in budgets(lambda given=given, **more: divergence(x, w, itself, **given, **more), times=20):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            rows = divergence(*leaves, itself, memory_budget=budget, **given)
            assert (rows == 0).all(), (options, budget)
            for gradient in torch.autograd.grad(rows.sum(), leaves):
                assert gradient.abs().max() <= 8 * torch.finfo(dtype).eps
            for distance in (1e-7, 1e-5, 1e-2):
                other = w + distance * torch.randn_like(w)
                rows = divergence(x, w, LinearTeacher(x, other, b), memory_budget=budget, **given)
                assert (rows >= 0).all(), (options, budget, distance)
        assert (divergence(x, w, LinearTeacher(x, w + 0.5 * torch.randn_like(w), b), **given) > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_against_its_own_logits(name: str) -> None:
    z = 3 * torch.randn(5, 211)
    x, w = head_of(z)
    for budget in budgets(lambda **more: DIVERGENCES[name](x, w, Logits(z), **more), times=3):
        assert (DIVERGENCES[name](x, w, Logits(z), reduction="none", memory_budget=budget) == 0).all()


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


# --- offsets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "offset"),
    [
        pytest.param(*s.values(), id=f"{s['name']}-{s['dtype']}-{s['offset']:g}")
        for s in pairwise(
            {
                "name": ("index", "smoothed", "Logits", "teacher", "bucket", "forward", "reverse", "js"),
                "dtype": (torch.float32, torch.float64),
                "offset": (1e4, -1e4, 1.0),
            }
        )
    ],
)
def test_offset(name: str, dtype: torch.dtype, offset: float) -> None:
    """Logits on a grid that the offset leaves exact: loss and gradient know nothing of it, in any tiling."""
    grid = 2.0**10 if dtype == torch.float32 else 2.0**38
    ulps = 16 * torch.finfo(dtype).eps
    base = (3 * torch.randn(2, 5, 67, dtype=dtype) * grid).round() / grid
    log_y = base[1].log_softmax(-1)
    results = []
    for of_z, of_t in ((0, 0), (offset, 0), (0, offset), (offset, -offset)):
        (x, w), (e, h) = head_of(base[0] + of_z), head_of(base[1] + of_t)
        assert torch.equal(w.mT - of_z, base[0])
        target: Any = {
            "index": torch.arange(5),
            "smoothed": torch.arange(5),
            "Logits": Logits(base[1] + of_t),
            "bucket": TopK(*reversed(log_y.topk(3))),
        }.get(name, LinearTeacher(e, h))
        loss = DIVERGENCES.get(name, softcurve.linear_cross_entropy)
        options = {"reduction": "none", **({"label_smoothing": 0.1} if name == "smoothed" else {})}
        w.requires_grad_()
        for budget in budgets(lambda loss=loss, x=x, w=w, target=target, **more: loss(x, w, target, **more), times=2):
            rows = loss(x, w, target, memory_budget=budget, **options)
            results.append((rows.detach(), torch.autograd.grad(rows.sum(), w)[0]))
    for shifted in results[1:]:
        for got, expected in zip(shifted, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=ulps, atol=ulps / 4)


@pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
def test_huge_logits(scale: float) -> None:
    """Gaps far beyond what exp can hold: the loss is the gap itself, the gradient that of a certain row."""
    x, z = torch.ones(1, 1), torch.tensor([[scale, -scale / 4, 0.0]])
    for target, truth in ((0, 0.0), (2, scale)):
        w = z.mT.clone().requires_grad_()
        loss = softcurve.linear_cross_entropy(x, w, torch.tensor([target]))
        (gradient,) = torch.autograd.grad(loss, w)
        assert loss.item() == torch.tensor(truth).item()
        assert gradient.flatten().tolist() == [1.0 - (target == 0), 0.0, -1.0 if target == 2 else 0.0]


# --- nothing wrong passes silently -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "reduction", "poison"),
    [
        pytest.param(case, *(("none", NAN) if n % 2 else ("mean", INF)), id=str(case))
        for n, case in enumerate(CASES)
        if case.kind is not BIASLESS_TEACHER
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


@pytest.mark.parametrize(
    ("name", "beta"), [("forward", 0), ("reverse", 1), ("js", 0.5), ("js", 0.1), ("js", 0.01), ("js", 0.99)]
)
def test_small_divergences_keep_four_digits(name: str, beta: float) -> None:
    """Of any size, on few classes, where no sum over many averages the rounding."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 3, generator=g)
    other = z + torch.randn(2000, 3, generator=g) * 10 ** (-2 * torch.rand(2000, 1, generator=g))
    w = torch.eye(3)
    if name == "js":
        got = softcurve.linear_js_divergence(z, w, Logits(other), beta=beta, reduction="none")
        truth = softcurve.js_divergence(other.double(), z.double(), beta=beta, reduction="none")
    else:
        got = softcurve.linear_kl_divergence(z, w, Logits(other), direction=name, reduction="none")
        pair = (other, z) if name == "forward" else (z, other)
        truth = softcurve.kl_divergence(*(t.double() for t in pair), reduction="none")
    assert ((got.double() - truth) / truth).abs().max() < 1e-4


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
