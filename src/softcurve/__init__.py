"""Cross-entropy and KL divergence of a linear head and a softmax, with exact first and second derivatives."""

from importlib import import_module as _import_module

from softcurve import curvature, functional, nn, reference
from softcurve.chain import ChainRule, chain_rule
from softcurve.functional import (
    cross_entropy,
    entropy,
    js_divergence,
    kl_divergence,
    softmax_jacobian,
    softmax_jacobian_product,
)
from softcurve.linear import linear_cross_entropy, linear_js_divergence, linear_kl_divergence
from softcurve.posed import LossStats
from softcurve.targets import LinearTeacher, Logits, Probabilities, TopK

__version__ = "0.1.0"

# They need scikit-learn, which is imported where they are used.
_LAZY = {
    "SoftmaxRegression": "softcurve.fit.estimator",
    "SoftmaxRegressionCV": "softcurve.fit.cross_validation",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'softcurve' has no attribute {name!r}")
    return getattr(_import_module(_LAZY[name]), name)


__all__ = [
    "ChainRule",
    "LinearTeacher",
    "Logits",
    "LossStats",
    "Probabilities",
    "SoftmaxRegression",
    "SoftmaxRegressionCV",
    "TopK",
    "chain_rule",
    "cross_entropy",
    "curvature",
    "entropy",
    "functional",
    "js_divergence",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_js_divergence",
    "linear_kl_divergence",
    "nn",
    "reference",
    "softmax_jacobian",
    "softmax_jacobian_product",
]
