"""Fits to sparse rows: the parts of the solver against dense float64, heads of the dense route and of scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.special import log_softmax
from sklearn.datasets import dump_svmlight_file
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from softcurve import SoftmaxRegression, SoftmaxRegressionCV, TopK
from softcurve.cli.main import app
from softcurve.fit import DataError, fitting
from softcurve.fit.data.dataset import SparseRows
from softcurve.fit.data.opening import open_source, open_source_for
from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.source import is_sparse
from softcurve.fit.data.sparse_features import SparseFeatures
from softcurve.fit.data.subset import split_source
from softcurve.fit.diagnostics import diagnose
from softcurve.fit.fitting import coordinates_of, fit_head, regularisation_path
from softcurve.fit.saved_head import SavedHead
from softcurve.fit.solver.coordinates import Coordinates, find_coordinates
from softcurve.fit.solver.curvature import OF_CURVATURE, Curvature
from softcurve.fit.solver.objective import FitProblem, Objective
from softcurve.fit.solver.tiles import SparseTile

from .pairwise import pairwise

ROWS, WIDTH, CLASSES = 67, 23, 4
RNG = np.random.default_rng(0)
X = np.where(RNG.random((ROWS, WIDTH)) < 0.2, RNG.normal(size=(ROWS, WIDTH)), 0.0)
X[:, 5], X[3], X[:, 7] = 0.0, 0.0, 2020.0 + RNG.normal(size=ROWS)  # a column and a row of zeros, and a full column
X[:, 8], X[:, 9] = 1e4, np.where(np.arange(ROWS) == 2, 0.0, 3.0)  # a constant, and one row short of it
LOGITS = X[:, :4] @ RNG.normal(size=(4, CLASSES)) * 3 + (X[:, 7:8] - 2020.0) * RNG.normal(size=CLASSES)
LOGITS += RNG.gumbel(size=LOGITS.shape)
LABELS, SOFT = LOGITS.argmax(1), np.exp(log_softmax(LOGITS, 1))
WEIGHTS = torch.as_tensor(RNG.choice([0.0, 0.5, 3.7], size=ROWS))
KINDS = {
    "labels": LABELS,
    "distributions": SOFT,
    "top_k": TopK(*(part.flip(1) for part in reversed(torch.log_softmax(torch.tensor(LOGITS), 1).topk(2, 1)))),
}


@pytest.fixture(autouse=True)
def _small_sparse_rows(monkeypatch, tmp_path):
    """Small problems stay sparse too, and have several tiles."""
    monkeypatch.setattr("softcurve.fit.data.dataset.SPARSE_SIZE", 0)
    monkeypatch.setattr("softcurve.fit.data.dataset.SPARSE_SHARE", 0)
    monkeypatch.setattr(fitting, "TILE", 1)
    monkeypatch.chdir(tmp_path)


def csr(array=X):
    return scipy.sparse.csr_array(array)


def sparse_source(target=LABELS, rows=X, **options):
    source = to_source(csr(rows), target, **options)
    assert is_sparse(source)
    return source


# --- the parts of the solver -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(0, ROWS), slice(3, 4), slice(4, 4), slice(2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sparse_tile_multiplies_as_the_centred_matrix(dtype, rows):
    mean = X.mean(0)
    tile = SparseTile.centred(SparseFeatures(csr()[rows]), torch.as_tensor(mean), dtype)
    centred = (X - mean)[rows]
    weight, bias = RNG.normal(size=(CLASSES, WIDTH)), RNG.normal(size=CLASSES)
    values, before = RNG.random((len(centred), CLASSES)), RNG.normal(size=(CLASSES, WIDTH))
    as_tensors = [torch.as_tensor(each, dtype=dtype) for each in (weight, bias, values)]
    out, sums = (torch.as_tensor(each, dtype=dtype).clone() for each in (before, bias))
    tile.add_transposed(as_tensors[2], out, sums)
    # The differences of the columns that are not full lose as much as sums of their entries do.
    size = np.abs(centred).max(initial=1.0) * (2 if dtype == torch.float64 else 1)
    near = {"rtol": 0, "atol": size * WIDTH * (1e-15 if dtype == torch.float64 else 2e-7)}
    np.testing.assert_allclose(tile.times(*as_tensors[:2], torch.empty(0)), centred @ weight.T + bias, **near)
    np.testing.assert_allclose(tile.times(as_tensors[0], None, torch.empty(0)), centred @ weight.T, **near)
    many = near | {"atol": near["atol"] * ROWS}
    np.testing.assert_allclose(out, before + values.T @ centred, **many)
    np.testing.assert_allclose(sums, bias + values.sum(0), **many)
    np.testing.assert_allclose(tile.square_sums(as_tensors[2]), values.T @ centred**2, **many)
    np.testing.assert_allclose(tile.row_squares(), (centred**2).sum(1), **many)


def test_a_full_column_far_from_zero_is_centred_before_it_is_rounded():
    far = X.copy()
    far[:, 7] += 1e9
    far[:, 9] = 0.0
    mean = far.mean(0)
    tile = SparseTile.centred(SparseFeatures(csr(far)), torch.as_tensor(mean), torch.float32)
    weight = RNG.normal(size=(CLASSES, WIDTH))
    logits = tile.times(torch.as_tensor(weight, dtype=torch.float32), None, torch.empty(0))
    np.testing.assert_allclose(logits, (far - mean) @ weight.T, atol=1e-4)


@pytest.mark.parametrize("intercept", [True, False])
def test_coordinates_of_sparse_rows(intercept):
    rows, weights = X.copy(), WEIGHTS.numpy() / float(WEIGHTS.sum())
    rows[:, 11] = np.where(weights > 0, 0.3, 0.0)  # constant where it counts
    rows[:, 12] = np.where(weights > 0, 0.0, 5.0)
    source = sparse_source(rows=rows)
    coordinates = find_coordinates(source, torch.as_tensor(weights), CLASSES, intercept=intercept, rows_at_once=10)
    mean = weights @ rows if intercept else np.zeros(WIDTH)
    np.testing.assert_allclose(coordinates.mean, mean, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(coordinates.moments[:WIDTH], weights @ rows**2, rtol=1e-13)
    constant = [5, 8, 11, 12] if intercept else [5, 12]
    assert coordinates.redundant.nonzero()[:, 0].tolist() == constant
    assert coordinates.basis is None


@pytest.mark.parametrize(
    "case", pairwise({"kind": list(KINDS), "intercept": [True, False], "damping": [0.0, 0.7]}), ids=str
)
def test_products_and_diagonals_are_those_of_the_dense_matrix(case):
    kind, intercept, damping = case["kind"], case["intercept"], case["damping"]
    source = sparse_source(KINDS[kind], **({"class_count": CLASSES} if kind == "top_k" else {}))
    weights = WEIGHTS / WEIGHTS.sum()
    coordinates = find_coordinates(source, weights, CLASSES, intercept=intercept, rows_at_once=10)
    problem = FitProblem(source, weights, "cross_entropy", 1e-3, rows_at_once=10)
    curvature = Curvature(problem, coordinates, dtype=torch.float64, memory=2**20)
    parameters = torch.as_tensor(RNG.normal(size=(CLASSES, coordinates.size)) / 10)
    Objective(problem, coordinates).at(parameters, curvature.keep)
    curvature.move_to(parameters)
    curvature.damping = damping

    u = np.column_stack([X - coordinates.mean.numpy(), np.ones(ROWS)])[:, : coordinates.size]
    p = np.exp(log_softmax(u @ parameters.numpy().T, 1))
    if kind == "top_k":
        y = np.zeros_like(p)
        np.put_along_axis(y, KINDS[kind].indices.numpy(), KINDS[kind].log_probs.exp().numpy(), 1)
    else:
        y = np.eye(CLASSES)[LABELS] if kind == "labels" else SOFT
    of_rows = (1 + OF_CURVATURE * damping) * (np.einsum("ij,jk->ijk", p, np.eye(CLASSES)) - p[:, :, None] * p[:, None])
    of_rows += damping * np.einsum("ij,jk->ijk", np.abs(p - y), np.eye(CLASSES))
    dense = np.einsum("i,ijk,ia,ib->jakb", weights.numpy(), of_rows, u, u)
    size = coordinates.size
    for axis in range(WIDTH):
        dense[range(CLASSES), axis, range(CLASSES), axis] += 1e-3
    direction = RNG.normal(size=(CLASSES, size))
    scale = np.abs(dense).max()
    np.testing.assert_allclose(
        curvature(torch.as_tensor(direction)), np.einsum("jakb,kb->ja", dense, direction), atol=1e-12 * scale
    )
    diagonal = np.einsum("jaja->ja", dense)
    np.testing.assert_allclose(curvature.diagonal(None), diagonal, atol=1e-12 * scale)


# --- fits -------------------------------------------------------------------------------------------------------------


FITS = {
    "kind": list(KINDS),
    "loss": ["cross_entropy", "forward_kl", "js"],
    "fit_intercept": [True, False],
    "sample_weight": [None, WEIGHTS],
    "C": [0.3, 30.0],
    "precision": ["mixed", "float64"],
}


@pytest.mark.parametrize("case", pairwise(FITS), ids=lambda case: f"{case['kind']}-{case['loss']}")
def test_heads_of_sparse_and_dense_rows_are_the_same(case):
    kind, how = case["kind"], {name: case[name] for name in FITS if name != "kind"} | {"tol": 1e-9, "max_iter": 300}
    scaled = np.where(X == 0.0, 0.0, X / np.maximum(np.abs(X).max(0), 1e-9))
    options = {"class_count": CLASSES} if kind == "top_k" else {}
    sparse = fit_head(sparse_source(KINDS[kind], scaled, **options), **how)
    dense = fit_head(to_source(scaled, KINDS[kind], **options), **how)
    assert sparse.converged
    assert dense.converged
    np.testing.assert_allclose(sparse.objective, dense.objective, rtol=1e-10)
    np.testing.assert_allclose(sparse.weight, dense.weight, atol=1e-6)
    np.testing.assert_allclose(sparse.bias, dense.bias, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_the_estimator_agrees_with_scikit_learn_and_with_dense_rows(class_weight, dtype):
    rows = np.delete(X, [7, 8], 1).astype(dtype)
    how = {"C": 3.0, "class_weight": class_weight, "tol": 1e-9}
    model = SoftmaxRegression(**how, max_iter=300).fit(csr(rows), LABELS, WEIGHTS)
    theirs = LogisticRegression(**how, solver="newton-cholesky").fit(rows.astype(float), LABELS, WEIGHTS)
    np.testing.assert_allclose(model.coef_, theirs.coef_, atol=2e-6)
    np.testing.assert_allclose(model.intercept_, theirs.intercept_, atol=2e-6)
    assert model.coef_.dtype == dtype
    near = 1e-12 if dtype == np.float64 else 1e-5
    for name in ("decision_function", "predict_proba", "predict_log_proba", "predict"):
        ours, dense = getattr(model, name)(csr(rows)), getattr(model, name)(rows)
        assert ours.dtype == dense.dtype
        np.testing.assert_allclose(ours, dense, atol=near)
    assert model.score(csr(rows), LABELS, WEIGHTS) == model.score(rows, LABELS, WEIGHTS)


def test_two_classes_distributions_with_class_weights_and_no_penalty():
    rows, two = X[:, :4], LABELS > 0
    model = SoftmaxRegression(C=np.inf, tol=1e-9).fit(csr(rows), two)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, solver="newton-cholesky").fit(rows, two)
    np.testing.assert_allclose(model.coef_, theirs.coef_, atol=1e-5)
    weighted = {"class_weight": {0: 2.0, 3: 0.1}, "tol": 1e-9}
    sparse, dense = (SoftmaxRegression(**weighted).fit(each, SOFT) for each in (csr(rows), rows))
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-6)


def test_separable_sparse_rows_without_a_penalty_are_said_to_be():
    fit = fit_head(sparse_source(np.arange(ROWS) % 2, np.eye(ROWS)), C=np.inf)
    assert fit.separated


def test_folds_paths_and_hold_outs_of_sparse_rows():
    rows = np.delete(X, [7, 8], 1)
    sparse, dense = (SoftmaxRegressionCV(Cs=[0.1, 1.0], cv=3, tol=1e-8).fit(each, LABELS) for each in (csr(rows), rows))
    np.testing.assert_allclose(sparse.scores_, dense.scores_, rtol=1e-6)
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-6)
    figures = []
    for source in (sparse_source(rows=rows), to_source(rows, LABELS)):
        train, held = split_source(source, 0.3, 1)
        assert is_sparse(train) == is_sparse(held) == is_sparse(source)
        fits = regularisation_path(train, [0.1, 3.0], tol=1e-9)
        scores = diagnose(held, fits[1].weight, fits[1].bias, "cross_entropy")
        assert scores.hardest_features is not None
        figures.append([fits[0].weight, fits[1].bias, scores.loss, scores.hardest_features])
    for ours, theirs in zip(*figures, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_resumed_fit_ends_where_an_uninterrupted_one_does(tmp_path):
    source, how = sparse_source(), {"C": 30.0, "tol": 1e-8, "precision": "mixed"}
    whole = fit_head(source, **how)
    fit_head(source, **how | {"max_iter": 2}, checkpoint=tmp_path / "state")
    resumed = fit_head(source, **how, checkpoint=tmp_path / "state")
    assert [step.objective for step in resumed.history] == [step.objective for step in whole.history]
    assert torch.equal(resumed.weight, whole.weight)


def test_warm_starts_of_sparse_rows():
    model = SoftmaxRegression(tol=1e-6, warm_start=True).fit(csr(), LABELS)
    steps = model.n_iter_[0]
    assert model.fit(csr(), LABELS).n_iter_[0] < steps


# --- which rows stay sparse, and what they must be --------------------------------------------------------------------


def test_narrow_or_nearly_dense_rows_are_made_dense(monkeypatch):
    monkeypatch.undo()
    wide = scipy.sparse.random_array((300, 4000), density=0.01, format="csr", rng=0)
    assert is_sparse(to_source(wide))
    assert not is_sparse(to_source(wide[:, :40]))
    assert not is_sparse(to_source(scipy.sparse.random_array((300, 4000), density=0.3, format="csr", rng=0)))


def test_entries_at_the_same_place_add_up_and_the_matrix_stays_as_it_is():
    twice = scipy.sparse.csr_array((np.array([1.0, 2.0, 4.0]), np.array([3, 1, 3]), np.array([0, 3, 3])), shape=(2, 5))
    (block,) = to_source(twice).blocks(9)
    np.testing.assert_array_equal(block.features.dense(), [[0.0, 2.0, 0.0, 5.0, 0.0], [0.0] * 5])
    assert twice.nnz == 3


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_entry_that_is_not_finite_is_named(wrong, stays, monkeypatch):
    monkeypatch.setattr("softcurve.fit.data.dataset.SPARSE_SHARE", 0 if stays else 10**9)
    rows = X.copy()
    rows[41, 6] = rows[50, 2] = wrong
    message = rf"features must be finite; (1 entry|2 entries) of rows .* (is|are) wrong, the first, {wrong:g}, in row 41, column 6: drop"
    with pytest.raises(DataError, match=message):
        to_source(csr(rows), LABELS)


def test_wide_rows_take_memory_of_the_order_of_the_head_and_the_entries(run_python):
    # The dense rows would take 1.6 GB in float32. The head has 400,000 parameters, 3.2 MB a vector.
    code = (
        "import numpy as np, scipy.sparse\n"
        "from softcurve import SoftmaxRegression\n"
        "from bench.measure import extra_peak_of\n"
        "rows = scipy.sparse.random_array((2000, 200_000), density=5e-5, format='csr', rng=0)\n"
        "y = np.arange(2000) % 3\n"
        "SoftmaxRegression(tol=1.0).fit(rows[:100], y[:100])\n"
        "model = SoftmaxRegression(tol=1e-3)\n"
        "print(extra_peak_of(lambda: model.fit(rows, y).predict_proba(rows)))\n"
    )
    assert float(run_python(code).stdout) < 250


# --- files and commands -----------------------------------------------------------------------------------------------


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done, json.loads(done.stdout.splitlines()[-1]) if done.exit_code == 0 else None


def write_npz(path, form="csr"):
    scipy.sparse.save_npz(path, getattr(scipy.sparse, f"{form}_matrix")(X))
    np.save("y.npy", LABELS)
    return path, "--target", "y.npy"


def write_svmlight(path):
    dump_svmlight_file(X, LABELS, str(path), zero_based=False, comment="sparse rows")
    return (path,)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia"])
def test_archives_of_every_format(form, tmp_path):
    write_npz(tmp_path / "x.npz", form=form)
    source = open_source(str(tmp_path / "x.npz"), tmp_path / "y.npy")
    np.testing.assert_array_equal(np.vstack([block.features.dense() for block in source.blocks(9)]), X)


@pytest.mark.parametrize(("write", "name"), [(write_npz, "x.npz"), (write_svmlight, "x.svmlight")])
def test_the_commands_take_sparse_files(write, name, tmp_path, monkeypatch):
    monkeypatch.setattr("softcurve.cli.report.render_report", lambda report: "<!DOCTYPE html>")  # takes longest
    data = write(tmp_path / name)
    done, fitted = run("fit", *data, "--tol", "1e-8", "--out", "h.safetensors", "--holdout", 0)
    assert done.exit_code == 0, done.output
    head = SavedHead.load(tmp_path / "h.safetensors")
    expected = fit_head(to_source(X, LABELS), tol=1e-8)
    np.testing.assert_allclose(head.weight, expected.weight, atol=1e-5)
    assert fitted["features"] == WIDTH
    done, predicted = run("predict", "h.safetensors", *data, "--out", "p.npz")
    assert done.exit_code == 0, done.output
    assert predicted["accuracy"] == pytest.approx(fitted["train_accuracy"])
    logits = X @ head.weight.numpy().T + head.bias.numpy()
    with np.load("p.npz") as arrays:
        np.testing.assert_allclose(arrays["probabilities"], np.exp(log_softmax(logits, 1)), atol=1e-10)


def test_shards_of_sparse_files_are_one_matrix(tmp_path):
    for name, suffix in (("npz", "npz"), ("svm", "svmlight")):
        (tmp_path / name).mkdir()
        for number, part in enumerate((slice(0, 20), slice(20, ROWS))):
            path = tmp_path / name / f"{number}.{suffix}"
            if name == "npz":
                scipy.sparse.save_npz(path, csr(X[part, :20]))
            else:
                dump_svmlight_file(X[part, :20], LABELS[part], str(path), zero_based=True)
    np.save("y.npy", LABELS)
    for source in (open_source(str(tmp_path / "npz"), tmp_path / "y.npy"), open_source(str(tmp_path / "svm"))):
        assert is_sparse(source)
        blocks = list(source.blocks(9))
        rows = np.vstack([block.features.dense() for block in blocks])
        np.testing.assert_allclose(rows, X[:, :20], rtol=1e-15)  # the text has 16 digits
        np.testing.assert_array_equal(torch.cat([block.target for block in blocks]), LABELS)


@pytest.mark.parametrize(
    ("text", "width", "columns"),
    [
        ("1 1:2 3:4\n0 2:1\n", None, [[2, 0, 4], [0, 1, 0]]),
        ("1 0:2 3:4\n0 2:1\n", None, [[2, 0, 0, 4], [0, 0, 1, 0]]),
        ("1 0:2\n0\n", 3, [[2, 0, 0], [0, 0, 0]]),
        ("1 1:2 3:4\n0 2:1\n", 3, [[2, 0, 4], [0, 1, 0]]),
        ("# Column indices are one-based\n1 1:2\n0 2:1\n", 3, [[2, 0, 0], [0, 1, 0]]),
        ("# Column indices are zero-based\n1 1:2\n0 2:1\n", 3, [[0, 2, 0], [0, 0, 1]]),
    ],
)
def test_the_first_index_of_an_svmlight_file(text, width, columns, tmp_path):
    path = tmp_path / "x.svm"
    path.write_text(text)
    source = open_source(str(path)) if width is None else open_source_for(str(path), (0, 1), width)
    (block,) = source.blocks(9)
    np.testing.assert_array_equal(block.features.dense(), columns)
    assert block.target.tolist() == [1, 0]


def damaged(path):
    write_npz(path)
    path.write_bytes(path.read_bytes()[:-200])


def out_of_range(path):
    with np.load(write_npz(path)[0]) as archive:
        arrays = dict(archive)
    arrays["indices"][3] = WIDTH
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.npz", damaged, "x.npz cannot be read as an .npz archive"),
        ("x.npz", out_of_range, "x.npz cannot be read as an .npz archive .*: indices must be < 23"),
        ("x.npz", lambda path: scipy.sparse.save_npz(path, csr()), r"has no targets \(it is one sparse matrix\)"),
        ("x.svmlight", lambda path: path.write_text("1 1:2 2:x\n"), "x.svmlight cannot be read as an svmlight file"),
        ("x.svmlight", lambda path: path.write_text("1 -1:2\n"), "x.svmlight cannot be read as an svmlight file"),
        ("x.svmlight", lambda path: path.write_text("1 1:2\n0 2:nan\n"), "in row 1, column 1: drop or fill"),
        ("x.svmlight", lambda path: path.write_text("1\n0\n"), r"is empty, of shape \(2, 0\)"),
        ("x.svmlight", lambda path: path.write_text("1.5 1:2\n0 2:1\n"), "labels of .* not whole numbers"),
        (
            "x.svmlight",
            lambda path: path.write_text("# Column indices are one-based\n1 0:2\n0 2:1\n"),
            "have indices from 0, and a comment says otherwise",
        ),
    ],
)
def test_sparse_files_that_cannot_be_used(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / name), tmp_path / "y.npy" if (tmp_path / "y.npy").exists() else None)


def test_rows_for_a_head_of_another_width_or_of_unknown_first_index(tmp_path):
    (tmp_path / "x.svm").write_text("1 1:2\n0 2:1\n")
    with pytest.raises(DataError, match="does not tell whether the first of 4 columns has the index 0 or 1: write"):
        open_source_for(str(tmp_path / "x.svm"), (0, 1), 4)
    (tmp_path / "x.svm").write_text("1 0:2\n0 7:1\n")
    with pytest.raises(DataError, match=r"must have 4 columns, .*; got 8"):
        open_source_for(str(tmp_path / "x.svm"), (0, 1), 4)


def test_digests_tell_sparse_matrices_apart():
    other = csr()
    other.data = other.data.copy()
    other.data[5] += 1.0
    digests = {SparseRows(each, "x").digest(2**20) for each in (csr(), other, csr(X[:, :-1]))}
    assert len(digests) == 3


def test_coordinates_lay_parameters_out_for_sparse_products():
    none = torch.zeros(3, dtype=torch.float64)
    sparse = Coordinates(none[:2], None, True, none, none.bool(), sparse=True)
    parameters = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    assert sparse.laid_out(parameters).T.is_contiguous()
    torch.testing.assert_close(sparse.parameters(*sparse.head(parameters)), parameters, rtol=0, atol=0)


def test_coordinates_of_dense_rows_do_not_serve_sparse_ones():
    message = (
        f"must be of {WIDTH} sparse features and fit_intercept True; got {WIDTH} dense features and fit_intercept True"
    )
    with pytest.raises(DataError, match=message):
        fit_head(sparse_source(), coordinates=coordinates_of(to_source(X, LABELS)))
