"""The fit against scikit-learn, against closed forms, and what it says where it does not get there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from softcurve.fit import DataError
from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.source import Source
from softcurve.fit.diagnostics import diagnose
from softcurve.fit.fitting import fit_head

from .gathered import load_rows, split

FEATURES = np.random.default_rng(1).normal(size=(97, 5))
SOFT = np.random.default_rng(2).dirichlet(np.full(4, 0.7), size=97)


def labels(classes: int) -> np.ndarray:
    noise = np.random.default_rng(3).normal(size=(97, classes))
    return (FEATURES[:, :1] * np.arange(classes) + noise).argmax(axis=1)


def labelled(classes: int, features: np.ndarray = FEATURES) -> Source:
    return to_source(features, labels(classes))


def soft() -> Source:
    return to_source(FEATURES, SOFT)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def oracle(features, labels, C, sample_weight=None):
    solver = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    return solver.fit(features, labels, sample_weight)


@pytest.mark.parametrize("C", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
def test_labels_give_the_coefficients_of_scikit_learn(C, loss):
    rows = labelled(classes=4)
    fit = fit_head(rows, C=C, loss=loss, tol=1e-8)
    expected = oracle(FEATURES, labels(4), C)
    assert fit.converged
    np.testing.assert_allclose(fit.weight, expected.coef_, rtol=0, atol=2e-6 * max(C, 1))
    np.testing.assert_allclose(fit.bias, expected.intercept_, rtol=0, atol=2e-6 * max(C, 1))


def test_digits_give_the_coefficients_of_scikit_learn():
    rows, _ = split(load_rows("digits"), 0.8, seed=0)
    fit = fit_head(to_source(rows.features, rows.target), C=0.1, tol=1e-8)
    expected = oracle(rows.features, rows.target, 0.1)
    np.testing.assert_allclose(fit.weight, expected.coef_, rtol=0, atol=1e-4)
    np.testing.assert_allclose(fit.bias, expected.intercept_, rtol=0, atol=1e-4)


# The two rows ±w/2 are penalised by their difference.
def test_two_classes_are_a_logistic_regression_of_the_same_strength():
    rows = labelled(classes=2)
    fit = fit_head(rows, C=0.7, tol=1e-9)
    expected = oracle(FEATURES, labels(2), 0.7)
    np.testing.assert_allclose(fit.weight[1] - fit.weight[0], expected.coef_[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(fit.bias[1] - fit.bias[0], expected.intercept_[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
def test_distributions_are_rows_repeated_with_weights(loss):
    fit = fit_head(soft(), loss=loss, tol=1e-9)
    expected = oracle(FEATURES.repeat(4, axis=0), np.tile(np.arange(4), 97), 1.0, SOFT.ravel())
    np.testing.assert_allclose(fit.weight, expected.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(fit.bias, expected.intercept_, rtol=0, atol=1e-6)


# ∂D(p‖y)/∂z = p ⊙ (log p − log y − D) in closed form.
def test_reverse_kl_ends_where_its_closed_form_gradient_is_zero():
    C = 3.0
    fit = fit_head(soft(), loss="reverse_kl", C=C, tol=1e-8)
    weight, bias = fit.weight.numpy(), fit.bias.numpy()
    p = softmax(FEATURES @ weight.T + bias)
    ratio = np.log(p) - np.log(SOFT)
    divergence = (p * ratio).sum(axis=1, keepdims=True)
    residual = p * (ratio - divergence)
    assert fit.converged
    assert np.abs(residual.T @ FEATURES / 97 + weight / (97 * C)).max() < 1.1e-8
    assert np.abs(residual.mean(axis=0)).max() < 1.1e-8
    assert math.isclose(fit.objective, divergence.mean() + (weight**2).sum() / (2 * 97 * C), rel_tol=1e-12)
    # The two directions differ: each head is the better one by its own measure.
    forward = fit_head(soft(), C=C)
    scores = [diagnose(soft(), head.weight, head.bias, "reverse_kl").loss for head in (fit, forward)]
    assert scores[0] < scores[1] - 1e-3


def test_products_in_float32_end_at_the_same_head():
    rows = labelled(classes=4)
    mixed, double = (fit_head(rows, precision=name, tol=1e-11) for name in ("mixed", "float64"))
    assert mixed.converged
    assert double.converged
    np.testing.assert_allclose(mixed.weight, double.weight, rtol=0, atol=1e-8)


def test_every_step_is_reported_and_none_goes_up():
    steps = []
    fit = fit_head(labelled(classes=3), on_step=steps.append)
    assert [step.iteration for step in steps] == list(range(fit.iterations + 1))
    objectives = [step.objective for step in steps]
    assert objectives == sorted(objectives, reverse=True)
    assert (steps[-1].objective, steps[-1].gradient_max) == (fit.objective, fit.gradient_max)
    assert fit.gradient_max <= 1e-4 < steps[-2].gradient_max


def test_a_small_fit_keeps_to_one_thread_and_gives_the_others_back():
    torch.set_num_threads(2)
    seen = []
    fit_head(labelled(classes=3), max_iter=1, on_step=lambda step: seen.append(torch.get_num_threads()))
    assert (seen, torch.get_num_threads()) == ([1, 1], 2)


def test_too_few_iterations_are_not_called_convergence():
    fit = fit_head(labelled(classes=3), max_iter=1)
    assert not fit.converged
    assert fit.iterations == 1
    assert fit.gradient_max > 1e-4


def test_a_tolerance_below_rounding_is_not_called_convergence():
    fit = fit_head(labelled(classes=3), tol=1e-300, max_iter=10_000)
    assert not fit.converged
    assert fit.gradient_max < 1e-7


def test_a_class_without_rows_counts_and_ends_with_a_small_probability():
    fit = fit_head(to_source(FEATURES, labels(3), classes=(0, 1, 2, 3)))
    assert fit.weight.shape == (4, 5)
    p = softmax(FEATURES @ fit.weight.numpy().T + fit.bias.numpy())
    assert p[:, 3].max() < 1e-3


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "reverse_kl"])
def test_scores_are_the_formulas(loss):
    fit = fit_head(soft(), C=0.1)
    scores = diagnose(soft(), fit.weight, fit.bias, loss)
    p = softmax(FEATURES @ fit.weight.numpy().T + fit.bias.numpy())
    entropy = -(SOFT * np.log(SOFT)).sum(axis=1).mean()
    cross_entropy = -(SOFT * np.log(p)).sum(axis=1).mean()
    reverse = (p * np.log(p / SOFT)).sum(axis=1).mean()
    expected = {"cross_entropy": cross_entropy, "forward_kl": cross_entropy - entropy, "reverse_kl": reverse}
    assert math.isclose(scores.loss, expected[loss], rel_tol=1e-12)
    assert scores.kl is not None
    assert math.isclose(scores.kl, cross_entropy - entropy, rel_tol=1e-12)
    assert scores.accuracy == (p.argmax(axis=1) == SOFT.argmax(axis=1)).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "reverse_kl"}, "loss reverse_kl is infinite for labels"),
        (
            {"loss": "hinge"},
            "loss must be one of cross_entropy, forward_kl, reverse_kl, js, or a Divergence; got 'hinge'",
        ),
        ({"C": 0.0}, "C must be a positive number; got 0.0"),
        ({"C": math.nan}, "C must be a positive number"),
        ({"tol": math.nan}, "tol must be a positive number; got nan"),
        ({"tol": -1.0}, "tol must be a positive number"),
        ({"tol": math.inf}, "tol must be a positive number"),
        ({"max_iter": -1}, "max_iter must be an integer of 0 or more; got -1"),
        ({"start": (torch.zeros(2, 5), torch.zeros(3))}, r"start must be a weight of shape \(3, 5\) and .* \(3,\), as"),
        ({"start": (torch.full((3, 5), math.nan), torch.zeros(3))}, "start must be finite"),
        ({"precision": "half"}, "precision must be auto, mixed or float64"),
        ({"memory_budget": 1000}, "memory_budget must be at least"),
        ({"sample_weight": torch.ones(3)}, "sample_weight must have one entry for each of 97 rows"),
        ({"sample_weight": -torch.ones(97)}, "sample_weight must be finite, not negative"),
        ({"sample_weight": torch.zeros(97)}, "positive somewhere"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        fit_head(labelled(classes=3), **options)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": "1"}, "C must be a positive number; got '1'"),
        ({"C": True}, "C must be a positive number; got True"),
        ({"tol": None}, "tol must be a positive number; got None"),
        ({"max_iter": 1.5}, "max_iter must be an integer of 0 or more; got 1.5"),
        ({"max_iter": True}, "max_iter must be an integer of 0 or more; got True"),
        ({"memory_budget": "1g"}, "memory_budget must be at least .* bytes; got '1g'"),
        ({"checkpoint": Path("c"), "checkpoint_every": math.nan}, "checkpoint_every must be a number of seconds"),
        ({"sample_weight": np.ones(4)}, "sample_weight must have one entry for each of 97 rows"),
    ],
)
def test_options_of_another_type_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        fit_head(labelled(classes=3), **options)


def test_reverse_kl_refuses_a_zero_in_a_target():
    target = SOFT.copy()
    target[[5, 9]] = [0.0, 0.5, 0.25, 0.25]
    with pytest.raises(DataError, match="infinite where a target is zero; the first such row is row 5"):
        fit_head(to_source(FEATURES, target), loss="reverse_kl")


def test_an_overflow_is_an_error():
    with pytest.raises(DataError, match="scale the features"):
        fit_head(labelled(3, FEATURES * 1e200))


def test_what_can_be_separated_is_called_so_without_a_penalty():
    apart = to_source(FEATURES, (FEATURES[:, 0] > 0).astype(int) + (FEATURES[:, 0] > 1))
    fit = fit_head(apart, C=math.inf)
    assert fit.separated
    assert fit.weight.isfinite().all()
    assert not fit_head(labelled(3), C=math.inf).separated
    assert not fit_head(apart).separated
