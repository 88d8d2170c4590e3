"""The second-order solver's parts against dense float64 matrices, and its heads' gradients in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from softcurve.fit import DataError, fitting
from softcurve.fit.data.row_source import to_source
from softcurve.fit.fitting import fit_head
from softcurve.fit.solver import curvature as curvature_module
from softcurve.fit.solver import preconditioner
from softcurve.fit.solver.coordinates import Coordinates, find_coordinates
from softcurve.fit.solver.curvature import OF_CURVATURE, Curvature
from softcurve.fit.solver.model import RoundedProduct, minimise_model
from softcurve.fit.solver.objective import FitProblem, Objective
from softcurve.fit.solver.preconditioner import ClassBlocks, Eigenbasis
from softcurve.losses.divergences import LOSS_NAMES
from softcurve.losses.topk import TopK

ROWS, WIDTH, CLASSES, AT_ONCE = 41, 5, 4, 7
KINDS = ["labels", "distributions", "top_k"]
PENALTY = 3e-3


def generator(seed=0):
    return np.random.default_rng(seed)


def targets(kind, rows=ROWS, classes=CLASSES, seed=0):
    """A target of the kind, and the same as a dense matrix (a list's unlisted classes are zero)."""
    random = generator(seed)
    soft = random.dirichlet(np.ones(classes), rows)
    if kind == "labels":
        labels = soft.argmax(1)
        labels[:classes] = range(classes)
        return labels, np.eye(classes)[labels]
    if kind == "distributions":
        return soft, soft
    listed = np.argsort(random.random((rows, classes)), 1)[:, :2]
    log_probs = np.log(np.take_along_axis(soft, listed, 1))
    dense = np.zeros_like(soft)
    np.put_along_axis(dense, listed, np.exp(log_probs), 1)
    return TopK(torch.as_tensor(listed), torch.as_tensor(log_probs), tail="bucket"), dense


class Problem:
    """Rows, weights, coordinates and a point, all at random; and the same in numpy."""

    def __init__(self, kind="labels", *, weighted=True, intercept=True, rows=ROWS, size=1.0, offset=0.0, seed=0):
        random = generator(seed)
        self.X = random.normal(size=(rows, WIDTH)) * [3.0, 1.0, 1.0, 0.3, 0.1] + offset
        target, self.y = targets(kind, rows, seed=seed)
        self.source = to_source(self.X, target, class_count=CLASSES if kind == "top_k" else None)
        weights = random.integers(0, 4, rows).astype(float) if weighted else np.ones(rows)
        self.weights = torch.as_tensor(weights / weights.sum())
        self.coordinates = find_coordinates(
            self.source, self.weights, CLASSES, intercept=intercept, rows_at_once=AT_ONCE
        )
        self.parameters = torch.as_tensor(size * random.normal(size=(CLASSES, self.coordinates.size)))
        centred = self.X - self.coordinates.mean.numpy()
        basis = np.eye(WIDTH) if self.coordinates.basis is None else self.coordinates.basis.numpy()
        self.u = np.concatenate([centred @ basis, np.ones((rows, 1))], 1) if intercept else centred @ basis
        self.p = np.exp(log_softmax(self.u @ self.parameters.numpy().T, 1))

    def problem(self, loss):
        return FitProblem(self.source, self.weights, loss, PENALTY, AT_ONCE)

    def curvature(self, memory=2**20, damping=0.0, scale=1.0, dtype=torch.float64):
        loss = {1.0: "cross_entropy", 0.25: "js"}[scale]
        curvature = Curvature(self.problem(loss), self.coordinates, dtype=dtype, memory=memory)
        for start in range(0, len(self.p), AT_ONCE):
            curvature.keep(start, torch.as_tensor(self.p[start : start + AT_ONCE]))
        curvature.move_to(self.parameters)
        curvature.damping = damping
        return curvature

    def of_rows(self, damping=0.0, scale=1.0):
        """``w ((1 + τμ) κ J + μ diag|p − y|)`` of each row."""
        jacobians = np.einsum("nc,ck->nck", self.p, np.eye(CLASSES)) - np.einsum("nc,nk->nck", self.p, self.p)
        wrong = np.einsum("nc,ck->nck", np.abs(self.p - self.y), np.eye(CLASSES))
        matrices = (1 + OF_CURVATURE * damping) * scale * jacobians + damping * wrong
        return self.weights.numpy()[:, None, None] * matrices

    def dense(self, damping=0.0, scale=1.0, rows=slice(None)):
        """The whole matrix, ``(C·size, C·size)``."""
        size = self.u.shape[1]
        matrix = np.einsum("nck,ni,nj->cikj", self.of_rows(damping, scale)[rows], self.u[rows], self.u[rows])
        penalties = np.full((CLASSES, size), PENALTY)
        if self.coordinates.intercept:
            penalties[:, -1] = 0.0
        return matrix.reshape(CLASSES * size, -1) + np.diag(penalties.ravel())


def whole(operator, shape):
    """The matrix of a linear map of (classes, size) tensors."""
    columns = [operator(column.view(shape)).reshape(-1) for column in torch.eye(math.prod(shape), dtype=torch.float64)]
    return torch.stack(columns, 1).numpy()


OF_FEATURES = ROWS * (WIDTH + 1) * 8
MEMORIES = {"nothing": 0, "features": OF_FEATURES, "some of p": OF_FEATURES + 17 * CLASSES * 8, "some of p alone": 17 * CLASSES * 8, "all": 2**20}  # fmt: skip


# --- the matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_dense_matrix_s(kind, damping, memory):
    problem = Problem(kind)
    curvature = problem.curvature(MEMORIES[memory], damping, scale=0.25)
    kept = 0 if memory in ("nothing", "features") else 17 if memory.startswith("some") else ROWS
    assert (curvature.features is not None, len(curvature.probabilities)) == (MEMORIES[memory] >= OF_FEATURES, kept)
    expected = problem.dense(damping, 0.25)
    np.testing.assert_allclose(whole(curvature, problem.parameters.shape), expected, atol=1e-12 * abs(expected).max())
    assert curvature.products == problem.parameters.numel()


@pytest.mark.parametrize("memory", ["nothing", "all"])
@pytest.mark.parametrize(("weighted", "intercept"), [(False, True), (True, False), (False, False)])
def test_products_without_weights_or_intercept(weighted, intercept, memory):
    problem = Problem(weighted=weighted, intercept=intercept)
    expected = problem.dense(0.3)
    actual = whole(problem.curvature(MEMORIES[memory], 0.3), problem.parameters.shape)
    np.testing.assert_allclose(actual, expected, atol=1e-12 * abs(expected).max())


@pytest.mark.parametrize("memory", ["nothing", "some of p", "all"])
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_factor_and_diagonals_are_the_dense_matrix_s(kind, damping, memory):
    problem = Problem(kind)
    curvature, of_rows = problem.curvature(MEMORIES[memory], damping), problem.of_rows(damping)
    np.testing.assert_allclose(curvature.class_factor().numpy(), of_rows.sum(0), atol=1e-13)
    dense, size = problem.dense(damping), problem.u.shape[1]
    np.testing.assert_allclose(curvature.diagonal(None).numpy().ravel(), np.diag(dense), rtol=1e-11)
    basis = np.linalg.qr(generator(1).normal(size=(CLASSES, CLASSES)))[0]
    turned = np.kron(basis.T, np.eye(size)) @ dense @ np.kron(basis, np.eye(size))
    np.testing.assert_allclose(curvature.diagonal(torch.as_tensor(basis)).numpy().ravel(), np.diag(turned), rtol=1e-11)
    seen = np.zeros((ROWS, CLASSES))
    curvature.diagonal(None, lambda numbers, weights: seen.__setitem__(numbers.numpy(), weights.numpy()))
    mean = problem.weights.numpy().mean()
    np.testing.assert_allclose(seen * mean, np.einsum("ncc->nc", of_rows), atol=1e-14)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    ("kind", "damping"), [("labels", 0.0), ("labels", 1e-3), ("distributions", 0.0), ("top_k", 0.0)]
)
def test_rows_left_out_are_negligible(kind, damping, memory):
    # Nearly every row is certain, of the wrong class too: those of labels count for nothing but with damping.
    problem = Problem(kind, size=60.0)
    curvature = problem.curvature(MEMORIES[memory], damping)
    curvature.leave_out_negligible_rows()
    left_out = curvature._left_out
    if left_out is None:
        assert kind == "labels"
        assert damping
        return
    assert left_out.sum() > ROWS / 2
    kept = ~left_out.numpy()
    expected = problem.dense(damping, rows=kept)
    actual = whole(curvature, problem.parameters.shape)
    np.testing.assert_allclose(actual, expected, atol=1e-12 * abs(expected).max())
    lost = problem.dense(damping) - expected
    of_weights = np.tile(np.arange(WIDTH + 1) < WIDTH, CLASSES)
    assert np.linalg.eigvalsh(lost[np.ix_(of_weights, of_weights)]).max() <= 0.1 * PENALTY


@pytest.fixture
def rounding(monkeypatch):
    """Fits of any size multiply in bfloat16 on any processor."""
    monkeypatch.setattr(curvature_module, "rounding_pays", lambda rows, size, classes: True)


@pytest.mark.parametrize("stored", [17, ROWS])
@pytest.mark.parametrize(("damping", "size"), [(0.0, 1.0), (0.7, 1.0), (1e-3, 60.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_products_are_the_dense_matrix_s_up_to_rounding(kind, damping, size, stored, rounding):
    problem = Problem(kind, size=size)
    memory = ROWS * problem.coordinates.size * (4 + 2) + stored * CLASSES * 4
    curvature = problem.curvature(memory, damping, scale=0.25, dtype=torch.float32)
    assert len(curvature.probabilities) == stored
    assert curvature.rounded.dtype == torch.bfloat16
    curvature.leave_out_negligible_rows()
    kept = slice(None) if curvature._left_out is None else ~curvature._left_out.numpy()
    expected = problem.dense(damping, 0.25, rows=kept)
    # Rounding the features, the direction, the change of the logits and the sums adds four errors of 2⁻⁹ each.
    diagonal = np.diag(expected)
    # In float32 the curvature p (1 − p) of certain rows has an error relative to p.
    scale = np.sqrt(np.outer(diagonal, diagonal)) if size == 1.0 else diagonal.max()
    actual = whole(curvature.rounded_product, problem.parameters.shape)
    errors = abs(actual - expected) / scale
    assert errors.max() <= 4 * 2.0**-9
    assert errors.max() > 2.0**-13  # it is rounded
    exact = abs(whole(curvature, problem.parameters.shape) - expected) / scale
    assert exact.max() <= 2.0**-17


def test_features_are_rounded_where_they_fit(rounding):
    problem = Problem()
    entries = ROWS * problem.coordinates.size
    assert problem.curvature(entries * 6, dtype=torch.float32).rounded is not None
    assert problem.curvature(entries * 6 - 1, dtype=torch.float32).rounded is None
    assert problem.curvature().rounded is None  # float64


@pytest.mark.parametrize(
    ("instructions", "enabled", "limit"),
    [(True, True, None), (False, True, None), (True, False, None), (True, True, "AVX2")],
)
def test_rounding_pays_for_large_products_where_onednn_has_instructions(instructions, enabled, limit, monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: enabled)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions, raising=False)
    pays = curvature_module.rounding_pays
    assert pays(1797, 512, 10) == (instructions and enabled and limit is None)
    assert not pays(100, 512, 10)
    assert not pays(10**6, 64, 10)


def test_no_row_of_notable_curvature_is_left_out():
    curvature = Problem(size=0.1).curvature()
    curvature.leave_out_negligible_rows()
    assert curvature._left_out is None


# --- coordinates and the objective ---------------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_coordinates_there_and_back(intercept, offset):
    problem = Problem(intercept=intercept, offset=offset)
    coordinates, random = problem.coordinates, generator(3)
    weight = torch.as_tensor(random.normal(size=(CLASSES, WIDTH)))
    bias = torch.as_tensor(random.normal(size=CLASSES)) * intercept
    there = coordinates.parameters(weight, bias)
    logits = problem.X @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(problem.u @ there.numpy().T, logits, atol=1e-11 * (1 + offset))
    back = coordinates.head(there)
    torch.testing.assert_close(back[0], weight, atol=1e-12, rtol=0)
    torch.testing.assert_close(back[1], bias, atol=1e-12 * (1 + offset), rtol=0)
    assert there[:, :WIDTH].norm() == pytest.approx(float(weight.norm()), rel=1e-13)  # the penalty is the same


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_axes_are_those_of_the_covariance(offset):
    problem = Problem(offset=offset)
    weights = problem.weights.numpy()
    np.testing.assert_allclose(problem.coordinates.mean, weights @ problem.X, rtol=1e-13, atol=1e-14)
    moment = (problem.u.T * weights) @ problem.u
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-11)
    expected = np.linalg.eigvalsh(np.cov(problem.X.T, aweights=weights, ddof=0))
    np.testing.assert_allclose(np.diag(moment)[:WIDTH], expected, rtol=1e-9)


@pytest.mark.parametrize("intercept", [True, False])
def test_fewer_rows_than_features_are_turned_into_their_span(intercept):
    random = generator(0)
    X = random.normal(size=(6, 20)) + 5.0
    source, weights = to_source(X, np.arange(6) % 3), torch.full((6,), 1 / 6, dtype=torch.float64)
    coordinates = find_coordinates(source, weights, 3, intercept=intercept, rows_at_once=4)
    basis, centred = coordinates.basis.numpy(), X - coordinates.mean.numpy()
    assert basis.shape == (20, 6)
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-13)
    np.testing.assert_allclose(centred @ basis @ basis.T, centred, atol=1e-12)
    np.testing.assert_allclose(coordinates.mean, X.mean(0) if intercept else np.zeros(20), atol=1e-14)
    out = torch.empty(6, coordinates.size, dtype=torch.float64)
    coordinates.turned_into(out, torch.as_tensor(X))
    np.testing.assert_allclose(out[:, :6], centred @ basis, atol=1e-13)


def test_gradients_are_turned_by_the_transpose():
    for basis in (None, torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]):
        ones = torch.ones(WIDTH + 1, dtype=torch.float64)
        coordinates = Coordinates(torch.randn(WIDTH, dtype=torch.float64), basis, True, ones, ones < 0)
        parameters = torch.randn(CLASSES, WIDTH + 1, dtype=torch.float64)
        of_weight, of_bias = torch.randn(CLASSES, WIDTH, dtype=torch.float64), torch.randn(CLASSES, dtype=torch.float64)
        weight, bias = coordinates.about_mean(parameters)
        expected = (weight * of_weight).sum() + (bias * of_bias).sum()
        torch.testing.assert_close((coordinates.from_mean(of_weight, of_bias) * parameters).sum(), expected)


# The formulas of the losses, written anew; of a list, the unlisted classes are one outcome.
def formula(loss, log_p, y, kind):
    if kind == "top_k":
        listed = (y > 0).double()
        rest, of_rest = 1 - y.sum(1), (log_p.exp() * (1 - listed)).sum(1)
        y, log_p = torch.cat([y, rest[:, None]], 1), torch.cat([log_p * listed, of_rest.log()[:, None]], 1)
    if loss == "cross_entropy":
        return -(y * log_p).sum(1)
    if loss == "forward_kl":
        return -(y * log_p).sum(1) + torch.xlogy(y, y).sum(1)
    p = log_p.exp()
    if loss == "reverse_kl":
        return (p * (log_p - y.log())).sum(1)
    mean = (p + y) / 2
    return 0.5 * (torch.xlogy(y, y) - torch.xlogy(y, mean) + p * log_p - torch.xlogy(p, mean)).sum(1)


CASES = [(loss, kind) for loss in LOSS_NAMES for kind in KINDS if (loss, kind) not in {("reverse_kl", "labels"), ("reverse_kl", "top_k"), ("js", "top_k")}]  # fmt: skip


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("loss", "kind"), CASES)
def test_the_objective_and_its_gradients(loss, kind, intercept):
    problem = Problem(kind, intercept=intercept)
    objective = Objective(problem.problem(loss), problem.coordinates)
    kept = np.zeros((ROWS, CLASSES))
    point = objective.at(problem.parameters, lambda start, p: kept.__setitem__(slice(start, start + len(p)), p.numpy()))
    np.testing.assert_allclose(kept, problem.p, atol=1e-14)

    def value(weight, bias):
        log_p = torch.log_softmax(torch.as_tensor(problem.X) @ weight.T + bias, 1)
        losses = formula(loss, log_p, torch.as_tensor(problem.y), kind)
        return (problem.weights * losses).sum() + 0.5 * PENALTY * weight.square().sum()

    head = [tensor.requires_grad_() for tensor in problem.coordinates.head(problem.parameters)]
    expected = value(*head)
    of_head = torch.autograd.grad(expected, head)
    largest = max(float(gradient.abs().max()) for gradient in (of_head if intercept else of_head[:1]))
    leaf = problem.parameters.clone().requires_grad_()
    (of_parameters,) = torch.autograd.grad(value(*problem.coordinates.head(leaf)), leaf)
    assert point.value == pytest.approx(expected.item(), rel=1e-13)
    assert point.gradient_max == pytest.approx(largest, rel=1e-11)
    torch.testing.assert_close(point.gradient, of_parameters, atol=1e-13, rtol=1e-11)


# --- approximate inverses and conjugate gradients -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_eigenbasis_is_exact_where_all_rows_have_the_same_probabilities(kind):
    problem = Problem(kind)
    problem.parameters[:, :WIDTH] = 0.0
    problem.p = np.exp(log_softmax(problem.u @ problem.parameters.numpy().T, 1))
    inverse = Eigenbasis(problem.curvature())
    x = torch.randn_like(problem.parameters)
    x -= x.mean(0)  # the same change in all classes has no curvature in the intercept
    product = torch.as_tensor(problem.dense() @ x.numpy().ravel()).view_as(x)
    found = inverse(product)
    found[:, -1] -= found[:, -1].mean()
    torch.testing.assert_close(found, x, atol=1e-11, rtol=0)


OF_MATRICES = CLASSES * (WIDTH + 1) ** 2 * 8  # bytes of the blocks of the classes as matrices


def class_blocks(curvature):
    return ClassBlocks(curvature, 2**28)


def blocks_of_three_rows(curvature):
    return ClassBlocks(curvature, OF_MATRICES - 1)


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(preconditioner, "FEWEST_FACTORED", 1)


def of_classes(matrix, size):
    """The blocks of the classes of a matrix, which has nothing beside them."""
    matrix = matrix.reshape(CLASSES, size, CLASSES, size)
    for k in range(CLASSES):
        assert not np.delete(matrix[k], k, 1).any()
    return np.stack([matrix[k, :, k] for k in range(CLASSES)])


@pytest.mark.parametrize("memory", [OF_MATRICES, 2**28])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_class_blocks_of_all_rows_are_the_true_ones(damping, memory, monkeypatch):
    monkeypatch.setattr(preconditioner, "COVERED", 1.0)
    problem = Problem()
    blocks = ClassBlocks(problem.curvature(damping=damping), memory)
    size = problem.u.shape[1]
    dense = problem.dense(damping).reshape(CLASSES, size, CLASSES, size)
    actual = of_classes(whole(blocks, problem.parameters.shape), size)
    for k in range(CLASSES):
        np.testing.assert_allclose(actual[k] @ dense[k, :, k], np.eye(size), atol=1e-9)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_class_blocks_of_few_rows_have_their_rows_and_the_diagonal_of_all(damping, count, few_rows, monkeypatch):
    monkeypatch.setattr(preconditioner, "COVERED", 1e-3)
    monkeypatch.setattr(preconditioner, "FEWEST_ROWS", count)
    problem = Problem()
    blocks = blocks_of_three_rows(problem.curvature(damping=damping))
    assert blocks.factored
    size = problem.u.shape[1]
    dense = problem.dense(damping).reshape(CLASSES, size, CLASSES, size)
    weights = np.einsum("ncc->nc", problem.of_rows(damping))
    actual = of_classes(whole(blocks, problem.parameters.shape), size)
    for k in range(CLASSES):
        diagonal = np.diag(dense[k, :, k])
        chosen = weights[:, k].argsort()[-count:]
        rows = np.sqrt(weights[chosen, k, None] / diagonal) * problem.u[chosen]
        rest = np.maximum(1.0 - np.square(rows).sum(0), preconditioner.LEAST_REST)
        block = np.sqrt(np.outer(diagonal, diagonal)) * (rows.T @ rows + np.diag(rest))
        np.testing.assert_allclose(actual[k] @ block, np.eye(size), atol=1e-9)


@pytest.mark.parametrize("make", [class_blocks, blocks_of_three_rows])
def test_blocks_of_another_point_have_the_diagonal_of_this_one(make, few_rows, monkeypatch):
    monkeypatch.setattr(preconditioner, "LEAST_REST", 1e-9)
    problem = Problem()
    curvature = problem.curvature(damping=0.5)
    blocks = make(curvature)
    curvature.damping = 0.0
    blocks.rescale(curvature)
    size = problem.u.shape[1]
    inverses = of_classes(whole(blocks, problem.parameters.shape), size)
    diagonal = np.diag(problem.dense(0.0)).reshape(CLASSES, size)
    np.testing.assert_allclose(np.stack([np.diag(np.linalg.inv(each)) for each in inverses]), diagonal, rtol=1e-9)


def test_blocks_of_no_rows_are_the_diagonal():
    # As where all rows are certain, so that their curvature is negligible beside that of the penalty.
    problem = Problem()
    curvature = problem.curvature()
    curvature._left_out = torch.ones(ROWS, dtype=torch.bool)
    actual = whole(ClassBlocks(curvature, 2**28), problem.parameters.shape)
    inverse = whole(lambda x: x / curvature.diagonal(None), problem.parameters.shape)
    np.testing.assert_allclose(np.diag(actual)[:WIDTH], np.diag(inverse)[:WIDTH], rtol=1e-12)
    assert not (actual - np.diag(np.diag(actual))).any()


def test_class_blocks_stay_within_the_memory_budget(run_python):
    # The weights of all rows and classes take 25 MB, the rows of all blocks 32 MB, and vectors of the head 4 MB.
    code = (
        "import torch\n"
        "from bench.measure import extra_peak_of\n"
        "from softcurve.fit.data.row_source import to_source\n"
        "from softcurve.fit.fitting import fit_head\n"
        "from softcurve.fit.solver import newton, preconditioner\n"
        "newton.cost_of_blocks, made = lambda *curvature, **rounded: 0.0, []\n"
        "prepare = preconditioner.ClassBlocks.__init__\n"
        "preconditioner.ClassBlocks.__init__ = lambda *each: made.append(1) or prepare(*each)\n"
        "y = torch.arange(12_000) % 520\n"
        "x = torch.randn(12_000, 60) + torch.randn(520, 60)[y]\n"
        "options = {'C': 1e-3, 'max_iter': 2, 'precision': 'mixed', 'memory_budget': 2**25}\n"
        "fit_head(to_source(x[:520], y[:520]), **options)\n"
        "made.clear()\n"
        "print(len(made), extra_peak_of(lambda: fit_head(to_source(x, y), **options)), len(made))\n"
    )
    _, peak, made = run_python(code).stdout.split()
    assert int(made) > 0
    assert float(peak) < 44


@pytest.mark.parametrize("make", [Eigenbasis, class_blocks, blocks_of_three_rows])
@pytest.mark.parametrize("kind", KINDS)
def test_approximate_inverses_are_symmetric_and_positive(make, kind, few_rows):
    problem = Problem(kind, rows=700, size=3.0)  # more than a block takes
    matrix = whole(make(problem.curvature(damping=0.2)), problem.parameters.shape)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12 * abs(matrix).max())
    assert np.linalg.eigvalsh(matrix).min() > 0.0


def test_class_blocks_bring_certain_rows_nearer_than_the_eigenbasis():
    problem = Problem(rows=200, size=8.0)
    dense = problem.dense(1e-2)
    root = np.linalg.cholesky(dense)
    conditions = []
    for make in (Eigenbasis, class_blocks):
        inverse = whole(make(problem.curvature(damping=1e-2)), problem.parameters.shape)
        values = np.linalg.eigvalsh(root.T @ inverse @ root)
        conditions.append(values.max() / values.min())
    assert conditions[1] < conditions[0]


@pytest.mark.parametrize("inverse", [lambda r: r, lambda r: r / torch.linspace(1, 30, 24, dtype=torch.float64).view(4, 6)], ids=["plain", "diagonal"])  # fmt: skip
def test_conjugate_gradients_solve(inverse):
    root = torch.randn(24, 24, dtype=torch.float64) / 5
    matrix = root @ root.T + torch.diag(torch.linspace(1, 30, 24, dtype=torch.float64))
    gradient = torch.randn(4, 6, dtype=torch.float64)

    def product(v):
        return (matrix @ v.reshape(-1)).view_as(v)

    x, _, foretold = minimise_model(product, inverse, gradient, tol=1e-12)
    expected = -torch.linalg.solve(matrix, gradient.reshape(-1)).view(4, 6)
    torch.testing.assert_close(x, expected, atol=1e-11, rtol=0)
    assert foretold == pytest.approx(float(0.5 * (gradient * expected).sum()), rel=1e-10)
    calls = []
    x, residual, foretold = minimise_model(
        lambda v: calls.append(1) or product(v), inverse, gradient, tol=1e-12, most=2
    )
    torch.testing.assert_close(residual, -gradient - product(x), atol=1e-12, rtol=0)
    assert len(calls) == 2
    assert foretold == pytest.approx(float((gradient * x).sum() + 0.5 * (x * product(x)).sum()), rel=1e-10)
    x, _, _ = minimise_model(
        product, inverse, gradient, tol=0.0, enough=lambda residual, square: float(residual.abs().max()) <= 0.1
    )
    assert 1e-4 < (product(x) + gradient).abs().max() <= 0.1


@pytest.mark.parametrize("rounding_error", [0.0, 1e-3, 0.3, 3.0])
def test_conjugate_gradients_end_at_the_exact_residual(rounding_error):
    root = torch.randn(24, 24, dtype=torch.float64) / 5
    matrix = root @ root.T + torch.diag(torch.linspace(1, 30, 24, dtype=torch.float64))
    noise = torch.randn(24, 24, dtype=torch.float64) / 24**0.5
    gradient, exact_products = torch.randn(24, 1, dtype=torch.float64), []

    def exact(v):
        exact_products.append(1)
        return matrix @ v

    def rough(v):
        return matrix @ (v + rounding_error * (noise @ v))

    rounded = RoundedProduct(rough)
    x, residual, change = minimise_model(exact, lambda r: r, gradient, tol=1e-5, rounded=rounded)
    torch.testing.assert_close(residual, -gradient - matrix @ x, atol=1e-12, rtol=0)
    assert residual.norm() <= 1e-5 * gradient.norm()
    assert change == pytest.approx(float(gradient.T @ x + 0.5 * x.T @ matrix @ x), rel=1e-10)
    assert rounded.accurate == (rounding_error < 0.1)
    assert len(exact_products) <= 7 if rounded.accurate else len(exact_products) > 7


@pytest.mark.parametrize("most", [1, 2, 7, 8])
def test_conjugate_gradients_end_at_the_exact_residual_after_the_most_products(most):
    matrix = torch.diag(torch.linspace(1, 1000, 60, dtype=torch.float64))
    products = []

    def times(v, error=0.0):
        products.append(1)
        return matrix @ v * (1 + error)

    gradient, rounded = torch.ones(60, 1).double(), RoundedProduct(lambda v: times(v, 2.0**-9))
    x, residual, _ = minimise_model(times, lambda r: r, gradient, tol=1e-9, most=most, rounded=rounded)
    torch.testing.assert_close(residual, -gradient - matrix @ x, atol=1e-12, rtol=0)
    assert x.any()
    assert len(products) <= max(most, 2)


def test_a_rounded_product_without_positive_curvature_is_given_up():
    rounded = RoundedProduct(lambda v: -v)
    x, residual, _ = minimise_model(
        lambda v: 2.0 * v, lambda r: r, torch.ones(3, 1).double(), tol=1e-9, rounded=rounded
    )
    torch.testing.assert_close(x, torch.full((3, 1), -0.5, dtype=torch.float64))
    assert not residual.any()
    assert not rounded.accurate


# --- fits ---------------------------------------------------------------------------------------------------------


def largest_gradient(fit, X, labels, classes, C, weights=None, intercept=True):
    """Of the mean objective, in numpy and the head's own terms."""
    weights = np.ones(len(X)) if weights is None else weights
    weight, bias = fit.weight.numpy(), fit.bias.numpy()
    residual = np.exp(log_softmax(X @ weight.T + bias, 1))
    residual[np.arange(len(X)), labels] -= 1.0
    residual *= (weights / weights.sum())[:, None]
    of_weight = residual.T @ X + (2.0 if classes == 2 else 1.0) / (C * weights.sum()) * weight
    return max(abs(of_weight).max(), abs(residual.sum(0)).max() if intercept else 0.0)


def blobs(rows=200, width=8, classes=5, spread=1.0, seed=0):
    random = generator(seed)
    labels = np.arange(rows) % classes
    return random.normal(size=(rows, width)) + spread * random.normal(size=(classes, width))[labels], labels


def hard(name):
    """Rows, labels, the number of classes, and options of the fit."""
    X, labels = blobs()
    if name == "rare classes":
        random = generator(1)
        labels = np.minimum(random.zipf(1.2, 507), 1013) - 1
        return random.normal(size=(507, 123)) + random.normal(size=(1013, 123))[labels], labels, 1013, {"C": 10.0}
    if name == "one feature":
        return X[:, :1], labels, 5, {}
    if name == "a constant feature":
        return np.concatenate([X, np.full((200, 1), 7.0)], 1), labels, 5, {}
    if name == "columns twice":
        return np.concatenate([X, X], 1), labels, 5, {}
    if name == "large":
        return X * 1e4, labels, 5, {}
    if name == "small":
        return X * 1e-4, labels, 5, {"C": 1e6}
    if name == "far from zero":
        return X + 1e4, labels, 5, {}
    if name == "hardly a penalty":
        return X, labels, 5, {"C": 1 / (1e-8 * 200)}
    if name == "a class without weight":
        return X, labels, 5, {"sample_weight": np.where(labels == 3, 0.0, 1.0 + labels)}
    if name == "fewer rows than features":
        return *blobs(30, 100), 5, {}
    if name == "two classes":
        return X, labels % 2, 2, {"C": 0.3}
    if name == "no intercept":
        return X + 2.0, labels, 5, {"fit_intercept": False}
    raise ValueError(name)


NAMES = ["rare classes", "one feature", "a constant feature", "columns twice", "large", "small", "far from zero", "hardly a penalty", "a class without weight", "fewer rows than features", "two classes", "no intercept"]  # fmt: skip


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("precision", ["mixed", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_fits_converge_where_it_is_hard(name, precision):
    X, labels, classes, options = hard(name)
    weights = options.pop("sample_weight", None)
    options = {"C": 1.0} | options
    source = to_source(X, labels, classes=tuple(range(classes)))
    given = None if weights is None else torch.as_tensor(weights)
    fit = fit_head(source, tol=1e-5, precision=precision, sample_weight=given, **options)
    assert fit.converged
    largest = largest_gradient(fit, X, labels, classes, options["C"], weights, options.get("fit_intercept", True))
    rounding = 1e-16 * np.square(X).max()  # of numpy's logits, times the rows
    assert largest <= 1e-5 + rounding
    assert fit.gradient_max == pytest.approx(largest, rel=1e-3, abs=max(rounding, 1e-14))
    assert fit.iterations <= 30


def same_heads(source, others, **options):
    exact = fit_head(source, precision="float64", **options)
    assert exact.converged
    for other in others:
        fit = fit_head(source, **options, **other)
        assert fit.converged
        torch.testing.assert_close(fit.weight, exact.weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(fit.bias, exact.bias, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("without_shape_checks")
def test_the_head_is_the_same_within_a_small_budget():
    random = generator(2)
    X = (random.normal(size=(2400, 900)) + 1.0).astype(np.float32)  # more than half of the least budget
    source = to_source(X, targets("labels", 2400, 6)[0])
    same_heads(source, [{"precision": "mixed"}, {"precision": "mixed", "memory_budget": 2**24}], C=1e-2, tol=1e-8)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("share", [0.5, 3e-3, 0.0])  # all is kept in memory, the features, nothing
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_the_same_in_all_precisions(kind, share, monkeypatch):
    X = (generator(2).normal(size=(600, 20)) + 1.0).astype(np.float32)
    target, _ = targets(kind, 600, 6)
    source = to_source(X, target, class_count=6 if kind == "top_k" else None)
    monkeypatch.setattr(fitting, "FOR_ROWS", share)
    same_heads(source, [{"precision": "mixed", "memory_budget": 2**24}], C=1e-2, tol=1e-8)


def test_fits_say_why_they_ended_and_how_they_got_there():
    X, labels = blobs()
    source = to_source(X, labels)
    steps = []
    fit = fit_head(source, max_iter=2, tol=1e-12, on_step=steps.append)
    assert not fit.converged
    assert fit.reason.startswith("2 steps were not enough; raise max_iter")
    assert fit.history == tuple(steps)
    assert [step.iteration for step in steps] == [0, 1, 2]
    assert fit.iterations == 2
    assert fit.products == steps[-1].products > 0
    assert not fit.separated
    none = fit_head(source, max_iter=0)
    assert none.iterations == 0
    assert not none.weight.any()
    there = fit_head(source, tol=1e-9)
    again = fit_head(source, tol=1e-9, start=(there.weight, there.bias))
    assert again.iterations == 1
    torch.testing.assert_close(again.weight, there.weight, atol=1e-7, rtol=0)


def test_separable_rows_without_a_penalty_are_named():
    X, labels = blobs(60, 3, 3, spread=30.0)
    fit = fit_head(to_source(X, labels), C=math.inf)
    assert fit.separated
    assert fit.weight.isfinite().all()
    overlapping = fit_head(to_source(*blobs(60, 3, 3, spread=0.1)), C=math.inf)
    assert overlapping.converged
    assert not overlapping.separated


def test_rows_without_targets_are_refused():
    with pytest.raises(DataError, match="must have targets"):
        fit_head(to_source(blobs()[0]))
