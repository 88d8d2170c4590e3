"""The one suite that every divergence × target kind × reduction × option passes through."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import softcurve

from .cases import (
    BUCKET,
    CASES,
    ENTROPY,
    FLOAT,
    INDICES,
    LOGITS,
    RENORMALIZED,
    SINGLE,
    Case,
    options_for,
    problem,
    reductions_for,
)

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


# Each option by itself, and all at once with every reduction.
COMPARED = [
    parameter
    for parameter in combinations(*SINGLE)
    if parameter.values[1] in ("plain", "everything") or parameter.values[2] in ("mean", "none")
]

FULL = ("cross_entropy", "forward", "reverse", "js0.3")
# Jensen-Shannon once; on a list, from both sides.
DIFFERENTIATED = [
    parameter
    for parameter in combinations("everything", "plain")
    if parameter.values[1] == "everything" or parameter.values[2] in ("mean", "none")
    if parameter.values[0].name not in ("js0", "js0.5", "js1")
    if parameter.values[0].name != "js0.3 exchanged" or parameter.values[0].kind in (BUCKET, RENORMALIZED)
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


@pytest.mark.parametrize(("case", "option", "reduction"), COMPARED)
def test_equals_the_dense_formula(case: Case, option: str, reduction: str) -> None:
    """Value, every gradient and a Hessian product, in float64."""
    assert_equals_dense(case, option, reduction, (5,), 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_leading_shape(case: Case) -> None:
    for rows in ((), (1,), (2, 3), (2, 1, 2)):
        for reduction in {"none", "mean"} & set(reductions_for(case)):
            option = "plain" if case.kind is INDICES and math.prod(rows) == 1 else "everything"  # which ignores a row
            assert_equals_dense(case, option, reduction, rows, 3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rows(case: Case) -> None:
    """An empty batch sums to 0, its mean is NaN as in torch, and its gradients have its own shape."""
    for reduction in reductions_for(case):
        posed = problem(case, "plain", reduction, (0,), 4)
        value = posed.ours(*posed.arguments)
        assert value.shape == ((0,) if reduction == "none" else ())
        assert value.isnan() if reduction in ("mean", "batchmean") else value.sum() == 0
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


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.slow
@pytest.mark.parametrize(("case", "option", "reduction"), DIFFERENTIATED)
def test_gradcheck_and_gradgradcheck(case: Case, option: str, reduction: str) -> None:
    """Derivatives in reverse, forward and batched mode, and forward over reverse, against differences, at random."""
    posed = problem(case, option, reduction, (2,), 3)
    modes = {"check_batched_grad": True, "fast_mode": True}
    assert gradcheck(posed.ours, posed.arguments, check_forward_ad=True, **modes)
    assert gradgradcheck(posed.ours, posed.arguments, check_fwd_over_rev=True, **modes)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.kind in (INDICES, FLOAT, LOGITS) and c.name in FULL] + [ENTROPY], ids=str
)
def test_entry_by_entry(case: Case) -> None:
    """The same in full, entry by entry, for each closed form."""
    posed = problem(case, "plain", "none", (2,), 3)
    assert gradcheck(posed.ours, posed.arguments, check_forward_ad=True)
    assert gradgradcheck(posed.ours, posed.arguments, check_fwd_over_rev=True)


@pytest.mark.parametrize("kind", ["Probabilities", "Logits", "LinearTeacher", "bucket"])
def test_ends_of_jensen_shannon(kind: str) -> None:
    """β = 0 is the forward and β = 1 the reverse KL: the value to the last bit, the derivatives as one may round them."""
    by_name = {str(case): case for case in CASES}
    for end, direction in (("js0", "forward"), ("js1", "reverse")):
        one = problem(by_name[f"{end}-{kind}"], "everything", "mean")
        other = by_name[f"{direction}-{kind}"]
        value, kl = one.ours(*one.arguments), problem(other, "everything", "mean").ours(*one.arguments)
        assert torch.equal(value, kl)
        for got, expected in zip(derivatives(value, one.arguments), derivatives(kl, one.arguments), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


# --- torch's own losses ------------------------------------------------------------------------------------------------

TORCH_OPTIONS = [
    {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    for weight in (None, torch.tensor([0.3, 1.7, 0.0, 2.0, 0.9], dtype=torch.float64))
    for ignore_index in (-100, 2, 7)
    for label_smoothing in (0.0, 0.15, 1.0)
    for reduction in ("none", "sum", "mean")
]


def _shown(options: dict[str, Any]) -> str:
    return "-".join(
        ["plain" if options["weight"] is None else "weighted", *(str(v) for v in list(options.values())[1:])]
    )


@pytest.mark.parametrize("options", TORCH_OPTIONS, ids=_shown)
def test_equals_torch_cross_entropy(options: dict[str, Any]) -> None:
    """Every option that torch has, for class indices and for probabilities."""
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([0, 2, 4, 1, 3, 2])
    if options["ignore_index"] not in range(5):
        indices[::3] = options["ignore_index"]
    probabilities = torch.softmax(torch.randn(6, 5, dtype=torch.float64), -1)
    for target, kept in ((indices, options), (probabilities, options | {"ignore_index": -100})):
        ours, torchs = softcurve.cross_entropy(z, target, **kept), F.cross_entropy(z, target, **kept)
        torch.testing.assert_close(ours, torchs, **EXACT)
        got, expected = (torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, torchs))
        torch.testing.assert_close(got, expected, **EXACT)


def test_all_rows_ignored_as_in_torch() -> None:
    """A mean of nothing is NaN, a sum of nothing 0, and neither moves the logits otherwise than torch's does."""
    z, target = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    for reduction in ("none", "sum", "mean"):
        ours = softcurve.cross_entropy(z, target, reduction=reduction)
        torchs = F.cross_entropy(z, target, reduction=reduction)
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)
    assert softcurve.cross_entropy(z, target, reduction="mean").isnan()
    assert softcurve.cross_entropy(z, target, reduction="batchmean").item() == 0


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_equals_torch_kl_div(reduction: str) -> None:
    """``F.kl_div(log q, log p)`` is ``D(p‖q)`` with the arguments exchanged; ours are logits."""
    p, q = torch.randn(2, 6, 5, dtype=torch.float64).requires_grad_()
    torchs = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction=reduction)
    torchs = torchs.sum(-1) if reduction == "none" else torchs
    ours = softcurve.kl_divergence(p, q, reduction=reduction)
    torch.testing.assert_close(ours, torchs, **EXACT)
    for got, expected in zip(*(torch.autograd.grad(v.sum(), (p, q)) for v in (ours, torchs)), strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
