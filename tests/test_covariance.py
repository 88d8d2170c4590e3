"""Covariances and standard errors of a fitted head, beside statsmodels and dense inverses of autograd's Hessian."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.stats import norm
from torch import Tensor
from torch.nn.functional import softplus

from softcurve import SoftmaxRegression, SoftmaxRegressionCV, TopK
from softcurve.fit import covariance

pandas = pytest.importorskip("pandas")
statsmodels = pytest.importorskip("statsmodels.api")

EXACT = {"tol": 1e-10, "precision": "float64"}


def election() -> tuple[np.ndarray, np.ndarray]:
    data = statsmodels.datasets.anes96.load_pandas()
    return np.asarray(data.exog, dtype=float)[:, 1:], np.asarray(data.endog).astype(int)  # 7 classes


def marriage() -> tuple[np.ndarray, np.ndarray]:
    data = statsmodels.datasets.fair.load_pandas()
    columns = np.asarray(data.exog, dtype=float)[:800]
    return columns[:, 1:], columns[:, 0].astype(int)  # the rating of the marriage, 5 classes


def grades() -> tuple[np.ndarray, np.ndarray]:
    data = statsmodels.datasets.spector.load_pandas()
    return np.asarray(data.exog, dtype=float), np.asarray(data.endog).astype(int)  # 2 classes, 32 rows


@pytest.mark.parametrize("kind", ["hessian", "sandwich"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("load", [election, marriage, grades])
def test_summary_equals_mnlogit(load: Callable[[], tuple[np.ndarray, np.ndarray]], weighted: bool, kind: Any) -> None:
    X, y = load()
    weights = np.random.default_rng(0).integers(0, 4, len(y)) if weighted else np.ones(len(y), dtype=int)
    model = SoftmaxRegression(C=math.inf, **EXACT).fit(X, y, weights)
    result, cov = model.summary(X, y, weights, kind=kind), model.covariance(X, y, weights, kind=kind)
    # MNLogit repeats rows, its base is the first class too, and its coefficients are in the same order, by classes.
    repeated = statsmodels.MNLogit(np.repeat(y, weights), np.repeat(np.c_[X, np.ones(len(X))], weights, axis=0))
    expected = repeated.fit(
        method="newton", tol=1e-12, maxiter=200, disp=0, warn_convergence=False,
        cov_type="nonrobust" if kind == "hessian" else "HC0",
    )  # fmt: skip
    assert result.base_class == model.classes_[0]
    assert result.weight == weights.sum()
    for name, value in {"coefficient": "params", "standard_error": "bse", "z": "tvalues", "p_value": "pvalues"}.items():
        np.testing.assert_allclose(getattr(result, name), np.asarray(getattr(expected, value)).T, rtol=1e-6)
    np.testing.assert_allclose(cov, np.asarray(expected.cov_params()), rtol=1e-6, atol=1e-6 * np.abs(cov).max())
    ends = np.asarray(expected.conf_int()).reshape(*result.low.shape, 2)
    np.testing.assert_allclose(np.stack([result.low, result.high], -1), ends, rtol=1e-6, atol=1e-8)


def problem(rows: int, *, soft: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    X, y = rng.normal(size=(rows, 3)) * [1.0, 30.0, 0.2] + [0.0, 100.0, -1.0], np.arange(rows) % 4
    weights = rng.uniform(0.5, 2.0, rows)
    return X, (rng.dirichlet(np.ones(4), rows) if soft else y), weights


def dense_covariance(
    model: Any, X: np.ndarray, y: np.ndarray, weights: np.ndarray, kind: str, base: int | None
) -> Tensor:
    """The pseudo-inverse of autograd's Hessian of the summed objective, from the coefficients ``(C, d + 1)``."""
    x, w = torch.tensor(X), torch.tensor(weights)
    target = torch.tensor(y) if y.ndim == 2 else torch.nn.functional.one_hot(torch.tensor(y), 4).double()
    if model.fit_intercept:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    parts = [model.coef_, model.intercept_[:, None]] if model.fit_intercept else [model.coef_]
    theta = torch.tensor(np.concatenate(parts, 1)).flatten()

    def losses(theta: Tensor) -> Tensor:
        return -(target * (x @ theta.view(4, -1).T).log_softmax(1)).sum(1)

    def objective(theta: Tensor) -> Tensor:
        return (w * losses(theta)).sum() + theta.view(4, -1)[:, :3].square().sum() / (2 * model.C)

    hessian = torch.autograd.functional.hessian(objective, theta)
    inverse = torch.linalg.pinv(hessian, hermitian=True, rtol=1e-13)
    if kind == "sandwich":
        scores = torch.autograd.functional.jacobian(losses, theta)
        inverse = inverse @ ((scores.T * w) @ scores) @ inverse
    if base is not None:
        contrast = torch.eye(4, dtype=torch.float64)
        contrast[:, base] -= 1.0
        turn = torch.kron(contrast[[k for k in range(4) if k != base]], torch.eye(x.shape[1], dtype=torch.float64))
        inverse = turn @ inverse @ turn.T
    return inverse


# The first two by a matrix over the rows, the last by one over the coefficients.
@pytest.mark.parametrize(("rows", "soft"), [(1, True), (5, False), (60, True)])
@pytest.mark.parametrize("kind", ["hessian", "sandwich"])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("base", [None, 2])
def test_penalised_covariance_is_the_dense_inverse(
    rows: int, soft: bool, kind: Any, intercept: bool, base: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y, weights = problem(rows, soft=soft)
    model = SoftmaxRegression(C=3.0, fit_intercept=intercept, **EXACT).fit(X, y, weights)
    expected = dense_covariance(model, X, y, weights, kind, base)
    result = model.covariance(X, y, weights, kind=kind, base_class=base)
    # One row is fitted exactly by the intercepts, and its scores are zero.
    tolerance = {"rtol": 1e-7, "atol": 1e-9 * float(expected.abs().max()) + 1e-20}
    np.testing.assert_allclose(result, expected, **tolerance)
    if rows < 60:
        monkeypatch.setattr(covariance, "full_covariance", None)
    blocks = model.covariance(X, y, weights, kind=kind, base_class=base, block="class")
    size = X.shape[1] + intercept
    of_classes = expected.view(-1, size, len(expected) // size, size)
    np.testing.assert_allclose(blocks, torch.stack([of_classes[k, :, k] for k in range(len(of_classes))]), **tolerance)
    summary = model.summary(X, y, weights, kind=kind, base_class=base)
    np.testing.assert_allclose(summary.standard_error.ravel() ** 2, expected.diagonal(), **tolerance)


def test_blocks_from_rows_without_a_penalty() -> None:
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(30, 2)) + 100.0, np.arange(30) % 9
    model = SoftmaxRegression(C=math.inf, **EXACT).fit(X, y)
    for kind in ("hessian", "sandwich"):
        full = model.covariance(X, y, kind=kind, base_class=3).reshape(8, 3, 8, 3)
        head, base = model._fitted_head(X, y, None, kind, 3, None)
        kept = [k for k in range(9) if k != base]
        blocks = list(covariance.class_blocks_from_rows(head, kept, base, sandwich=kind == "sandwich"))
        for k, block in enumerate(blocks):
            np.testing.assert_allclose(block, full[k, :, k], rtol=1e-8, atol=1e-10 * np.abs(full[k, :, k]).max())
        assert len(blocks) == 8


def test_two_classes_are_the_difference() -> None:
    X, _, weights = problem(41, soft=False)
    y = np.where(np.arange(41) % 3 == 0, "no", "yes")
    model = SoftmaxRegression(C=0.5, **EXACT).fit(X, y, weights)
    x, sign = torch.tensor(np.c_[X, np.ones(41)]), torch.tensor(np.where(y == "yes", 1.0, -1.0))

    def objective(theta: Tensor) -> Tensor:
        return (torch.tensor(weights) * softplus(-sign * (x @ theta))).sum() + theta[:3].square().sum() / (2 * 0.5)

    theta = torch.tensor(np.r_[model.coef_[0], model.intercept_])
    expected = torch.linalg.inv(torch.autograd.functional.hessian(objective, theta))
    np.testing.assert_allclose(model.covariance(X, y, weights), expected, rtol=1e-8)
    summary = model.summary(X, y, weights)
    assert (summary.classes, summary.base_class) == (("yes",), "no")
    np.testing.assert_array_equal(summary.coefficient[0], theta)
    other = model.summary(X, y, weights, base_class="yes")
    np.testing.assert_array_equal(other.coefficient, -summary.coefficient)
    np.testing.assert_allclose(other.standard_error, summary.standard_error, rtol=1e-12)


def test_units_and_offsets_of_the_features() -> None:
    X, y, weights = problem(80, soft=False)
    plain = SoftmaxRegression(C=math.inf, **EXACT).fit(X, y, weights).summary(X, y, weights)
    moved = X * 1e-3 + 10.0  # a mean of 10,000 units
    model = SoftmaxRegression(C=math.inf, tol=1e-9).fit(moved, y, weights)
    summary = model.summary(moved, y, weights)
    np.testing.assert_allclose(summary.standard_error[:, :3] * 1e-3, plain.standard_error[:, :3], rtol=1e-6)
    # The intercept of the old units is the logit at the old zero, where every feature is 10.
    cov, zero = model.covariance(moved, y, weights, block="class"), np.array([10.0, 10.0, 10.0, 1.0])
    variances = np.einsum("i,kij,j->k", zero, cov, zero)
    np.testing.assert_allclose(variances, plain.standard_error[:, 3] ** 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hessian", "sandwich"])
def test_forms_of_the_rows_agree(kind: Any, tmp_path: Any) -> None:
    X, y, weights = problem(50, soft=False)
    model = SoftmaxRegression(**EXACT).fit(X, y, weights)
    expected = model.covariance(X, y, weights, kind=kind)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    # A label is the distribution of mass one on it; a row of weight zero may hold anything.
    more = np.r_[weights, 0.0], np.r_[X, X[:1] + 1e3], np.r_[y, 0]
    for rows, target, w in ((csr_array(X), y, weights), (mapped, np.eye(4)[y], weights), (more[1], more[2], more[0])):
        np.testing.assert_allclose(model.covariance(rows, target, w, kind=kind), expected, rtol=1e-8, atol=1e-12)
    of_tensor = model.covariance(torch.tensor(X), y, weights, kind=kind)
    assert isinstance(of_tensor, Tensor)
    np.testing.assert_allclose(of_tensor, expected, rtol=1e-12)
    half = torch.tensor(X).bfloat16()
    np.testing.assert_allclose(
        SoftmaxRegression(**EXACT).fit(half, y).covariance(half, y, kind=kind),
        SoftmaxRegression(**EXACT).fit(half.double(), y).covariance(half.double(), y, kind=kind),
        rtol=1e-7, atol=1e-9,
    )  # fmt: skip
    single = SoftmaxRegression().fit(X.astype(np.float32), y, weights)
    result = single.covariance(X.astype(np.float32), y, weights, kind=kind)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


def test_class_weights_and_cross_validation() -> None:
    X, y, weights = problem(60, soft=False)
    balanced = SoftmaxRegression(class_weight={0: 3.0, 2: 0.5}, **EXACT).fit(X, y, weights)
    factors = np.array([3.0, 1.0, 0.5, 1.0])[y]
    expected = dense_covariance(balanced, X, y, weights * factors, "hessian", None)
    np.testing.assert_allclose(balanced.covariance(X, y, weights), expected, rtol=1e-6, atol=1e-9)
    chosen = SoftmaxRegressionCV(Cs=[0.25], cv=2, **EXACT).fit(X, y, weights)
    plain = SoftmaxRegression(C=0.25, **EXACT).fit(X, y, weights)
    np.testing.assert_allclose(chosen.covariance(X, y, weights), plain.covariance(X, y, weights), rtol=1e-6, atol=1e-9)


def test_table() -> None:
    X, y, _ = problem(50, soft=False)
    labels = np.array(["a", "class with a long name", "é", "d"])[y]
    X = pandas.DataFrame(X, columns=["age", "a feature with a long name", "x"])
    model = SoftmaxRegression(**EXACT).fit(X, labels)
    summary = model.summary(X, labels, level=0.9)
    assert summary.features == ("age", "a feature with a long name", "x", "(intercept)")
    text = str(summary)
    assert max(map(len, text.splitlines())) <= 80
    assert text == repr(summary)
    for shown in ("age", "a feature wi…", "class with…", "(intercept)", "low 90 %"):
        assert shown in text
    assert pandas.DataFrame(summary.records()).shape == (16, 8)
    quantile = norm.ppf(0.95)
    np.testing.assert_allclose(summary.high - summary.coefficient, quantile * summary.standard_error, rtol=1e-12)
    np.testing.assert_allclose(summary.coefficient - summary.low, quantile * summary.standard_error, rtol=1e-12)
    np.testing.assert_allclose(summary.p_value, 2 * norm.sf(np.abs(summary.z)), rtol=1e-12)
    records = summary.records()
    assert [(row["class"], row["feature"]) for row in records[3:5]] == [
        ("a", "(intercept)"),
        (model.classes_[1], "age"),
    ]
    assert [row["standard_error"] for row in records] == summary.standard_error.ravel().tolist()
    X, y = np.tile(np.eye(40), (2, 1)), np.tile(np.arange(40), 2)
    assert "1,580 more rows" in str(SoftmaxRegression().fit(X, y).summary(X, y))


def collinear() -> tuple[np.ndarray, np.ndarray]:
    X, y, _ = problem(60, soft=False)
    return np.c_[X, X[:, 0] - 2 * X[:, 2]], y


def constant() -> tuple[np.ndarray, np.ndarray]:
    X, y, _ = problem(60, soft=False)
    return np.c_[X[:, :2], np.full(60, 0.1)], y


@pytest.mark.filterwarnings("ignore:the classes can be separated")
@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (collinear, {"C": math.inf}, "singular at feature 'x3'.*leave it out, or give a smaller C"),
        (constant, {"C": math.inf}, "singular at feature 'x2'"),
        (lambda: (np.eye(4), np.arange(4)), {"C": math.inf}, "can be separated.*give a finite C"),
        (lambda: problem(60, soft=True)[:2], {"loss": "js"}, "maximum-likelihood.*got loss 'js'"),
        (lambda: problem(60, soft=True)[:2], {"loss": "forward_kl", "y": "lists"}, "got loss 'forward_kl'.*top_k"),
    ],
)
def test_no_covariance(data: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    X, y = data()
    if options.pop("y", None):
        y = TopK(torch.tensor(y).topk(2).indices, torch.tensor(y).topk(2).values.log())
    model = SoftmaxRegression(**options).fit(X, y)
    with pytest.raises(ValueError, match=message):
        model.covariance(X, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "robust"}, "kind must be one of 'hessian', 'sandwich', got 'robust'"),
        ({"block": "diagonal"}, "block must be one of 'full', 'class'"),
        ({"base_class": 9}, "base_class must be one of the classes 0, 1, 2, 3; got 9"),
        ({"memory_budget": 5}, "memory_budget must be at least"),
        ({"sample_weight": np.ones(3)}, "sample_weight"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, without_shape_checks: None) -> None:
    X, y, _ = problem(12, soft=False)
    model = SoftmaxRegression().fit(X, y)
    with pytest.raises(ValueError, match=message):
        model.covariance(X, y, **arguments)
    if "block" not in arguments:
        with pytest.raises(ValueError, match=message):
            model.summary(X, y, **arguments)


def test_bad_rows_and_level() -> None:
    X, y, _ = problem(24, soft=False)
    model = SoftmaxRegression().fit(X, y)
    with pytest.raises(ValueError, match="level must be a finite number between 0 and 1, got 95"):
        model.summary(X, y, level=95)
    with pytest.raises(ValueError, match="y must have the classes of the fit, 0, 1, 2, 3; got 0, 1, 2: give"):
        model.summary(X, y % 3)
    with pytest.raises(ValueError, match="X has 2 features"):
        model.summary(X[:, :2], y)
    with pytest.raises(ValueError, match="not fitted"):
        SoftmaxRegression().summary(X, y)
    with pytest.warns(UserWarning, match="gradient at these rows is .* give the X, y and sample_weight of the fit"):
        model.summary(X[:12], y[:12])
    assert model.n_features_in_ == 3


class Reached(Exception):
    """The computation that a budget is for."""


@pytest.mark.filterwarnings("ignore:the largest entry of the gradient")
@pytest.mark.parametrize("kind", ["hessian", "sandwich"])
@pytest.mark.parametrize("call", [{"block": "full"}, {"block": "class"}, {"level": 0.9}])
def test_refusals_name_the_bytes(kind: Any, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(1500, 20)), rng.dirichlet(np.ones(120), 1500)
    model = SoftmaxRegression.from_linear(torch.nn.Linear(20, 120, dtype=torch.float64), memory_budget=2**24)

    def reached(*arguments: Any, **options: Any) -> None:
        raise Reached

    monkeypatch.setattr(covariance, "_inverse_of_hessian", reached)
    monkeypatch.setattr(covariance, "class_blocks_from_rows", reached)
    result = model.summary if "level" in call else model.covariance
    with pytest.raises(ValueError, match="got 16,777,216: raise it") as caught:
        result(X, y, kind=kind, **call)
    needed = int(re.findall("at least ([0-9,]+) bytes", str(caught.value))[0].replace(",", ""))
    with pytest.raises(ValueError, match=f"at least {needed:,} bytes"):
        result(X, y, kind=kind, memory_budget=needed - 1, **call)
    with pytest.raises(Reached):
        result(X, y, kind=kind, memory_budget=needed, **call)


@pytest.mark.parametrize("kind", ["hessian", "sandwich"])  # whose standard errors are small where scores vanish
def test_nearly_separable_classes_are_reported(kind: Any) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 2)), np.arange(60) % 3
    X[y == 0, 0] = -5.0 - rng.random(20)  # the first class is apart, the others are mixed
    model = SoftmaxRegression(C=math.inf, tol=1e-6).fit(X, y)
    with pytest.warns(UserWarning, match="standard error of feature 'x0' is .* give a finite C"):
        model.summary(X, y, kind=kind)


READS_PROC = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
MEMORY = """
import re
from pathlib import Path


def status(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])


def started():
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    return status("VmRSS")
"""


@READS_PROC
@pytest.mark.slow
def test_memory_of_many_classes(run_python: Any) -> None:
    """The full matrix of 202,000 coefficients has 326 GB; one variance is compared with a solution by CG."""
    done = run_python(
        MEMORY
        + dedent("""
        import numpy as np, torch
        from scipy.sparse.linalg import LinearOperator, cg
        from softcurve import SoftmaxRegression
        rng = np.random.default_rng(0)
        X, y = rng.normal(size=(40, 100)), rng.dirichlet(np.full(2000, 0.1), 40)
        model = SoftmaxRegression(C=2.0, tol=1e-6).fit(X, y)
        try:
            model.covariance(X, y)
        except ValueError as error:
            print(error)
        small = X[:, :5], np.arange(40) % 3
        SoftmaxRegression().fit(*small).summary(*small)
        before = started()
        summary = model.summary(X, y, memory_budget=2**26)
        print(status("VmHWM") - before)
        p, x = model.predict_proba(X), np.c_[X, np.ones(40)]

        def product(v):
            v = v.reshape(2000, 101)
            z = x @ v.T
            penalty = np.c_[v[:, :100] / 2.0, np.zeros(2000)]
            return ((p * (z - (p * z).sum(1, keepdims=True))).T @ x + penalty).ravel()

        k, j = 7, 3
        unit = np.zeros((2000, 101))
        unit[k, j] = 1.0
        solution, failed = cg(LinearOperator((202000, 202000), product, dtype=float), unit.ravel(), rtol=1e-10)
        print(failed, solution.reshape(2000, 101)[k, j] / summary.standard_error[k, j] ** 2 - 1.0)
    """)
    )
    refused, grown, cg = done.stdout.strip().splitlines()
    assert "block='class'" in refused
    assert "202,000 coefficients; got 1,073,741,824" in refused
    assert float(grown) < 2**26
    failed, difference = cg.split()
    assert failed == "0"
    assert abs(float(difference)) < 1e-8


@READS_PROC
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "base"), [("hessian", None), ("sandwich", 3)])  # one matrix, and two
def test_memory_of_the_full_matrix(kind: str, base: int | None, run_python: Any) -> None:
    done = run_python(
        MEMORY
        + dedent(f"""
        import warnings, numpy as np, torch
        from softcurve import SoftmaxRegression
        rng, options = np.random.default_rng(0), dict(kind={kind!r}, base_class={base!r})
        X, y = rng.normal(size=(300, 49)), rng.dirichlet(np.ones(60), 300)
        model = SoftmaxRegression.from_linear(torch.nn.Linear(49, 60, dtype=torch.float64), C=2.0)
        warnings.simplefilter("ignore")  # the head is not at the minimum
        small = X[:, :5], np.arange(300) % 5
        SoftmaxRegression().fit(*small).covariance(*small, **options)
        torch.ones(600, 600, dtype=torch.float64) @ torch.ones(600, 600, dtype=torch.float64)
        try:
            model.covariance(X, y, **options, memory_budget=2**24)
        except ValueError as error:
            needed = int(re.findall("at least ([0-9,]+)", str(error))[0].replace(",", ""))
        before = started()
        model.covariance(X, y, **options, memory_budget=needed)
        print(needed, status("VmHWM") - before)
        """)
    )
    needed, grown = map(int, done.stdout.split())
    copies = 2 if kind == "sandwich" else 1
    assert copies * 72e6 < grown < needed < copies * 96e6  # a matrix of 3,000 coefficients takes 72 MB
