"""Exactness on logits and through a head: right relatively where the naive formula cancels, whatever offset and tiles."""

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
from .cases import HEAD_ROUTE, LOGIT_ROUTE, least_of
from .pairwise import pairwise
from .placement import ON_CPU

pytestmark = pytest.mark.usefixtures("without_shape_checks")

ROUTES = (LOGIT_ROUTE, HEAD_ROUTE) if ON_CPU else (HEAD_ROUTE,)
GAPS = (5, 8, 12, 16, 17, 20, 30, 45, 60, 75, 80)


def head_of(z: Tensor) -> tuple[Tensor, Tensor]:
    """Features and a head whose logits are ``z`` to the last bit: each row picks its column of the weight."""
    return torch.eye(z.shape[0], dtype=z.dtype), z.mT.contiguous()


def budgets(call: Callable[..., Any], times: int = 1) -> tuple[int | None, ...]:
    """The default, and (so many times) the least that works, whose tiles cut the classes."""
    with pytest.raises(ValueError, match="memory_budget") as refused:
        call(memory_budget=1)
    return None, times * least_of(str(refused.value))


def in_every_tiling(route: str, z: Tensor, target: Any, times: int = 1, **options: Any) -> list[Tensor]:
    """The cross-entropy of logits, or of a head that has them, whole and in class tiles."""
    if route == LOGIT_ROUTE:
        return [softcurve.cross_entropy(z, target, **options)]
    x, w = head_of(z)
    call = lambda **more: softcurve.linear_cross_entropy(x, w, target, **options, **more)  # noqa: E731
    return [call(memory_budget=budget) for budget in budgets(call, times)]


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
    pytest.param(*s.values(), id="-".join([*list(s.values())[:2], s["made"].__name__, str(s["others"]), "right" if s["right"] else "wrong"]))
    for s in pairwise(
        {
            "route": ROUTES,
            "kind": tuple(CERTAIN),
            "made": (on_a_grid, off_the_grid),
            "others": (1, 2, 9, 400),
            "right": (True, False),
        }
    )
]  # fmt: skip


@pytest.mark.parametrize(("route", "kind", "made", "others", "right"), CONFIDENT)
def test_confident_row(route: str, kind: str, made: Callable[[float, int], Tensor], others: int, right: bool) -> None:
    """Loss and gradients in float32, relatively right, from a hesitant row to one of e^−80; whole or in class tiles."""
    at = 1 if right else 0
    # A row of logits by itself: beside one of e^−80 all rows of a batch are computed with more care.
    for gaps in [(gap,) for gap in GAPS] if route == LOGIT_ROUTE else [GAPS]:
        z = torch.stack([made(gap, others) for gap in gaps]).requires_grad_()
        target = CERTAIN[kind](torch.full((len(gaps),), at), others + 1)
        for rows in in_every_tiling(route, z, target, others // 100 + 1, reduction="none"):
            (gradient,) = torch.autograd.grad(rows.sum(), z)
            for n, gap in enumerate(gaps):
                loss, residual, _ = confident_truth(made, gap, others, at)
                # Half an ulp of a difference of logits is relative in its exponential.
                bound = 2e-6 + (0 if made is on_a_grid else 1.5e-7 * (gap + 5))
                assert oracle.relative_error(rows[n].item(), loss) <= bound, gap
                for k in {0, 1, others}:
                    assert oracle.relative_error(gradient[n, k].item(), residual[k]) <= bound, (gap, k)


@pytest.mark.parametrize("others", [1, 9, 400])
@pytest.mark.parametrize("kind", ["index", "float", "Logits", "bucket"])
def test_features_of_a_confident_row(kind: str, others: int) -> None:
    """A dot product over the classes in float32: terms below half an ulp of the largest may each be lost."""
    x, w = head_of(torch.stack([on_a_grid(gap, others) for gap in GAPS]))
    target = CERTAIN[kind](torch.ones(len(GAPS), dtype=torch.int64), others + 1)
    x.requires_grad_()
    for budget in budgets(lambda **given: softcurve.linear_cross_entropy(x, w, target, **given), others // 100 + 1):
        loss = softcurve.linear_cross_entropy(x, w, target, reduction="sum", memory_budget=budget)
        (in_x,) = torch.autograd.grad(loss, x)
        for n, gap in enumerate(GAPS):
            in_feature = confident_truth(on_a_grid, gap, others, 1)[2]
            assert oracle.relative_error(in_x[n, n].item(), in_feature) <= 4e-6 + others * 2.0**-24, (gap, budget)


OPTIONS = (
    {"temperature": 0.5},
    {"softcap": 1000.0},
    {"base": 2.0},
    {"label_smoothing": 0.0},
    {"sample_weight": torch.ones(1)},
)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_confident_row_with_options(options: dict[str, Any], route: str) -> None:
    for gap in (6.0, 20.0, 40.0):
        z = on_a_grid(gap, 6).unsqueeze(0).requires_grad_()
        seen = oracle.seen_by_softmax(z.detach()[0].double(), options.get("temperature", 1.0), options.get("softcap"))
        y, unit = oracle.exact(one_hot(7, 1)), math.log(options.get("base", math.e))
        truth = oracle.exact_residual(y, oracle.exact(seen))[1] / options.get("temperature", 1.0)
        # The soft cap itself rounds in float32, a logit of 40 by 2e-6 absolutely, and the loss is exp of it.
        bound = 2e-6 if "softcap" not in options else 2e-5
        for loss in in_every_tiling(route, z, torch.tensor([1]), **options):
            (gradient,) = torch.autograd.grad(loss, z)
            assert oracle.relative_error(loss.item() * unit, oracle.exact_cross_entropy(y, oracle.exact(seen))) <= bound
            assert oracle.relative_error(gradient[0, 1].item() * unit, truth) <= bound


@pytest.mark.parametrize(
    ("route", "name"),
    [(route, name) for route in ROUTES for name in ("index", "float", "Logits", "bucket")],
)
def test_rows_of_any_confidence(route: str, name: str) -> None:
    """A batch from the nearly uniform to the certain: every row's loss and gradient, whichever class is meant."""
    scale = torch.tensor([1e-3, 0.3, 1.0, 4.0, 15.0, 40.0]).unsqueeze(-1)
    z = (scale * torch.randn(6, 23)).requires_grad_()
    at = torch.cat([z[:3].argmin(-1), z[3:].argmax(-1)])
    for rows in in_every_tiling(route, z, CERTAIN[name](at, 23), reduction="none"):
        (gradient,) = torch.autograd.grad(rows.sum(), z)
        for i in range(6):
            y, row = oracle.exact(torch.eye(23)[at[i]]), oracle.exact(z[i])
            spread = (z[i].max() - z[i].min()).item()
            slack = 0.0 if route == LOGIT_ROUTE and name == "index" else 6e-8 * spread
            assert oracle.relative_error(rows[i].item(), oracle.exact_cross_entropy(y, row)) <= 1e-6 + slack
            for k, truth in enumerate(oracle.exact_residual(y, row)):
                # Half an ulp of a difference d is d · 6e-8 of its exponential; below 1e-37 float32 itself gives out.
                far = (z[i].max() - z[i, k]).item() if route == LOGIT_ROUTE else 2 * spread
                got = gradient[i, k].item()
                close = oracle.relative_error(got, truth) <= 2e-6 + 6e-8 * far
                assert close or (abs(got) < 1e-37 and abs(truth) < 1e-37)


@pytest.mark.parametrize("gap", [5, 17, 40, 80])
def test_confident_row_second_order(gap: int) -> None:
    """``H e_top = p_top (e_top − p)``, whose own entry is ``p (1 − p)``: the small sum of the others."""
    z = on_a_grid(gap, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(softcurve.cross_entropy(z, torch.tensor(1)), z, create_graph=True)
    (column,) = torch.autograd.grad(gradient[1], z)
    p = oracle.exact_softmax(oracle.exact(z))
    others = oracle.MP.fsum(v for k, v in enumerate(p) if k != 1)
    assert oracle.relative_error(column[1].item(), p[1] * others) <= 2e-6
    for k in (0, 2, 3, 4):
        assert oracle.relative_error(column[k].item(), -p[1] * p[k]) <= 2e-6
    jacobian = softcurve.softmax_jacobian(z.detach())
    assert oracle.relative_error(jacobian[1, 1].item(), p[1] * others) <= 2e-6
    product = softcurve.softmax_jacobian_product(z.detach(), one_hot(5, 1))
    assert oracle.relative_error(product[1].item(), p[1] * others) <= 2e-6


@pytest.mark.parametrize("gap", [5, 17, 40, 80])
def test_confident_entropy(gap: int) -> None:
    z = on_a_grid(gap, 4)
    p = oracle.exact_softmax(oracle.exact(z))
    truth = -oracle.MP.fsum(v * oracle.MP.log(v) for v in p)
    assert oracle.relative_error(softcurve.entropy(z).item(), truth) <= 2e-6


def test_torch_itself_fails_here() -> None:
    """What the tests above are about: torch's loss of a confident row is 0 from a gap of 17 on."""
    x, w = torch.ones(1, 1), on_a_grid(20, 1).unsqueeze(-1)
    assert F.linear_cross_entropy(x, w, torch.tensor([1])).item() == 0
    assert softcurve.linear_cross_entropy(x, w, torch.tensor([1])).item() > 2e-9


# --- nearly equal distributions ----------------------------------------------------------------------------------------

VOCABULARY = 50257


def neighbours(seed: int, distance: float, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(rows, VOCABULARY, generator=generator)
    return z, z + distance * torch.randn(rows, VOCABULARY, generator=generator)


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
@pytest.mark.parametrize("seed", range(3))
def test_nearly_equal_logits(seed: int, distance: float) -> None:
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
def test_nearly_equal_gradient_of_logits(distance: float) -> None:
    """``∂D(p‖q)/∂z_q = q − p`` of 50,257 classes: relative in norm, where q and p agree to three or five digits."""
    z_p, z_q = neighbours(7, distance)
    leaf_p, leaf_q = z_p.clone().requires_grad_(), z_q.clone().requires_grad_()
    in_p, in_q = torch.autograd.grad(softcurve.kl_divergence(leaf_p, leaf_q, reduction="sum"), (leaf_p, leaf_q))
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
