"""The head's Triton kernels: float32 tiles against dense float64.

``test_head_fused.py`` runs this in Triton's interpreter; where the tests' device is a GPU, the kernels are compiled.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import softcurve
from softcurve import checks
from softcurve.head import backends, curvature, half, loop, per_row, products
from softcurve.head.aten.dense_terms import MODEL, DenseTile
from softcurve.head.aten.sparse import Places
from softcurve.head.products import Direction
from softcurve.losses.divergences import CrossEntropy
from softcurve.losses.spec import LossSpec

from .cases import (
    BIASLESS_TEACHER,
    BY_NAME,
    CASES,
    Problem,
    along,
    assert_same,
    everything,
    least_of,
    problem,
    tile_of,
)  # fmt: skip
from .pairwise import pairwise
from .placement import DEVICE, ON_CPU
from .test_curvature_head import Dense, directions, flat, option_sets, random_columns, second_order, whole, zeros_like

pytestmark = pytest.mark.usefixtures("without_shape_checks")

math, lists, dense, columns = (backends.kernels(name) for name in ("math", "sparse", "dense", "columns"))
SMALL = (2, 8)  # so that few rows and classes are several programs, and several steps of each
ROWS, CLASSES = 3, 13
RAN: set[Any] = set()


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "INTERPRETED_SHAPE", SMALL)
    launch_it = math.run

    def run(kernel: Any, *more: Any) -> None:
        RAN.add(kernel)
        launch_it(kernel, *more)

    monkeypatch.setattr(math, "run", run)


def test_the_kernels_are_on() -> None:
    assert backends.serves(LossSpec(CrossEntropy(), "sparse"), DEVICE, torch.float32)
    assert not backends.serves(LossSpec(CrossEntropy(), "sparse"), DEVICE, torch.float64)


# --- losses --------------------------------------------------------------------------------------------------------------


def narrowed(given: Problem, dtype: torch.dtype = torch.float32) -> tuple[Problem, Problem]:
    """The problem in a narrower dtype, and the very same numbers in float64."""

    def made(values: torch.dtype) -> Problem:
        arguments = tuple(a.detach().to(dtype).to(values).requires_grad_() for a in given.arguments)
        weight = None if given.weight is None else given.weight.to(dtype).to(values)
        return replace(given, weight=weight, arguments=arguments)

    return made(dtype), made(torch.float64)


def derivatives(value: Tensor, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradient of a weighted sum, and that of its product with a fixed direction."""
    ramp = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    first = torch.autograd.grad((value * ramp).sum(), arguments, create_graph=True, materialize_grads=True)
    return [*first, *torch.autograd.grad(along(first), arguments, materialize_grads=True)]


def assert_equals_dense(given: Problem, budget: int | None = None, bound: float = 5e-6) -> None:
    ours, truth = narrowed(given)
    value = truth.dense(*truth.arguments)
    expected = [value, *derivatives(value, truth.arguments)]
    got = ours.ours(*ours.arguments, memory_budget=budget)
    names = ("value", *given.names, *(f"second, {name}" for name in given.names))
    for name, found, right in zip(names, (got, *derivatives(got, ours.arguments)), expected, strict=True):
        # float32 leaves a few times more of a second derivative, whoever computes it.
        assert_same(found.double(), right, name, 2 * bound if name.startswith("second") else bound)


# Each family of terms and each form of target, which the kernels tell apart on their own. A list's divergence is not among
# them: it is evaluated on the coarse rows, outside of the kernels.
KINDS_OF_TILES = (
    "cross_entropy-indices",
    "cross_entropy-bucket",
    "cross_entropy-renormalize",
    "cross_entropy-float",
    "cross_entropy-Logits",
    "forward-Probabilities",
    "reverse-Logits",
    "js0.3-LinearTeacher",
)
EVERY_KIND = [str(case) for case in CASES if case.kind is not BIASLESS_TEACHER]


@pytest.mark.parametrize("name", KINDS_OF_TILES if ON_CPU else EVERY_KIND)
def test_equals_the_dense_loss(name: str) -> None:
    """Value, gradients and a Hessian product, with every option."""
    assert_equals_dense(problem(BY_NAME[name], everything(BY_NAME[name]), "none", (ROWS,), 3, CLASSES))


CUT = (
    "cross_entropy-indices",
    "cross_entropy-float",
    "cross_entropy-LinearTeacher",
    "forward-bucket",
    "js0.3-Probabilities",
)


@pytest.mark.parametrize("name", CUT)
def test_equals_the_dense_loss_where_classes_are_cut(name: str) -> None:
    given = problem(BY_NAME[name], {"bias": True}, "mean", (2,), 3, 21)
    assert_equals_dense(given, narrowed(given)[0].least_budget)


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("cross_entropy-indices", "whole"),
        ("cross_entropy-bucket", "least"),
        ("reverse-Logits", "whole"),
        ("reverse-Logits", "least"),
    ],
)
def test_statistics(name: str, budget: str) -> None:
    ours, truth = narrowed(problem(BY_NAME[name], everything(BY_NAME[name]), "sum", (ROWS,), 3, CLASSES))
    _, stats = ours.ours(*ours.arguments, memory_budget=ours.budget(budget), return_stats=True)
    right = truth.dense_stats()
    for column in ("log_probs", "entropy", "lse", "mean_logit", "collision"):
        assert_same(getattr(stats, column).double(), getattr(right, column), column, 2e-6)
    assert torch.equal(stats.predicted, right.predicted)
    assert torch.equal(stats.correct, right.correct)


@pytest.mark.parametrize(
    ("name", "rows", "classes"),
    [
        ("cross_entropy-indices", 37, 1013),
        ("js0.3-LinearTeacher", 37, 1013),
        ("forward-bucket", 1, 7),
        ("reverse-Logits", 1, 7),
        ("cross_entropy-indices", 3, 1),
        ("reverse-Logits", 3, 1),
    ],
)
def test_ragged(name: str, rows: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows and classes as fill no program; a row; a class."""
    if rows == 37:
        monkeypatch.setattr(math, "INTERPRETED_SHAPE", (16, 512))
    ours, truth = narrowed(problem(BY_NAME[name], {"bias": True}, "mean", (rows,), 13, classes))
    got, right = (p(*given.arguments) for p, given in ((ours.ours, ours), (truth.dense, truth)))
    assert_same(got.double(), right, "value", 2e-6)
    of_ours, of_truth = (
        torch.autograd.grad(value, given.arguments, materialize_grads=True)
        for value, given in ((got, ours), (right, truth))
    )
    for what, found, expected in zip(ours.names, of_ours, of_truth, strict=True):
        assert_same(found.double(), expected, what, 5e-6)


def test_nothing_is_launched_for_float64_or_for_no_rows() -> None:
    before = set(RAN)
    RAN.clear()
    for dtype, rows in ((torch.float64, 3), (torch.float32, 0)):
        x, w = torch.randn(rows, 2, dtype=dtype), torch.randn(5, 2, dtype=dtype)
        softcurve.linear_cross_entropy(x, w, torch.zeros(rows, dtype=torch.int64), reduction="sum")
    assert not RAN
    RAN.update(before)


@pytest.mark.parametrize("kind", ["indices", "Probabilities", "Logits"])
def test_masked_classes_have_no_share_of_label_smoothing(kind: str) -> None:
    """A vocabulary padded with masked classes has torch's loss and gradients of the vocabulary without padding."""
    live = torch.tensor([c for c in range(37) if c not in (2, 5, 30)])
    e, w, bias = torch.randn(4, 6), torch.randn(37, 6), torch.full((37,), -torch.inf)
    bias[live] = torch.randn(len(live))
    y, p = torch.tensor([0, 7, 30, 33]), torch.randn(4, len(live)).softmax(-1)
    padded = torch.zeros(4, 37).index_copy(1, live, p)
    target = {
        "indices": live[y],
        "Probabilities": softcurve.Probabilities(padded),
        "Logits": softcurve.Logits(padded.log()),
    }
    leaves, exact = (tuple(t.to(d).requires_grad_() for t in (e, w)) for d in (torch.float32, torch.float64))
    loss = softcurve.linear_cross_entropy(*leaves, target[kind], linear_bias=bias, label_smoothing=0.2)
    z = exact[0] @ exact[1][live].T + bias[live]
    right = torch.nn.functional.cross_entropy(z, y if kind == "indices" else p.double(), label_smoothing=0.2)
    found, wanted = (torch.autograd.grad(value, tensors) for value, tensors in ((loss, leaves), (right, exact)))
    for got, true in zip((loss.detach(), *found), (right.detach(), *wanted), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=2e-5, atol=1e-6)


def test_probabilities_of_masked_classes_have_no_second_derivatives() -> None:
    """Derivatives in the head and in the probabilities are those of the vocabulary without its masked classes."""
    live = torch.tensor([c for c in range(37) if c not in (2, 5, 30)])
    e, w, bias = torch.randn(4, 6), torch.randn(37, 6), torch.full((37,), -torch.inf).index_fill(0, live, 0.0)
    y = torch.zeros(4, 37).index_copy(1, live, torch.randn(4, len(live)).softmax(-1))
    along, results = [torch.randn_like(part) for part in (e, w, y)], []
    for dtype in (torch.float32, torch.float64):
        leaves = [part.to(dtype).requires_grad_() for part in (e, w, y)]
        if dtype == torch.float32:
            loss = softcurve.linear_cross_entropy(*leaves, linear_bias=bias)
        else:
            loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1][live].T, leaves[2][:, live])
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        product = sum((g * v).sum() for g, v in zip(first, along, strict=True))
        results.append((*first, *torch.autograd.grad(product, leaves)))
    for got, true in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl_divergence", "js_divergence"])
def test_a_target_that_masks_every_class_is_nan_unless_its_row_has_no_weight(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody looks at values, or leaves out rows by them."""
    monkeypatch.setattr(checks, "values_visible", lambda *_: False)
    monkeypatch.setattr(loop, "kept_rows", lambda weight: slice(0, len(weight)))
    z, t, w = torch.randn(4, 9), torch.randn(4, 9), torch.eye(9).requires_grad_()
    t[1] = -torch.inf
    function = getattr(softcurve, f"linear_{loss}")
    rows = function(z, w, softcurve.Logits(t), reduction="none")
    assert rows[1].isnan()
    assert rows[[0, 2, 3]].isfinite().all()
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    value = function(z, w, softcurve.Logits(t), reduction="sum", sample_weight=weight)
    assert_same(value.detach(), rows[[0, 2, 3]].detach().sum(), "value", 1e-6)
    assert torch.autograd.grad(value, w)[0].isfinite().all()


# --- half-precision products ---------------------------------------------------------------------------------------------


@pytest.fixture
def half_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The products of CUDA: half-precision factors, their product summed in float32. The CPU is as if it had them."""
    multiplied: list[torch.dtype] = []
    product_on_device = products.half_product

    def half_product(out: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> None:
        assert a.dtype == b.dtype
        assert a.dtype in (torch.float16, torch.bfloat16)
        assert out.dtype == torch.float32
        multiplied.append(a.dtype)
        if not ON_CPU:
            product_on_device(out, a, b, beta=beta, alpha=alpha)
            return
        product = alpha * (a.float() @ b.float())
        out.copy_(product if beta == 0 else product + beta * out)

    if ON_CPU:
        monkeypatch.setattr(half, "multiplies_half", lambda device, dtype: True)
        monkeypatch.setattr(half, "LEAST_ENTRIES", 0)
        monkeypatch.setattr(half, "LEAST_ROWS", 0)
        monkeypatch.setattr(products, "rounds_once", lambda *_: False)
    monkeypatch.setattr(products, "half_product", half_product)
    return multiplied


@pytest.mark.parametrize(
    "setting",
    pairwise(
        {
            "name": ("cross_entropy-indices", "cross_entropy-bucket", "forward-LinearTeacher", "reverse-Logits"),
            "options": ("plain", "everything"),
            "dtype": (torch.bfloat16, torch.float16),
        }
    ),
    ids=lambda setting: "-".join(map(str, setting.values())),
)
def test_half_precision_is_no_worse_than_dense(
    setting: dict[str, Any], half_products: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math, "INTERPRETED_SHAPE", (32, 16))
    name, options, dtype = setting.values()
    case = BY_NAME[name]
    given = problem(case, everything(case) if options == "everything" else {}, "sum", (17,), 13, 101)
    ours, truth = narrowed(given, dtype)
    found: list[list[Tensor]] = []
    for value, posed_as in (
        (ours.ours(*ours.arguments), ours),
        (ours.dense(*ours.arguments), ours),
        (truth.dense(*truth.arguments), truth),
    ):
        found.append([value, *torch.autograd.grad(value, posed_as.arguments, materialize_grads=True)])
    assert set(half_products) == {dtype}
    # Forward, and back to features and weight: bfloat16 all three, float16 the first (see residual_dtype).
    sides = 2 if "Teacher" in name else 1
    assert len(half_products) >= sides * (3 if dtype == torch.bfloat16 else 1)
    for what, got, plain, right in zip(("value", *given.names), *found, strict=True):
        ours_off, plain_off = ((part.double() - right).norm() for part in (got, plain))
        rounding = torch.finfo(dtype).eps / 2 * right.norm()
        assert ours_off <= torch.maximum(plain_off, rounding), what


def test_weight_gradients_of_half_precision_add_up_in_float32(
    half_products: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tiles of rows: a sum in bfloat16 would stop to grow at 256 of its terms."""
    monkeypatch.setattr(math, "INTERPRETED_SHAPE", (256, 4))
    x, w = torch.ones(2048, 1, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(2048, dtype=torch.int64)
    budget = 40_000
    loss = softcurve.linear_cross_entropy(x, w, target, reduction="sum", memory_budget=budget)
    (gradient,) = torch.autograd.grad(loss, w)
    assert len(half_products) > 6
    assert torch.equal(gradient.flatten(), (torch.tensor([-2.0, 1.0, 1.0]) * 2048 / 3).to(torch.bfloat16))


def test_the_true_class_of_a_confident_row_in_half_precision(half_products: list[torch.dtype]) -> None:
    """``p − 1`` of a rounded ``p`` would be 0."""
    z = torch.tensor([[0.0, -12.0, -14.0], [-3.0, 9.0, -8.0]], dtype=torch.bfloat16)
    x, w = torch.eye(2, dtype=torch.bfloat16), z.mT.contiguous().requires_grad_()
    loss = softcurve.linear_cross_entropy(x, w, torch.tensor([0, 1]), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, w)
    p = torch.softmax(z.double(), -1)
    others = torch.stack([p[0, 1] + p[0, 2], p[1, 0] + p[1, 2]])
    got = -gradient.double().mT.diagonal()
    # The interpreter cuts bfloat16 where a GPU rounds: an ulp, and half of one each for the features and the result.
    assert torch.all((got - others).abs() <= 2 * 2**-7 * others)


# --- tiles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_guess_far_from_the_largest_logit_is_made_good(dtype: torch.dtype) -> None:
    """The first classes of a row tell nothing of the others: far above, far below, masked, all at an offset."""
    z = torch.randn(9, 53)
    z[1, 40:] += 300.0
    z[2, :20] = -torch.inf
    z[2] -= 1e4
    z[3] += 1e4
    z[4, 45] = 39.0
    z[5, 45] = 90.0
    z[6, :] = -torch.inf
    z[7, :] -= 500.0
    out = torch.empty_like(z, dtype=dtype)
    shift, total = (part.squeeze(-1) for part in lists.exponentials(tile_of(z, out)))
    lse = shift.double() + total.double().log()
    assert_same(lse[:6], torch.logsumexp(z.double(), -1)[:6], "log-sum-exp", 1e-6)
    assert total[6] == 0
    assert torch.isfinite(out.float()).all()
    p = out.double() / total.double().unsqueeze(-1)
    right = torch.softmax(z.double(), -1)
    kept = torch.arange(9) != 6
    bound = 6e-6 if dtype == torch.float32 else 2.0**-7 + 6e-6  # the interpreter cuts where a GPU rounds
    assert ((p - right)[kept].abs() <= bound * right[kept] + 1e-36).all()


def test_rows_whose_factor_cannot_be_divided_by_are_scaled(half_products: list[torch.dtype]) -> None:
    """Rows without weight, and a bucket whose own residual vanishes while its classes' do not."""
    x, w = torch.eye(3, dtype=torch.bfloat16), torch.randn(41, 3).to(torch.bfloat16).requires_grad_()
    w.data[:, 2] = -60.0
    w.data[3, 2], w.data[4, 2] = 40.0, 38.0
    target = torch.tensor([1, 2, 4])
    weight = torch.tensor([0.0, 1.0, 1.0])
    loss = softcurve.linear_cross_entropy(x, w, target, sample_weight=weight, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, w)
    z = w.detach().double().mT
    right = weight.double().unsqueeze(-1) * (torch.softmax(z, -1) - torch.eye(41).double()[target])
    assert (gradient[:, 0] == 0).all()
    assert_same(gradient.double().mT, right, "gradient", 2.0**-7)


def test_rows_are_multiplied_by_their_factors() -> None:
    tile, factor = torch.randn(ROWS, CLASSES), torch.tensor([[1.0], [0.0], [-2.5]], dtype=torch.float64)
    expected = tile * factor.float()
    lists.rescale(tile, factor)
    assert torch.equal(tile, expected)


@contextmanager
def room_for(entries: int) -> Iterator[Tensor]:
    """Of float32; on the CPU it occupies nothing until it is touched."""
    if not ON_CPU:
        yield torch.empty(entries, device=DEVICE)
        return
    with mmap.mmap(-1, 4 * entries, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) as room:
        yield torch.frombuffer(room, dtype=torch.float32)


def test_rows_beyond_32_bits() -> None:
    """A row's place is counted in 64 bits: two rows 2³¹ + 16 entries apart, of which nothing else is ever touched."""
    apart = 2**31 + 16
    with room_for(apart + 64) as whole_room:
        z = whole_room.as_strided((2, 20), (apart, 1))
        values = torch.randn(2, 20)
        z.copy_(values)
        sums, _, _ = lists.statistics(tile_of(z), wants_stats=False, leaves_residual=False)
        tile = DenseTile(LossSpec(CrossEntropy(), "logits"), 20, 40, False, True, z, z)
        top, rest, _ = dense.softmax(tile, MODEL, wants_place=True)
        lists.put(z, Places(torch.tensor([[3], [19]]), None), None)
        right = torch.logsumexp(values.double(), -1)
        assert_same((sums.shift + sums.total.log()).squeeze(-1), right, "sums", 1e-6)
        assert_same((top.double() + rest.double().log1p()).squeeze(-1), right, "softmax", 1e-6)
        assert z[1, 19] == -torch.inf
        assert (z == -torch.inf).sum() == 2
        del z, whole_room


# --- second order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    pairwise(
        {
            "name": (
                "cross_entropy-indices",
                "forward-bucket",
                "cross_entropy-Logits",
                "reverse-Logits",
                "js0.3-LinearTeacher",
            ),
            "budget": ("whole", "least"),
            "matrix": ("hessian", "gauss_newton"),
        }
    ),
    ids=lambda setting: "-".join(setting.values()),
)
def test_curvature_products(setting: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "INTERPRETED_SHAPE", (2, 16))
    name, budget, matrix = setting.values()
    ours, truth = narrowed(problem(BY_NAME[name], option_sets(BY_NAME[name])["everything"], "sum", (ROWS,), 3, 21))
    right = Dense(truth)
    columns = [tuple(part.float().double() for part in column) for column in random_columns(right.head)[:2]]
    expected = (
        right.hessian_products(columns)
        if matrix == "hessian"
        else right.products(right.matrices(matrix), columns)
    )  # fmt: skip
    least = None
    if budget == "least":
        with pytest.raises(ValueError, match="memory_budget") as refused:
            second_order(matrix)(whole(ours, memory_budget=1))
        least = least_of(str(refused.value))
    narrow = [tuple(part.float() for part in column) for column in columns]
    into = zeros_like(narrow)
    rows = whole(ours, memory_budget=least)
    curvature.add_products(rows, matrix, directions(narrow), directions(into))
    assert_same(torch.stack(list(map(flat, into))).double(), expected, "products", 5e-6)
    norms = rows.tensors.row_weight * per_row.gradient_norms(rows)
    assert_same(norms.double(), torch.linalg.vector_norm(right.gradients(), dim=-1), "norms", 5e-6)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_curvature_of_confident_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of a class with more than half of a row's mass, beside one of a confident row's own features."""
    monkeypatch.setattr(math, "INTERPRETED_SHAPE", (4, 32))
    e, w = 4 * torch.eye(3).repeat(2, 1), torch.randn(60, 3)
    w[torch.tensor([7, 30, 55]), torch.arange(3)] = torch.tensor([8.0, 8.5, 9.0])
    y = torch.tensor([7, 30, 55, 3, 3, 3])
    target = y if kind == "indices" else torch.eye(60)[y]
    narrow = softcurve.curvature.HeadCurvature(e, w, target)
    wide = softcurve.curvature.HeadCurvature(e.double(), w.double(), target if kind == "indices" else target.double())
    for row in range(6):
        direction = torch.zeros(6, 3)
        direction[row] = torch.randn(3)
        found = narrow.ggnvp(Direction(direction, None, None)).input[row]
        right = wide.ggnvp(Direction(direction.double(), None, None)).input[row]
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5 * right.abs().max().item())


# --- labels beside a teacher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "probabilities", "logits", "list"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_labels_beside_a_teacher(kind: str, softcap: float | None) -> None:
    """The labels' term has kernels of its own, beside those of the divergence, whose direction moves no labels."""
    x, w, e, u, y = (torch.randn(s) for s in ((3, 4), (13, 4), (3, 2), (13, 2), (3, 13)))
    log_y, at = y.log_softmax(-1).topk(3)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        labels = {
            "classes": torch.tensor([0, 12, 5]), "probabilities": softcurve.Probabilities(y.softmax(-1).to(dtype)),
            "logits": softcurve.Logits(y.to(dtype)), "list": softcurve.TopK(at, log_y.to(dtype)),
        }  # fmt: skip
        loss = softcurve.linear_distillation(
            *leaves, labels[kind], softcurve.LinearTeacher(e.to(dtype), u.to(dtype)), alpha=0.4, temperature=2.0,
            entropy_bonus=0.1, softcap=softcap, label_smoothing=0.1,
        )  # fmt: skip
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        results.append([loss, *first, *torch.autograd.grad(along(first), leaves)])
    for got, right in zip(*results, strict=True):
        assert_same(got.double(), right, bound=5e-6)


# --- all of it -----------------------------------------------------------------------------------------------------------


def test_every_kernel_has_run(request: pytest.FixtureRequest) -> None:
    """The last of the tests."""
    if request.config.getoption("record", None) is not None:
        pytest.skip("the tests are divided among processes")
    kernels = {
        value
        for module in (lists, dense, columns)
        for value in vars(module).values()
        if {"ROWS", "rows"} <= set(getattr(value, "arg_names", ())) and value.fn.__module__ == module.__name__
    }
    assert len(kernels) > 10
    assert {kernel.fn.__name__ for kernel in kernels - RAN} == set()
