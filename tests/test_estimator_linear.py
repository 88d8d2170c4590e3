"""An estimator as a layer of torch, and a layer as an estimator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from softcurve import SoftmaxRegression, SoftmaxRegressionCV

X = np.random.default_rng(0).normal(size=(40, 3))


def labels(classes):
    return np.array(["ant", "bee", "cat"])[np.arange(40) % classes]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_fitted_head_survives_the_way_to_a_layer_and_back(classes, intercept, dtype):
    model = SoftmaxRegression(fit_intercept=intercept).fit(X.astype(dtype), labels(classes))
    layer = model.to_linear()
    assert layer.weight.shape == (classes, 3)
    assert (layer.bias is not None) == intercept
    assert layer.weight.dtype == torch.as_tensor(X.astype(dtype)).dtype
    p = layer(torch.as_tensor(X.astype(dtype))).softmax(-1).detach().numpy()
    np.testing.assert_allclose(p, model.predict_proba(X.astype(dtype)), atol=4 * np.finfo(dtype).eps)

    again = SoftmaxRegression.from_linear(layer, model.classes_)
    assert again.fit_intercept == intercept
    for name in ("coef_", "intercept_", "classes_"):
        assert np.array_equal(getattr(again, name), getattr(model, name)), name
    assert np.array_equal(again.predict_log_proba(X), model.predict_log_proba(X))
    assert again.score(X, labels(classes)) == model.score(X, labels(classes))

    with torch.no_grad():
        layer.weight.zero_()  # a copy
    assert model.coef_.any()
    assert again.coef_.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_predicts_as_itself(dtype):
    head = nn.Linear(3, 5, dtype=dtype)
    model = SoftmaxRegressionCV.from_linear(head)
    assert model.n_features_in_ == 3
    assert model.coef_.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    logits = X @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    np.testing.assert_allclose(model.decision_function(X), logits, rtol=1e-6)
    assert model.predict(X).tolist() == logits.argmax(1).tolist()
    with pytest.raises(ValueError, match="expecting 3 features"):
        model.predict(X[:, :2])


def test_a_warm_start_goes_on_from_a_layer():
    fitted = SoftmaxRegression(tol=1e-9).fit(X, labels(3))
    again = SoftmaxRegression.from_linear(fitted.to_linear(), fitted.classes_, tol=1e-9, warm_start=True)
    assert again.fit(X, labels(3)).n_iter_ < fitted.n_iter_


@pytest.mark.parametrize(
    ("head", "classes", "error", "message"),
    [
        (nn.Linear(3, 1), None, ValueError, "at least 2"),
        (Scaled(3, 2), None, TypeError, "head must compute W e"),
        (
            nn.Linear(3, 2, device="meta"),
            None,
            ValueError,
            r"head must have values, got .*meta.*to_empty\(device='cpu'\)",
        ),
        (nn.Linear(3, 2), ["a", "a"], ValueError, "2 distinct labels.*got 1 distinct ones"),
        (nn.Linear(3, 2), ["a", "b", "c"], ValueError, r"got 3 distinct ones of shape \(3,\)"),
    ],
)
def test_a_layer_that_is_no_head_is_refused(head, classes, error, message):
    with pytest.raises(error, match=message):
        SoftmaxRegression.from_linear(head, classes)
