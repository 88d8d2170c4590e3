"""A teacher's own scale, soft cap and classes: one meaning on logits and on a head, equal to the dense computation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve import AlphaDivergence, CrossEntropy, ForwardKL, JensenShannon, LinearTeacher, ReverseKL
from softcurve.head import backends
from softcurve.losses.spec import LossSpec

from . import oracle
from .cases import assert_same, derivatives
from .pairwise import pairwise
from .placement import DEVICE
from .test_head_memory import MOST, PREAMBLE

F64 = torch.float64
FAR = -700.0  # what has no probability, for an oracle with logarithms


@dataclass(frozen=True)
class OwnMember(AlphaDivergence):
    """A member that no kernel names, with the formulas of the α-divergence."""


def alpha_rows(log_y: Tensor, log_p: Tensor) -> Tensor:
    return (1 - torch.exp(0.3 * log_y + 0.7 * log_p).sum(-1)) / (0.3 * 0.7)


DIVERGENCES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross-entropy": (CrossEntropy(), lambda log_y, log_p: -(log_y.exp() * log_p).sum(-1)),
    "forward": (ForwardKL(), oracle.kl_rows),
    "reverse": (ReverseKL(), lambda log_y, log_p: oracle.kl_rows(log_p, log_y)),
    "js": (JensenShannon(0.3), lambda log_y, log_p: oracle.js_rows(log_y, log_p, beta=0.3)),
    "alpha": (AlphaDivergence(0.3), alpha_rows),
    "own": (OwnMember(0.3), alpha_rows),
}


def index_of(count: int, classes: int) -> Tensor:
    """The model's classes among ``count`` of the teacher, in another order; what it lacks is −1."""
    order = torch.randperm(max(count, classes))[:classes]
    return torch.where(order < count, order, -1)


# The number of the teacher's classes for so many of the model, and which they are.
CHOICES: dict[str, tuple[Callable[[int], int], Callable[[int], Any]]] = {
    "all": (lambda c: c, lambda _: None),
    "slice": (lambda c: 2 * c + 5, lambda c: slice(3, 3 + 2 * c, 2)),
    "more": (lambda c: c + 9, lambda c: index_of(c + 9, c)),
    "fewer": (lambda c: max(1, c - 4), lambda c: index_of(max(1, c - 4), c)),
}
TILINGS = {"one row": ((), 7), "whole": ((2, 6), 23), "rows": ((70,), 37), "cut": ((12,), 601)}
BUDGETS = {"rows": 64_000, "cut": 40_000}

SETTINGS = pairwise(
    {
        "divergence": tuple(DIVERGENCES),
        "choice": tuple(CHOICES),
        "softcap": (None, 2.0),
        "scale": (1.0, 0.6),
        "temperature": (1.0, 0.7),
        "tiling": tuple(TILINGS),
        "bias": (True, False),
    },
    lambda name, level, other, value: (name, level, other, value) != ("divergence", "reverse", "choice", "fewer"),
)


def chosen_logits(logits: Tensor, classes: Any, missing: float = FAR) -> Tensor:
    if not isinstance(classes, Tensor):
        return logits if classes is None else logits[..., classes]
    return torch.where(classes < 0, missing, logits[..., classes.clamp(min=0)])


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_equals_the_dense_teacher(setting: dict[str, Any]) -> None:
    """On both routes, value, gradients and Hessian product, in the model's tensors and the teacher's."""
    (divergence, rows_of), (count, choose) = DIVERGENCES[setting["divergence"]], CHOICES[setting["choice"]]
    rows, classes = TILINGS[setting["tiling"]]
    shapes = ((*rows, 4), (classes, 4), (*rows, 3), (count(classes), 3), *[(count(classes),)] * setting["bias"])
    leaves = tuple(torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes)
    (x, w, e, u, *bias), chosen, temperature = leaves, choose(classes), setting["temperature"]
    options = {name: setting[name] for name in ("softcap", "scale")}
    teacher = LinearTeacher(e, u, *bias, **options, classes=chosen)

    logits = options["scale"] * F.linear(e, u, *bias)
    if options["softcap"]:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    cold = 1.0 if setting["divergence"] == "cross-entropy" else temperature
    log_y = torch.log_softmax(chosen_logits(logits, chosen) / cold, -1)
    truth = rows_of(log_y, torch.log_softmax(x @ w.T / temperature, -1)).mean()

    given: dict[str, Any] = {"divergence": divergence, "temperature": temperature}
    on_head = softcurve.linear_divergence(x, w, teacher, **given, memory_budget=BUDGETS.get(setting["tiling"]))
    on_logits = softcurve.divergence(teacher, x @ w.T, **given)
    expected = derivatives(truth, leaves)
    for route, value in (("head", on_head), ("logits", on_logits)):
        assert_same(value, truth, route)
        for n, (got, right) in enumerate(zip(derivatives(value, leaves), expected, strict=True)):
            assert_same(got, right, f"{route}: derivative {n}")


# torch's own doing when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("without_shape_checks")
def test_forward_mode_over_forward_mode() -> None:
    """Per row, where derivatives along a weight are taken as more features."""
    chosen = index_of(5, 7)
    primal = tuple(torch.randn(shape, dtype=F64) for shape in ((3, 2), (7, 2), (3, 2), (5, 2), (5,)))
    tangents = tuple(map(torch.randn_like, primal))

    def ours(x: Tensor, w: Tensor, *of_teacher: Tensor) -> Tensor:
        teacher = LinearTeacher(*of_teacher, classes=chosen, softcap=2.0, scale=0.6)
        return softcurve.linear_kl_divergence(x, w, teacher, reduction="none")

    def dense(x: Tensor, w: Tensor, *of_teacher: Tensor) -> Tensor:
        log_y = torch.log_softmax(chosen_logits(2 * torch.tanh(0.3 * F.linear(*of_teacher)), chosen), -1)
        return oracle.kl_rows(log_y, torch.log_softmax(x @ w.T, -1))

    def twice(f: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(lambda *p: torch.func.jvp(f, p, tangents)[1], primal, tangents)[1]

    assert_same(twice(ours), twice(dense))
    with pytest.raises(RuntimeError, match="third"):
        torch.func.jacrev(torch.func.hessian(lambda e: ours(*primal[:2], e, *primal[3:]).sum()))(primal[2])


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3)], ids=str)
def test_padded_classes_and_rows_of_weight_0(divergence: Any) -> None:
    """As if the padding were not there: masked by the bias on both sides, or −1; NaN in rows that do not count."""
    x, w, e, u = (torch.randn(shape, dtype=F64) for shape in ((6, 4), (9, 4), (6, 3), (9, 3)))
    bias = torch.zeros(9, dtype=F64).index_fill(0, torch.tensor([4, 8]), -math.inf)
    kept, sample_weight = bias == 0, torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.0], dtype=F64)
    shown = {"divergence": divergence, "sample_weight": sample_weight}
    truth = softcurve.linear_divergence(x, w[kept], LinearTeacher(e, u[kept], softcap=3.0), **shown)
    spoiled = torch.where(sample_weight.unsqueeze(-1) == 0, math.nan, e)
    index = torch.where(kept, torch.arange(9), -1)
    for teacher in (
        LinearTeacher(spoiled, u, bias, softcap=3.0),
        LinearTeacher(spoiled, torch.cat([u, u]), torch.cat([bias, bias]), softcap=3.0, classes=slice(9, 18)),
        LinearTeacher(spoiled, u, softcap=3.0, classes=index),
    ):
        leaves = tuple(t.requires_grad_() for t in (x.clone(), teacher.input.clone(), teacher.linear_weight.clone()))
        target = replace(teacher, input=leaves[1], linear_weight=leaves[2])
        value = softcurve.linear_divergence(leaves[0], w, target, linear_bias=bias, **shown)
        assert_same(value.detach(), truth)
        on_logits = softcurve.divergence(target, F.linear(leaves[0], w, bias), **shown)
        gradients = torch.autograd.grad(value, leaves)
        for got, other in zip(gradients, torch.autograd.grad(on_logits, leaves), strict=True):
            assert got.isfinite().all()
            assert_same(got, other)
        assert not gradients[1][sample_weight == 0].any()


def test_mass_where_the_teacher_has_none_is_infinite() -> None:
    x, w, e, u = (torch.randn(shape) for shape in ((4, 3), (5, 3), (4, 2), (3, 2)))
    teacher = LinearTeacher(e, u, classes=torch.tensor([0, -1, 2, 1, -1]))
    assert softcurve.linear_kl_divergence(x, w, teacher, direction="reverse") == math.inf
    assert softcurve.linear_kl_divergence(x, w, teacher).isfinite()
    for masked, is_finite in ((1, True), (0, False)):  # a class that the teacher lacks, and one that it has
        bias = torch.zeros(5).index_fill(0, torch.tensor([masked]), -math.inf)
        assert softcurve.linear_kl_divergence(x, w, teacher, linear_bias=bias).isfinite() == is_finite
        assert softcurve.linear_js_divergence(x, w, teacher, linear_bias=bias).isfinite()


def test_a_common_offset_is_not_rounded_by_the_scale() -> None:
    """In float32, where 0.7 · 1e4 is rounded by more than the bound; the offset and the logits are multiples of 2⁻⁸."""
    e, u, x, w = (torch.randint(-8, 9, shape) / 16 for shape in ((5, 4), (9, 4), (5, 4), (9, 4)))
    teacher = LinearTeacher(e, u, torch.full((9,), 1e4), scale=0.7)
    exact = LinearTeacher(e.double(), u.double(), scale=0.7)
    for temperature in (1.0, 1.3):
        truth = softcurve.kl_divergence(exact, x.double() @ w.double().T, temperature=temperature)
        found = softcurve.linear_kl_divergence(x, w, teacher, temperature=temperature)
        on_logits = softcurve.kl_divergence(teacher, x @ w.T, temperature=temperature)
        assert found.item() == pytest.approx(truth.item(), rel=1e-5)
        assert on_logits.item() == pytest.approx(truth.item(), rel=1e-5)


# --- autocast ----------------------------------------------------------------------------------------------------------

Factors = list[Tensor]
UNDER_AUTOCAST: dict[str, Callable[[Factors, Any], Tensor]] = {
    "head": lambda s, t: softcurve.linear_kl_divergence(s[0], s[1], LinearTeacher(*t), linear_bias=s[2]),
    "reverse on a head": lambda s, t: softcurve.linear_kl_divergence(
        s[0], s[1], LinearTeacher(*t, softcap=3.0), linear_bias=s[2], direction="reverse"
    ),
    "chosen classes": lambda s, t: softcurve.linear_js_divergence(
        s[0], s[1], LinearTeacher(*t, classes=torch.arange(22, -1, -1)), linear_bias=s[2]
    ),
    "distillation": lambda s, t: softcurve.linear_distillation(
        s[0], s[1], torch.arange(9), LinearTeacher(*t), linear_bias=s[2], alpha=0.3, temperature=2.0
    ),
    "logits": lambda _, t: softcurve.js_divergence(LinearTeacher(*t), torch.arange(207).view(9, 23).cos().double()),
    "groups": lambda s, t: softcurve.linear_kl_divergence(
        s[0], s[1], softcurve.ClassMap(torch.arange(23) % 7, torch.arange(23) % 7).target(LinearTeacher(*t)),
        linear_bias=s[2],
    ),
    "curvature": lambda s, t: softcurve.curvature.HeadCurvature(
        s[0], s[1], LinearTeacher(*t), linear_bias=s[2], loss="reverse_kl"
    ).diagonal(matrix="hessian").weight,
}  # fmt: skip


def of_both() -> tuple[Factors, Factors]:
    return [torch.randn(shape) for shape in ((9, 6), (23, 6), (23,))], [
        torch.randn(s) for s in ((9, 4), (23, 4), (23,))
    ]


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_autocast_rounds_the_teacher_as_it_rounds_the_model(name: str) -> None:
    """Beside float64 on the rounded tensors; what is not rounded differs by 1e-3. A float64 teacher stays as it is."""
    model, teacher = of_both()
    call, exact = UNDER_AUTOCAST[name], [t.double() for t in teacher]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        values = [call(model, of_teacher) for of_teacher in (teacher, exact)]
    rounded, of_teacher = ([t.bfloat16().double() for t in each] for each in (model, teacher))
    for value, truth in zip(values, (call(rounded, of_teacher), call(rounded, exact)), strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)


def test_autocast_beside_the_dense_computation() -> None:
    """Of both heads by torch's ``linear`` under autocast, whose error ours does not exceed; a low-rank teacher as well."""
    factors = [t.requires_grad_() for each in of_both() for t in each]
    a, b = torch.randn(23, 2), torch.randn(2, 4)

    def dense(x: Tensor, w: Tensor, c: Tensor, e: Tensor, u: Tensor, d: Tensor) -> Tensor:
        log_y, log_p = (torch.log_softmax(F.linear(*of), -1) for of in ((e, u, d), (x, w, c)))
        return oracle.kl_rows(log_y, log_p).mean()

    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = softcurve.linear_kl_divergence(*factors[:2], LinearTeacher(*factors[3:]), linear_bias=factors[2])
        plain = dense(*factors)
        low = softcurve.LowRankWeight(factors[4], a, b)
        same = softcurve.linear_kl_divergence(factors[3], low, LinearTeacher(factors[3], low))
    exact = [t.detach().double().requires_grad_() for t in factors]
    truth = dense(*exact)
    found = [
        [value, *torch.autograd.grad(value, of)] for value, of in ((ours, factors), (plain, factors), (truth, exact))
    ]
    for got, other, right in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert (got - right).norm() <= 1.2 * (other - right).norm() + 1e-3 * right.norm()
    assert same == 0


def test_statistics_are_in_the_classes_of_the_model() -> None:
    w = torch.eye(4, dtype=F64)
    teacher = LinearTeacher(3 * w, torch.cat([w, w]), classes=torch.tensor([5, 6, 7, 4]))
    _, stats = softcurve.linear_kl_divergence(3 * w, w.roll(-1, 0), teacher, return_stats=True)
    assert stats.correct.all()
    _, stats = softcurve.linear_kl_divergence(3 * w, w, teacher, return_stats=True)
    assert not stats.correct.any()


def test_the_description_has_the_teachers_options() -> None:
    spec = LossSpec(ForwardKL(), "teacher", temperature=0.7, teacher_scale=0.6, teacher_softcap=2.5)
    assert LossSpec.decode(spec.encode()) == spec
    plain = replace(spec, teacher_softcap=None)
    for served in (torch.device("cuda"), torch.device("cpu")):
        assert not backends.serves(spec, served, torch.float32)
    assert backends.serves(plain, torch.device("cuda"), torch.float32) == backends._has_triton()


# --- errors ------------------------------------------------------------------------------------------------------------

BAD = {
    "LinearTeacher(x, u, scale=0.0)": ("ValueError", "LinearTeacher scale must be a finite number above 0, got 0.0"),
    "LinearTeacher(x, u, softcap=-1)": ("ValueError", "LinearTeacher softcap must be a finite number above 0"),
    "LinearTeacher(x, u, classes=[0, 1])": ("TypeError", "LinearTeacher classes must be a slice, an int64 tensor"),
    "LinearTeacher(x, u, classes=torch.ones(5))": ("TypeError", "int64 tensor (C_model,)"),
    "LinearTeacher(x, u, classes=torch.zeros(0).long())": ("TypeError", "got shape (0,)"),
    "LinearTeacher(x, u, classes=slice(None, None, -1))": ("ValueError", "steps >= 1"),
    "LinearTeacher(x, u, classes=slice(9, 12))": ("ValueError", "of the 7 classes of linear_weight"),
    "KL(LinearTeacher(x, u))": ("ValueError", "say by LinearTeacher(..., classes=) which of the teacher's"),
    "KL(LinearTeacher(x, u[:4]))": ("ValueError", "say by LinearTeacher(..., classes=) which of the teacher's"),
    "KL(LinearTeacher(x, u, classes=slice(4)))": ("ValueError", "classes="),
    "KL(LinearTeacher(x, u, classes=torch.arange(5) + 3))": ("ValueError", "classes 0 … 6, at least one, or -1"),
    "KL(LinearTeacher(x, u, classes=torch.arange(5) - 2))": ("ValueError", "got -2"),
    "KL(LinearTeacher(x, u, classes=-torch.ones(5).long()))": ("ValueError", "at least one"),
}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("route", ["head", "logits"])
@pytest.mark.parametrize("code", BAD)
def test_errors(code: str, route: str) -> None:
    x, w, u = torch.randn(3, 2), torch.randn(5, 2), torch.randn(7, 2)
    losses = {
        "head": lambda target: softcurve.linear_kl_divergence(x, w, target),
        "logits": lambda target: softcurve.cross_entropy(x @ w.T, target),
    }
    kind, words = BAD[code]
    with pytest.raises((TypeError, ValueError)) as refused:
        eval(code, {"x": x, "u": u, "torch": torch, "LinearTeacher": LinearTeacher, "KL": losses[route]})
    assert type(refused.value).__name__ == kind
    assert words in str(refused.value)


# --- memory ------------------------------------------------------------------------------------------------------------


def test_neither_logits_nor_chosen_rows_of_the_weight_are_held(run_python: Callable[[str], object]) -> None:
    """Of a teacher's weight of 287 MB, 206 MB are chosen by an index or a slice."""
    body = """
def teacher(rows, features, classes):
    weight = torch.randn(70000 if classes > 1000 else 1400, 1024)
    return torch.randn(rows, 1024), weight, torch.randperm(len(weight))[:classes].sort().values

def distilled(classes):
    def work(x, w, t, h, index):
        target = softcurve.LinearTeacher(t, h, softcap=30.0, classes=index if classes is None else slice(len(w)))
        return torch.autograd.grad(softcurve.linear_kl_divergence(x, w, target, memory_budget=BUDGET), (x, w))
    return work

for classes in (None, slice):
    warm_and_extra(distilled(classes), 128, 32, 50257, teacher)
"""
    done = run_python(PREAMBLE + body).stdout.splitlines()[-2:]  # type: ignore[attr-defined]
    for found in map(json.loads, done):
        assert found <= MOST
