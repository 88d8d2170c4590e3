"""The suite that every loss × kind of target × option × reduction passes through, on logits and on a head: equal to dense.

The settings are pairwise: any two of loss and target, options, reduction and tiling meet in one of them.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve

from .cases import (
    BY_NAME,
    CASES_OF,
    HEAD_ROUTE,
    INDICES,
    LOGIT_ROUTE,
    OPTIONS,
    REDUCTIONS,
    Case,
    Problem,
    assert_same,
    derivatives,
    everything,
    problem,
)
from .pairwise import pairwise
from .placement import ON_CPU

ROUTES = (LOGIT_ROUTE, HEAD_ROUTE) if ON_CPU else (HEAD_ROUTE,)
CASES = [pytest.param(route, case, id=f"{route}-{case}") for route in ROUTES for case in CASES_OF[route]]

# Rows, features, classes and budget. The first three leave the logits whole, cut rows, and cut rows and classes (see
# test_budgets_cut_rows_and_classes); without a head only the rows and few classes matter.
TILINGS = {
    "whole": ((3, 2, 7), 5, 23, "whole"),
    "rows": ((2, 65), 5, 37, "tiles"),
    "classes": ((12,), 5, 601, "tiles"),
}
SHAPES = {
    "(4,)": ((4,), 2, 6, "whole"),
    "()": ((), 2, 7, "least"),
    "(1,)": ((1,), 2, 5, "least"),
    "(2, 1, 2)": ((2, 1, 2), 2, 5, "whole"),
    "(1, 4, 1)": ((1, 4, 1), 2, 5, "least"),
}
SINGLE_ROW = ("()", "(1,)")
FEW_ROWS = (*SINGLE_ROW, "(1, 4, 1)")


def assert_equals_dense(posed: Problem, *budgets: str, bound: float = 1e-10) -> None:
    """Value, the gradient in every argument, and a Hessian product in all of them at once."""
    value = posed.dense(*posed.arguments)
    expected = [value, *derivatives(value, posed.arguments)]
    names = ("value", *posed.names, *(f"second, {name}" for name in posed.names))
    for budget in budgets:
        options = {} if "logits" in posed.names else {"memory_budget": posed.budget(budget)}
        ours = posed.ours(*posed.arguments, **options)
        for name, got, truth in zip(names, (ours, *derivatives(ours, posed.arguments)), expected, strict=True):
            if "logits" in posed.names:
                torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
            else:
                assert_same(got, truth, f"{name}, {budget}", bound)


@cache
def settings(route: str) -> list[dict[str, Any]]:
    """Any two of the case, its options, the reduction and the tiling meet in one of them."""

    def possible(name: str, level: Any, other: str, value: Any) -> bool:
        if name == "case":
            known = other not in OPTIONS or level.knows(other, route)
            return not value or known
        if other == "tiling":  # where every row would be left out, a mean is NaN (see test_no_rows)
            return not (name == "shift" and level and value in FEW_ROWS) and not (
                name in ("weight", "ignore_index") and level in (True, 1) and value in SINGLE_ROW
            )
        return True

    options = {name: (False, True) for name in OPTIONS if any(case.knows(name, route) for case in CASES_OF[route])}
    tilings = (*(TILINGS if route == HEAD_ROUTE else ()), *SHAPES)
    factors = {"case": CASES_OF[route]} | options
    factors |= {"ignore_index": (None, -100, 1), "reduction": REDUCTIONS, "tiling": tilings}
    factors |= {"stats": (False, True)} if route == HEAD_ROUTE else {}
    return pairwise(factors, possible)


PAIRS = [
    pytest.param(route, setting, id=f"{route}-{n}-{setting['case']}")
    for route in ROUTES
    for n, setting in enumerate(settings(route))
]


@pytest.mark.parametrize(("route", "setting"), PAIRS)
def test_equals_the_dense_loss(route: str, setting: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if route == HEAD_ROUTE:
        request.getfixturevalue("without_shape_checks")
    case, tiling = setting["case"], setting["tiling"]
    options = {name: OPTIONS[name] for name in OPTIONS if setting.get(name)}
    if setting["ignore_index"] is not None:
        options["ignore_index"] = setting["ignore_index"]
    rows, features, classes, budget = (TILINGS | SHAPES)[tiling]
    posed = problem(case, options, setting["reduction"], rows, features, classes, route)
    assert_equals_dense(posed, budget)
    if setting.get("stats"):
        assert_stats(posed, budget)


DIFFERENTIABLE_STATS = ("log_probs", "entropy", "lse", "mean_logit", "collision")


def assert_stats(posed: Problem, budget: str) -> None:
    loss, stats = posed.ours(*posed.arguments, memory_budget=posed.budget(budget), return_stats=True)
    assert_same(loss, posed.dense(*posed.arguments), "loss beside stats")
    assert loss.requires_grad
    truth = posed.dense_stats()
    assert torch.equal(stats.predicted, truth.predicted)
    assert torch.equal(stats.correct, truth.correct)
    combined = []
    for found in (stats, truth):
        parts = [getattr(found, name) for name in DIFFERENTIABLE_STATS]
        combined.append(sum(part.sin().sum() for part in parts))
        derivatives = torch.autograd.grad(combined[-1], posed.arguments, materialize_grads=True)
        combined.extend([*parts, *derivatives])
    for got, right in zip(combined[: len(combined) // 2], combined[len(combined) // 2 :], strict=True):
        assert_same(got.detach(), right.detach(), "statistics", 1e-9)


def test_every_pair_of_levels_meets() -> None:
    """What the suite above rests on."""
    for route in ROUTES:
        chosen = settings(route)
        for case in CASES_OF[route]:
            own = [setting for setting in chosen if setting["case"] is case]
            assert {setting["reduction"] for setting in own} == set(REDUCTIONS)
            assert {setting["tiling"] for setting in own} >= {*SHAPES}
            for name in OPTIONS:
                assert any(setting.get(name) for setting in own) == case.knows(name, route), (case, name)
        for a, b in itertools.combinations((name for name in OPTIONS if name in chosen[0]), 2):
            assert any(setting[a] and setting[b] for setting in chosen), (a, b)


@pytest.mark.parametrize(("route", "case"), CASES)
def test_everything_at_once(route: str, case: Case) -> None:
    """All options that the loss knows."""
    assert_equals_dense(problem(case, everything(case), "mean", (7,), 4, 23, route), "tiles")


@pytest.mark.parametrize(
    "name",
    [
        *("cross_entropy-indices", "cross_entropy-bucket", "cross_entropy-renormalize"),
        *("cross_entropy-LinearTeacher", "js0.3-Logits"),
    ],
)
def test_temperature_without_soft_cap_where_classes_are_cut(name: str) -> None:
    """The largest logit is taken off before the division, so that the sums of earlier blocks have to be lowered."""
    rows, features, classes, budget = TILINGS["classes"]
    for options in ({"temperature": 0.7}, {"temperature": 0.7, "bias": True, "weight": True, "label_smoothing": 0.2}):
        assert_equals_dense(problem(BY_NAME[name], options, "mean", rows, features, classes), budget)


RAGGED = [
    ("cross_entropy-indices", "mean"),
    ("cross_entropy-float", "batchmean"),
    ("forward-bucket", "none"),
    ("reverse-LinearTeacher", "batchmean"),
    ("js0.3-Logits", "sum"),
]


@pytest.mark.parametrize(("name", "reduction"), RAGGED)
def test_ragged(name: str, reduction: str) -> None:
    """507 rows of 123 features and 1013 classes: no tile divides any of them."""
    case = BY_NAME[name]
    assert_equals_dense(problem(case, everything(case, "shift"), reduction, (507,), 123, 1013), "whole", "tiles")


# --- edges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "case"), CASES)
def test_no_rows(route: str, case: Case) -> None:
    """Nothing sums to 0 with gradients of 0; its mean is NaN, as in torch."""
    for rows in ((0,), (2, 0)):
        for reduction in ("none", "sum", "mean"):
            posed = problem(case, everything(case), reduction, rows, 3, 4, route)
            for more in ({},) if route == LOGIT_ROUTE else ({}, {"memory_budget": 1 << 20, "return_stats": True}):
                value = posed.ours(*posed.arguments, **more)
                if more:
                    value, stats = value
                    assert stats.log_probs.shape == (rows if case.kind is INDICES else (*rows, 0))
                    assert all(part.shape == rows for part in stats[1:])
                assert value.shape == (rows if reduction == "none" else ())
                assert value.dtype == torch.float64
                assert value.isnan() if reduction == "mean" else value.sum() == 0
                gradients = torch.autograd.grad(value.sum(), posed.arguments, materialize_grads=True)
                if reduction != "mean":
                    assert not any(gradient.any() for gradient in gradients)
                assert all(g.shape == a.shape for g, a in zip(gradients, posed.arguments, strict=True))


@pytest.mark.parametrize(("route", "case"), CASES)
def test_one_class(route: str, case: Case) -> None:
    """Nothing is uncertain: the loss is 0, and no gradient moves the logits."""
    posed = problem(case, {"bias": True, "temperature": 0.7}, "none", (3,), 2, 1, route)
    value = posed.ours(*posed.arguments)
    assert_same(value, torch.zeros(3, dtype=torch.float64), bound=1e-12)
    gradients = torch.autograd.grad(value.sum(), posed.arguments, materialize_grads=True)
    for name, gradient in zip(posed.names, gradients, strict=True):
        if not name.startswith("target"):
            assert_same(gradient, torch.zeros_like(gradient), name, bound=1e-12)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["cross_entropy-bucket", "forward-bucket", "reverse-bucket", "js0.3-bucket"])
def test_a_list_of_all_classes(name: str, route: str) -> None:
    """No class is left for the bucket."""
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), "none", (7,), 2, 4, route)
    assert_equals_dense(posed, "whole", "least")


@pytest.mark.parametrize(
    "name", ["cross_entropy-indices", "cross_entropy-float", "forward-bucket", "reverse-LinearTeacher", "js0.3-Logits"]
)
@pytest.mark.parametrize("route", ROUTES)
def test_strides_do_not_matter(name: str, route: str) -> None:
    """Transposed, sliced and reversed arguments, and gradients of them."""
    posed = problem(BY_NAME[name], {"bias": True, "sample_weight": True}, "none", (3, 4), 5, 301, route)

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.stack([tensor.detach().mT.contiguous().mT if tensor.ndim > 1 else tensor.detach()] * 2, -1)
        return wide[..., 0].requires_grad_()

    arguments = tuple(map(strided, posed.arguments))
    assert not any(a.is_contiguous() for a in arguments)
    expected = posed.dense(*posed.arguments)
    truths = [expected, *derivatives(expected, posed.arguments)]
    for budget in ("whole", "tiles") if route == HEAD_ROUTE else ("whole",):
        options = {"memory_budget": posed.budget(budget)} if route == HEAD_ROUTE else {}
        value = posed.ours(*arguments, **options)
        for got, truth in zip((value, *derivatives(value, arguments)), truths, strict=True):
            assert_same(got, truth)


@pytest.mark.parametrize("route", ROUTES)
def test_arguments_are_left_alone(route: str) -> None:
    """The tiles are temporaries; nothing that a caller holds is written to."""
    for case in CASES_OF[route]:
        posed = problem(case, everything(case), "none", (11,), 4, 37, route)
        before = [a.detach().clone() for a in (*posed.arguments, posed.indices)]
        for budget in ("whole", "tiles") if route == HEAD_ROUTE else ("whole",):
            options = {"memory_budget": posed.budget(budget)} if route == HEAD_ROUTE else {}
            value = posed.ours(*posed.arguments, **options)
            scale = torch.rand(value.shape, dtype=value.dtype)
            kept = scale.clone()
            torch.autograd.grad(value, posed.arguments, scale, materialize_grads=True)
            assert torch.equal(scale, kept)
        assert all(torch.equal(a, b) for a, b in zip((*posed.arguments, posed.indices), before, strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["Probabilities", "Logits", "LinearTeacher", "bucket"])
def test_ends_of_jensen_shannon(kind: str, route: str) -> None:
    """β = 0 is the forward and β = 1 the reverse KL: in value to the last bit, in derivatives up to rounding."""
    for beta, direction in ((0.0, "forward"), (1.0, "reverse")):
        kl = BY_NAME[f"{direction}-{kind}"]
        js = Case(f"js{beta:g}", kl.kind, "js_divergence", kl.rows, {"beta": beta})
        posed = problem(kl, everything(kl), "mean", (9,), 4, 23, route)
        ends = Problem(js, posed.options, posed.indices, posed.weight, posed.names, posed.arguments)
        value, expected = ends.ours(*posed.arguments), posed.ours(*posed.arguments)
        if route == HEAD_ROUTE or beta == 0:
            assert torch.equal(value, expected)
        torch.testing.assert_close(value, expected, rtol=1e-15, atol=0)
        for got, truth in zip(derivatives(value, posed.arguments), derivatives(expected, posed.arguments), strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)


# --- torch's own losses ----------------------------------------------------------------------------------------------------

TORCH_OPTIONS = pairwise(
    {
        "weight": (None, (0.3, 1.7, 0.0, 2.0, 0.9)),
        "ignore_index": (-100, 2, 7),
        "label_smoothing": (0.0, 0.15, 1.0),
        "reduction": ("none", "sum", "mean"),
    }
)


def loss_of(route: str, z: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The cross-entropy of logits, or of a head that has them: features ``I``, weight ``zᵀ``."""
    if route == LOGIT_ROUTE:
        return softcurve.cross_entropy(z, target, **options)
    return softcurve.linear_cross_entropy(torch.eye(len(z), dtype=z.dtype), z.mT, target, **options)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("options", TORCH_OPTIONS, ids=str)
def test_equals_torch_cross_entropy(options: dict[str, Any], route: str) -> None:
    """Every option that torch has, for class indices and for probabilities."""
    weight = options["weight"] and torch.tensor(options["weight"], dtype=torch.float64)
    options = options | {"weight": weight}
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([0, 2, 4, 1, 3, 2])
    if options["ignore_index"] not in range(5):
        indices[::3] = options["ignore_index"]
    probabilities = torch.softmax(torch.randn(6, 5, dtype=torch.float64), -1)
    for target, kept in ((indices, options), (probabilities, options | {"ignore_index": -100})):
        ours, torchs = loss_of(route, z, target, **kept), F.cross_entropy(z, target, **kept)
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-13)
        got, expected = (torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, torchs))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("route", ROUTES)
def test_all_rows_ignored_as_in_torch(route: str) -> None:
    """A mean of nothing is NaN, a sum of nothing 0, and neither moves the logits otherwise than torch's does."""
    z, target = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    for reduction in ("none", "sum", "mean"):
        ours = loss_of(route, z, target, reduction=reduction, z_loss=0.1)
        torchs = F.cross_entropy(z, target, reduction=reduction)
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)
    assert ours.isnan()
    total = loss_of(route, z, target, reduction="batchmean")
    assert total.item() == 0
    assert not torch.autograd.grad(total, z)[0].any()


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_equals_torch_kl_div(reduction: str) -> None:
    """``F.kl_div(log q, log p)`` is ``D(p‖q)`` with the arguments exchanged; ours are logits."""
    p, q = torch.randn(2, 6, 5, dtype=torch.float64).requires_grad_()
    torchs = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction=reduction)
    torchs = torchs.sum(-1) if reduction == "none" else torchs
    ours = softcurve.kl_divergence(p, q, reduction=reduction)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-13)
    for got, expected in zip(*(torch.autograd.grad(v.sum(), (p, q)) for v in (ours, torchs)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_entropy() -> None:
    """In nats and bits, on any leading shape; 0 for one class and for no rows."""
    for rows in ((5,), (), (2, 1, 2), (0,)):
        z = torch.randn(*rows, 7, dtype=torch.float64, requires_grad=True)
        for base in (math.e, 2.0):
            log_p = z.log_softmax(-1)
            ours, truth = softcurve.entropy(z, base=base), -(log_p.exp() * log_p).sum(-1) / math.log(base)
            for got, expected in zip((ours, *derivatives(ours, (z,))), (truth, *derivatives(truth, (z,))), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert not softcurve.entropy(torch.randn(3, 1)).any()
