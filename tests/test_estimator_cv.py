"""SoftmaxRegressionCV and the path of fits, against the same fits one by one and against scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, make_scorer, zero_one_loss
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler

from softcurve import SoftmaxRegression, SoftmaxRegressionCV, TopK
from softcurve.fit import DataError
from softcurve.fit.data.row_source import to_source
from softcurve.fit.fitting import fit_head, regularisation_path

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # hundreds of fits, which test_estimator.py has checked

RNG = np.random.default_rng(0)
IRIS = StandardScaler().fit_transform(load_iris().data), load_iris().target
DIGITS = load_digits().data[:400] / 16.0, load_digits().target[:400]
SOFT = RNG.dirichlet(np.full(4, 0.5), 90)
ROWS = RNG.normal(size=(90, 6)) + np.eye(6)[SOFT.argmax(1)]
WEIGHT = RNG.integers(0, 4, 150).astype(np.float64)
Cs = [1.0, 0.01, 30.0]  # in no order
TIGHT = {"Cs": Cs, "tol": 1e-10, "cv": 3}


def fold_scores(score, X, y, folds, weight=None, **options):
    """A table by scikit-learn's estimator, every fit from nothing."""
    weight = np.ones(len(X)) if weight is None else weight
    scores = np.empty((len(folds), len(Cs)))
    for row, (train, test) in enumerate(folds):
        for column, C in enumerate(Cs):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit = LogisticRegression(C=C, solver="newton-cg", tol=1e-10, max_iter=2000, **options)
                fit.fit(X[train], y[train], weight[train])
            scores[row, column] = score(y[test], fit.predict_proba(X[test]), weight[test])
    return scores


def log_likelihood(y, probabilities, weight):
    return -log_loss(y, probabilities, sample_weight=weight, labels=np.arange(probabilities.shape[1]))


def accuracy(y, probabilities, weight):
    return np.average(probabilities.argmax(1) == y, weights=weight)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weighted"])
@pytest.mark.parametrize("options", [{}, {"class_weight": {0: 3.0}}, {"fit_intercept": False}], ids=str)
def test_scores_are_those_of_fits_one_by_one(weight, options):
    X, y = IRIS
    ours = SoftmaxRegressionCV(**TIGHT, **options).fit(X, y, weight)
    expected = fold_scores(log_likelihood, X, y, list(StratifiedKFold(3).split(X, y)), weight, **options)
    np.testing.assert_allclose(ours.scores_, expected, rtol=1e-5)
    np.testing.assert_allclose(ours.mean_scores_, expected.mean(0), rtol=1e-5)
    assert ours.Cs_.tolist() == Cs
    assert ours.Cs_[expected.mean(0).argmax()] == ours.C_
    refitted = SoftmaxRegression(C=ours.C_, tol=1e-10, **options).fit(X, y, weight)
    np.testing.assert_allclose(ours.coef_, refitted.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.intercept_, refitted.intercept_, atol=1e-6)
    np.testing.assert_allclose(ours.predict_proba(X), refitted.predict_proba(X), atol=1e-7)
    assert ours.objective_ == pytest.approx(refitted.objective_, rel=1e-10)
    assert ours.n_iter_.shape == (1,)
    assert ours.n_iter_[0] >= len(ours.history_) - 1


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weighted"])
@pytest.mark.parametrize("scoring", ["accuracy", make_scorer(zero_one_loss, greater_is_better=False)], ids=["name", "scorer"])  # fmt: skip
def test_scorers_of_scikit_learn(scoring, weight):
    X, y = IRIS
    ours = SoftmaxRegressionCV(**TIGHT, scoring=scoring).fit(X, y, weight)
    expected = fold_scores(accuracy, X, y, list(StratifiedKFold(3).split(X, y)), weight)
    np.testing.assert_allclose(ours.scores_, expected if scoring == "accuracy" else expected - 1.0, atol=1e-12)


def test_a_callable_is_given_a_head_rows_and_labels_by_name():
    names = np.array(["z", "b", "é"])[IRIS[1]]
    ours = SoftmaxRegressionCV(**TIGHT, scoring=lambda head, X, y: float(np.mean(head.predict(X) == y))).fit(
        IRIS[0], names
    )
    by_name = SoftmaxRegressionCV(**TIGHT, scoring="accuracy").fit(*IRIS)
    np.testing.assert_array_equal(ours.scores_, by_name.scores_)
    assert ours.mean_scores_.max() > 0.9
    assert ours.classes_.tolist() == ["b", "z", "é"]


def test_without_refit_the_best_of_the_folds_are_averaged():
    X, y = IRIS
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
    ours = SoftmaxRegressionCV(Cs=Cs, tol=1e-10, cv=folds, refit=False).fit(X, y)
    best = [Cs[column] for column in fold_scores(log_likelihood, X, y, folds).argmax(1)]
    heads = [
        SoftmaxRegression(C=C, tol=1e-10).fit(X[train], y[train]) for C, (train, _) in zip(best, folds, strict=True)
    ]
    np.testing.assert_allclose(ours.C_, np.mean(best))
    np.testing.assert_allclose(ours.coef_, np.mean([head.coef_ for head in heads], 0), atol=1e-6)
    np.testing.assert_allclose(ours.intercept_, np.mean([head.intercept_ for head in heads], 0), atol=1e-6)
    assert ours.predict(X).shape == (150,)


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
def test_distributions_are_scored_by_their_own_loss(loss):
    weight = WEIGHT[:90] + 0.5
    ours = SoftmaxRegressionCV(**TIGHT, loss=loss).fit(ROWS, SOFT, weight)
    for row, (train, test) in enumerate(KFold(3).split(ROWS)):
        for column, C in enumerate(Cs):
            head = SoftmaxRegression(C=C, tol=1e-10).fit(ROWS[train], SOFT[train], weight[train])
            losses = -(SOFT[test] * np.log(head.predict_proba(ROWS[test]))).sum(1)
            if loss == "forward_kl":
                losses += (SOFT[test] * np.log(SOFT[test])).sum(1)
            assert ours.scores_[row, column] == pytest.approx(-np.average(losses, weights=weight[test]), rel=1e-6)


def test_scorers_of_soft_targets_see_the_most_probable_class():
    order = np.argsort(-SOFT, 1)
    lists = TopK(torch.as_tensor(order), torch.as_tensor(np.log(np.take_along_axis(SOFT, order, 1))), tail="bucket")
    for y in (SOFT, lists, torch.as_tensor(SOFT)):
        ours = SoftmaxRegressionCV(**TIGHT, scoring="accuracy").fit(ROWS, y)
        for row, (train, test) in enumerate(KFold(3).split(ROWS)):
            head = SoftmaxRegression(C=30.0, tol=1e-10).fit(ROWS[train], SOFT[train])
            assert ours.scores_[row, 2] == np.mean(head.predict(ROWS[test]) == SOFT[test].argmax(1))


def test_class_weights_of_distributions_do_not_weigh_the_score():
    ours = SoftmaxRegressionCV(**TIGHT, class_weight={0: 5.0}).fit(ROWS, SOFT)
    train, test = next(KFold(3).split(ROWS))
    head = SoftmaxRegression(C=1.0, tol=1e-10, class_weight={0: 5.0}).fit(ROWS[train], SOFT[train])
    likelihood = (SOFT[test] * np.log(head.predict_proba(ROWS[test]))).sum(1).mean()
    assert ours.scores_[0, 0] == pytest.approx(likelihood, rel=1e-6)


def test_a_fold_without_rows_of_a_class_knows_the_class():
    X, y = IRIS[0], IRIS[1].copy()
    y[7] = 3  # one row alone
    folds = list(KFold(3, shuffle=True, random_state=1).split(X))
    (lacking,) = [row for row, (train, _) in enumerate(folds) if 7 not in train]
    ours = SoftmaxRegressionCV(Cs=Cs, tol=1e-6, cv=folds).fit(X, y)
    assert ours.coef_.shape == (4, 4)
    assert np.isfinite(ours.scores_).all()
    others = np.delete(ours.scores_, lacking, 0)
    assert (ours.scores_[lacking] < others.min(0) - 0.2).all()  # each expects what it has seen


def test_rows_that_a_fold_names_twice_weigh_twice():
    X, y = IRIS
    train, test = RNG.integers(0, 150, 150), np.arange(0, 150, 3)
    ours = SoftmaxRegressionCV(**TIGHT | {"cv": [(train, test)]}).fit(X, y)
    expected = fold_scores(log_likelihood, X, y, [(train, test)])
    np.testing.assert_allclose(ours.scores_, expected, rtol=1e-5)
    masks = [(np.bincount(train, minlength=150) > 0, np.arange(150) % 3 == 0)]
    as_masks = SoftmaxRegressionCV(**TIGHT | {"cv": masks}).fit(X, y)
    np.testing.assert_allclose(as_masks.scores_, fold_scores(log_likelihood, X, y, masks), rtol=1e-5)


def test_rows_in_a_file_and_tensors(tmp_path):
    X, y = DIGITS
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)
    options = {"Cs": 3, "tol": 1e-8, "cv": 2}
    arrays, files, tensors = (
        SoftmaxRegressionCV(**options).fit(rows, labels)
        for rows, labels in ((X, y), (mapped, y), (torch.as_tensor(X).float(), torch.as_tensor(y)))
    )
    np.testing.assert_allclose(arrays.Cs_, [1e-4, 1.0, 1e4])
    np.testing.assert_allclose(files.scores_, arrays.scores_, rtol=1e-6)
    np.testing.assert_allclose(files.coef_, arrays.coef_, atol=1e-5)
    assert tensors.coef_.dtype == torch.float32
    np.testing.assert_allclose(tensors.scores_, arrays.scores_, rtol=1e-3)
    assert isinstance(tensors.predict_proba(torch.as_tensor(X).float()), torch.Tensor)


def test_binary_labels_by_default():
    X, y = IRIS[0][50:], IRIS[1][50:]
    ours = clone(SoftmaxRegressionCV()).fit(X, y)
    assert ours.scores_.shape == (5, 10)
    np.testing.assert_allclose(ours.Cs_, np.logspace(-4, 4, 10))
    assert ours.coef_.shape == (1, 4)
    best = SoftmaxRegression(C=ours.C_, tol=1e-4).fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X), best.predict_proba(X), atol=2e-2)
    assert ours.score(X, y) > 0.9


@pytest.mark.parametrize("wrong", [0, [], [1.0, -1.0], [1.0, np.nan], "10", [[1.0]], 2.5, True], ids=str)
def test_grids_that_cannot_be_used_are_named(wrong):
    with pytest.raises(ValueError, match="Cs must be a list of positive numbers, or how many to try; got"):
        SoftmaxRegressionCV(Cs=wrong).fit(*IRIS)


@pytest.mark.parametrize(("wrong", "message"), [({"cv": []}, "at least once"), ({"scoring": 3}, "scoring must be")])
def test_folds_and_scorers_that_cannot_be_used_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxRegressionCV(Cs=[1.0], **wrong).fit(*IRIS)


def test_folds_without_weight_are_named():
    weight = np.ones(150)
    weight[:50] = 0.0
    folds = [(np.arange(50, 100), np.arange(100, 150)), (np.arange(50, 150), np.arange(50))]
    with pytest.raises(ValueError, match="fold 1 of cv has no row with a positive weight to score"):
        SoftmaxRegressionCV(Cs=2, cv=folds).fit(*IRIS, weight)


def test_fits_to_folds_that_have_not_converged_are_counted():
    with pytest.warns(ConvergenceWarning) as caught:
        SoftmaxRegressionCV(Cs=[1.0], cv=2, max_iter=1).fit(*DIGITS)
    assert len([w for w in caught if "2 of the 2 fits to the folds have not converged" in str(w.message)]) == 1
    assert len(caught) == 2  # and of the last fit


# --- the path -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 5), (12, 40)], ids=["n > d", "n < d"])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_a_path_is_its_fits(shape, fit_intercept):
    X, y = RNG.normal(size=shape), RNG.integers(0, 3, shape[0])
    source, weight = to_source(X, y), torch.as_tensor(WEIGHT[: shape[0]] + 0.5)
    options = {"tol": 1e-10, "fit_intercept": fit_intercept, "sample_weight": weight}
    path = regularisation_path(source, Cs, **options)
    for C, fit in zip(Cs, path, strict=True):
        alone = fit_head(source, C=C, **options)
        assert fit.converged
        torch.testing.assert_close(fit.weight, alone.weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(fit.bias, alone.bias, atol=1e-6, rtol=0)
    norms = [float(path[place].weight.norm()) for place in np.argsort(Cs)]
    assert norms == sorted(norms)


def test_a_path_is_shorter_than_its_fits():
    source, Cs = to_source(*DIGITS), np.logspace(-3, 3, 10).tolist()
    path = regularisation_path(source, Cs, tol=1e-6)
    alone = [fit_head(source, C=C, tol=1e-6) for C in Cs]
    assert sum(fit.products for fit in path) < 0.8 * sum(fit.products for fit in alone)


@pytest.mark.parametrize("wrong", [[], [0.0], [1.0, float("nan")], ["a"]], ids=str)
@pytest.mark.usefixtures("without_shape_checks")
def test_paths_that_cannot_be_walked_are_named(wrong, tmp_path):
    source = to_source(*IRIS)
    with pytest.raises(DataError, match="Cs must be positive numbers"):
        regularisation_path(source, wrong)
    with pytest.raises(DataError, match="checkpoint must be left out of a path"):
        regularisation_path(source, Cs, checkpoint=tmp_path / "state")
