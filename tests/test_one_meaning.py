"""One question has one answer on every route: value, dtype, gradient, edge cases and errors, beside independent truths."""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK
from softcurve.curvature import HeadCurvature
from softcurve.head import backends
from softcurve.head.products import Direction
from softcurve.losses.divergences import Divergence, JensenShannon
from softcurve.losses.spec import LossSpec

from . import oracle
from .cases import assert_same, least_of
from .loss_routes import BETA, FUNCTIONS, HEADS, LOSSES, PLAIN, ROUTES, Route, head_of, one_process_group
from .pairwise import pairwise

F64, HALF = torch.float64, (torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
DIVERGENCES = LOSSES[1:]
REDUCTIONS = ("none", "sum", "mean", "batchmean")

# The same calls are made with shapes checked elsewhere; here there are thousands of them.
pytestmark = pytest.mark.usefixtures("without_shape_checks")

KINDS = ("float", "Probabilities", "Logits", "renormalize", "LinearTeacher")  # those of targets_of


def go_together(loss: str, kind: str) -> bool:
    """Whether a loss takes a kind of target."""
    if loss == "cross_entropy":
        return True
    return kind not in ("float", "indices") and (loss, kind) != ("reverse", "renormalize")


def each_pair(possible: Callable[[str, Any, str, Any], bool] = lambda *_: True, **factors: Any) -> pytest.MarkDecorator:
    """Parametrise over settings in which any two levels of any two factors meet; ``case`` is a loss and a kind."""
    settings = pairwise(factors, possible)
    ids = ["-".join("/".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in s.values()) for s in settings]
    return pytest.mark.parametrize(tuple(factors), [tuple(setting.values()) for setting in settings], ids=ids)


def cases_of(*kinds: str) -> list[tuple[str, str]]:
    """Every loss with every kind of target that it takes."""
    return [case for case in itertools.product(LOSSES, kinds) if go_together(*case)]


routes = pytest.mark.parametrize("route", ROUTES, ids=str)
functions = pytest.mark.parametrize("route", FUNCTIONS, ids=str)
plain_routes = pytest.mark.parametrize("route", PLAIN, ids=str)


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """A group of this process alone, for the sharded head."""
    with one_process_group():
        yield


# --- truths -------------------------------------------------------------------------------------------------------------


def rows_of(loss: str, z: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
    """The loss of each row of float64 logits against probabilities, written out; ``0 log 0 = 0``."""
    log_p = torch.log_softmax(z / temperature, -1)
    if loss == "cross_entropy":
        return -oracle.product(y, log_p).sum(-1)
    log_y = torch.where(y > 0, torch.where(y > 0, y, 1.0).log(), -INF)
    if loss == "forward":
        return oracle.kl_rows(log_y, log_p)
    return oracle.kl_rows(log_p, log_y) if loss == "reverse" else oracle.js_rows(log_y, log_p, BETA)


def targets_of(t: Tensor, k: int = 3) -> dict[str, tuple[Any, Tensor]]:
    """Each kind of target that ``softmax(t)`` can be told by, and the distribution that it means (no bucket)."""
    y = torch.softmax(t.double(), -1)
    listed = y.topk(k)
    renormalized = torch.zeros_like(y).scatter(-1, listed.indices, listed.values)
    teacher = LinearTeacher(*head_of(t))
    return {
        "float": (y.to(t.dtype), y),
        "Probabilities": (Probabilities(y.to(t.dtype)), y),
        "Logits": (Logits(t), y),
        "renormalize": (
            TopK(listed.indices, listed.values.log().to(t.dtype), tail="renormalize"),
            renormalized / renormalized.sum(-1, keepdim=True),
        ),
        "LinearTeacher": (teacher, y),
    }


def combinations(t: Tensor) -> Iterator[tuple[str, str, Any, Tensor]]:
    """``(loss, kind, target, y)`` of every loss and kind of distribution that go together."""
    made = targets_of(t)
    for loss, kind in cases_of(*KINDS):
        yield loss, kind, *made[kind]


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), leaves, materialize_grads=True, retain_graph=True)


# --- 1. a mean whose divisor is 0 ---------------------------------------------------------------------------------------


def empty_means(z: Tensor) -> dict[str, tuple[str, Any, dict[str, Any]]]:
    zeros, index = z.new_zeros(len(z)), torch.arange(len(z))
    made: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "all ignored": ("cross_entropy", torch.full_like(index, -100), {}),
        "another ignored": ("cross_entropy", torch.full_like(index, 2), {"ignore_index": 2, "label_smoothing": 0.1}),
        "class weights": ("cross_entropy", index, {"weight": z.new_zeros(z.shape[-1])}),
        "class weights, smoothed": ("cross_entropy", index, {"weight": z.new_zeros(z.shape[-1]), "z_loss": 0.1}),
        "sample weights": ("cross_entropy", index, {"sample_weight": zeros}),
        "shifted weights": ("cross_entropy", index, {"sample_weight": zeros.index_fill(0, index[:1], 1.0), "shift": 1}),
    }
    for loss, kind, target, _ in combinations(torch.randn_like(z)):
        made[f"{loss}, {kind}"] = (loss, target, {"sample_weight": zeros})
    return made


@routes
def test_a_mean_of_nothing_is_nan_and_moves_nothing(route: Route) -> None:
    """NaN with gradient 0, and with Hessian-vector product 0: no batch without weight harms the parameters."""
    clean = torch.randn(4, 200, dtype=F64)
    for name, (loss, target, options) in empty_means(clean).items():
        if "shift" in options and route not in HEADS:
            continue
        z = clean.clone().requires_grad_()
        value = route(loss, z, target, **options)
        assert value.isnan(), name
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        second = gradients((first * clean).sum(), z)[0] if first.requires_grad else first
        assert torch.equal(first.detach(), torch.zeros_like(clean)), name
        assert torch.equal(second, torch.zeros_like(clean)), name


def test_a_mean_of_nothing_over_positions() -> None:
    x, w = torch.randn(3, 2).requires_grad_(), torch.randn(5, 4, 2).requires_grad_()
    index, soft = torch.zeros(3, 4, dtype=torch.int64), torch.full((3, 5, 4), 0.2)
    for target, options in (
        (index - 100, {}),
        (index, {"weight": torch.zeros(5)}),
        (index, {"sample_weight": torch.zeros(3, 4)}),
        (soft, {"sample_weight": torch.zeros(3, 4)}),
    ):
        value = softcurve.linear_cross_entropy(x, w, target, **options)
        assert value.isnan()
        assert not any(gradient.any() for gradient in gradients(value, x, w))


@each_pair(case=cases_of("indices", *KINDS), route=ROUTES, leading=((0,), (2, 0)), reduction=REDUCTIONS)
def test_empty_batches(case: tuple[str, str], route: Route, leading: tuple[int, ...], reduction: str) -> None:
    """A sum of 0, a mean of NaN; ``batchmean`` divides by the first dimension, which need not be 0."""
    loss, kind = case
    z = torch.randn(*leading, 6, dtype=F64).requires_grad_()
    target = torch.zeros(leading, dtype=torch.int64) if kind == "indices" else targets_of(z.detach())[kind][0]
    value = route(loss, z, target, reduction=reduction)
    if reduction == "none":
        assert value.shape == leading
    else:
        truth = {"sum": 0.0, "mean": NAN, "batchmean": 0.0 if leading[0] else NAN}[reduction]
        torch.testing.assert_close(value.item(), truth, equal_nan=True, rtol=0, atol=0)
    assert gradients(value, z)[0].shape == z.shape


@pytest.mark.parametrize("member", [softcurve.ForwardKL(), softcurve.ReverseKL(), JensenShannon(BETA)])
@pytest.mark.parametrize("kind", ["LinearTeacher", "Probabilities"])
def test_empty_batches_have_no_gradient_in_weights(member: Divergence, kind: str) -> None:
    """A mean of no rows is NaN, and its gradient is 0, on logits and on a head."""
    x, w, b = (torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((0, 3), (6, 3), (6,)))
    target = LinearTeacher(x.detach(), w.detach()) if kind == "LinearTeacher" else Probabilities(torch.ones(0, 6) / 6)
    options = {"divergence": member, "reduction": "batchmean"}
    for value in (
        softcurve.linear_divergence(x, w, target, linear_bias=b, **options),
        softcurve.divergence(target, F.linear(x, w, b), **options),
    ):
        assert value.isnan()
        for gradient in torch.autograd.grad(value, (w, b)):
            assert (gradient == 0).all()


# --- 2. sums of weights in half precision ------------------------------------------------------------------------------

MANY = 70_000


@pytest.mark.parametrize("dtype", HALF)
def test_many_half_precision_weights(dtype: torch.dtype) -> None:
    """Their sums exceed float16's largest number, and stop growing in bfloat16."""
    z, t = torch.randn(2, MANY, 3)
    weight, of_class = (1 + torch.rand(MANY)).to(dtype), (0.5 + torch.rand(3)).to(dtype)
    index, y = torch.randint(3, (MANY,)), torch.softmax(t.double(), -1)
    wide = weight.double()
    for route in PLAIN[:3]:
        for loss, target in (("forward", Logits(t)), ("cross_entropy", Probabilities(y.float()))):
            truth = (rows_of(loss, z.double(), y) * wide).sum() / wide.sum()
            assert route_of_rows(route, loss, z, target, sample_weight=weight).item() == pytest.approx(
                truth.item(), rel=2e-6
            )
        truth = F.cross_entropy(z.double(), index, weight=of_class.double())
        got = route_of_rows(route, "cross_entropy", z, index, weight=of_class)
        assert got.item() == pytest.approx(truth.item(), rel=2e-6)
        rows = F.cross_entropy(z.double(), index, weight=of_class.double(), reduction="none") * wide
        got = route_of_rows(route, "cross_entropy", z, index, weight=of_class, sample_weight=weight)
        assert got.item() == pytest.approx((rows.sum() / (of_class.double()[index] * wide).sum()).item(), rel=2e-6)


def route_of_rows(route: Route, loss: str, z: Tensor, target: Any, **options: Any) -> Tensor:
    """Many rows of few classes: the head's features are the logits, and its weight the identity."""
    if route not in HEADS:
        return route(loss, z, target, **options)
    head = softcurve.linear_cross_entropy if loss == "cross_entropy" else softcurve.linear_kl_divergence
    return head(z, torch.eye(z.shape[-1]), target, **options)


@pytest.mark.parametrize("dtype", HALF)
def test_many_half_precision_weights_over_positions(dtype: torch.dtype) -> None:
    x, w = torch.randn(MANY // 2, 3), torch.randn(4, 2, 3)
    z = torch.einsum("nd,ckd->nck", x.double(), w.double())
    soft, index = torch.softmax(torch.randn(MANY // 2, 4, 2), 1), torch.randint(4, (MANY // 2, 2))
    weight, of_class = (1 + torch.rand(MANY // 2, 2)).to(dtype), (0.5 + torch.rand(4)).to(dtype)
    wide, of_row = weight.double(), of_class.double()[index]
    for target, truth, options in (
        (soft, (F.cross_entropy(z, soft.double(), reduction="none") * wide).sum() / wide.sum(), {}),
        (index, (F.cross_entropy(z, index, reduction="none") * wide).sum() / wide.sum(), {}),
        (
            index,
            (F.cross_entropy(z, index, reduction="none") * wide * of_row).sum() / (wide * of_row).sum(),
            {"weight": of_class},
        ),
    ):
        got = softcurve.linear_cross_entropy(x, w, target, sample_weight=weight, **options)
        assert got.item() == pytest.approx(truth.item(), rel=2e-6)


# --- 3. losses of half precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "dtype"),
    [*itertools.product(ROUTES, HALF), *itertools.product(FUNCTIONS[:2], (torch.float32, F64))],
    ids=str,
)
def test_losses_are_float32_or_wider(route: Route, dtype: torch.dtype) -> None:
    """In dtype and in digits, for every reduction; the gradient has the dtype of what it belongs to."""
    z, t = (2 * torch.randn(2, 3, 200)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    index = torch.tensor([0, 7, 199])
    cases = [("cross_entropy", index, F.one_hot(index, 200).double())]
    cases += [(loss, target, y) for loss, kind, target, y in combinations(t) if kind in ("Logits", "LinearTeacher")]
    coarse = torch.softmax(t.double(), -1).to(dtype)
    if dtype in (torch.float32, F64):
        cases += [("reverse", Probabilities(coarse), coarse.double() / coarse.double().sum(-1, keepdim=True))]
    cases += [("cross_entropy", Probabilities(coarse), coarse.double())]
    asked = [(*cases[0], reduction) for reduction in REDUCTIONS] + [(*case, "none") for case in cases[1:]]
    for loss, target, y, reduction in asked:
        leaf = z.clone().requires_grad_()
        value = route(loss, leaf, target, reduction=reduction)
        assert value.dtype == wide
        rows = rows_of(loss, z.double(), y)
        truth = {"none": rows, "sum": rows.sum()}.get(reduction, rows.mean())
        torch.testing.assert_close(value.double(), truth, rtol=1e-5 if wide == torch.float32 else 1e-12, atol=0)
        assert gradients(value, leaf)[0].dtype == dtype


def test_a_wider_side_widens_the_loss() -> None:
    z, y = torch.randn(3, 5).bfloat16(), torch.softmax(torch.randn(3, 5, dtype=F64), -1)
    for route, loss in itertools.product(PLAIN, LOSSES):
        value = route(loss, z, Probabilities(y))
        assert value.dtype == F64
        assert value.item() == pytest.approx(rows_of(loss, z.double(), y).mean().item(), rel=1e-6)
    assert softcurve.entropy(z).dtype == torch.float32
    log_p = z.double().log_softmax(-1)
    torch.testing.assert_close(softcurve.entropy(z).double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-6, atol=0)


# --- 4. a head of many positions ---------------------------------------------------------------------------------------


def test_many_positions_add_up_in_float32() -> None:
    """The gradient of bfloat16 features is the sum over 256 positions, rounded once."""
    positions = 256
    x, w = torch.randn(4, 8).bfloat16(), (torch.randn(3, positions, 8) / 4).bfloat16()
    target = torch.randint(3, (4, positions))
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    (got,) = gradients(softcurve.linear_cross_entropy(leaf, w, target, reduction="sum"), leaf)
    logits = torch.einsum("nd,ckd->nck", exact, w.double())
    (truth,) = gradients(F.cross_entropy(logits, target, reduction="sum"), exact)
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert got.dtype == torch.bfloat16
    assert ((got.double() - truth).abs() <= half_ulp * 1.01 * truth.abs() + 1e-5).all()


# --- 5. what belongs to a row moves with it ----------------------------------------------------------------------------


@pytest.mark.parametrize("route", HEADS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shift_moves_all_that_belongs_to_a_row(route: Route, reduction: str) -> None:
    """Position ``i`` has target and weight of ``i + s``; the weights receive the gradient at their own places."""
    clean, index = torch.randn(2, 6, 200, dtype=F64), torch.randint(200, (2, 6))
    index[0, 3] = -100
    weights = torch.tensor([[0, 0, 1, 1, 2, 0.5], [0, 1, 1, 1, 1, 1]], dtype=F64)
    for s, learned in itertools.product((1, 2), (False, True)):
        z, weight = clean.clone().requires_grad_(), weights.clone().requires_grad_(learned)
        value = route("cross_entropy", z, index, shift=s, sample_weight=weight, reduction=reduction)
        given = F.cross_entropy(z[:, :-s].mT, index[:, s:], reduction="none")
        kept = torch.where(index[:, s:] == -100, 0.0, weight[:, s:])
        rows = given * kept
        truth = {
            "none": F.pad(rows, (0, s)),
            "sum": rows.sum(),
            "mean": rows.sum() / kept.sum(),
            "batchmean": rows.sum() / 2,
        }[reduction]
        assert_same(value, truth, bound=1e-12)
        leaves = (z, weight) if learned else (z,)
        for got, expected in zip(gradients(value, *leaves), gradients(truth, *leaves), strict=True):
            assert_same(got, expected, bound=1e-12)


# --- 6. mean and batchmean ---------------------------------------------------------------------------------------------


@each_pair(route=ROUTES, loss=(*LOSSES, "indices"), leading=((3,), (2, 7), (2, 3, 2)))
def test_mean_and_batchmean(route: Route, loss: str, leading: tuple[int, ...]) -> None:
    """``batchmean`` is torch's, and the default of every loss is the mean over the rows."""
    z, t = torch.randn(2, *leading, 5, dtype=F64)
    log_p, log_y = z.log_softmax(-1), t.log_softmax(-1)
    if loss == "indices":
        index = torch.randint(5, leading)
        rows = F.cross_entropy(z.movedim(-1, 1), index, reduction="none")
        assert_same(route("cross_entropy", z, index, reduction="batchmean"), rows.sum() / leading[0], bound=1e-12)
        assert_same(route("cross_entropy", z, index), rows.mean(), bound=1e-12)
        return
    rows = rows_of(loss, z, log_y.exp())
    truth = rows.sum() / leading[0]
    if loss in ("forward", "reverse"):
        sides = (log_p, log_y) if loss == "forward" else (log_y, log_p)
        torch.testing.assert_close(truth, F.kl_div(*sides, log_target=True, reduction="batchmean"))
    assert_same(route(loss, z, Logits(t), reduction="batchmean"), truth, bound=1e-12)
    assert_same(route(loss, z, Logits(t)), rows.mean(), bound=1e-12)
    weight = torch.rand(leading, dtype=F64)
    assert_same(route(loss, z, Logits(t), sample_weight=weight), (rows * weight).sum() / weight.sum(), bound=1e-12)


def test_batchmean_over_positions_and_of_one_row() -> None:
    x, w, index = torch.randn(3, 2, dtype=F64), torch.randn(5, 4, 2, dtype=F64), torch.randint(5, (3, 4))
    total = F.cross_entropy(torch.einsum("nd,ckd->nck", x, w), index, reduction="sum")
    assert_same(softcurve.linear_cross_entropy(x, w, index, reduction="batchmean"), total / 3, bound=1e-12)
    z, t = torch.randn(2, 5, dtype=F64)
    for loss in LOSSES:
        rows = rows_of(loss, z, t.softmax(-1))
        assert_same(ROUTES[0](loss, z, Logits(t), reduction="batchmean"), rows, bound=1e-12)


# --- 7. plain floating-point tensors -----------------------------------------------------------------------------------


@plain_routes
def test_a_plain_target_of_a_cross_entropy_has_its_own_mass(route: Route) -> None:
    """As in torch, whatever a row sums to; logits in its place are an error that names ``Logits``."""
    clean = torch.randn(4, 200, dtype=F64)
    y = torch.softmax(torch.randn(4, 200, dtype=F64), -1) * torch.tensor([[0.0], [0.5], [1.0], [3.0]], dtype=F64)
    for smoothing, reduction in itertools.product((0.0, 0.1), ("none", "mean")):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        z = clean.clone().requires_grad_()
        ours, torchs = route("cross_entropy", z, y, **options), F.cross_entropy(z, y, **options)
        assert_same(ours, torchs, bound=1e-12)
        assert_same(gradients(ours, z)[0], gradients(torchs, z)[0], bound=1e-12)
    for wrong, says in ((clean, "Logits"), (y.index_fill(0, torch.tensor([1]), INF), "finite")):
        with pytest.raises(ValueError, match=says):
            route("cross_entropy", clean, wrong)


@plain_routes
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_a_plain_side_of_a_divergence(route: Route, loss: str) -> None:
    """On logits it is logits, with a warning where it looks like probabilities; a head refuses what could be either."""
    z, p = torch.randn(4, 5), torch.softmax(torch.randn(4, 5), -1)
    if route in HEADS:
        for target in (z, p):
            with pytest.raises(TypeError, match=r"target.*Probabilities.*Logits"):
                route(loss, z, target)
        return
    for sides in ((z, p), (p, z), (p, p), (p.bfloat16(), z)):
        with pytest.warns(UserWarning, match=r"Probabilities.*Logits"):
            value = route(loss, *sides)
        truth = rows_of(loss, sides[0].double(), sides[1].double().softmax(-1)).mean()
        assert value.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(loss, z, z.log_softmax(-1))
        route(loss, z, Probabilities(p))
        route(loss, z, Logits(p))


# --- 8. boundaries of lists, padding, ignored classes -------------------------------------------------------------------


BOUNDARIES = {  # the number of classes, of those that are not masked, and of those that are listed
    "every live class": (200, 6, 6),
    "every class, masked ones included": (200, 6, 200),
    "every class": (200, 200, 200),
    "all but one class": (200, 200, 199),
    "the one live class": (200, 1, 1),
    "one class": (1, 1, 1),
    "two of many": (200, 150, 2),
}
ON = [*((route, torch.float32) for route in FUNCTIONS), *((route, F64) for route in FUNCTIONS[:2])]


@each_pair(on=ON, boundary=tuple(BOUNDARIES), case=cases_of("bucket", "renormalize"))
def test_boundaries_of_lists(on: tuple[Route, torch.dtype], boundary: str, case: tuple[str, str]) -> None:
    """A list of all classes that are not masked is the distribution over these."""
    (route, dtype), (loss, tail), (classes, count, listed) = on, case, BOUNDARIES[boundary]
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    live = torch.arange(classes) < count
    bias = torch.where(live, 0.0, -INF).to(dtype)
    t = (torch.randn(3, classes, dtype=F64) + bias).log_softmax(-1)
    indices = (torch.rand(3, classes) - (~live).float()).argsort(-1, descending=True)[:, :listed]
    log_probs = t.gather(-1, indices).to(dtype)
    leaf = torch.randn(3, classes, dtype=F64).to(dtype).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    value = route(loss, leaf, TopK(indices, log_probs, tail), bias, reduction="none")
    truth = rows_of_list(loss, exact, live, indices, log_probs.double(), tail)
    assert_same(value.double(), truth, bound=bound)
    assert_same(gradients(value, leaf)[0].double(), gradients(truth, exact)[0], "gradient", bound)


def rows_of_list(loss: str, z: Tensor, live: Tensor, indices: Tensor, log_probs: Tensor, tail: str) -> Tensor:
    """The classes that are not masked, alone; what is neither listed nor masked is one outcome or has no mass."""
    y = torch.zeros_like(z).scatter(-1, indices, log_probs.exp())
    unlisted = torch.ones_like(z, dtype=torch.bool).scatter(-1, indices, False) & live
    if tail == "renormalize" or not unlisted.any():
        return rows_of(loss, z[:, live], y[:, live] / y[:, live].sum(-1, keepdim=True))
    outcomes = oracle.listed_and_rest(torch.where(live, z, -INF), indices)
    return rows_of(loss, outcomes, torch.cat([log_probs.exp(), 1 - log_probs.exp().sum(-1, keepdim=True)], -1))


@functions
def test_a_list_of_bfloat16_that_names_every_live_class(route: Route) -> None:
    """What its rounding leaves over is no mass on the masked classes."""
    bias = torch.where(torch.arange(200) < 6, 0.0, -INF)
    log_probs = torch.randn(16, 6).log_softmax(-1).bfloat16()
    indices = torch.arange(6).expand(16, 6)
    for loss in LOSSES:
        assert route(loss, torch.randn(16, 200), TopK(indices, log_probs), bias, reduction="none").isfinite().all()


def padded(kind: str, target: Any, fill: str) -> Any:
    """The target with padding in its second row."""
    row = torch.tensor([1])
    value = {"nan": NAN, "zeros": 0.0, "negative": -1.0, "repeated": 0.0}[fill]
    if kind == "indices":
        return target.index_fill(0, row, {"nan": 4000, "zeros": 0, "negative": -1, "repeated": -100}[fill])
    if kind in ("bucket", "renormalize"):
        at = {"nan": 4000, "zeros": 0, "negative": -1, "repeated": 7}[fill]
        return TopK(target.indices.index_fill(0, row, at), target.log_probs.index_fill(0, row, value), target.tail)
    if kind == "LinearTeacher":
        return LinearTeacher(target.input.index_fill(0, row, value), target.linear_weight)
    if kind == "float":
        return target.index_fill(0, row, value)
    return type(target)(target.values.index_fill(0, row, value))


@each_pair(case=cases_of("indices", *KINDS, "bucket"), route=FUNCTIONS, fill=("nan", "zeros", "negative", "repeated"))
def test_padding_rows_of_weight_0(case: tuple[str, str], route: Route, fill: str) -> None:
    """Value, gradient and Hessian-vector product are those of the other rows, and 0 in the padding."""
    loss, kind = case
    z, t = torch.randn(2, 3, 200, dtype=F64)
    weight, kept = torch.tensor([1.0, 0.0, 2.0], dtype=F64), torch.tensor([0, 2])
    index, listed = torch.tensor([5, 8, 199]), t.log_softmax(-1).topk(2)
    made = targets_of(t) | {"indices": (index, F.one_hot(index, 200).double())}
    target, y = (TopK(listed.indices, listed.values), None) if kind == "bucket" else made[kind]
    leaf, exact = z.clone().requires_grad_(), z.clone().requires_grad_()
    value = route(loss, leaf, padded(kind, target, fill), sample_weight=weight)
    if y is None:
        every = torch.ones(200, dtype=torch.bool)
        rows = rows_of_list(loss, exact[kept], every, listed.indices[kept], listed.values[kept], kind)
    else:
        rows = rows_of(loss, exact[kept], y[kept])
    truth = (rows * weight[kept]).sum() / 3
    assert_same(value, truth, bound=1e-12)
    (first,), (expected,) = (torch.autograd.grad(v, at, create_graph=True) for v, at in ((value, leaf), (truth, exact)))
    assert_same(first, expected, "gradient", 1e-12)
    assert_same(gradients((first * t).sum(), leaf)[0], gradients((expected * t).sum(), exact)[0], "product", 1e-10)


@pytest.mark.parametrize("budget", [None, "least"])
def test_features_of_padding_may_be_nan(budget: str | None) -> None:
    """In rows of weight 0 and in rows whose class is ignored: value and gradients are those of the other rows."""
    x, w, t = (torch.randn(*shape, dtype=F64) for shape in ((5, 3), (200, 3), (5, 200)))
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5], dtype=F64)
    index = torch.tensor([3, -100, 199, -100, 0])
    y = t.softmax(-1)
    for loss, target, options in (
        (softcurve.linear_cross_entropy, index, {}),
        (softcurve.linear_cross_entropy, index, {"label_smoothing": 0.1}),
        *((softcurve.linear_cross_entropy, made, {"sample_weight": weight}) for made in (index, y)),
        (softcurve.linear_kl_divergence, Probabilities(y), {"sample_weight": weight}),
        (softcurve.linear_js_divergence, Logits(t), {"sample_weight": weight}),
    ):
        found = []
        for poisoned in (False, True):
            features = (x.index_fill(0, torch.tensor([1, 3]), NAN) if poisoned else x).clone().requires_grad_()
            leaf, given = w.clone().requires_grad_(), dict(options)
            if budget:
                with pytest.raises(ValueError, match="memory_budget") as refused:
                    loss(features, leaf, target, **options, memory_budget=1)
                given["memory_budget"] = least_of(str(refused.value))
            value = loss(features, leaf, target, **given)
            first = torch.autograd.grad(value, (features, leaf), create_graph=budget is None)
            found.append((value, *first, *(() if budget else gradients(first[1].sin().sum(), leaf))))
        for got, truth in zip(found[1], found[0], strict=True):
            assert torch.equal(got, truth)
        assert not found[1][1][1::2].any()
        assert found[0][0] > 0


@routes
def test_an_ignored_class_is_one_of_class_indices(route: Route) -> None:
    """Any but the default is refused beside a distribution, rather than dropped."""
    z, t = torch.randn(2, 3, 5, dtype=F64)
    listed = t.log_softmax(-1).topk(2)
    for kind, (target, y) in (targets_of(t) | {"bucket": (TopK(listed.indices, listed.values), None)}).items():
        for ignore_index in (2, -1):
            with pytest.raises(ValueError, match=r"ignore_index.*distribution.*sample_weight"):
                route("cross_entropy", z, target, ignore_index=ignore_index)
        value = route("cross_entropy", z, target, ignore_index=-100)
        if kind != "bucket":
            assert_same(value, rows_of("cross_entropy", z, y).mean(), bound=1e-12)


# --- 9. common offsets -------------------------------------------------------------------------------------------------

OFFSETS = ((8192.0, 0.0), (0.0, 8192.0), (-8192.0, 8192.0))


def offset_possible(name: str, level: Any, other: str, other_level: Any) -> bool:
    """Probabilities and renormalised lists have no offset of their own; not every kind is tempered."""
    if (name, other) == ("case", "offsets"):
        return other_level[1] == 0 or level[1] in ("indices", "Logits", "LinearTeacher", "bucket")
    if (name, other) == ("case", "temperature"):
        return other_level == 1 or level[1] in ("indices", "Logits", "renormalize")
    return True


@each_pair(
    offset_possible,
    case=cases_of("indices", *KINDS, "bucket"), route=FUNCTIONS, offsets=OFFSETS, temperature=(1.0, 0.7),
)  # fmt: skip
def test_common_offsets_change_nothing(
    case: tuple[str, str], route: Route, offsets: tuple[float, float], temperature: float
) -> None:
    """Of model and target, on a grid that float32 holds beside the offset: the truth is that without it, in float64."""
    (loss, kind), (of_model, of_target) = case, offsets
    base = (2 * torch.randn(2, 3, 200) * 256).round() / 256
    index, listed = torch.tensor([0, 150, 199]), base[1].log_softmax(-1).topk(4)
    t = base[1] + of_target
    assert torch.equal(t - of_target, base[1])
    made = targets_of(t) | {"indices": (index, F.one_hot(index, 200).double())}
    target, y = (TopK(listed.indices, listed.values), None) if kind == "bucket" else made[kind]
    leaf, exact = base[0].clone().requires_grad_(), base[0].double().requires_grad_()
    bias = torch.full((200,), of_model)
    value = route(loss, leaf, target, bias, temperature=temperature, reduction="none")
    if y is None:
        every = torch.ones(200, dtype=torch.bool)
        truth = rows_of_list(loss, exact, every, listed.indices, listed.values.double(), "bucket")
    else:
        if loss != "cross_entropy" and temperature != 1:
            y = torch.softmax(torch.where(y > 0, y, 1.0).log() / temperature + torch.where(y > 0, 0.0, -INF), -1)
        truth = rows_of(loss, exact, y, temperature)
    assert ((value.double() - truth) / truth).abs().max() <= 3e-6
    assert_same(gradients(value, leaf)[0].double(), gradients(truth, exact)[0], bound=1e-5)


# --- 10. members that are not known ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halved(Divergence):
    """A member of one's own: half of the Jensen-Shannon divergence."""

    beta: float = BETA

    @property
    def whole(self) -> Divergence:
        return JensenShannon(self.beta)

    def value(self, pair: Any) -> Tensor:
        return self.whole.value(pair) / 2

    def score(self, pair: Any) -> Tensor:
        return self.whole.score(pair) / 2

    def curve(self, pair: Any) -> Tensor:
        return self.whole.curve(pair) / 2

    def cross(self, pair: Any) -> Tensor:
        return self.whole.cross(pair) / 2

    def exchanged(self) -> Divergence:
        return Halved(1 - self.beta)


def test_what_is_no_member_is_refused() -> None:
    z = torch.randn(3, 5)
    with pytest.raises(TypeError, match="divergence"):
        softcurve.divergence(z, z, divergence=JensenShannon)
    with pytest.raises(TypeError, match="divergence"):
        softcurve.linear_divergence(z, torch.eye(5), Logits(z), divergence=JensenShannon)


def test_a_member_of_ones_own_is_right() -> None:
    """On each route of the head: half of what the Jensen-Shannon divergence gives."""
    z, t = torch.randn(2, 3, 200)
    x, w = head_of(z)

    def outcomes(member: Divergence) -> dict[str, Tensor]:
        leaf = w.clone().requires_grad_()
        found = {}
        for name, budget in {"head": None, "tiles": 40_000}.items():
            value = softcurve.linear_divergence(x, leaf, Logits(t), divergence=member, memory_budget=budget)
            found[name] = torch.cat([value.detach().reshape(1), gradients(value, leaf)[0].flatten()])
        head = HeadCurvature(x, w, Logits(t), loss=member)
        direction = Direction(None, torch.ones_like(w).cumsum(0).sin(), None)
        return found | {name: getattr(head, name)(direction).weight for name in ("hvp", "ggnvp")}

    known = outcomes(JensenShannon(BETA))
    for name, found in outcomes(Halved()).items():
        assert_same(found, known[name] / 2, name, 1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_member_that_is_not_known_is_refused_by_triton() -> None:
    with pytest.raises(TypeError, match=r"divergence.*Halved"):
        backends.kernels("dense_terms").family(LossSpec(Halved(), "logits"))


# --- 11. numbers, vocabularies, layouts --------------------------------------------------------------------------------

NUMBERS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda v: np.float32(v) if isinstance(v, float) else np.int32(v),
    "float64": lambda v: np.float64(v) if isinstance(v, float) else np.int64(v),
    "0-d tensor": torch.tensor,
    "0-d tensor of half the width": lambda v: torch.tensor(v).to(
        torch.float16 if isinstance(v, float) else torch.int16
    ),
}
# All of them are exact in half precision.
COMMON = {"temperature": 0.75, "base": 2.0}
OF_HEADS = {"softcap": 3.5, "memory_budget": 30_000}
OF_CROSS_ENTROPY = {"label_smoothing": 0.125, "z_loss": 0.25, "softcap": 3.5, "ignore_index": 2}


OPTIONS: list[tuple[str, str, Any]] = [
    *((loss, name, value) for loss in LOSSES for name, value in (COMMON | OF_HEADS).items()),
    *(("cross_entropy", name, value) for name, value in OF_CROSS_ENTROPY.items() if name not in OF_HEADS),
    ("cross_entropy", "shift", 1),
    ("js", "beta", 0.25),
]


def takes(name: str, level: Any, other: str, other_level: Any) -> bool:
    """Whether a route takes an option."""
    if (name, other) != ("option", "route") or other_level in HEADS:
        return True
    loss, option, _ = level
    return option not in ("memory_budget", "shift") and (loss == "cross_entropy" or option != "softcap")


@each_pair(takes, option=OPTIONS, route=PLAIN, kind=tuple(NUMBERS))
def test_numbers_of_every_kind(option: tuple[str, str, Any], route: Route, kind: str) -> None:
    """Python's, numpy's and 0-d tensors, in every option: the same to the last bit."""
    (loss, name, value), (z, t) = option, torch.randn(2, 3, 5)
    target = torch.tensor([0, 2, 4]) if loss == "cross_entropy" else Logits(t)
    got = route(loss, z, target, **{name: NUMBERS[kind](value)})
    assert torch.equal(got, route(loss, z, target, **{name: value}))


@pytest.mark.parametrize("kind", NUMBERS)
def test_base_of_an_entropy_of_every_kind(kind: str) -> None:
    z = torch.randn(3, 5)
    assert torch.equal(softcurve.entropy(z, base=NUMBERS[kind](2.0)), softcurve.entropy(z, base=2.0))


@plain_routes
def test_unequal_vocabularies_and_layouts_name_the_remedy(route: Route) -> None:
    z, t = torch.randn(3, 7), torch.randn(3, 5)
    for loss, kind, target, _ in combinations(t):
        if kind != "renormalize":
            with pytest.raises(ValueError, match=r"padded, cut .*\[.*:(C|5)\]"):
                route(loss, z, target)
    if route.name in ("logits", "module"):
        with pytest.raises(ValueError, match=r"movedim\(1, -1\)"):
            route("cross_entropy", torch.randn(3, 5, 4), torch.zeros(3, 4, dtype=torch.int64))


# --- masked classes and label smoothing --------------------------------------------------------------------------------

LIVE, PADDED = 170, 200
SMOOTHED = ("indices", "float", "Probabilities", "Logits", "LinearTeacher", "bucket", "renormalize")


def vocabularies(kind: str, t: Tensor) -> tuple[Any, Any, Tensor, Tensor | None]:
    """The target over the padded vocabulary, over the unpadded one, what it means, and the list of a bucket."""
    far = F.pad(t, (0, PADDED - LIVE), value=-INF)
    listed = t.log_softmax(-1).topk(3)
    rows = torch.eye(len(t), dtype=t.dtype)
    bias = torch.where(torch.arange(PADDED) < LIVE, 0.0, -INF).to(t.dtype)
    y = t.softmax(-1)
    if kind == "indices":
        index = listed.indices[:, 0]
        return index, index, F.one_hot(index, LIVE).to(t.dtype), None
    if kind == "float":
        return 0.5 * far.softmax(-1), 0.5 * y, 0.5 * y, None
    if kind == "LinearTeacher":
        weight = F.pad(t.mT, (0, 0, 0, PADDED - LIVE))
        return LinearTeacher(rows, weight, bias), LinearTeacher(rows, weight[:LIVE]), y, None
    if kind in ("bucket", "renormalize"):
        target = TopK(listed.indices, listed.values, kind)
        masses = listed.values.exp()
        if kind == "bucket":
            return target, target, torch.cat([masses, 1 - masses.sum(-1, keepdim=True)], -1), listed.indices
        own = torch.zeros_like(t).scatter(-1, listed.indices, masses / masses.sum(-1, keepdim=True))
        return target, target, own, None
    made = Probabilities if kind == "Probabilities" else Logits
    return (*(made(v.softmax(-1) if made is Probabilities else v) for v in (far, t)), y, None)


@each_pair(
    lambda name, level, other, other_level: (name, level, other_level) != ("kind", "bucket", True),
    kind=SMOOTHED, route=FUNCTIONS, weighted=(False, True),
)  # fmt: skip
def test_masked_classes_have_no_share_of_smoothing(kind: str, route: Route, weighted: bool) -> None:
    """The loss over a vocabulary padded with −inf is that over the unpadded one: value, gradient, product."""
    z, t = torch.randn(2, 3, LIVE, dtype=F64)
    mask = torch.where(torch.arange(PADDED) < LIVE, 0.0, -INF).double()
    target, _, y, indices = vocabularies(kind, t)
    weight = 0.5 + torch.rand(PADDED, dtype=F64) if weighted else None
    leaf, exact = F.pad(z, (0, PADDED - LIVE)).requires_grad_(), z.clone().requires_grad_()
    value = route("cross_entropy", leaf, target, mask, label_smoothing=0.2, reduction="sum", weight=weight)
    short = None if weight is None else weight[:LIVE]
    truth = oracle.cross_entropy_rows(exact, y, weight=short, label_smoothing=0.2, indices=indices).sum()
    assert_same(value, truth, bound=1e-12)
    (first,), (expected,) = (torch.autograd.grad(v, at, create_graph=True) for v, at in ((value, leaf), (truth, exact)))
    assert_same(first, F.pad(expected, (0, PADDED - LIVE)), bound=1e-12)
    direction = F.pad(t, (0, PADDED - LIVE), value=0.7)
    second, product = gradients((first * direction).sum(), leaf)[0], gradients((expected * t).sum(), exact)[0]
    assert_same(second, F.pad(product, (0, PADDED - LIVE)), bound=1e-12)


@pytest.mark.parametrize("kind", SMOOTHED)
def test_curvature_of_a_padded_vocabulary(kind: str) -> None:
    """Every product and closed form is that of the unpadded head, and 0 at the masked classes."""
    x, w, t = (torch.randn(*shape, dtype=F64) for shape in ((3, 4), (PADDED, 4), (3, LIVE)))
    bias = torch.where(torch.arange(PADDED) < LIVE, torch.randn(PADDED, dtype=F64), -INF)
    padded_target, target, _, _ = vocabularies(kind, t)
    of_class = None if kind == "bucket" else 0.5 + torch.rand(PADDED, dtype=F64)
    for weight in {id(given): given for given in (None, of_class)}.values():
        more, fewer = (
            HeadCurvature(
                x, w[:count], made, linear_bias=bias[:count], label_smoothing=0.2,
                weight=None if weight is None else weight[:count],
            )
            for made, count in ((padded_target, PADDED), (target, LIVE))
        )  # fmt: skip
        direction = Direction(torch.randn_like(x), torch.randn_like(w), torch.randn(PADDED, dtype=F64))
        short = direction._replace(weight=direction.weight[:LIVE], bias=direction.bias[:LIVE])
        for product in ("hvp", "ggnvp"):
            for got, truth in zip(getattr(more, product)(direction), getattr(fewer, product)(short), strict=True):
                longer = (*truth.shape[1:], len(got) - len(truth))
                assert_same(got, torch.cat([truth, truth.new_zeros(longer[-1], *truth.shape[1:])]), product, 1e-11)
        assert more.trace() == pytest.approx(fewer.trace(), rel=1e-11)
        assert_same(more.gradient_norms(), fewer.gradient_norms(), bound=1e-11)
