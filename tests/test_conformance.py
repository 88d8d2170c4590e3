"""The one suite that every divergence × target kind × reduction × option passes through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from .cases import CASES, INDICES, SINGLE, TEACHER, Case, options_for, problem, reductions_for

# torch's own doing when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def combinations(*option_sets: str) -> list[Any]:
    return [
        pytest.param(case, option, reduction, id=f"{case}-{option}-{reduction}")
        for case in CASES
        for option in option_sets
        if options_for(case, option) is not None
        for reduction in reductions_for(case)
    ]


# Every case with every reduction and all of its options at once, and each on its plain path.
DIFFERENTIATED = [
    *combinations("everything"),
    *(parameter for parameter in combinations("plain") if parameter.values[2] in ("mean", "none")),
]


def derivatives(value: Tensor, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradient in every argument, and that of its product with a fixed direction: a Hessian product."""
    first = torch.autograd.grad(value.sin().sum(), arguments, create_graph=True, materialize_grads=True)
    along = sum((g * torch.arange(g.numel(), dtype=g.dtype).cos().reshape(g.shape)).sum() for g in first)
    return [*first, *torch.autograd.grad(along, arguments, materialize_grads=True)]


def assert_equals_dense(case: Case, option: str, reduction: str, rows: tuple[int, ...], classes: int) -> None:
    posed = problem(case, option, reduction, rows, classes)
    ours, dense = posed.ours(*posed.arguments), posed.dense(*posed.arguments)
    torch.testing.assert_close(ours, dense, **EXACT)
    pairs = zip(derivatives(ours, posed.arguments), derivatives(dense, posed.arguments), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize(("case", "option", "reduction"), combinations(*SINGLE))
def test_equals_the_dense_formula(case: Case, option: str, reduction: str) -> None:
    """Value, every gradient and a Hessian product, in float64."""
    assert_equals_dense(case, option, reduction, (5,), 4)


@pytest.mark.parametrize(("case", "option", "reduction"), combinations("everything"))
def test_any_leading_shape(case: Case, option: str, reduction: str) -> None:
    for rows in ((), (1,), (2, 3), (2, 1, 2)):
        if rows == () and case.kind is TEACHER:
            continue  # its input is a matrix of features
        if rows in ((), (1,)) and case.kind is INDICES and reduction == "mean":
            continue  # the one row is ignored: a mean of nothing, in test_targets.py
        assert_equals_dense(case, option, reduction, rows, 3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rows(case: Case) -> None:
    """An empty batch sums to 0, has no rows, and gradients of its own shape. Its mean is an error (test_bad_input.py)."""
    for reduction in set(reductions_for(case)) - {"mean", "batchmean"}:
        posed = problem(case, "plain", reduction, (0,), 4)
        value = posed.ours(*posed.arguments)
        assert value.shape == ((0,) if reduction == "none" else ())
        assert value.sum() == 0
        for leaf, gradient in zip(
            posed.arguments, torch.autograd.grad(value.sum(), posed.arguments, materialize_grads=True), strict=True
        ):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("case", [c for c in CASES if c.kind.name not in ("bucket", "renormalize")], ids=str)
def test_one_class(case: Case) -> None:
    """Nothing is uncertain: zero, with zero gradient in the logits."""
    posed = problem(case, "plain", "none", (3,), 1)
    value = posed.ours(*posed.arguments)
    assert torch.equal(value, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(value.sum(), posed.arguments[0])[0], torch.zeros(3, 1, dtype=torch.float64))


@pytest.mark.parametrize(("case", "option", "reduction"), DIFFERENTIATED)
def test_gradcheck(case: Case, option: str, reduction: str) -> None:
    """First derivatives in reverse, forward and batched mode against differences of the value."""
    posed = problem(case, option, reduction, (2,), 3)
    assert gradcheck(posed.ours, posed.arguments, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize(("case", "option", "reduction"), DIFFERENTIATED)
def test_gradgradcheck(case: Case, option: str, reduction: str) -> None:
    """Second derivatives, reverse over reverse and forward over reverse, against differences of the first."""
    posed = problem(case, option, reduction, (2,), 3)
    assert gradgradcheck(posed.ours, posed.arguments, check_fwd_over_rev=True, check_batched_grad=True)
