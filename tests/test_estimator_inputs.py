"""What the estimators take: sparse and read-only rows, weights of classes, scorers, groups."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import f1_score, log_loss, make_scorer
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut

from softcurve import SoftmaxRegression, SoftmaxRegressionCV, TopK

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # many small fits, which test_estimator.py has checked

X, Y = load_iris(return_X_y=True)
NAMES = np.array(["01", "1", "x"])[Y]


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "lil", "dok"])
@pytest.mark.parametrize("kind", ["matrix", "array"])
def test_sparse_rows_of_any_form_and_index(kind, form, index):
    rows = getattr(scipy.sparse, f"{form}_{kind}")(np.where(X > 1.0, X, 0.0))
    for name in ("indices", "indptr", "row", "col"):
        if isinstance(getattr(rows, name, None), np.ndarray):
            try:
                setattr(rows, name, getattr(rows, name).astype(index))
            except AttributeError:  # of coo_array, a view of its coordinates
                rows.coords = tuple(each.astype(index) for each in rows.coords)
    dense = SoftmaxRegression(max_iter=4, tol=1e-2).fit(rows.toarray(), Y)
    sparse = SoftmaxRegression(max_iter=4, tol=1e-2).fit(rows, Y)
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-8)
    np.testing.assert_allclose(sparse.predict_proba(rows), dense.predict_proba(rows.toarray()), atol=1e-8)


def readonly(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def test_read_only_arrays_are_taken_without_a_warning():  # the tests make errors of warnings
    soft, weight = 0.9 * np.eye(3)[Y] + 0.1 / 3, np.linspace(1.0, 2.0, 150)
    for target in (Y, NAMES, soft):
        plain = SoftmaxRegression().fit(X, target, weight)
        model = SoftmaxRegression().fit(readonly(X), readonly(target), readonly(weight))
        model.coef_, model.intercept_ = readonly(model.coef_), readonly(model.intercept_)  # as of a mapped file
        for name in ("predict", "predict_proba", "predict_log_proba", "decision_function"):
            np.testing.assert_array_equal(getattr(model, name)(readonly(X)), getattr(plain, name)(X))
        assert model.score(readonly(X), readonly(target), readonly(weight)) == plain.score(X, target, weight)
        assert model.set_params(warm_start=True).fit(readonly(X), readonly(target)).n_iter_[0] >= 1
    cv = SoftmaxRegressionCV(Cs=[1.0], cv=2, scoring="accuracy").fit(readonly(X), readonly(Y), readonly(weight))
    assert cv.score(readonly(X), readonly(Y), readonly(weight)) > 0.9


class OnADevice(torch.Tensor):
    """A tensor whose entries numpy cannot read before ``cpu()``, as those of a CUDA tensor."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def numpy(self):
        raise TypeError("copy the tensor to host memory first")

    __array__ = numpy


@pytest.mark.parametrize("kind", ["labels", "distributions", "lists"])
def test_no_tensor_of_a_device_is_read_where_it_is(kind):
    soft = 0.9 * np.eye(3)[Y] + 0.1 / 3
    lists = torch.as_tensor(np.argsort(-soft)[:, :2].copy()), torch.log(torch.as_tensor(np.sort(soft)[:, :0:-1].copy()))
    arrays = {"labels": Y, "distributions": soft, "lists": TopK(*lists)}
    there = {"labels": as_on_a_device(Y), "distributions": as_on_a_device(soft), "lists": TopK(*map(as_on_a_device, lists))}  # fmt: skip
    weights = np.linspace(0.5, 1.0, 150)
    here = SoftmaxRegression().fit(torch.as_tensor(X), arrays[kind], weights)
    model = SoftmaxRegression(warm_start=True).fit(as_on_a_device(X), there[kind], as_on_a_device(weights))
    torch.testing.assert_close(model.coef_, here.coef_)
    score = model.score(as_on_a_device(X), there[kind], as_on_a_device(weights))
    assert score == here.score(X, arrays[kind], weights)
    model.coef_, model.intercept_ = as_on_a_device(model.coef_), as_on_a_device(model.intercept_)
    torch.testing.assert_close(model.predict_proba(torch.as_tensor(X)).cpu(), here.predict_proba(torch.as_tensor(X)))
    np.testing.assert_allclose(model.predict_proba(X), here.predict_proba(X))
    assert model.fit(as_on_a_device(X), there[kind], as_on_a_device(weights)).n_iter_[0] <= here.n_iter_[0]


def as_on_a_device(array):
    return torch.as_tensor(array).as_subclass(OnADevice)


# --- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "class_weight", "of_index"),
    [
        (NAMES, {"1": 2.0, "01": 0.5}, {0: 0.5, 1: 2.0}),
        (NAMES, {"01": 2.0, "1": 1.0, "x": 3.0}, {0: 2.0, 2: 3.0}),
        (NAMES.astype(object), {"x": 4.0}, {2: 4.0}),
        (NAMES, {1: 2.0}, {1: 2.0}),
        (Y, {np.int64(1): 2.0, 0: 0.5}, {0: 0.5, 1: 2.0}),
        (Y + 0.0, {1: 2.0}, {1: 2.0}),
        (Y, {0: 2.0, 1: 1.0, 2: 1.0, 7: 9.0}, {0: 2.0}),
        (Y > 0, {True: 3.0}, {1: 3.0}),
        (np.eye(3)[Y], {1: 2.0, 0: 0.5}, {0: 0.5, 1: 2.0}),
    ],
    ids=str,
)
def test_class_weights_are_those_of_the_labels_that_they_name(target, class_weight, of_index):
    model = SoftmaxRegression(class_weight=class_weight, tol=1e-8).fit(X, target)
    index = (Y > 0).astype(int) if len(model.classes_) == 2 else Y
    expected = SoftmaxRegression(tol=1e-8).fit(X, index, np.array([of_index.get(k, 1.0) for k in index]))
    np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-6)


@pytest.mark.parametrize("class_weight", [{"1": 2.0}, {7: 1.0}, {0: 1.0, 3: 1.0}], ids=str)
@pytest.mark.parametrize("target", [Y, np.eye(3)[Y]], ids=["labels", "distributions"])
def test_class_weights_of_no_class_are_named(target, class_weight):
    with pytest.raises(ValueError, match=r"class_weight names .*, which is none of the 3 classes \(0, 1, 2\)"):
        SoftmaxRegression(class_weight=class_weight).fit(X, target)


@pytest.mark.parametrize("target", [Y, np.eye(3)[Y], NAMES], ids=["labels", "distributions", "names"])
def test_balanced_weights_of_a_class_without_weight(target):
    weight = np.where(Y == 2, 0.0, 1.0 + Y)
    model = SoftmaxRegression(class_weight="balanced", tol=1e-9).fit(X, target, weight)
    # Of the mass 50 + 100 + 0, each of three classes has 50.
    expected = SoftmaxRegression(tol=1e-9).fit(X, Y, np.where(Y == 2, 0.0, 1.0))
    np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-6)


@pytest.mark.parametrize(("labels", "shown"), [(np.zeros(150, int), "0"), (["a"] * 150, "'a'"), (np.zeros(150, bool), "False")])  # fmt: skip
def test_one_class_is_named_as_it_is_written(labels, shown):
    with pytest.raises(ValueError, match=f"only one class: {shown}$"):
        SoftmaxRegression().fit(X, labels)


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.coo_array])
@pytest.mark.parametrize("use", ["fit", "score"])
def test_sparse_targets_are_refused_by_name(use, form):
    model, target = SoftmaxRegression().fit(X, Y), form(np.eye(3)[Y])
    with pytest.raises(ValueError, match=r"y must be dense.*of shape \(150, 3\): give y.toarray\(\)"):
        getattr(model, use)(X, target)


# --- scorers --------------------------------------------------------------------------------------------------------

# Rows of two classes alone in each part that is scored; the fits know all.
ROWS, LABELS = X[30:], Y[30:]
FOLDS = [(np.arange(10, 120), np.arange(0, 40)), (np.arange(0, 100), np.arange(70, 120))]
BY_NAME = ["neg_log_loss", "neg_brier_score", "top_k_accuracy", "f1_macro", "balanced_accuracy", "matthews_corrcoef"]
SCORERS = {name: name for name in BY_NAME} | {
    "log_loss": make_scorer(log_loss, greater_is_better=False, response_method="predict_proba"),
    "f1_score": make_scorer(f1_score, average="macro"),
    "a function": lambda head, X, y: float(np.mean(head.predict(X) == y)),
}


@pytest.mark.parametrize("labels", [LABELS, NAMES[30:]], ids=["numbers", "names"])
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_scikit_learns_where_a_fold_lacks_a_class(name, labels):
    options = {"Cs": [0.1, 1.0], "cv": FOLDS, "scoring": SCORERS[name], "tol": 1e-8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LogisticRegressionCV(**options, use_legacy_attributes=False, solver="newton-cholesky").fit(
            ROWS, labels
        )
        there = theirs.score(ROWS, labels)
        ours = SoftmaxRegressionCV(**options).fit(ROWS, labels)
        here = ours.score(ROWS, labels), ours.score(torch.as_tensor(ROWS), labels)
    np.testing.assert_allclose(ours.scores_, np.reshape(theirs.scores_, (2, 2)), atol=1e-4)
    assert ours.C_ == theirs.C_
    np.testing.assert_allclose(here, there, atol=1e-4)


def test_scores_that_are_not_defined_are_left_out():
    scoring, folds = (lambda head, X, y: np.nan if len(set(y)) < 3 else head.score(X, y)), FOLDS[:1]
    with pytest.warns(UserWarning, match="is NaN for 2 of the 4 fits to the folds"):
        ours = SoftmaxRegressionCV(Cs=[1e-4, 1.0], cv=[*folds, (np.arange(120), np.arange(120))], scoring=scoring).fit(ROWS, LABELS)  # fmt: skip
    np.testing.assert_array_equal(ours.mean_scores_, ours.scores_[1])
    assert ours.C_ == 1.0
    with pytest.warns(UserWarning, match="is NaN for 2 of the 2 fits"):
        assert SoftmaxRegressionCV(Cs=[1e-4, 1.0], cv=folds, scoring=scoring, refit=False).fit(ROWS, LABELS).C_ == 1e-4


def test_score_is_the_chosen_scorer_and_accuracy_without_one():
    soft, weight = 0.9 * np.eye(3)[Y] + 0.1 / 3, np.linspace(0.0, 1.0, 150)
    chosen = SoftmaxRegressionCV(Cs=[1.0], cv=3, scoring="neg_log_loss").fit(X, soft)
    expected = -log_loss(Y, chosen.predict_proba(X), sample_weight=weight)
    assert chosen.score(X, soft, weight) == pytest.approx(expected, rel=1e-12)
    assert chosen.score(X[:10], Y[:10]) == pytest.approx(np.log(chosen.predict_proba(X[:10])[:, 0]).mean(), rel=1e-12)
    plain = SoftmaxRegressionCV(Cs=[1.0], cv=3).fit(X, Y)
    assert plain.score(X, Y, weight) == np.average(plain.predict(X) == Y, weights=weight)


def test_weights_are_not_given_to_a_scorer_that_takes_none():
    scoring = make_scorer(lambda y, predicted: float(np.mean(y == predicted)))
    ours = SoftmaxRegressionCV(Cs=[1.0], cv=3, scoring=scoring).fit(X, Y, np.linspace(0.1, 1.0, 150))
    assert ours.score(X, Y, np.ones(150)) == np.mean(ours.predict(X) == Y)


@pytest.mark.parametrize("splitter", [GroupKFold(3), LeaveOneGroupOut()], ids=str)
def test_groups_are_kept_together(splitter):
    groups = np.arange(150) // 2 % 5
    folds = list(splitter.split(X, Y, groups))
    ours = SoftmaxRegressionCV(Cs=[0.1, 1.0], cv=splitter, tol=1e-8).fit(X, Y, groups=torch.as_tensor(groups))
    np.testing.assert_array_equal(
        ours.scores_, SoftmaxRegressionCV(Cs=[0.1, 1.0], cv=folds, tol=1e-8).fit(X, Y).scores_
    )
    with pytest.raises(ValueError, match=r"groups must have one entry for each of 150 rows; got \(149,\)"):
        ours.fit(X, Y, groups=groups[1:])
    with pytest.raises(ValueError, match="groups"):
        ours.fit(X, Y)


def test_class_weights_of_numbers_are_scikit_learns():
    for class_weight in ("balanced", {0: 0.5, 2: 3.0}):
        ours = SoftmaxRegression(class_weight=class_weight, tol=1e-9).fit(X, Y, 1.0 + Y)
        theirs = LogisticRegression(class_weight=class_weight, tol=1e-9, solver="newton-cholesky").fit(X, Y, 1.0 + Y)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)
