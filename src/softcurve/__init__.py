"""Cross-entropy and KL divergence of a linear head and a softmax, with exact first and second derivatives."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from softcurve import curvature, functional, nn, reference, typing
from softcurve.chain import ChainRule, chain_rule
from softcurve.contrastive import contrastive_loss
from softcurve.extras import installed as _installed
from softcurve.extras import needed as _needed
from softcurve.functional import (
    cross_entropy,
    divergence,
    entropy,
    js_divergence,
    kl_divergence,
    softmax_jacobian,
    softmax_jacobian_product,
)
from softcurve.head.row_statistics import HeadStatistics, LossStats
from softcurve.lazy import lazy_logits
from softcurve.linear import (
    linear_cross_entropy,
    linear_distillation,
    linear_divergence,
    linear_js_divergence,
    linear_kl_divergence,
)
from softcurve.linear_softmax import linear_log_probs, linear_topk
from softcurve.losses.class_map import ClassMap
from softcurve.losses.divergences import (
    AlphaDivergence,
    CrossEntropy,
    Divergence,
    ForwardKL,
    JensenShannon,
    Pair,
    ReverseKL,
    SkewKL,
)
from softcurve.losses.low_rank import LowRankWeight
from softcurve.losses.targets import Logits, Probabilities
from softcurve.losses.teacher import LinearTeacher
from softcurve.losses.topk import TopK, TopKCache
from softcurve.losses.topk_writer import TopKWriter

if TYPE_CHECKING:
    from softcurve.fit.cross_validation import SoftmaxRegressionCV
    from softcurve.fit.estimator import SoftmaxRegression

__version__ = "0.1.0"

# They need scikit-learn, which is imported where they are used.
_LAZY = {
    "SoftmaxRegression": "softcurve.fit.estimator",
    "SoftmaxRegressionCV": "softcurve.fit.cross_validation",
}

__all__ = [
    "AlphaDivergence", "ChainRule", "ClassMap", "CrossEntropy", "Divergence", "ForwardKL", "HeadStatistics",
    "JensenShannon", "LinearTeacher", "Logits", "LossStats", "LowRankWeight", "Pair", "Probabilities", "ReverseKL",
    "SkewKL", "SoftmaxRegression", "SoftmaxRegressionCV", "TopK", "TopKCache", "TopKWriter", "chain_rule",
    "contrastive_loss", "cross_entropy", "curvature", "divergence", "entropy", "functional", "js_divergence",
    "kl_divergence", "lazy_logits",
    "linear_cross_entropy", "linear_distillation", "linear_divergence", "linear_js_divergence", "linear_kl_divergence",
    "linear_log_probs", "linear_topk", "nn", "reference", "softmax_jacobian", "softmax_jacobian_product", "typing",
]  # fmt: skip


# A type checker takes the lazy names from the imports above, and must not take any other name for an object.
if not TYPE_CHECKING:
    # A completion and ``import *`` look up each name, and must not end in the error of a missing dependency.
    if not _installed("sklearn", "scipy", "safetensors"):
        __all__ = [name for name in __all__ if name not in _LAZY]

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module 'softcurve' has no attribute {name!r}")
        with _needed(f"softcurve.{name}", "fit"):
            return getattr(_import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """The public names, the lazy ones too; the other modules of the package are internal."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


del TYPE_CHECKING
