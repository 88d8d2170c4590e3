"""Classes that have no part in a row's softmax, beside the dense loss of each row on the classes that are left."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

import softcurve
from softcurve.curvature import Direction, HeadCurvature
from softcurve.head import per_row
from softcurve.losses.divergences import CrossEntropy

from . import oracle
from .cases import (
    CASES_OF,
    FLOAT,
    HEAD_ROUTE,
    INDICES,
    LOGIT_ROUTE,
    OTHER_TEACHER,
    PROBABILITIES,
    Case,
    Problem,
    along,
    assert_same,
    derivatives,
    directions,
    everything,
    problem,
)
from .pairwise import pairwise

ROWS, CLASSES = 5, 11
REDUCTIONS = ("mean", "none", "sum", "batchmean")


def exclusions(p: Problem) -> Tensor:
    """Up to three classes a row, repeated and not in order, none of which the target names; the last row has none."""
    exclude = torch.randint(-1, CLASSES, (ROWS, 4))
    named = p.indices if p.case.kind.listed else p.indices.unsqueeze(-1)
    exclude = torch.where((exclude.unsqueeze(-1) == named.unsqueeze(-2)).any(-1), -1, exclude)
    exclude[:, 3] = exclude[:, 0]
    exclude[-1] = -1
    return exclude


def kept(exclude: Tensor, row: int) -> Tensor:
    return torch.tensor([k for k in range(CLASSES) if k not in exclude[row].tolist()])


def with_masses(p: Problem, exclude: Tensor, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Probabilities without mass on excluded classes, as functions of the leaves."""
    if p.case.kind not in (FLOAT, PROBABILITIES):
        return arguments
    at = p.names.index("target 0")
    allowed = torch.stack([torch.zeros(CLASSES).index_fill(0, kept(exclude, i), 1.0) for i in range(ROWS)]).double()
    y = arguments[at] * allowed
    y = y if p.case.kind is FLOAT else y / y.sum(-1, keepdim=True)
    return (*arguments[:at], y, *arguments[at + 1 :])


def alone(p: Problem, row: int, keep: Tensor, arguments: tuple[Tensor, ...]) -> Tensor:
    """The dense loss of one row as if the classes that it keeps were all there are."""
    parts: dict[str, Tensor] = {}
    for name, value in zip(p.names, arguments, strict=True):
        if name in ("linear_weight", "linear_bias", "target 1", "target 2"):
            parts[name] = value[keep]
        elif name != "sample_weight":
            own = value[row : row + 1]
            of_classes = name == "logits" or (name == "target 0" and own.shape[-1] == CLASSES)
            parts[name] = own[:, keep] if of_classes else own
    place = torch.full((CLASSES,), -1).index_put((keep,), torch.arange(len(keep)))
    indices = p.indices[row : row + 1]
    indices = torch.where(indices < 0, indices, place[indices.clamp(min=0)])
    weight = None if p.weight is None else p.weight[keep]
    options = {**p.options, "reduction": "none"}
    return replace(p, options=options, indices=indices, weight=weight, names=tuple(parts)).dense(*parts.values())


def dense(p: Problem, exclude: Tensor, *arguments: Tensor) -> Tensor:
    arguments = with_masses(p, exclude, arguments)
    rows = torch.cat([alone(p, row, kept(exclude, row), arguments) for row in range(ROWS)])
    counted = p.indices != -100 if p.case.kind is INDICES else torch.ones(ROWS, dtype=torch.bool)
    mass = counted.double()
    if p.weight is not None and p.case.kind is INDICES:
        mass = torch.where(counted, p.weight[p.indices.clamp(min=0)], 0.0)
    sample_weight = dict(zip(p.names, arguments, strict=True)).get("sample_weight")
    return oracle.reduced(rows, p.options["reduction"], sample_weight, mass, ROWS)


OPTION_SETS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "none": lambda case: {},
    "everything": lambda case: everything(case, "shift"),
    # The slope of a soft cap is 0 at a masked class, which would hide what is left there.
    "without soft cap": lambda case: everything(case, "shift", "softcap", "sample_weight"),
}


def settings(route: str) -> list[dict[str, Any]]:
    budgets = ("whole", "tiles", "least") if route == HEAD_ROUTE else ("whole",)
    # The oracle drops the excluded classes, which a teacher's own choice of classes does not bear.
    cases = [case for case in CASES_OF[route] if case.kind is not OTHER_TEACHER]
    return pairwise({"case": cases, "options": tuple(OPTION_SETS), "reduction": REDUCTIONS, "budget": budgets})


@pytest.mark.parametrize("route", [LOGIT_ROUTE, HEAD_ROUTE])
def test_every_loss_on_the_classes_that_are_left(route: str) -> None:
    """Value, gradients and a Hessian product in every argument."""
    for number, s in enumerate(settings(route)):
        torch.manual_seed(number)
        case: Case = s["case"]
        options = OPTION_SETS[s["options"]](case)
        p = problem(case, options, s["reduction"], (ROWS,), 3, CLASSES, route)
        exclude = exclusions(p)

        def ours(*arguments: Tensor, p: Problem = p, exclude: Tensor = exclude, **more: Any) -> Tensor:
            loss: Tensor = p.ours(*with_masses(p, exclude, arguments), exclude=exclude, **more)
            return loss

        budget = {}
        if route == HEAD_ROUTE and s["budget"] != "whole":
            q = replace(p)
            object.__setattr__(q, "ours", partial(p.ours, exclude=exclude))
            budget = {"memory_budget": q.budget(s["budget"])}
        got, expected = ours(*p.arguments, **budget), dense(p, exclude, *p.arguments)
        assert_same(got, expected, f"{s}")
        for i, (a, b) in enumerate(zip(derivatives(got, p.arguments), derivatives(expected, p.arguments), strict=True)):
            assert_same(a, b, f"{s}: {i}", 1e-9)


@pytest.mark.parametrize("budget", [None, 8 * 3000])
def test_classes_that_a_teacher_chooses(budget: int | None) -> None:
    """The head agrees with the logits, also beside labels with smoothing, in value and both derivatives."""
    shapes = ((ROWS, 4), (90, 4), (ROWS, 3), (95, 3))
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, w, e, of_teacher = leaves
    chosen, exclude = torch.randperm(95)[:90].index_fill(0, torch.tensor([4]), -1), torch.randint(-1, 90, (ROWS, 3))
    labels = torch.tensor([row[0] for row in [sorted(set(range(90)) - set(r.tolist())) for r in exclude]])
    teacher = softcurve.LinearTeacher(e, of_teacher, classes=chosen)
    options: dict[str, Any] = {"exclude": exclude, "temperature": 2.0}

    def apart() -> Tensor:
        return softcurve.kl_divergence(teacher, x @ w.T, **options)

    both = softcurve.linear_distillation(
        x, w, labels, teacher, alpha=0.3, label_smoothing=0.1, memory_budget=budget, **options
    )
    smoothed = softcurve.cross_entropy(x @ w.T, labels, exclude=exclude, label_smoothing=0.1)
    alone = softcurve.linear_kl_divergence(x, w, teacher, memory_budget=budget, **options)
    for got, right in ((alone, apart()), (both, 0.3 * smoothed + 0.7 * 4 * apart())):
        assert_same(got, right)
        for found, truth in zip(derivatives(got, leaves), derivatives(right, leaves), strict=True):
            assert_same(found, truth, bound=1e-9)


# --- mass, fillers and rows --------------------------------------------------------------------------------------------


def head() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


EXCLUDE = torch.tensor([[0, 4], [1, -1], [-1, -1]])
LIST = torch.tensor([[0, 1], [2, 3], [4, 5]])
LOG_PROBS = torch.tensor([[0.6, 0.3]] * 3, dtype=torch.float64).log()
Y = torch.softmax(torch.arange(18, dtype=torch.float64).reshape(3, 6).sin(), -1)


def teacher() -> softcurve.LinearTeacher:
    return softcurve.LinearTeacher(Y, torch.eye(6, dtype=torch.float64))


# The target, the divergence, and which rows state mass on a class that they exclude.
MASSES: dict[str, tuple[Callable[[], Any], Any, list[bool]]] = {
    "index": (lambda: torch.tensor([4, 2, 3]), CrossEntropy(), [True, False, False]),
    "probabilities": (lambda: softcurve.Probabilities(Y), CrossEntropy(), [True, True, False]),
    "probabilities, forward": (lambda: softcurve.Probabilities(Y), softcurve.ForwardKL(), [True, True, False]),
    "probabilities, reverse": (lambda: softcurve.Probabilities(Y), softcurve.ReverseKL(), [False] * 3),
    "list": (lambda: softcurve.TopK(LIST, LOG_PROBS), softcurve.ForwardKL(), [True, False, False]),
    "list, renormalized": (
        lambda: softcurve.TopK(LIST, LOG_PROBS, tail="renormalize"),
        CrossEntropy(),
        [True, False, False],
    ),
    "logits": (lambda: softcurve.Logits(Y), CrossEntropy(), [False] * 3),
    "logits, JS": (lambda: softcurve.Logits(Y), softcurve.JensenShannon(0.3), [False] * 3),
    "teacher": (teacher, softcurve.ReverseKL(), [False] * 3),
}


@pytest.mark.parametrize("name", MASSES)
def test_mass_on_an_excluded_class(name: str) -> None:
    """Stated mass makes the loss infinite; a distribution made by a softmax has none there."""
    make, divergence, infinite = MASSES[name]
    x, w = head()
    options: dict[str, Any] = {"divergence": divergence, "reduction": "none", "exclude": EXCLUDE}
    on_head = softcurve.linear_divergence(x, w, make(), **options)
    on_logits = softcurve.divergence(make(), x @ w.T, **options)
    assert on_head.isposinf().tolist() == infinite
    assert not on_head.isnan().any()
    torch.testing.assert_close(on_head, on_logits, rtol=1e-12, atol=1e-13)


def test_lists_of_all_classes_that_are_left() -> None:
    """What rounding leaves of a list's mass is no mass where the row excludes all others; listed without mass, no share."""
    x, w = head()
    log_probs = torch.tensor([[0.7, 0.3, 0.0]] * 3).log()
    for listed, excluded, options in (
        ([0, 1, 2], [3, 4, 5], {"divergence": softcurve.ForwardKL()}),
        ([5, 3, 2], [4, 1, 0], {"divergence": CrossEntropy()}),
        ([0, 1, 2], [2, 3, 5], {"label_smoothing": 0.3}),
        ([4, 1, 0], [0], {"label_smoothing": 0.3}),
    ):
        target = softcurve.TopK(torch.tensor([listed] * 3), log_probs - 1e-9)
        exclude = torch.tensor([excluded] * 3)
        on_logits, on_head = softcurve.cross_entropy, softcurve.linear_cross_entropy
        if "divergence" in options:
            on_logits, on_head = (lambda z, t, **o: softcurve.divergence(t, z, **o)), softcurve.linear_divergence
        got = on_head(x, w, target, exclude=exclude, reduction="none", **options)
        assert got.isfinite().all()
        expected = on_logits(x @ w.T, target, exclude=exclude, reduction="none", **options)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
        if "label_smoothing" in options:
            keep = [k for k in range(6) if k not in excluded]
            y = torch.zeros(6, dtype=torch.float64).index_put((torch.tensor(listed),), log_probs[0].double().exp())
            y = 0.7 * y[keep] + 0.3 / len(keep)
            z = (x @ w.T)[:, keep]
            if len(keep) > 3:  # the classes that are not listed are one outcome
                places = torch.tensor([keep.index(k) for k in listed[:2]])
                rest = [i for i in range(len(keep)) if i not in places.tolist()]
                z = torch.cat([z[:, places], z[:, rest].logsumexp(-1, keepdim=True)], -1)
                y = torch.cat([y[places], y[rest].sum().unsqueeze(0)])
            torch.testing.assert_close(got, -(y * z.log_softmax(-1)).sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_fillers_repeats_and_order_change_nothing(dtype: torch.dtype) -> None:
    x, w = head()
    y = torch.tensor([2, 5, 0])
    for exclude, same in (
        (torch.tensor([[4, 0, 4], [-1, 1, -1], [-1, -1, -1]]), EXCLUDE),
        (torch.full((3, 2), -1), None),
        (torch.zeros(3, 0), None),
    ):
        for smoothing in (0.0, 0.2):
            got = softcurve.linear_cross_entropy(x, w, y, exclude=exclude.to(dtype), label_smoothing=smoothing)
            expected = softcurve.cross_entropy(x @ w.T, y, exclude=same, label_smoothing=smoothing)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_one_class_no_rows_and_rows_without_a_class() -> None:
    """All of a row's classes may be excluded where it does not count."""
    x, w = head()
    every = torch.arange(6).expand(3, 6)
    for rows in ((), (0,), (2, 3)):
        e = torch.randn(*rows, 4, dtype=torch.float64)
        y = torch.zeros(rows, dtype=torch.int64)
        exclude = torch.full((*rows, 1), 3)
        on_logits = softcurve.cross_entropy(e @ w.T, y, exclude=exclude, reduction="sum")
        assert_same(softcurve.linear_cross_entropy(e, w, y, exclude=exclude, reduction="sum"), on_logits)
        one = softcurve.linear_cross_entropy(e, w[:1], y, exclude=torch.full((*rows, 1), -1), reduction="sum")
        assert float(one) == 0
    weight = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    exclude = torch.where((weight == 0).unsqueeze(-1), every, -1)
    e = x.clone().requires_grad_()
    for loss in (
        softcurve.linear_cross_entropy(e, w, torch.tensor([0, 1, 2]), exclude=exclude, sample_weight=weight),
        softcurve.cross_entropy(e @ w.T, torch.tensor([0, 1, 2]), exclude=exclude, sample_weight=weight),
    ):
        assert_same(loss, softcurve.cross_entropy(x[1] @ w.T, torch.tensor(1)))
        (gradient,) = torch.autograd.grad(loss, e)
        assert not gradient[weight == 0].any()
        assert gradient.isfinite().all()


def test_shift_moves_what_a_row_excludes_with_its_target() -> None:
    x, w = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    y = torch.randint(3, (2, 5))
    exclude = torch.randint(3, 6, (2, 5, 2))
    for shift in (1, 7):
        got = softcurve.linear_cross_entropy(x, w, y, exclude=exclude, shift=shift, reduction="sum")
        z = (x @ w.T)[:, :-shift]
        expected = softcurve.cross_entropy(z, y[:, shift:], exclude=exclude[:, shift:], reduction="sum")
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_a_head_of_more_dimensions() -> None:
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 2, 3, 3, dtype=torch.float64)
    y, exclude = torch.randint(2, (4, 2, 3)), torch.randint(2, 5, (4, 2, 3, 2))
    z = torch.einsum("nd,cijd->nijc", x, w)
    expected = softcurve.cross_entropy(z, y, exclude=exclude)
    torch.testing.assert_close(softcurve.linear_cross_entropy(x, w, y, exclude=exclude), expected, rtol=1e-12, atol=0)


def test_the_statistics_do_not_see_excluded_classes() -> None:
    x, w = head()
    z = x @ w.T
    exclude = z.argmax(-1, keepdim=True)
    masked = z.scatter(-1, exclude, -math.inf)
    for target in (masked.argmax(-1), softcurve.Logits(z)):
        _, stats = softcurve.linear_cross_entropy(x, w, target, exclude=exclude, return_stats=True)
        assert_same(stats.lse, masked.logsumexp(-1))
        assert torch.equal(stats.predicted, masked.argmax(-1))
        assert stats.correct.all()
        assert_same(stats.entropy, oracle.entropy_rows(torch.gather(z, -1, masked.argsort(-1)[:, 1:])))


# --- the softmax itself --------------------------------------------------------------------------------------------------
SOFTMAX: dict[str, list[Any]] = {
    "temperature": [0.7, "rows"],
    "softcap": [None, 2.0],
    "low_rank": [False, True],
    "listed": ["one", "two", "excluded"],  # the last lists a class that the row excludes beside another
    "budget": [None, 8 * 3000],
    "leading": [(6,), (1,), (2, 0)],
}


def masked_statistics(z: Tensor, exclude: Tensor, index: Tensor) -> list[Tensor]:
    """Return the statistics by their definitions; the log-probability of an excluded class is a constant."""
    gone = (exclude.unsqueeze(-1) == torch.arange(z.shape[-1])).any(-2)
    log_p = z.masked_fill(gone, -math.inf).log_softmax(-1)
    p, finite = log_p.exp(), log_p.masked_fill(gone, 0.0)
    entropy, mean = -(p * finite).sum(-1), (p * z).sum(-1)
    listed = torch.where(gone.gather(-1, index), -math.inf, finite.gather(-1, index))
    return [listed, entropy, entropy + mean, mean, p.square().sum(-1).log()]


@pytest.mark.parametrize("setting", pairwise(SOFTMAX), ids=str)
def test_log_probabilities_do_not_see_excluded_classes(setting: dict[str, Any]) -> None:
    """Every statistic, its gradients and a Hessian product, against the masked dense softmax."""
    leading, cap = setting["leading"], setting["softcap"]
    shapes = [(*leading, 4), (80, 4), (80,), *([(80, 2), (2, 4)] if setting["low_rank"] else [])]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, w, bias, *low_rank = leaves
    exclude, index = torch.randint(40, (*leading, 5)), torch.randint(40, 80, (*leading, 2))
    exclude[..., 3:] = torch.tensor([-1, 7])
    if setting["listed"] == "excluded":
        index[..., 1] = 7
    if setting["listed"] == "one":
        index = index[..., :1]
    temperature = torch.rand(leading, dtype=torch.float64) + 0.5 if setting["temperature"] == "rows" else 0.7
    weight = softcurve.LowRankWeight(w, *low_rank) if low_rank else w
    found = softcurve.linear_log_probs(
        x, weight, index, linear_bias=bias, temperature=temperature, softcap=cap, exclude=exclude,
        memory_budget=setting["budget"],
    )  # fmt: skip
    z = x @ (w + low_rank[0] @ low_rank[1] if low_rank else w).mT + bias
    z = z if cap is None else cap * torch.tanh(z / cap)
    z = z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    got, right = list(found), masked_statistics(z, exclude, index)
    incoming = [torch.randn_like(part) for part in right]
    for parts in (got, right):
        finite = (torch.where(part.isinf(), 0.0, part) for part in list(parts))
        total = sum((part * v).sin().sum() for part, v in zip(finite, incoming, strict=True))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        parts += [*first, *torch.autograd.grad(along(first), leaves, materialize_grads=True)]
    for number, (ours, truth) in enumerate(zip(got, right, strict=True)):
        assert torch.equal(ours.isinf(), truth.isinf())
        assert_same(
            torch.where(ours.isinf(), 0.0, ours).detach(), torch.where(ours.isinf(), 0.0, truth).detach(), str(number)
        )


@pytest.mark.parametrize("mask", ["bias", "exclude"])
def test_the_log_probability_of_a_class_without_part_is_a_constant(mask: str) -> None:
    """Its gradient is 0, in reverse and in forward mode, whatever comes in."""
    x, w = (t.requires_grad_() for t in head())
    options: dict[str, Any] = {"exclude": torch.full((3, 1), 4)}
    if mask == "bias":
        options = {"linear_bias": torch.zeros(6, dtype=torch.float64).index_fill(0, torch.tensor([4]), -math.inf)}

    def listed(x: Tensor, w: Tensor) -> Tensor:
        return softcurve.linear_log_probs(x, w, torch.full((3,), 4), **options).log_probs

    value = listed(x, w)
    assert (value == -math.inf).all()
    for gradient in torch.autograd.grad(value.sum(), (x, w)):
        assert not gradient.any()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # torch's own, at the first jvp
        _, change = jvp(listed, (x.detach(), w.detach()), (torch.ones_like(x), torch.ones_like(w)))
    assert not change.any()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 2.0}, {"memory_budget": 40_000}], ids=str)
def test_a_list_leaves_out_what_a_row_excludes(options: dict[str, Any]) -> None:
    """Such as the items that a user has seen: also the most probable; masked and repeated classes, and fillers at the end."""
    x, w = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(60, 4, dtype=torch.float64)
    bias = torch.zeros(60, dtype=torch.float64).index_fill(0, torch.tensor([1, 50]), -math.inf)
    z = oracle.seen_by_softmax(x @ w.mT, options.get("temperature", 1.0), options.get("softcap"))
    exclude = torch.cat([z.topk(3).indices, torch.randint(60, (2, 3, 2)), torch.full((2, 3, 1), -1)], -1)
    exclude[0, 0] = torch.tensor([3, 3, 1, -1, -1, -1])
    gone = (exclude.unsqueeze(-1) == torch.arange(60)).any(-2) | (bias == -math.inf)
    log_p, indices = z.masked_fill(gone, -math.inf).log_softmax(-1).topk(9)
    found = softcurve.linear_topk(x, w, 9, linear_bias=bias, exclude=exclude, **options)
    assert torch.equal(found.indices, indices)
    assert_same(found.log_probs, log_p)
    others = torch.tensor([0, 4, 5]).expand(2, 3, 3)
    few = softcurve.linear_topk(x, w[:6], 5, exclude=others)
    assert (few.log_probs > -math.inf).sum(-1).eq(3).all()
    assert few.indices[..., :3].sort(-1).values.eq(torch.tensor([1, 2, 3])).all()
    assert abs(softcurve.linear_kl_divergence(x, w[:6], few, exclude=others)) < 1e-12


# --- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_and_half_precision(dtype: torch.dtype) -> None:
    """Logits at 1e4, and excluded classes far above the others, beside float64 on the same numbers."""
    x, w = torch.randn(6, 8), torch.randn(40, 8) / 4
    exclude = torch.tensor([[3, 7]]).expand(6, 2)
    bias = torch.randn(40).index_fill(0, torch.tensor([3, 7]), 60.0)
    x, w, bias = (t.to(dtype) for t in (x, w, bias))
    offset = 1e4 if dtype == torch.float32 else 0.0
    y, t, others = torch.randint(8, 40, (6,)), torch.randn(6, 40), [k for k in range(40) if k not in (3, 7)]
    targets = {"index": (y, y - 2), "logits": (softcurve.Logits(t), torch.softmax(t[:, others].double(), -1))}
    settings = itertools.product(targets.values(), ({}, {"label_smoothing": 0.3}), (None, 40_000))
    for (target, of_others), options, budget in settings:
        leaves = tuple(t.detach().clone().requires_grad_() for t in (x, w))
        loss = softcurve.linear_cross_entropy(
            *leaves, target, linear_bias=bias + offset, exclude=exclude, memory_budget=budget, **options
        )  # fmt: skip
        wide = tuple(t.detach().double().requires_grad_() for t in (x, w))
        z = wide[0] @ wide[1].T + (bias + offset).double()
        truth = torch.nn.functional.cross_entropy(z[:, others], of_others, **options)
        assert loss.dtype == torch.float32
        # A logit of 1e4 has steps of 1e-3 in float32.
        torch.testing.assert_close(loss.double(), truth, rtol=1e-3 if offset else 1e-5, atol=1e-6)
        pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), strict=True)
        for got, expected in pairs:
            bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
            assert_same(got.double(), expected, f"{options} {budget}", bound)


# --- second order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 30_000])
@pytest.mark.parametrize("kind", ["index", "list", "logits", "teacher"])
def test_curvature_of_a_head(kind: str, budget: int | None) -> None:
    """The Hessian's products and diagonal, gradient norms and masses, beside autograd of the loss on logits."""
    x, w = head()
    w = torch.cat([w, torch.randn(30, 4, dtype=torch.float64)]) if kind in ("index", "list") else w
    bias = torch.randn(len(w), dtype=torch.float64)
    target = {
        "index": torch.tensor([2, 5, 0]),
        "list": softcurve.TopK(LIST[[1, 2, 0]], LOG_PROBS, tail="renormalize"),
        "logits": softcurve.Logits(Y),
        "teacher": teacher(),
    }[kind]
    options: dict[str, Any] = {"label_smoothing": 0.3, "softcap": 2.0, "temperature": 0.7, "z_loss": 0.1}
    options["weight"] = 0.5 + torch.rand(len(w), dtype=torch.float64)
    curvature = HeadCurvature(x, w, target, linear_bias=bias, exclude=EXCLUDE, memory_budget=budget, **options)

    def loss(x: Tensor, w: Tensor, bias: Tensor, reduction: str = "mean") -> Tensor:
        return softcurve.cross_entropy(x @ w.T + bias, target, exclude=EXCLUDE, reduction=reduction, **options)

    leaves = tuple(t.clone().requires_grad_() for t in (x, w, bias))
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    expected = torch.autograd.grad(along(first), leaves)
    for got, wanted in zip(curvature.hvp(Direction(*directions(leaves))), expected, strict=True):
        assert got is not None
        assert_same(got, wanted, kind, 1e-9)
    hessian = jacrev(grad(loss, 1), 1)(x, w, bias).reshape(w.numel(), w.numel())
    diagonal = curvature.diagonal(matrix="hessian").weight
    assert diagonal is not None
    assert_same(diagonal.reshape(-1), hessian.diagonal(), kind, 1e-9)
    z = x @ w.T + bias
    rows = z.clone().requires_grad_()
    none = softcurve.cross_entropy(rows, target, exclude=EXCLUDE, reduction="none", **options)
    (gradient,) = torch.autograd.grad(none.sum(), rows)
    assert_same(curvature.gradient_norms("el2n"), gradient.norm(dim=-1), kind, 1e-9)
    draws = per_row.sample_classes(curvature.rows, torch.rand(3, 200, dtype=torch.float64))
    assert not (draws.unsqueeze(-1) == EXCLUDE.unsqueeze(1)).any()


def test_transforms() -> None:
    """``vmap`` over problems, and a Jacobian of gradients, equal a loop and a double backward pass."""
    x, w = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([[2, 5, 0], [5, 3, 0]])
    exclude = torch.stack([EXCLUDE, EXCLUDE.flip(0)])
    y[1, 2] = 5

    def loss(x: Tensor, y: Tensor, exclude: Tensor) -> Tensor:
        return softcurve.linear_cross_entropy(x, w, y, exclude=exclude, label_smoothing=0.1)

    def on_logits(x: Tensor, y: Tensor, exclude: Tensor) -> Tensor:
        return softcurve.cross_entropy(x @ w.T, y, exclude=exclude, label_smoothing=0.1)

    expected = torch.stack([grad(on_logits)(*each) for each in zip(x, y, exclude, strict=True)])
    for function in (loss, on_logits):
        assert_same(vmap(grad(function))(x, y, exclude), expected)
    assert_same(jacrev(grad(loss))(x[0], y[0], EXCLUDE), jacrev(grad(on_logits))(x[0], y[0], EXCLUDE))


def test_compiled(run_python: Callable[[str], Any]) -> None:
    """One graph, on a head and on logits."""
    code = """
import json, warnings, torch, softcurve
# Dynamo's own doing when it traces an autograd.Function.
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
x, w = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
y, exclude = torch.tensor([2, 5, 0]), torch.tensor([[0, 4], [1, -1], [-1, -1]])
def both(x, w):
    options = {"exclude": exclude, "label_smoothing": 0.2}
    return softcurve.linear_cross_entropy(x, w, y, **options), softcurve.cross_entropy(x @ w.T, y, **options)
found = []
for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
    for value in function(x, w):
        found.append([value.item(), *(g.sum().item() for g in torch.autograd.grad(value, (x, w), retain_graph=True))])
print(json.dumps(found))
"""
    found = torch.tensor(json.loads(run_python(code).stdout))
    torch.testing.assert_close(found, found[:1].expand(4, 3), rtol=1e-4, atol=1e-6)


# --- bad input ---------------------------------------------------------------------------------------------------------
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "float": (torch.zeros(3, 1), TypeError, "must hold class indices"),
    "mask": (torch.zeros(3, 6, dtype=torch.bool), TypeError, "torch.where"),
    "one a row": (torch.zeros(3, dtype=torch.int64), ValueError, r"unsqueeze\(-1\)"),
    "other rows": (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"\(3,\) \+ \(k,\)"),
    "too large": (torch.full((3, 1), 6), ValueError, "0 … 5, or -1 for none, got 6"),
    "too small": (torch.full((3, 1), -2), ValueError, "got -2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    """The same error on every route."""
    exclude, kind, text = BAD[name]
    x, w = head()
    y, t = torch.tensor([2, 5, 0]), softcurve.Logits(Y)
    messages = set()
    for call in (
        lambda: softcurve.cross_entropy(x @ w.T, y, exclude=exclude),
        lambda: softcurve.kl_divergence(t, x @ w.T, exclude=exclude),
        lambda: softcurve.js_divergence(t, x @ w.T, exclude=exclude),
        lambda: softcurve.linear_cross_entropy(x, w, y, exclude=exclude),
        lambda: softcurve.linear_kl_divergence(x, w, t, exclude=exclude),
        lambda: softcurve.linear_js_divergence(x, w, t, exclude=exclude),
        lambda: softcurve.linear_log_probs(x, w, y, exclude=exclude),
        lambda: softcurve.linear_topk(x, w, 2, exclude=exclude),
        lambda: softcurve.nn.LinearCrossEntropyLoss(4, 6, dtype=torch.float64)(x, y, exclude=exclude),
        lambda: softcurve.nn.KLDivergenceLoss()(t, x @ w.T, exclude=exclude),
        lambda: softcurve.nn.CrossEntropyLoss()(x @ w.T, y, exclude=exclude),
    ):
        with pytest.raises(kind, match="exclude must") as raised:
            call()
        messages.add(str(raised.value))
    assert len(messages) == 1
    assert re.search(text, messages.pop())


def test_a_row_that_counts_keeps_a_class() -> None:
    x, w = head()
    every = torch.arange(6).expand(3, 6)
    for call in (
        lambda: softcurve.cross_entropy(x @ w.T, torch.tensor([0, 1, 2]), exclude=every),
        lambda: softcurve.linear_cross_entropy(x, w, torch.tensor([0, 1, 2]), exclude=every),
    ):
        with pytest.raises(ValueError, match="finite"):
            call()
