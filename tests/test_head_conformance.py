"""The head's one suite: every loss × target × option × reduction × memory budget equals the dense computation, in float64."""

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

from .head_cases import (
    BY_NAME,
    CASES,
    INDICES,
    OPTIONS,
    REDUCTIONS,
    Case,
    Problem,
    along,
    assert_same,
    derivatives,
    everything,
    pairwise,
    problem,
)
from .placement import DEVICE

# Rows, features, classes and budget that leave the logits whole, cut rows, and cut rows and classes (see
# test_budgets_cut_rows_and_classes).
TILINGS = {
    "whole": ((3, 2, 7), 5, 23, "whole"),
    "rows": ((2, 65), 5, 37, "tiles"),
    "classes": ((12,), 5, 601, "tiles"),
}


def assert_equals_dense(posed: Problem, *budgets: str, bound: float = 1e-10) -> None:
    """Value, the gradient in every argument, and a Hessian product in all of them at once."""
    value = posed.dense(*posed.arguments)
    expected = [value, *derivatives(value, posed.arguments)]
    names = ("value", *posed.names, *(f"second, {name}" for name in posed.names))
    for budget in budgets:
        ours = posed.ours(*posed.arguments, memory_budget=posed.budget(budget))
        for name, got, truth in zip(names, (ours, *derivatives(ours, posed.arguments)), expected, strict=True):
            assert_same(got, truth, f"{name}, {budget}", bound)


# --- all pairs ---------------------------------------------------------------------------------------------------------


def settings_of(case: Case) -> list[dict[str, Any]]:
    known = {name: (False, True) for name in OPTIONS if case.knows(name)}
    return pairwise(
        known
        | ({"ignore_index": (None, -100, 1)} if case.kind is INDICES else {})
        | {"reduction": REDUCTIONS, "tiling": tuple(TILINGS), "stats": (False, True)}
    )


PAIRS = [pytest.param(case, setting, id=f"{case}-{n}") for case in CASES for n, setting in enumerate(settings_of(case))]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("case", "setting"), PAIRS)
def test_equals_the_dense_loss(case: Case, setting: dict[str, Any]) -> None:
    """Every two of options, reductions, budgets and shapes meet somewhere, for every loss and kind of target."""
    options = {name: OPTIONS[name] for name in OPTIONS if setting.get(name)}
    if setting.get("ignore_index"):
        options["ignore_index"] = setting["ignore_index"]
    rows, features, classes, budget = TILINGS[setting["tiling"]]
    posed = problem(case, options, setting["reduction"], rows, features, classes)
    assert_equals_dense(posed, budget)
    if setting["stats"]:
        assert_stats(posed, budget)


def assert_stats(posed: Problem, budget: str) -> None:
    loss, stats = posed.ours(*posed.arguments, memory_budget=posed.budget(budget), return_stats=True)
    assert_same(loss, posed.dense(*posed.arguments), "loss beside stats")
    assert loss.requires_grad
    truth = posed.dense_stats()
    assert stats._fields == truth._fields
    assert not any(part.requires_grad for part in stats)
    assert_same(stats.lse, truth.lse, "lse")
    assert_same(stats.entropy, truth.entropy, "entropy")
    assert torch.equal(stats.predicted, truth.predicted)
    assert torch.equal(stats.correct, truth.correct)


@pytest.mark.parametrize(
    "name", ["cross_entropy-indices", "cross_entropy-bucket", "reverse-LinearTeacher", "js0.3-Logits"]
)
def test_stats_when_no_gradient_is_wanted(name: str) -> None:
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), "sum", (2, 9), 4, 401)
    frozen = tuple(a.detach() for a in posed.arguments)
    for budget in ("whole", "tiles"):
        loss, stats = posed.ours(*frozen, memory_budget=posed.budget(budget), return_stats=True)
        assert_same(loss, posed.dense(*frozen))
        for got, truth in zip(stats, posed.dense_stats(), strict=True):
            assert torch.allclose(got, truth, rtol=1e-10, atol=1e-12)
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


# --- shapes ------------------------------------------------------------------------------------------------------------

RAGGED = [
    ("cross_entropy-indices", "mean"),
    ("cross_entropy-float", "batchmean"),
    ("cross_entropy-bucket", "mean"),
    ("cross_entropy-renormalize", "sum"),
    ("forward-LinearTeacher", "sum"),
    ("forward-bucket", "none"),
    ("reverse-LinearTeacher", "batchmean"),
    ("reverse-Logits", "mean"),
    ("js0.3-LinearTeacher", "none"),
]


@pytest.mark.parametrize(("name", "reduction"), RAGGED)
def test_ragged(name: str, reduction: str) -> None:
    """507 rows of 123 features and 1013 classes: no tile divides any of them."""
    case = BY_NAME[name]
    assert_equals_dense(problem(case, everything(case, "shift"), reduction, (507,), 123, 1013), "whole", "tiles")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_leading_shape(case: Case) -> None:
    for n, rows in enumerate(((), (1,), (2, 3), (2, 1, 2), (1, 4, 1))):
        for reduction in ("none", REDUCTIONS[n % 4]):
            assert_equals_dense(problem(case, everything(case, "shift"), reduction, rows, 2, 5), "whole", "least")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rows(case: Case) -> None:
    """Nothing sums to 0 with gradients of 0; its mean is NaN, as in torch."""
    for rows in ((0,), (2, 0)):
        for reduction in ("none", "sum", "mean"):
            posed = problem(case, everything(case), reduction, rows, 3, 4)
            for budget in (None, 1 << 20):
                value, stats = posed.ours(*posed.arguments, memory_budget=budget, return_stats=True)
                assert value.shape == (rows if reduction == "none" else ())
                assert value.dtype == torch.float64
                assert all(part.shape == rows for part in stats)
                if reduction == "mean":
                    assert value.isnan()
                    continue
                assert value.sum() == 0
                gradients = torch.autograd.grad(value.sum(), posed.arguments, materialize_grads=True)
                assert all(torch.equal(g, torch.zeros_like(a)) for g, a in zip(gradients, posed.arguments, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_class(case: Case) -> None:
    """Nothing is uncertain: the loss is 0, and no gradient moves the logits."""
    posed = problem(case, {"bias": True, "temperature": 0.7}, "none", (3,), 2, 1)
    value = posed.ours(*posed.arguments)
    assert_same(value, torch.zeros(3, dtype=torch.float64), bound=1e-12)
    for name, gradient in zip(
        posed.names, torch.autograd.grad(value.sum(), posed.arguments, materialize_grads=True), strict=True
    ):
        if not name.startswith("target"):
            assert_same(gradient, torch.zeros_like(gradient), name, bound=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy-bucket", "forward-bucket", "reverse-bucket", "js0.3-bucket"])
def test_a_list_of_all_classes(name: str) -> None:
    """No class is left for the bucket."""
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), "none", (7,), 2, 4)
    assert_equals_dense(posed, "whole", "least")


@pytest.mark.parametrize(
    "name", ["cross_entropy-indices", "cross_entropy-float", "forward-bucket", "reverse-LinearTeacher", "js0.3-Logits"]
)
def test_strides_do_not_matter(name: str) -> None:
    """Transposed, sliced and reversed arguments, and gradients of them."""
    posed = problem(BY_NAME[name], {"bias": True, "sample_weight": True}, "none", (3, 4), 5, 301)

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.stack([tensor.detach().mT.contiguous().mT if tensor.ndim > 1 else tensor.detach()] * 2, -1)
        return wide[..., 0].requires_grad_()

    arguments = tuple(map(strided, posed.arguments))
    assert not any(a.is_contiguous() for a in arguments)
    expected = posed.dense(*posed.arguments)
    truths = [expected, *derivatives(expected, posed.arguments)]
    for budget in ("whole", "tiles"):
        value = posed.ours(*arguments, memory_budget=posed.budget(budget))
        for got, truth in zip((value, *derivatives(value, arguments)), truths, strict=True):
            assert_same(got, truth)


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
    for event in profile.events():
        if (at := PRODUCTS.get(event.name.removeprefix("aten::"))) is not None:
            a, b = event.input_shapes[at : at + 2]
            found.append((math.prod(a[:-1]), a[-1], b[-1] if len(b) > 1 else 1))
    return found


def work_of(run: Callable[[], object]) -> int:
    return sum(m * k * n for m, k, n in products_of(run))


TILED = [
    "cross_entropy-indices",
    "cross_entropy-float",
    "cross_entropy-bucket",
    "forward-Logits",
    "reverse-LinearTeacher",
]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", TILED)
def test_budgets_cut_rows_and_classes(name: str) -> None:
    """The tilings of this file are what they are called, for loss, gradients and Hessian product."""
    for tiling, (rows, features, classes, budget) in {**TILINGS, "ragged": ((507,), 123, 1013, "tiles")}.items():
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


def test_all_rows_ignored_as_in_torch() -> None:
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    target = torch.full((3,), -100)
    for reduction, truth in (("mean", math.nan), ("sum", 0.0), ("batchmean", 0.0)):
        ours = softcurve.linear_cross_entropy(x, w, target, reduction=reduction, z_loss=0.1)
        torch.testing.assert_close(ours, torch.tensor(truth), rtol=0, atol=0, equal_nan=True)
    assert all((g == 0).all() for g in torch.autograd.grad(ours, (x, w)))


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


@pytest.mark.parametrize("kind", ["Probabilities", "Logits", "LinearTeacher", "bucket"])
def test_ends_of_jensen_shannon(kind: str) -> None:
    """β = 0 is the forward and β = 1 the reverse KL."""
    for beta, direction in ((0.0, "forward"), (1.0, "reverse")):
        kl = BY_NAME[f"{direction}-{kind}"]
        posed = problem(kl, everything(kl), "mean", (9,), 4, 23)
        named = dict(zip(posed.names, posed.arguments, strict=True))
        leaves = [tensor for name, tensor in named.items() if name.startswith("target")]
        value = softcurve.linear_js_divergence(
            named["input"],
            named["linear_weight"],
            kl.kind.target(posed.indices, *leaves),
            linear_bias=named["linear_bias"],
            sample_weight=named["sample_weight"],
            beta=beta,
            **posed.options,
        )
        expected = posed.ours(*posed.arguments)
        assert_same(value, expected, bound=1e-13)
        for got, truth in zip(derivatives(value, posed.arguments), derivatives(expected, posed.arguments), strict=True):
            assert_same(got, truth, bound=1e-12)


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


def test_arguments_are_left_alone() -> None:
    """The tiles are temporaries; nothing that a caller holds is written to."""
    for case in CASES:
        posed = problem(case, everything(case), "none", (11,), 4, 301)
        before = [a.detach().clone() for a in (*posed.arguments, posed.indices)]
        for budget in ("whole", "tiles"):
            value = posed.ours(*posed.arguments, memory_budget=posed.budget(budget))
            scale = torch.rand(value.shape, dtype=value.dtype)
            kept = scale.clone()
            torch.autograd.grad(value, posed.arguments, scale, materialize_grads=True)
            assert torch.equal(scale, kept)
        assert all(torch.equal(a, b) for a, b in zip((*posed.arguments, posed.indices), before, strict=True))
