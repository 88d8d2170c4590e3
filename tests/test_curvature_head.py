"""The head's passes of second order, tile by tile, against dense matrices, in float64."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from softcurve.curvature import HeadCurvature
from softcurve.curvature.losses import HeadLosses
from softcurve.head import curvature, per_row
from softcurve.head import plan as plan_module
from softcurve.head.plan import Plan, make_plan
from softcurve.head.products import Direction
from softcurve.head.tensors import RowLosses

from .cases import (
    BIASLESS_TEACHER,
    BY_NAME,
    CASES,
    INDICES,
    PROBABILITIES,
    Case,
    Problem,
    assert_same,
    everything,
    least_of,
    problem,
)
from .curvature_oracle import MATRICES, DenseRows, batch_of, loss_options
from .pairwise import pairwise

Columns = list[tuple[Tensor, ...]]
Pass = Callable[[RowLosses], Any]

BOUND = 1e-9
COLUMNS = 3

# Rows, features and classes: with the default budget, in blocks that stay beside each other as those of large heads do,
# with a budget that cuts rows in two, with the least there is, which cuts classes (see
# test_budgets_cut_what_they_are_named_after). A pass that goes through no columns needs less.
TILINGS = {
    "whole": ((2, 5), 3, 7),
    "blocks": ((2, 5), 3, 41),
    "rows": ((2, 35), 3, 7),
    "classes": ((3,), 3, 131),
    "many classes": ((3,), 3, 251),
}


def option_sets(case: Case) -> dict[str, dict[str, Any]]:
    """Those that differ for this loss."""
    sets = {
        "bias": {"bias": True},
        "everything": everything(case, "shift"),
        "softcap+temperature": {"softcap": 2.0, "temperature": 0.7},
        "smoothing+weight": {"label_smoothing": 0.2, "weight": True},
        "z_loss+weight+bias": {"z_loss": 0.3, "weight": True, "bias": True},
        "shift": everything(case),
    }
    different: dict[str, dict[str, Any]] = {}
    for name, options in sets.items():
        known = {option: value for option, value in options.items() if case.knows(option)}
        if known and known not in different.values():
            different[name] = known
    return different


def go_together(name: str, level: str, other: str, other_level: str) -> bool:
    """Whether a loss knows options, and whether it or they are computed in cut tiles too.

    Cut are the kinds of target that a pass tells from others.
    """
    if (name, other) == ("case", "options"):
        return other_level in option_sets(BY_NAME[level])
    if other != "tiling" or other_level == "whole":
        return True
    if name == "options":
        return level in ("everything", "z_loss+weight+bias")
    kind = BY_NAME[level].kind
    return kind is not BIASLESS_TEACHER and (kind is not PROBABILITIES or BY_NAME[level].name == "js0.3")


def settings(*tilings: str, **more: Sequence[str]) -> list[Any]:
    """Any two of loss, options, tiling, and the levels of ``more`` meet."""
    options = list(dict.fromkeys(name for case in CASES for name in option_sets(case)))
    factors = {"case": [str(case) for case in CASES], "options": options} | more | {"tiling": ("whole", *tilings)}
    together = pairwise(factors, lambda *pair: pair[0] not in ("case", "options") or go_together(*pair))
    return [pytest.param(*setting.values(), id="-".join(setting.values())) for setting in together]


OF_MATRICES = settings("blocks", "rows", "classes", matrix=MATRICES)
OF_GRADIENTS = settings("rows", "many classes")
OF_SAMPLES = [
    (case, "everything", tiling)
    for case in ("cross_entropy-indices", "cross_entropy-LinearTeacher", "forward-bucket", "js0.3-Logits")
    for tiling in ("whole", "rows", "many classes")
]
HEAD = ("input", "linear_weight", "linear_bias")


# --- ours ----------------------------------------------------------------------------------------------------------------


def posed(case: str, options: str, tiling: str) -> Problem:
    rows, features, classes = TILINGS[tiling]
    kind = BY_NAME[case].kind
    if tiling.endswith("classes") and not (kind.listed or kind is INDICES):
        classes //= 2  # passes over dense targets need more for each class
    return problem(BY_NAME[case], option_sets(BY_NAME[case])[options], "sum", rows, features, classes)


def whole(given: Problem, memory_budget: int | None = None) -> RowLosses:
    losses = HeadLosses.of(**loss_options(given), memory_budget=memory_budget)
    named, _ = given._named(given.arguments)
    _, target, *weight = batch_of(given, None)
    head = named["input"], named["linear_weight"], named.get("linear_bias")
    return losses.rows(losses.problem(*head, target, weight[0] if weight else None))


def second_order(matrix: str) -> Pass:
    return lambda rows: curvature.diagonal(rows, matrix, wants_diagonal=False)


def plan_of(run: Pass, rows: RowLosses, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, Callable[[int], Plan]]:
    """How a pass cuts the rows, and how it would with another budget."""
    asked: dict[str, Any] = {}

    def record(*counts: int, **given: Any) -> Plan:
        asked.update(counts=counts, given=given)
        return make_plan(*counts, **given)

    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "make_plan", record)
        run(rows)

    def plan_with(memory_budget: int | None) -> Plan:
        return make_plan(*asked["counts"], **asked["given"] | {"memory_budget": memory_budget})

    return plan_with(rows.memory_budget), plan_with


def rows_of(given: Problem, tiling: str, run: Pass, monkeypatch: pytest.MonkeyPatch) -> RowLosses:
    """With the budget that the tiling means for this pass."""
    if tiling == "blocks":
        monkeypatch.setattr(plan_module, "KEPT_ENTRIES", 64)
        monkeypatch.setattr(plan_module, "KEPT_ROWS", 6)
    if tiling in ("whole", "blocks"):
        return whole(given)
    with pytest.raises(ValueError, match="memory_budget") as refused:
        run(whole(given, memory_budget=1))
    least = least_of(str(refused.value))
    if tiling != "rows":
        return whole(given, memory_budget=least)
    plan, plan_with = plan_of(run, whole(given), monkeypatch)
    low = high = least
    while 2 * plan_with(high).rows < plan.rows:
        low, high = high, 2 * high
    while high - low > 64:
        middle = (low + high) // 2
        few = 2 * plan_with(middle).rows >= plan.rows
        low, high = (low, middle) if few else (middle, high)
    return whole(given, memory_budget=high)


def random_columns(tensors: tuple[Tensor, ...]) -> Columns:
    return [tuple(torch.randn_like(t) for t in tensors) for _ in range(COLUMNS)]


def zeros_like(columns: Columns) -> Columns:
    return [tuple(map(torch.zeros_like, column)) for column in columns]


def directions(columns: Columns) -> list[Direction]:
    return list(map(as_direction, columns))


def as_direction(parts: tuple[Tensor, ...]) -> Direction:
    """The features' part with its rows flattened."""
    e, weight, *bias = parts
    return Direction(e.reshape(-1, e.shape[-1]), weight, bias[0] if bias else None)


def flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts if part is not None])


# --- dense ---------------------------------------------------------------------------------------------------------------


class Dense:
    """A problem's head, its rows' matrices and gradients, and what they are in ``(e, W, b)``."""

    def __init__(self, given: Problem) -> None:
        self.given, self.rows = given, DenseRows.of(given)
        self.head = tuple(a for name, a in zip(given.names, given.arguments, strict=True) if name in HEAD)
        self.e, self.weight, self.bias = as_direction(tuple(a.detach() for a in self.head))
        self.z = F.linear(self.e, self.weight, self.bias)

    def matrices(self, matrix: str) -> Tensor:
        """Each row's matrix in the logits, with its weight."""
        return self.rows.weight.view(-1, 1, 1) * self.rows.matrices(matrix, self.z)

    def gradients(self) -> Tensor:
        """Each row's gradient in the logits, with its weight."""
        return self.rows.weight.unsqueeze(-1) * self.rows.gradients(self.z)

    def hessian_products(self, columns: Columns) -> Tensor:
        """A row a column."""
        first = torch.autograd.grad(self.given.dense(*self.given.arguments), self.head, create_graph=True)
        second = [torch.autograd.grad(first, self.head, column, retain_graph=True) for column in columns]
        return torch.stack(list(map(flat, second)))

    def products(self, matrices: Tensor, columns: Columns) -> Tensor:
        """``Σ (∂z_i)ᵀ B_i ∂z_i``, a row a column."""
        moved = [torch.einsum("nab,nb->na", matrices, self.changes(column)) for column in columns]
        return torch.stack(list(map(self.pulled_back, moved)))

    def changes(self, column: tuple[Tensor, ...]) -> Tensor:
        """``ż``."""
        e, weight, bias = as_direction(column)
        change = e @ self.weight.T + self.e @ weight.T
        return change if bias is None else change + bias

    def pulled_back(self, in_logits: Tensor) -> Tensor:
        """``(∂z)ᵀ`` of a gradient in the logits, flat."""
        parts = in_logits @ self.weight, in_logits.T @ self.e, None if self.bias is None else in_logits.sum(0)
        return flat(parts)


# --- products, diagonals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "options", "matrix", "tiling"), OF_MATRICES)
def test_products_and_diagonal(case, options, matrix, tiling, monkeypatch):
    given = posed(case, options, tiling)
    dense = Dense(given)
    rows = rows_of(given, tiling, second_order(matrix), monkeypatch)
    matrices, columns = dense.matrices(matrix), random_columns(dense.head)

    into = zeros_like(columns)
    curvature.add_products(rows, matrix, directions(columns), directions(into))
    expected = dense.hessian_products(columns) if matrix == "hessian" else dense.products(matrices, columns)
    assert_same(torch.stack(list(map(flat, into))), expected, "products", BOUND)

    got, entries = curvature.diagonal(rows, matrix, wants_diagonal=True), matrices.diagonal(dim1=1, dim2=2)
    assert_same(got.weight, entries.T @ dense.e.square(), "diagonal in the weight", BOUND)
    assert_same(got.bias, entries.sum(0), "diagonal in the bias", BOUND)
    assert_same(got.rows, entries.sum(-1), "traces of the rows", BOUND)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_diagonal_that_is_not_wanted_is_not_made(matrix):
    rows = whole(posed("js0.3-Logits", "everything", "whole"))
    only = curvature.diagonal(rows, matrix, wants_diagonal=False)
    assert (only.weight, only.bias) == (None, None)
    assert torch.equal(only.rows, curvature.diagonal(rows, matrix, wants_diagonal=True).rows)


PARTS_OF_THE_HEAD = {"case": ["cross_entropy-indices", "reverse-Logits", "js0.3-bucket"], "matrix": MATRICES}


@pytest.mark.parametrize(
    ("case", "matrix", "left_out"), [tuple(s.values()) for s in pairwise(PARTS_OF_THE_HEAD | {"left_out": range(3)})]
)
def test_products_in_a_part_of_the_head(case, matrix, left_out):
    """A part left out of the columns is zero; one left out of the sums is not asked for."""
    given = posed(case, "everything", "whole")
    dense = Dense(given)
    inside = tuple(torch.full_like(part, n != left_out) for n, part in enumerate(dense.head))
    columns = [tuple(map(torch.mul, column, inside)) for column in random_columns(dense.head)]
    into = zeros_like(columns)

    def without(parts: Columns) -> list[Direction]:
        return [Direction(*(None if n == left_out else part for n, part in enumerate(d))) for d in directions(parts)]

    curvature.add_products(whole(given), matrix, without(columns), without(into))
    of_rows = partial(dense.products, dense.matrices(matrix))
    expected = (dense.hessian_products if matrix == "hessian" else of_rows)(columns) * flat(inside)
    assert_same(torch.stack(list(map(flat, into))), expected, matrix, BOUND)


@pytest.mark.parametrize("matrix", MATRICES)
def test_products_are_scaled_and_added(matrix):
    given = posed("forward-Logits", "everything", "whole")
    columns, before = random_columns(Dense(given).head), random_columns(Dense(given).head)
    products, into = zeros_like(columns), [tuple(part.clone() for part in each) for each in before]
    curvature.add_products(whole(given), matrix, directions(columns), directions(products))
    curvature.add_products(whole(given), matrix, directions(columns), directions(into), scale=-0.25)
    for each, start, product in zip(into, before, products, strict=True):
        assert_same(flat(each), flat(start) - 0.25 * flat(product), matrix, 1e-14)


@pytest.mark.parametrize("name", [*MATRICES, "gradients"])
@pytest.mark.parametrize(
    "case", ["cross_entropy-indices", "cross_entropy-LinearTeacher", "forward-bucket", "reverse-Logits", "js0.3-bucket"]
)
def test_budgets_cut_what_they_are_named_after(case, name, monkeypatch):
    """What TILINGS is for."""
    run = per_row.gradient_norms if name == "gradients" else second_order(name)
    cuts = {}
    for tiling in ("whole", "rows", "many classes" if name == "gradients" else "classes"):
        plan, _ = plan_of(run, rows_of(posed(case, "everything", tiling), tiling, run, monkeypatch), monkeypatch)
        cuts[tiling.split()[-1]] = "classes" if plan.cuts_classes else "rows" if plan.rows < plan.row_count else "whole"
    assert cuts == {name: name for name in ("whole", "rows", "classes")}
    plan, _ = plan_of(run, rows_of(posed(case, "everything", "blocks"), "blocks", run, monkeypatch), monkeypatch)
    is_listed = BY_NAME[case].kind.listed or BY_NAME[case].kind is INDICES
    assert plan.kept == (is_listed and name != "gradients")
    assert (plan.classes < plan.class_count) == plan.kept


# --- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "options", "tiling"), OF_GRADIENTS)
def test_norms_masses_and_outer_products_of_gradients(case, options, tiling, monkeypatch):
    given = posed(case, options, tiling)
    dense = Dense(given)
    rows = rows_of(given, tiling, per_row.gradient_norms, monkeypatch)
    weight, gradients = rows.tensors.row_weight, dense.gradients()

    norms = torch.linalg.vector_norm(gradients, dim=-1)
    assert_same(weight * per_row.gradient_norms(rows), norms, "norms", BOUND)

    masses = dense.rows.weight * dense.rows.masses(dense.rows.seen(dense.z))
    assert_same(weight * dense.rows.nats * per_row.row_masses(rows), masses, "masses", BOUND)

    columns, factor = random_columns(dense.head), torch.randn(len(dense.z), dtype=torch.float64)
    into = zeros_like(columns)
    # The gradients of ours are without the row's weight.
    of_rows = factor * weight.square()
    curvature.add_outer_products(rows, of_rows, directions(columns), directions(into), scale=-0.5)
    outer = -0.5 * torch.einsum("n,na,nb->nab", factor, gradients, gradients)
    assert_same(torch.stack(list(map(flat, into))), dense.products(outer, columns), "outer products", BOUND)


@pytest.mark.parametrize("pass_of", ["products", "diagonal", "gradient_norms", "outer_products"])
def test_rows_of_weight_zero_are_not_looked_at(pass_of):
    """Their numbers may be anything."""
    given = posed("cross_entropy-indices", "everything", "whole")
    dense = Dense(given)
    rows = whole(given)
    nothing = rows.tensors.row_weight == 0
    assert 0 < nothing.sum() < len(nothing)
    spoilt = rows._replace(
        tensors=rows.tensors._replace(input=torch.where(nothing.unsqueeze(-1), math.nan, rows.tensors.input))
    )

    def outcome(rows: RowLosses) -> Tensor:
        columns = [tuple(map(torch.ones_like, dense.head))]
        into = zeros_like(columns)
        if pass_of == "products":
            curvature.add_products(rows, "hessian", directions(columns), directions(into))
        elif pass_of == "outer_products":
            factor = torch.ones_like(rows.tensors.row_weight)
            curvature.add_outer_products(rows, factor, directions(columns), directions(into))
        elif pass_of == "diagonal":
            return flat(curvature.diagonal(rows, "hessian", wants_diagonal=True))
        else:
            return per_row.gradient_norms(rows)
        return flat(into[0])

    assert torch.equal(outcome(spoilt), outcome(rows))


# --- classes drawn from the model ----------------------------------------------------------------------------------------


def head_rows(z: Tensor, memory_budget: int | None = None, **options: Any) -> RowLosses:
    """Rows whose logits are ``z``: of features that are one-hot, by the rows of the weight."""
    losses = HeadLosses.of(**options, memory_budget=memory_budget)
    e = torch.eye(len(z), dtype=z.dtype)
    return losses.rows(losses.problem(e, z.T.contiguous(), None, torch.zeros(len(z), dtype=torch.int64), None))


def inverse_cdf(seen: Tensor, uniforms: Tensor) -> Tensor:
    cumulated = torch.cumsum(torch.softmax(seen, -1), -1)
    return torch.searchsorted(cumulated, uniforms, right=True)


@pytest.mark.parametrize(("case", "options", "tiling"), OF_SAMPLES)
def test_classes_are_where_the_cumulated_probabilities_pass_the_uniforms(case, options, tiling, monkeypatch):
    given = posed(case, options, tiling)
    dense = Dense(given)
    rows = rows_of(given, tiling, per_row.gradient_norms, monkeypatch)
    uniforms = torch.rand(len(dense.z), 11, dtype=torch.float64)
    drawn = per_row.sample_classes(rows, uniforms)
    expected = inverse_cdf(dense.rows.seen(dense.z), uniforms)
    assert torch.equal(drawn[dense.rows.weight != 0], expected[dense.rows.weight != 0])


@pytest.mark.parametrize("budget", ["default", "least"])
def test_classes_of_long_rows(budget):
    z = 2 * torch.randn(5, 601, dtype=torch.float64)
    uniforms = torch.rand(5, 300, dtype=torch.float64)
    least = None
    if budget == "least":
        with pytest.raises(ValueError, match="memory_budget") as refused:
            per_row.sample_classes(head_rows(z, 1), uniforms)
        least = least_of(str(refused.value))
    drawn = per_row.sample_classes(head_rows(z, least), uniforms)
    assert torch.equal(drawn, inverse_cdf(z, uniforms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [None, "least"])
@pytest.mark.parametrize(
    "masked",
    [slice(None, 3), slice(-3, None), slice(None, 200), slice(110, None)],
    ids=["first", "last", "first blocks", "last blocks"],
)
def test_a_masked_class_is_never_drawn(dtype, budget, masked):
    """Not by the least uniform there is, 0, nor by the greatest below 1, whatever the rounding of the sums."""
    bias = torch.zeros(251, dtype=dtype)
    bias[masked] = -math.inf
    e, weight = torch.eye(40, dtype=dtype), torch.randn(251, 40, dtype=dtype)
    losses = HeadLosses.of()
    rows = losses.rows(losses.problem(e, weight, bias, torch.full((40,), int(bias.argmax())), None))
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).repeat(40, 1)
    if budget == "least":
        with pytest.raises(ValueError, match="memory_budget") as refused:
            per_row.sample_classes(rows._replace(memory_budget=1), uniforms)
        rows = rows._replace(memory_budget=least_of(str(refused.value)))
    drawn = per_row.sample_classes(rows, uniforms)
    allowed = torch.isfinite(bias).nonzero()
    assert torch.equal(drawn, torch.cat([allowed[0], allowed[-1]]).expand(40, 2))


def test_the_frequencies_of_classes_are_the_probabilities():
    z = torch.tensor([[0.3, -1.0, 1.4, 0.0], [2.0, 1.9, -3.0, -0.5]], dtype=torch.float64)
    draws = 20_000
    drawn = per_row.sample_classes(head_rows(z, temperature=2.0), torch.rand(2, draws, dtype=torch.float64))
    p = torch.softmax(z / 2, -1)
    frequencies = torch.stack([(drawn == k).double().mean(-1) for k in range(4)], -1)
    deviations = (frequencies - p) / (p * (1 - p) / draws).sqrt()
    assert deviations.abs().max() < 4


def test_kronecker_factors_are_freed_without_the_cyclic_collector():
    e, w = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    factors = HeadCurvature(e, w, torch.arange(6) % 4).kfac()
    factors.solve(w, damping=0.1)
    seen = weakref.ref(factors)
    gc.disable()
    try:
        del factors
        assert seen() is None
    finally:
        gc.enable()
