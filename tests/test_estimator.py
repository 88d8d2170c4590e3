"""SoftmaxRegression: scikit-learn's contract, and scikit-learn's coefficients."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from softcurve import ForwardKL, ReverseKL, SoftmaxRegression, TopK

RNG = np.random.default_rng(0)


def scaled(load):
    features, labels = load(return_X_y=True)
    return StandardScaler().fit_transform(features), labels


IRIS, CANCER = scaled(load_iris), scaled(load_breast_cancer)
DIGITS = (load_digits().data[:600] / 16.0, load_digits().target[:600])
WEIGHTS = {len(y): RNG.integers(0, 4, len(y)).astype(np.float64) for _, y in (IRIS, CANCER, DIGITS)}
SOFT = RNG.dirichlet(np.full(4, 0.5), 90)
ROWS = RNG.normal(size=(90, 6)) + np.eye(6)[SOFT.argmax(1)]


def theirs(features, labels, weight=None, **options):
    """scikit-learn's fit: newton-cg ends where the gradient of the *sum* is within its tol of zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its line search complains where rounding hides a decrease
        return LogisticRegression(solver="newton-cg", tol=1e-10, max_iter=2000, **options).fit(features, labels, weight)


def close(ours, reference, features):
    assert ours.coef_.shape == reference.coef_.shape
    assert ours.intercept_.shape == reference.intercept_.shape
    scale = max(1.0, np.abs(reference.coef_).max())
    np.testing.assert_allclose(ours.coef_, reference.coef_, atol=1e-4 * scale, rtol=0)
    np.testing.assert_allclose(ours.intercept_, reference.intercept_, atol=1e-4 * scale, rtol=0)
    np.testing.assert_allclose(ours.predict_proba(features), reference.predict_proba(features), atol=1e-5, rtol=0)
    np.testing.assert_array_equal(ours.predict(features), reference.predict(features))


# In a process without the check of annotations: a constructor must take anything, as it is fit that refuses.
@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["SoftmaxRegression()", "SoftmaxRegressionCV(Cs=[1.0], cv=2)"])
def test_scikit_learns_contract(run_python, estimator):
    run_python(
        f"from sklearn.utils.estimator_checks import check_estimator; from softcurve import *\n"
        f"check_estimator({estimator}, on_skip=None)"
    )


# --- the coefficients of scikit-learn -----------------------------------------------------------------------------


@pytest.mark.parametrize("data", [IRIS, CANCER, DIGITS], ids=["iris", "cancer", "digits"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("options", [{}, {"fit_intercept": False}, {"class_weight": "balanced"}], ids=str)
def test_coefficients_are_scikit_learns(data, weighted, options):
    features, labels = data
    weight = WEIGHTS[len(labels)] if weighted else None
    ours = SoftmaxRegression(tol=1e-10, **options).fit(features, labels, weight)
    close(ours, theirs(features, labels, weight, **options), features)
    if not options.get("fit_intercept", True):
        assert not ours.intercept_.any()


@pytest.mark.parametrize("C", [1e-3, 1e-1, 1e2, 1e4])
@pytest.mark.parametrize("data", [IRIS, CANCER], ids=["iris", "cancer"])
def test_coefficients_from_weak_to_strong_penalties(data, C):
    features, labels = data
    close(SoftmaxRegression(C=C, tol=1e-11).fit(features, labels), theirs(features, labels, C=C), features)


def test_coefficients_without_a_penalty_where_the_classes_overlap():
    features, labels = ROWS[:, :2], SOFT.argmax(1)
    ours = SoftmaxRegression(C=np.inf, tol=1e-11).fit(features, labels)
    reference = theirs(features, labels, C=np.inf)
    np.testing.assert_allclose(ours.predict_proba(features), reference.predict_proba(features), atol=1e-6)
    np.testing.assert_allclose(ours.coef_.sum(0), 0.0, atol=1e-8)  # of all heads that are as good, the smallest


def test_class_weights_of_a_dict():
    features, labels = IRIS
    weights = {0: 0.5, 2: 3.0}
    ours = SoftmaxRegression(class_weight=weights, tol=1e-10).fit(features, labels)
    close(ours, theirs(features, labels, class_weight=weights), features)


def test_float32_is_fitted_as_well_and_stays_float32():
    features, labels = DIGITS
    ours = SoftmaxRegression(tol=1e-9).fit(features.astype(np.float32), labels)
    assert ours.coef_.dtype == ours.intercept_.dtype == np.float32
    assert ours.predict_proba(features.astype(np.float32)).dtype == np.float32
    close(ours, theirs(features, labels), features)


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.csc_array])
def test_sparse_rows_give_the_same_head(form):
    features, labels = DIGITS
    dense = SoftmaxRegression(tol=1e-9).fit(features, labels)
    sparse = SoftmaxRegression(tol=1e-9).fit(form(features), labels)
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-7)
    np.testing.assert_allclose(sparse.predict_proba(form(features)), dense.predict_proba(features), atol=1e-7)


def test_binary_shapes_and_signs():
    features, labels = CANCER
    names = np.array(["malignant", "benign"])[labels]  # "benign" sorts first
    ours = SoftmaxRegression(tol=1e-10).fit(features, names)
    assert ours.classes_.tolist() == ["benign", "malignant"]
    assert ours.coef_.shape == (1, 30)
    assert ours.decision_function(features).shape == (len(features),)
    close(ours, theirs(features, names), features)


def test_labels_of_any_kind_are_given_back():
    features, labels = IRIS
    names = np.array(["z", "a b", "é"])[labels]
    assert set(SoftmaxRegression().fit(features, names).predict(features)) == set(names)
    assert set(SoftmaxRegression().fit(features, labels * 10 - 7).predict(features)) == {-7, 3, 13}
    assert SoftmaxRegression().fit(features, labels > 0).predict(features).dtype == bool


# --- soft targets ------------------------------------------------------------------------------------------------


def copies(features, soft, weight):
    """Each row once with every label, weighted by its probability."""
    count, classes = soft.shape
    return np.repeat(features, classes, 0), np.tile(np.arange(classes), count), (soft * weight[:, None]).ravel()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
def test_distributions_weigh_the_copies_of_a_row(classes, loss):
    soft = SOFT[:, :classes] / SOFT[:, :classes].sum(1, keepdims=True)
    weight = WEIGHTS[150][:90] + 0.5
    ours = SoftmaxRegression(loss=loss, tol=1e-11, C=3.0).fit(ROWS, soft, weight)
    close(ours, theirs(*copies(ROWS, soft, weight), C=3.0), ROWS)


def test_class_weights_follow_what_a_member_declares_and_not_its_name():
    of_name, of_member = (
        SoftmaxRegression(loss=loss, class_weight="balanced").fit(ROWS, SOFT) for loss in ("forward_kl", ForwardKL())
    )
    assert np.array_equal(of_name.coef_, of_member.coef_)
    with pytest.raises(ValueError, match="class_weight of distributions is defined for"):
        SoftmaxRegression(loss=ReverseKL(), class_weight="balanced").fit(ROWS, SOFT)


@pytest.mark.parametrize("class_weight", [{0: 2.0, 3: 0.25}, "balanced"])
def test_class_weights_of_distributions_weigh_the_copies(class_weight):
    ours = SoftmaxRegression(class_weight=class_weight, tol=1e-11).fit(ROWS, SOFT)
    close(ours, theirs(*copies(ROWS, SOFT, np.ones(90)), class_weight=class_weight), ROWS)


def test_a_list_of_all_classes_is_the_distribution():
    order = np.argsort(RNG.random((90, 4)), axis=1)
    log_probs = np.log(np.take_along_axis(SOFT, order, 1))
    lists = TopK(torch.as_tensor(order), torch.as_tensor(log_probs), tail="bucket")
    dense, listed = (SoftmaxRegression(tol=1e-10).fit(ROWS, y) for y in (SOFT, lists))
    np.testing.assert_allclose(listed.coef_, dense.coef_, atol=1e-7)
    assert listed.score(ROWS, lists) == dense.score(ROWS, SOFT) == np.mean(dense.predict(ROWS) == SOFT.argmax(1))


# The formulas of the divergences, written anew; y is positive everywhere.
def reverse_kl(log_p, y):
    return (log_p.exp() * (log_p - y.log())).sum(1)


def js(log_p, y):
    log_m = ((log_p.exp() + y) / 2).log()
    return 0.5 * (y * (y.log() - log_m)).sum(1) + 0.5 * (log_p.exp() * (log_p - log_m)).sum(1)


@pytest.mark.parametrize("formula", [reverse_kl, js])
def test_other_losses_end_in_a_minimum(formula):
    loss, C, tol = formula.__name__, 2.0, 1e-7
    weight = torch.as_tensor(WEIGHTS[150][:90] + 0.5)
    features, soft = torch.as_tensor(ROWS), torch.as_tensor(SOFT)

    def objective(flat):
        w, b = flat[:24].view(4, 6), flat[24:]
        losses = formula(torch.log_softmax(features @ w.T + b, 1), soft)
        return (weight * losses).sum() / weight.sum() + 0.5 * w.square().sum() / (C * weight.sum())

    def value_and_gradient(flat):
        leaf = torch.as_tensor(flat).requires_grad_()
        value = objective(leaf)
        value.backward()
        return value.item(), leaf.grad.numpy()

    ours = SoftmaxRegression(loss=loss, C=C, tol=tol).fit(ROWS, SOFT, weight.numpy())
    value, gradient = value_and_gradient(np.concatenate([ours.coef_.ravel(), ours.intercept_]))
    assert np.abs(gradient).max() <= 1.01 * tol
    assert value == pytest.approx(ours.objective_, rel=1e-12)
    shares = np.log(np.average(SOFT, axis=0, weights=weight))
    start = np.concatenate([np.zeros(24), shares - shares.mean()])
    found = scipy.optimize.minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 1e-15, "maxiter": 5000})  # fmt: skip
    assert value <= found.fun + 1e-8


def test_labels_with_js():
    soft = np.eye(3)[IRIS[1]]
    labels, one_hot = (SoftmaxRegression(loss="js", tol=1e-8).fit(IRIS[0], y) for y in (IRIS[1], soft))
    np.testing.assert_allclose(labels.coef_, one_hot.coef_, atol=1e-6)


# --- what comes in and goes out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_come_out_where_tensors_come_in(dtype):
    features, labels = torch.as_tensor(IRIS[0]).to(dtype), torch.as_tensor(IRIS[1])
    ours = SoftmaxRegression(tol=1e-9).fit(features, labels)
    arrays = SoftmaxRegression(tol=1e-9).fit(features.numpy(), labels.numpy())
    for name in ("coef_", "intercept_"):
        assert getattr(ours, name).dtype == dtype
        np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(arrays, name))
    for name in ("decision_function", "predict_proba", "predict_log_proba", "predict"):
        out, expected = getattr(ours, name)(features), getattr(arrays, name)(features.numpy())
        assert isinstance(out, torch.Tensor)
        np.testing.assert_array_equal(out.numpy(), expected)
    assert ours.predict_proba(features).dtype == dtype
    assert ours.score(features, labels) == arrays.score(features.numpy(), labels.numpy())
    assert isinstance(ours.predict_proba(features.numpy()), np.ndarray)


def test_a_data_frame_names_the_features():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(IRIS[0], columns=list("abcd"))
    ours = SoftmaxRegression().fit(frame, pandas.Series(IRIS[1]))
    assert ours.feature_names_in_.tolist() == list("abcd")
    np.testing.assert_array_equal(ours.coef_, SoftmaxRegression().fit(*IRIS).coef_)
    with pytest.raises(ValueError, match="feature names"):
        ours.predict(frame[list("bacd")])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_memory_map_gives_the_same_head(tmp_path, dtype):
    features, labels = DIGITS[0].astype(dtype), DIGITS[1]
    np.save(tmp_path / "x.npy", features)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)
    ours, arrays = (SoftmaxRegression(tol=1e-8).fit(x, labels) for x in (mapped, features))
    assert ours.n_features_in_ == 64
    np.testing.assert_allclose(ours.coef_, arrays.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(mapped), arrays.predict_proba(features), atol=1e-6)
    with pytest.raises(ValueError, match="64 features as input"):
        ours.predict(np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)[:, :7])


def test_a_warm_start_takes_few_steps():
    ours = SoftmaxRegression(warm_start=True, tol=1e-8).fit(*DIGITS)
    cold = ours.n_iter_[0]
    assert ours.fit(*DIGITS).n_iter_[0] == 1
    ours.set_params(C=1.2).fit(*DIGITS)
    assert 0 < ours.n_iter_[0] < cold
    np.testing.assert_allclose(ours.coef_, SoftmaxRegression(C=1.2, tol=1e-8).fit(*DIGITS).coef_, atol=1e-5)
    ours.fit(*IRIS)  # of other classes and features: from the start
    np.testing.assert_array_equal(ours.coef_, SoftmaxRegression(C=1.2, tol=1e-8).fit(*IRIS).coef_)


def test_it_is_cloned_piped_and_searched():
    ours = SoftmaxRegression(C=3.0, loss="js", class_weight={0: 2.0}, memory_budget=2**25)
    assert clone(ours).get_params() == ours.get_params()
    features, labels = load_iris(return_X_y=True)
    pipe = make_pipeline(StandardScaler(), SoftmaxRegression())
    search = GridSearchCV(pipe, {"softmaxregression__C": [1e-3, 1.0]}, cv=3).fit(features, labels)
    assert search.best_params_ == {"softmaxregression__C": 1.0}
    assert search.score(features, labels) > 0.95


def test_the_history_leads_downhill_to_what_is_reported():
    ours = SoftmaxRegression(tol=1e-8).fit(*DIGITS)
    values = [step.objective for step in ours.history_]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(values))
    assert len(values) == ours.n_iter_[0] + 1
    assert values[-1] == ours.objective_
    losses = -np.log(ours.predict_proba(DIGITS[0])[np.arange(600), DIGITS[1]])
    assert ours.objective_ == pytest.approx(losses.mean() + 0.5 * np.square(ours.coef_).sum() / 600, rel=1e-12)


# --- what is warned of, and refused --------------------------------------------------------------------------------


def test_a_loss_without_a_minimum_is_named():
    features, labels = IRIS[0][:100], IRIS[1][:100]  # setosa is far from the others
    with pytest.warns(ConvergenceWarning, match="can be separated"):
        ours = SoftmaxRegression(C=np.inf).fit(features, labels)
    assert np.isfinite(ours.coef_).all()
    assert (ours.predict(features) == labels).all()


def test_too_few_steps_are_warned_of():
    with pytest.warns(ConvergenceWarning, match="1 steps were not enough; raise max_iter"):
        ours = SoftmaxRegression(max_iter=1).fit(*DIGITS)
    assert ours.n_iter_.tolist() == [1]
    assert ours.gradient_max_ > ours.tol


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": 0.0}, "C must be a positive number; got 0.0"),
        ({"C": -1}, "C must be a positive number; got -1"),
        ({"C": np.nan}, "C must be a positive number; got nan"),
        ({"C": "1"}, "C must be a positive number; got '1'"),
        ({"tol": 0.0}, "tol must be a positive number"),
        ({"max_iter": 1.5}, "max_iter must be an integer"),
        (
            {"loss": "hinge"},
            "loss must be one of cross_entropy, forward_kl, reverse_kl, js, or a Divergence; got 'hinge'",
        ),
        ({"loss": "reverse_kl"}, "reverse_kl is infinite for labels"),
        ({"precision": "half"}, "precision must be auto, mixed or float64"),
        ({"memory_budget": 1000}, "memory_budget must be at least"),
        ({"class_weight": {7: 1.0}}, r"class_weight names 7, which is none of the 3 classes \(0, 1, 2\)"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression().set_params(**options).fit(*IRIS)


HOLED = IRIS[0].copy()
HOLED[17, 2] = np.nan


@pytest.mark.parametrize(
    ("features", "target", "weight", "message"),
    [
        (HOLED, IRIS[1], None, "NaN"),
        (IRIS[0], IRIS[1][:-1], None, "inconsistent numbers of samples"),
        (IRIS[0], np.zeros(150), None, "one class: .*0.0"),
        (IRIS[0], IRIS[1] + 0.5, None, "Unknown label type: continuous"),
        (IRIS[0], np.where(IRIS[1] == 0, np.nan, 1.0), None, "NaN"),
        (IRIS[0], None, None, "requires y"),
        (ROWS, 2 * SOFT, None, r"y must sum to 1 in every row; \d+ of rows .* the first, 2, in row"),
        (ROWS, SOFT - 0.5, None, "y must be probabilities; .* in row 0, column"),
        (ROWS, SOFT[:-1], None, "X has 90 rows but y has 89"),
        (IRIS[0], IRIS[1], -np.ones(150), "[Nn]egative"),
        (IRIS[0], IRIS[1], np.zeros(150), "at least one non-zero number"),
        (IRIS[0], IRIS[1], np.ones(149), "sample_weight"),
    ],
)
def test_data_that_cannot_be_used_are_named(features, target, weight, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression().fit(features, target, weight)


def test_rows_of_another_width_are_refused():
    ours = SoftmaxRegression().fit(*IRIS)
    with pytest.raises(ValueError, match="X has 3 features, but SoftmaxRegression is expecting 4"):
        ours.predict(IRIS[0][:, :3])


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_intercept": "no"}, "fit_intercept must be True or False; got 'no'"),
        ({"memory_budget": "1"}, "memory_budget must be at least .* bytes; got '1'"),
        ({"class_weight": "some"}, 'class_weight must be a dict of labels, "balanced" or None'),
        ({"class_weight": {0: -1.0}}, "class_weight must be finite and not negative; that of 0 is -1.0"),
        ({"class_weight": {7: 1.0}}, r"class_weight names 7, which is none of the 3 classes \(0, 1, 2\)"),
    ],
)
def test_options_of_another_kind_are_named(options, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        SoftmaxRegression(**options).fit(rng.normal(size=(20, 3)), rng.dirichlet(np.ones(3), 20))


# Each of Newton's steps gains little here: eight of them were once taken for the end.
def test_slow_progress_is_not_taken_for_the_end():
    rng = np.random.default_rng(215)
    features = 1000 * rng.standard_normal((150, 20))
    labels = (features / 1000 @ rng.standard_normal((20, 3)) + 0.3 * rng.gumbel(size=(150, 3))).argmax(1)
    model = SoftmaxRegression(C=100.0).fit(features, labels)
    expected = LogisticRegression(C=100.0, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(features, labels)
    np.testing.assert_allclose(model.predict_proba(features), expected.predict_proba(features), rtol=0, atol=1e-5)


def test_a_row_without_weight_may_have_an_infinite_loss():
    rng = np.random.default_rng(0)
    features, target = rng.normal(size=(50, 4)), rng.dirichlet(np.ones(3), 50)
    target[0] = [1.0, 0.0, 0.0]
    weights = np.ones(50)
    weights[0] = 0.0
    model = SoftmaxRegression(loss="reverse_kl", tol=1e-8, max_iter=300)
    without = model.fit(features[1:], target[1:]).coef_
    np.testing.assert_allclose(model.fit(features, target, weights).coef_, without, rtol=0, atol=1e-5)


def test_certain_distributions_that_can_be_separated_are_called_so():
    features = np.random.default_rng(0).normal(size=(60, 3))
    with pytest.warns(ConvergenceWarning, match="can be separated"):
        SoftmaxRegression(C=np.inf).fit(features, np.eye(2)[(features[:, 0] > 0).astype(int)])
