"""When a fit ends: the same head in all units of the features, for many classes, and from any start."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from softcurve import SoftmaxRegression, TopK
from softcurve.fit import DataError
from softcurve.fit.data.row_source import to_source
from softcurve.fit.fitting import fit_head
from softcurve.fit.solver import newton
from softcurve.fit.solver.preconditioner import ClassBlocks

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # many small fits, which test_solver.py has checked

X, Y = load_iris(return_X_y=True)
SOFT = 0.9 * np.eye(3)[Y] + 0.1 / 3
TOL = 1e-4


def expected(features, labels, **options):
    """scikit-learn's probabilities, of features that have been brought to the scale of 1."""
    features = features / features.std(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(solver="newton-cg", tol=1e-10, max_iter=5000, **options).fit(features, labels)
    return model.predict_proba(features)


UNITS = {"1e-12": 1e-12, "1e-4": 1e-4, "1e6": 1e6, "1e-6 to 1e6": np.logspace(-6, 6, 4), "1e6 to 1e-6": np.logspace(6, -6, 4)}  # fmt: skip


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("units", UNITS)
def test_units_of_the_features_change_nothing_without_a_penalty(units, fit_intercept):
    model = SoftmaxRegression(C=np.inf, fit_intercept=fit_intercept).fit(X * UNITS[units], Y)
    there = expected(X, Y, C=np.inf, fit_intercept=fit_intercept)
    np.testing.assert_allclose(model.predict_proba(X * UNITS[units]), there, atol=3e-2)
    assert model.n_iter_[0] <= 30


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "reverse_kl", "js"])
def test_units_of_the_features_change_nothing_for_distributions(loss):
    heads = [SoftmaxRegression(C=np.inf, loss=loss).fit(X * unit, SOFT) for unit in (1.0, 1e-6)]
    at_one, small = (model.predict_proba(X * unit) for model, unit in zip(heads, (1.0, 1e-6), strict=True))
    np.testing.assert_allclose(small, at_one, atol=3e-2)
    assert heads[1].objective_ == pytest.approx(heads[0].objective_, abs=1e-4)


@pytest.mark.parametrize("kind", ["labels", "distributions", "top_k"])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_many_classes_of_few_rows_are_learned(kind, fit_intercept):
    random = np.random.default_rng(0)
    classes, unit = 400, 0.1
    centres = random.standard_normal((classes, 64))
    rows, labels = (
        np.repeat(centres, 3, 0) + 0.2 * random.standard_normal((3 * classes, 64)),
        np.arange(classes).repeat(3),
    )
    rows *= unit / np.linalg.norm(rows, axis=1, keepdims=True)
    target = {
        "labels": labels,
        "distributions": np.eye(classes)[labels],
        "top_k": TopK(torch.as_tensor(labels)[:, None], torch.zeros(len(labels), 1, dtype=torch.float64)),
    }[kind]
    model = SoftmaxRegression(C=1e3 / unit**2, fit_intercept=fit_intercept).fit(rows, target)
    assert np.mean(model.predict(rows) == labels) > 0.99


def decrement(features, weight, bias, labels, penalty):
    """Half the squared Newton decrement of the mean objective, by the dense Hessian."""
    extended = np.concatenate([features, np.ones((len(features), 1))], 1)
    p = softmax(features @ weight.T + bias, axis=1)
    residual = (p - np.eye(len(bias))[labels]) / len(features)
    gradient = residual.T @ extended
    gradient[:, :-1] += penalty * weight
    jacobians = (np.einsum("nc,ck->nck", p, np.eye(len(bias))) - np.einsum("nc,nk->nck", p, p)) / len(features)
    hessian = np.einsum("nck,ni,nj->cikj", jacobians, extended, extended).reshape(gradient.size, -1)
    hessian += np.diag(np.tile(np.r_[np.full(weight.shape[1], penalty), 0.0], len(bias)))
    scale = 1.0 / np.sqrt(hessian.diagonal())  # the units differ
    scaled = gradient.ravel() * scale
    return 0.5 * scaled @ np.linalg.pinv(scale[:, None] * hessian * scale, rcond=1e-12, hermitian=True) @ scaled


@pytest.mark.parametrize("C", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e3])
def test_a_fit_ends_where_gradient_and_decrement_are_small(unit, C):
    features, penalty = X * unit, unit**2 / (C * len(X))
    fit = fit_head(to_source(features, Y), C=C / unit**2, tol=TOL)
    assert fit.converged
    assert fit.gradient_max <= TOL
    assert fit.iterations >= 1
    assert decrement(features, fit.weight.numpy(), fit.bias.numpy(), Y, penalty) <= TOL


def test_what_is_lacking_is_said():
    with pytest.warns(ConvergenceWarning, match="1 steps were not enough .the gradient is within tol, but a step may"):
        SoftmaxRegression(C=np.inf, max_iter=1, fit_intercept=False).fit(X * 1e-6, Y)


@pytest.mark.parametrize(
    "more",
    [np.full((150, 1), 7.0), np.zeros((150, 2)), X, 1e-6 * X[:, ::-1], X.sum(1, keepdims=True)],
    ids=["constant", "zeros", "copies", "small copies", "a sum"],
)
def test_columns_that_say_nothing_new_change_nothing_without_a_penalty(more):
    model, alone = (SoftmaxRegression(C=np.inf).fit(rows, Y) for rows in (np.concatenate([X, more], 1), X))
    np.testing.assert_allclose(model.predict_proba(np.concatenate([X, more], 1)), alone.predict_proba(X), atol=2e-2)
    assert np.abs(model.coef_).max() <= 2.0 * np.abs(alone.coef_).max()


def test_the_scale_of_the_weights_changes_nothing():
    plain = SoftmaxRegression().fit(X, Y)
    for scale in (1e-150, 1e-8, 1e8):
        model = SoftmaxRegression(C=1.0 / scale).fit(X, Y, np.full(150, scale))
        np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-3)


# --- starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "js"])
@pytest.mark.parametrize("unit", [1e-4, 1e5, 1e8])
def test_a_warm_start_from_afar_is_as_good_as_none(unit, loss):
    target = Y if loss == "cross_entropy" else SOFT
    warm = SoftmaxRegression(warm_start=True, loss=loss, max_iter=200).fit(X, target).fit(X * unit, target)
    cold = SoftmaxRegression(loss=loss, max_iter=200).fit(X * unit, target)
    assert warm.gradient_max_ <= TOL
    np.testing.assert_allclose(warm.predict_proba(X * unit), cold.predict_proba(X * unit), atol=1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300, -1e30])
@pytest.mark.parametrize("name", ["coef_", "intercept_"])
def test_a_warm_start_from_what_is_no_head_is_a_cold_one(name, value):
    warm = SoftmaxRegression(warm_start=True).fit(X, Y)
    cold = warm.coef_.copy()
    setattr(warm, name, getattr(warm, name).copy())
    getattr(warm, name)[0] = value
    np.testing.assert_allclose(warm.fit(X, Y).coef_, cold, atol=1e-12)


def test_a_path_from_a_start_afar_is_that_from_none():
    source, options = to_source(X, Y), {"tol": 1e-8}
    start = torch.full((3, 4), 1e8, dtype=torch.float64).diagonal_scatter(torch.zeros(3)), torch.zeros(3)
    with pytest.raises(DataError, match="start must be finite; leave it out"):
        fit_head(source, start=(start[0] * torch.inf, start[1]))
    fit, cold = fit_head(source, start=start, **options), fit_head(source, **options)
    torch.testing.assert_close(fit.weight, cold.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [1e160, 1e308])
def test_a_step_out_of_range_is_damped(monkeypatch, length):
    solve, calls = newton.minimise_model, []

    def too_long(*operands, **options):
        step, residual, foretold = solve(*operands, **options)
        calls.append(1)
        return (step * length if len(calls) in (1, 3) else step), residual, foretold

    monkeypatch.setattr(newton, "minimise_model", too_long)
    fit = fit_head(to_source(X, Y), tol=1e-8)
    assert fit.converged
    values = [step.objective for step in fit.history]
    assert values[1] == values[0]  # nothing of the first step was within range
    assert fit.history[1].damping > fit.history[0].damping
    log_p = log_softmax(X @ fit.weight.numpy().T + fit.bias.numpy(), axis=1)
    penalty = 0.5 * float(fit.weight.square().sum()) / 150
    assert fit.objective == pytest.approx(penalty - log_p[np.arange(150), Y].mean(), rel=1e-12)


@pytest.mark.parametrize(
    ("cost", "in_vain", "least", "most"),
    [(1e9, 1e9, 2, 4), (1.0, 1e9, 5, 100), (1.0, 0.0, 1, 1)],
    ids=["reused", "computed anew", "given up"],
)
def test_class_blocks_are_reused_replaced_and_given_up(monkeypatch, cost, in_vain, least, most):
    # By what others cost, in products, and by the multiple of the products of the eigenbasis that is in vain.
    options = {"tol": 1e-12, "C": 100.0}
    without, computed, compute = fit_head(to_source(X, Y), **options), [], ClassBlocks.__init__

    def noted(self, *arguments):
        compute(self, *arguments)
        computed.append(self.count)

    monkeypatch.setattr(ClassBlocks, "__init__", noted)
    monkeypatch.setattr(newton, "saved_by_blocks", lambda *step: 2 * cost)
    monkeypatch.setattr(newton, "cost_of_blocks", lambda *blocks, **rounded: cost)
    monkeypatch.setattr(newton, "IN_VAIN", in_vain)
    fit = fit_head(to_source(X, Y), **options)
    assert fit.converged
    # The penalty alone has a curvature of 1 / 15,000 in every direction.
    torch.testing.assert_close(fit.weight, without.weight, atol=3e-8, rtol=0)
    assert least <= len(computed) <= most


def test_rows_are_blamed_for_what_no_step_has_done():
    target = SOFT.copy()
    target[7] = [1.0, 0.0, 0.0]
    with pytest.raises(DataError, match="reverse_kl is infinite where a target is zero; the first such row is row 7"):
        fit_head(to_source(X, target), loss="reverse_kl")
    weights = torch.ones(150)
    weights[7] = 0.0
    assert fit_head(to_source(X, target), loss="reverse_kl", sample_weight=weights, max_iter=300).converged
