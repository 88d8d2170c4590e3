"""What only a head has: statistics, memory budgets, a causal shift, modules with parameters, tensors in two places."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK, nn

from .cases import (
    BY_NAME,
    REDUCTIONS,
    Problem,
    along,
    assert_same,
    derivatives,
    everything,
    problem,
)
from .placement import DEVICE
from .test_conformance import TILINGS, assert_equals_dense


@pytest.mark.parametrize(
    "name", ["cross_entropy-indices", "cross_entropy-bucket", "reverse-LinearTeacher", "js0.3-Logits"]
)
def test_stats_when_no_gradient_is_wanted(name: str) -> None:
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), "sum", (2, 9), 4, 401)
    frozen = tuple(a.detach() for a in posed.arguments)
    for budget in ("whole", "tiles"):
        loss, stats = posed.ours(*frozen, memory_budget=posed.budget(budget), return_stats=True)
        assert_same(loss, posed.dense(*frozen))
        for name, truth in posed.dense_stats()._asdict().items():
            assert torch.allclose(getattr(stats, name), truth.detach(), rtol=1e-10, atol=1e-12)
        assert posed.ours(*frozen, memory_budget=posed.budget(budget)).equal(loss)


def test_stats_know_which_prediction_is_right() -> None:
    """Rows that are right, wrong, ignored and, at the end of a causal shift, without a target."""
    weight, x = torch.eye(4, dtype=torch.float64), 3 * torch.eye(4, dtype=torch.float64)
    target = torch.tensor([0, 1, -100, 2])
    _, stats = softcurve.linear_cross_entropy(x, weight, target, return_stats=True)
    assert stats.predicted.tolist() == [0, 1, 2, 3]
    assert stats.correct.tolist() == [True, True, False, False]
    _, stats = softcurve.linear_cross_entropy(x, weight, torch.tensor([3, 0, -100, 2]), shift=1, return_stats=True)
    assert stats.correct.tolist() == [True, False, True, False]
    _, stats = softcurve.linear_kl_divergence(x, weight, Logits(weight.roll(1, 0)), return_stats=True)
    assert stats.correct.tolist() == [False] * 4
    _, stats = softcurve.linear_kl_divergence(x, weight, Probabilities(0.1 + 0.6 * weight), return_stats=True)
    assert stats.correct.tolist() == [True] * 4


def test_expanded_arguments() -> None:
    """One row for all, one class row for all, one index for all: strides of 0."""
    x, w = torch.randn(5, dtype=torch.float64).expand(7, 5), torch.randn(5, dtype=torch.float64).expand(9, 5)
    y = torch.softmax(torch.randn(9, dtype=torch.float64), -1).expand(7, 9)
    for target in (torch.tensor(3).expand(7), y):
        got = softcurve.linear_cross_entropy(x.detach().requires_grad_(), w, target)
        assert_same(got.detach(), F.cross_entropy(x @ w.T, target))
    got = softcurve.linear_kl_divergence(x, w, Probabilities(y))
    assert_same(got, (y * (y.log() - (x @ w.T).log_softmax(-1))).sum(-1).mean())


# --- budgets -----------------------------------------------------------------------------------------------------------

# The operators, and where their two factors stand.
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "addmv": 1, "addmv_": 1}


def products_of(run: Callable[[], object]) -> list[tuple[int, int, int]]:
    """The ``(m, k, n)`` of every matrix product on the way."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    found = []
    for event in profile.profiler.kineto_results.events():  # as recorded: a list of objects takes ten times as long
        if (at := PRODUCTS.get(event.name().removeprefix("aten::"))) is not None:
            a, b = event.shapes()[at : at + 2]
            found.append((math.prod(a[:-1]), a[-1], b[-1] if len(b) > 1 else 1))
    return found


def work_of(run: Callable[[], object]) -> int:
    return sum(m * k * n for m, k, n in products_of(run))


TILED = ["cross_entropy-indices", "cross_entropy-bucket", "forward-Logits", "reverse-LinearTeacher"]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", TILED)
def test_budgets_cut_rows_and_classes(name: str) -> None:
    """The tilings of test_conformance.py are what they are called, for loss, gradients and Hessian product."""
    ragged = {"ragged": ((507,), 123, 1013, "tiles")} if name == "cross_entropy-bucket" else {}
    for tiling, (rows, features, classes, budget) in (TILINGS | ragged).items():
        posed, count = problem(BY_NAME[name], {}, "sum", rows, features, classes), math.prod(rows)
        first: list[Tensor] = []

        def gradients(posed: Problem = posed, budget: str = budget, first: list[Tensor] = first) -> None:
            value = posed.ours(*posed.arguments, memory_budget=posed.budget(budget))
            first[:] = torch.autograd.grad(value, posed.arguments, create_graph=True)

        def products(posed: Problem = posed, first: list[Tensor] = first) -> None:
            torch.autograd.grad(along(first), posed.arguments)

        for work in (gradients, products):
            shapes = products_of(work)
            largest = max(m * n for m, k, n in shapes if k == features)
            all_classes = any(classes in shape for shape in shapes)
            assert (largest < count * classes) == (tiling != "whole"), (tiling, work)
            assert all_classes == (tiling in ("whole", "rows")) or tiling == "ragged", (tiling, work)


@pytest.mark.parametrize("name", TILED)
def test_the_least_budget_is_the_least(name: str) -> None:
    """It works through to the second derivative; a byte less is an error at once."""
    posed = problem(BY_NAME[name], {}, "sum", (3,), 5, 67)
    assert_equals_dense(posed, "least")
    with pytest.raises(ValueError, match="memory_budget"):
        posed.ours(*posed.arguments, memory_budget=posed.least_budget - 1)


def test_a_budget_beyond_need() -> None:
    posed = problem(BY_NAME["cross_entropy-indices"], {}, "sum", (9,))
    assert torch.equal(posed.ours(*posed.arguments, memory_budget=1 << 40), posed.ours(*posed.arguments))


# --- causal shift ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shift_is_slicing(shift: int, reduction: str) -> None:
    """Position i against target i + s, in every sequence of the batch by itself."""
    x, w = torch.randn(2, 3, 8, 5, dtype=torch.float64, requires_grad=True), torch.randn(11, 5, dtype=torch.float64)
    target = torch.randint(11, (2, 3, 8))
    target[0, 1, 4:6] = -100
    sliced = softcurve.cross_entropy(
        F.linear(x, w)[..., :-shift, :], target[..., shift:], reduction=reduction, label_smoothing=0.1
    )
    ours = softcurve.linear_cross_entropy(x, w, target, shift=shift, reduction=reduction, label_smoothing=0.1)
    if reduction == "none":
        assert ours.shape == target.shape
        assert (ours[..., -shift:] == 0).all()
        ours = ours[..., :-shift]
    assert_same(ours, sliced)
    in_ours, in_sliced = (torch.autograd.grad(v.sin().sum(), x)[0] for v in (ours, sliced))
    assert_same(in_ours, in_sliced)
    assert (in_ours[..., -shift:, :] == 0).all()


@pytest.mark.parametrize("shift", [4, 5])
def test_shift_past_the_end(shift: int) -> None:
    """No position has a target."""
    x, w, target = torch.randn(4, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True), torch.arange(4)
    assert softcurve.linear_cross_entropy(x, w, target, shift=shift).isnan()
    total = softcurve.linear_cross_entropy(x, w, target, shift=shift, reduction="sum")
    assert total.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(total, (x, w)))


# --- rows without part -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"softcap": 5.0, "return_stats": True}]
)
def test_ignored_rows_have_no_part_at_all(options: dict[str, Any]) -> None:
    """Exactly zero value, gradient and Hessian product."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, -100, 2, -100, 3])
    rows = softcurve.linear_cross_entropy(x, w, target, reduction="none", **options)
    rows = rows[0] if isinstance(rows, tuple) else rows
    assert (rows[1::2] == 0).all()
    first = torch.autograd.grad(rows.sin().sum(), (x, w), create_graph=True)
    second = torch.autograd.grad(first[1].sin().sum(), x)
    assert (first[0][1::2] == 0).all()
    assert (second[0][1::2] == 0).all()
    assert (rows[::2] > 0).all()


# --- ends, modules, ties -----------------------------------------------------------------------------------------------


X, T = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
SAMPLE, CLASS = torch.linspace(0, 1, 6), torch.linspace(0.5, 2, 7)
INDEX = torch.arange(6) % 7
TEACHER = LinearTeacher(T, torch.randn(7, 5, generator=torch.Generator().manual_seed(2)))

MODULES: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("LinearCrossEntropyLoss", "linear_cross_entropy", INDEX, {}),
    ("LinearCrossEntropyLoss", "linear_cross_entropy", TEACHER, {"z_loss": 0.1, "reduction": "none"}),
    (
        "LinearCrossEntropyLoss",
        "linear_cross_entropy",
        INDEX,
        {
            "weight": CLASS,
            "ignore_index": 2,
            "label_smoothing": 0.1,
            "temperature": 0.7,
            "softcap": 4.0,
            "z_loss": 0.2,
            "reduction": "sum",
            "base": 2.0,
            "shift": 1,
            "memory_budget": 1 << 20,
        },
    ),
    ("LinearKLDivergenceLoss", "linear_kl_divergence", TEACHER, {}),
    (
        "LinearKLDivergenceLoss",
        "linear_kl_divergence",
        TEACHER,
        {
            "direction": "reverse",
            "temperature": 2.0,
            "softcap": 4.0,
            "reduction": "none",
            "base": 2.0,
            "memory_budget": 1 << 20,
        },
    ),
    ("LinearJSDivergenceLoss", "linear_js_divergence", TEACHER, {}),
    (
        "LinearJSDivergenceLoss",
        "linear_js_divergence",
        TEACHER,
        {"beta": 0.2, "temperature": 2.0, "softcap": 4.0, "reduction": "sum", "base": 2.0, "memory_budget": 1 << 20},
    ),
    ("LinearDivergenceLoss", "linear_divergence", TEACHER, {"divergence": softcurve.AlphaDivergence(0.5)}),
    ("LinearDivergenceLoss", "linear_divergence", INDEX, {"divergence": softcurve.CrossEntropy(), "reduction": "sum"}),
    (
        "LinearDivergenceLoss",
        "linear_divergence",
        TEACHER,
        {
            "divergence": softcurve.SkewKL(0.1),
            "temperature": 2.0,
            "softcap": 4.0,
            "reduction": "none",
            "base": 2.0,
            "memory_budget": 1 << 20,
        },
    ),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("module", "function", "target", "options"), MODULES)
def test_modules_are_the_functions(
    module: str, function: str, target: Any, options: dict[str, Any], bias: bool
) -> None:
    made = getattr(nn, module)(5, 7, bias=bias, **options).to(DEVICE)
    parameters = dict(made.named_parameters())
    assert parameters.keys() == ({"linear.weight", "linear.bias"} if bias else {"linear.weight"})
    for sample_weight in (None, SAMPLE):
        value = made(X, target, sample_weight=sample_weight)
        expected = getattr(softcurve, function)(
            X,
            made.linear.weight,
            target,
            linear_bias=made.linear.bias,
            sample_weight=sample_weight,
            **options,
        )
        assert torch.equal(value, expected)
        assert torch.equal(copy.deepcopy(made)(X, target, sample_weight=sample_weight), expected)
        assert torch.equal(pickle.loads(pickle.dumps(made))(X, target, sample_weight=sample_weight), expected)  # noqa: S301
    value.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    shown = repr(made)
    assert shown.startswith(f"{module}(")
    assert all(f"{name}={value!r}" in shown for name, value in options.items() if name != "weight"), shown


@pytest.mark.parametrize(
    ("module", "options"),
    [(m, {}) for m in ("LinearCrossEntropyLoss", "LinearKLDivergenceLoss", "LinearJSDivergenceLoss")],
)
def test_tied_embedding(module: str, options: dict[str, Any]) -> None:
    """One tensor embeds the words and is the head: its gradient is the sum of both parts, as in the dense model."""
    torch.manual_seed(4)
    embedding = torch.nn.Embedding(7, 5).double().to(DEVICE)
    made = getattr(nn, module)(5, 7, dtype=torch.float64, **options).to(DEVICE)
    made.linear.weight = embedding.weight
    words, target = torch.tensor([0, 3, 3, 6]), torch.tensor([3, 3, 6, 1])
    goal = target if module == "LinearCrossEntropyLoss" else Logits(torch.randn(4, 7, dtype=torch.float64))
    made(embedding(words).tanh(), goal).backward()
    got, embedding.weight.grad = embedding.weight.grad, None
    logits = embedding(words).tanh() @ embedding.weight.T
    if module == "LinearCrossEntropyLoss":
        F.cross_entropy(logits, target).backward()
    elif module == "LinearKLDivergenceLoss":
        softcurve.kl_divergence(goal, logits).backward()
    else:
        softcurve.js_divergence(goal, logits).backward()
    assert_same(got, embedding.weight.grad)


def test_one_tensor_in_two_places() -> None:
    """The teacher's head is the student's, or the teacher's features are: both parts of the gradient arrive."""
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    other = torch.randn(6, 3, dtype=torch.float64)
    for ours, dense in (
        (
            softcurve.linear_kl_divergence(x, w, LinearTeacher(other, w), direction="reverse"),
            softcurve.kl_divergence(x @ w.T, other @ w.T),
        ),
        (
            softcurve.linear_js_divergence(x, w, LinearTeacher(x, w.flip(0)), beta=0.3),
            softcurve.js_divergence(x @ w.flip(0).T, x @ w.T, beta=0.3),
        ),
        (softcurve.linear_cross_entropy(x, w, Logits(x @ w.T)), softcurve.entropy(x @ w.T).mean()),
    ):
        for got, truth in zip((ours, *derivatives(ours, (x, w))), (dense, *derivatives(dense, (x, w))), strict=True):
            assert_same(got, truth)


# --- beside the dense functions of the library -------------------------------------------------------------------------

Z_TARGETS: dict[str, Callable[[Tensor], Any]] = {
    "Probabilities": lambda t: Probabilities(torch.softmax(t, -1)),
    "Logits": Logits,
    "bucket": lambda t: TopK(*reversed(torch.log_softmax(t, -1).topk(3))),
    "renormalize": lambda t: TopK(*reversed(torch.log_softmax(t, -1).topk(3)), tail="renormalize"),
}


@pytest.mark.parametrize("kind", Z_TARGETS)
def test_equals_the_functions_on_logits(kind: str) -> None:
    """The directions and defaults of the contract, word by word."""
    x, w, b, t = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 4), (9, 4), (9,), (6, 9)))
    logits, target = F.linear(x, w, b), Z_TARGETS[kind](t)
    sc = softcurve
    pairs = [
        (sc.linear_cross_entropy(x, w, target, linear_bias=b), sc.cross_entropy(logits, target)),
        (sc.linear_kl_divergence(x, w, target, linear_bias=b), sc.kl_divergence(target, logits)),
        (sc.linear_js_divergence(x, w, target, linear_bias=b), sc.js_divergence(target, logits)),
        (sc.linear_js_divergence(x, w, target, linear_bias=b, beta=0.2), sc.js_divergence(target, logits, beta=0.2)),
    ]
    if kind != "renormalize":
        reverse = sc.linear_kl_divergence(x, w, target, linear_bias=b, direction="reverse")
        pairs.append((reverse, sc.kl_divergence(logits, target)))
    for ours, dense in pairs:
        assert_same(ours, dense)


def test_closed_forms() -> None:
    """``∂L/∂e = (p − y) W``, ``∂L/∂W = (p − y)ᵀ e``, ``∂L/∂b = Σ (p − y)``: the formulas of the note, by themselves."""
    x, w, b = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((6, 4), (9, 4), (9,)))
    y = torch.softmax(torch.randn(6, 9, dtype=torch.float64), -1)
    loss = softcurve.linear_cross_entropy(x, w, y, linear_bias=b, reduction="sum")
    p = softcurve.reference.softmax(F.linear(x, w, b).detach())
    assert_same(loss.detach(), softcurve.reference.cross_entropy(y, p).sum())
    in_z = softcurve.reference.dL_dz(y, p)
    in_x, in_w, in_b = torch.autograd.grad(loss, (x, w, b))
    assert_same(in_x, softcurve.reference.dL_de(in_z, w.detach()))
    assert_same(in_w, softcurve.reference.dL_dW(in_z, x.detach()).sum(0))
    assert_same(in_b, in_z.sum(0))
    target = Probabilities(y)
    reverse = softcurve.linear_kl_divergence(x, w, target, linear_bias=b, direction="reverse", reduction="sum")
    assert_same(reverse.detach(), softcurve.reference.reverse_kl(y, p).sum())
    assert_same(torch.autograd.grad(reverse, b)[0], softcurve.reference.kl_gradient_in_first_logits(p, y).sum(0))


def test_class_weights_that_want_a_gradient() -> None:
    """Refused on logits and on a head alike, as in torch, rather than ignored."""
    x, w = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    of_class, target = torch.rand(9, dtype=torch.float64).requires_grad_(), torch.randint(9, (6,))
    for loss in (
        lambda: softcurve.cross_entropy(x @ w.T, target, weight=of_class),
        lambda: softcurve.linear_cross_entropy(x, w, target, weight=of_class),
    ):
        with pytest.raises(ValueError, match=r"weight must not require gradients.*detach"):
            loss()
