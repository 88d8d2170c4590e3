"""Standard errors, bootstrap intervals and the majority baseline, against scipy, scikit-learn and dense targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom, bootstrap, sem
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.source import Share
from softcurve.fit.diagnostics import baseline_scores, diagnose
from softcurve.fit.group import ALONE
from softcurve.fit.losses import target_probability, target_sums
from softcurve.fit.uncertainty import RowGroups, bootstrap_intervals, standard_error
from softcurve.losses.topk import TopK

RNG = np.random.default_rng(4)


def groups_of(losses, correct, shares=1, block=7):
    """The groups of rows that several processes have, in blocks."""
    total, sums = len(losses), 0.0
    for rows in np.array_split(np.arange(total), shares):
        groups = RowGroups(Share(int(rows[0]), len(rows), total, ALONE))
        for start in range(0, len(rows), block):
            here = rows[start : start + block]
            groups.add(start, torch.tensor(losses[here]), torch.tensor(correct[here]))
        sums = groups.sums + sums
    return sums


@pytest.mark.parametrize("shares", [1, 3])
def test_the_standard_error_of_a_mean_is_that_of_scipy(shares):
    losses, correct = RNG.exponential(size=83), RNG.random(83) < 0.7
    groups = groups_of(losses, correct, shares)
    assert groups.sum(1).tolist() == pytest.approx([83, losses.sum(), correct.sum()])
    assert standard_error(groups) == pytest.approx(sem(losses), rel=1e-12)
    assert np.isnan(standard_error(groups_of(losses[:1], correct[:1])))


def test_intervals_are_those_of_scipy_and_of_the_binomial_distribution():
    losses, correct = RNG.exponential(size=150), RNG.random(150) < 0.8
    groups = groups_of(losses, correct)
    intervals = bootstrap_intervals(groups, seed=0)
    assert intervals == bootstrap_intervals(groups, seed=0)
    assert intervals != bootstrap_intervals(groups, seed=1)
    # The bootstrap distribution of an accuracy is known: the ends are within the error of 2000 resamples of its own.
    for end, quantile in zip(intervals.accuracy, (0.025, 0.975), strict=True):
        spread = 4 * np.sqrt(quantile * (1 - quantile) / intervals.resamples)
        low, high = binom.ppf([quantile - spread, quantile + spread], 150, correct.mean()) / 150
        assert low <= end <= high
    expected = bootstrap((losses,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert intervals.loss == pytest.approx(tuple(expected), abs=0.1 * sem(losses))


def test_many_rows_are_resampled_in_groups_with_the_same_error():
    losses, correct = RNG.exponential(size=25_003), RNG.random(25_003) < 0.7
    groups = groups_of(losses, correct, block=999)
    assert groups.shape == (3, 10_000)
    assert set(groups[0].tolist()) == {2.0, 3.0}
    assert standard_error(groups) == pytest.approx(sem(losses), rel=0.03)
    low, high = bootstrap_intervals(groups, seed=0, resamples=400).loss
    assert high - low == pytest.approx(2 * 1.96 * sem(losses), rel=0.15)


def test_a_resample_with_an_infinite_loss_is_infinite():
    losses = np.where(np.arange(50) == 7, np.inf, 1.0)
    low, high = bootstrap_intervals(groups_of(losses, losses < 2), seed=0).loss
    assert (low, high) == (1.0, np.inf)


def rows(count, classes, soft):
    features = RNG.normal(size=(count, 3))
    index = RNG.choice(classes, count, p=np.arange(1, classes + 1) / sum(range(classes + 1)))
    index[:classes] = np.arange(classes)
    return features, RNG.dirichlet(np.full(classes, 0.5), count) if soft else index


def test_the_majority_baseline_of_labels_is_that_of_sklearn():
    (x, y), (held_x, held_y) = rows(90, 4, False), rows(41, 4, False)
    dummy = DummyClassifier(strategy="prior").fit(x, y)
    weight, bias = torch.tensor(RNG.normal(size=(4, 3))), torch.zeros(4, dtype=torch.float64)
    classes = tuple(range(4))
    train = diagnose(to_source(x, y, classes=classes), weight, bias, "cross_entropy")
    held = to_source(held_x, held_y, classes=classes)
    scores = baseline_scores(held, train.frequencies, "cross_entropy", rows_at_once=7)
    assert scores.accuracy == accuracy_score(held_y, dummy.predict(held_x))
    assert scores.loss == pytest.approx(log_loss(held_y, dummy.predict_proba(held_x)), rel=1e-12)
    judged = diagnose(held, weight, bias, "cross_entropy")
    predicted = (held_x @ weight.numpy().T).argmax(1)
    assert judged.balanced_accuracy == pytest.approx(balanced_accuracy_score(held_y, predicted), rel=1e-12)
    absent = baseline_scores(held, torch.tensor([0.0, 0.2, 0.3, 0.5], dtype=torch.float64), "cross_entropy")
    assert absent.loss == np.inf
    assert absent.accuracy == (held_y == 3).mean()


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "reverse_kl", "js"])
def test_the_baseline_of_distributions_is_their_mean(loss):
    x, y = rows(37, 5, True)
    source = to_source(x, y)
    q = diagnose(source, torch.zeros(5, 3), torch.zeros(5), "cross_entropy").frequencies.numpy()
    np.testing.assert_allclose(q, y.mean(0), rtol=1e-12)
    mixed = 0.5 * (y + q)
    kl = {
        "cross_entropy": -(y * np.log(q)).sum(1), "forward_kl": (y * np.log(y / q)).sum(1),
        "reverse_kl": (q * np.log(q / y)).sum(1),
        "js": 0.5 * (y * np.log(y / mixed)).sum(1) + 0.5 * (q * np.log(q / mixed)).sum(1),
    }  # fmt: skip
    assert baseline_scores(source, torch.tensor(q), loss).loss == pytest.approx(kl[loss].mean(), rel=1e-10)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_sums_of_lists_are_those_of_their_probabilities(tail):
    classes = 6
    indices = torch.tensor(np.array([RNG.permutation(classes)[:3] for _ in range(11)]))
    p = torch.tensor(RNG.dirichlet(np.ones(classes), 11))
    log_probs = p.gather(1, indices).log()
    log_probs[2, 1] = -torch.inf  # a filler
    target = TopK(indices, log_probs, tail=tail)
    expected = [target_probability(target, torch.full((11,), k), classes).sum() for k in range(classes)]
    torch.testing.assert_close(target_sums(target, classes), torch.stack(expected), rtol=1e-12, atol=0)
    assert float(target_sums(target, classes).sum()) == pytest.approx(11, rel=1e-12)
