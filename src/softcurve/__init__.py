"""Cross-entropy and KL divergence of a linear head and a softmax, with exact first and second derivatives.

The import itself loads only modules of Python. A public name loads what it needs, such as torch, at its first use, so
that the command line shows its help and completes options without torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from softcurve.extras import installed as _installed
from softcurve.extras import needed as _needed

if TYPE_CHECKING:
    from softcurve import curvature, functional, nn, reference, typing
    from softcurve.chain import ChainRule, chain_rule
    from softcurve.contrastive import contrastive_loss
    from softcurve.fit.cross_validation import SoftmaxRegressionCV
    from softcurve.fit.estimator import SoftmaxRegression
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

__version__ = "0.1.0"

_MODULES = "curvature", "functional", "nn", "reference", "typing"
_OF_FIT = {"fit.cross_validation": "SoftmaxRegressionCV", "fit.estimator": "SoftmaxRegression"}
_NAMES = _OF_FIT | {
    "chain": "ChainRule chain_rule",
    "contrastive": "contrastive_loss",
    "functional": (
        "cross_entropy divergence entropy js_divergence kl_divergence softmax_jacobian softmax_jacobian_product"
    ),
    "head.row_statistics": "HeadStatistics LossStats",
    "lazy": "lazy_logits",
    "linear": ("linear_cross_entropy linear_distillation linear_divergence linear_js_divergence linear_kl_divergence"),
    "linear_softmax": "linear_log_probs linear_topk",
    "losses.class_map": "ClassMap",
    "losses.divergences": "AlphaDivergence CrossEntropy Divergence ForwardKL JensenShannon Pair ReverseKL SkewKL",
    "losses.low_rank": "LowRankWeight",
    "losses.targets": "Logits Probabilities",
    "losses.teacher": "LinearTeacher",
    "losses.topk": "TopK TopKCache",
    "losses.topk_writer": "TopKWriter",
}
_MODULE_OF = {name: f"softcurve.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AlphaDivergence", "ChainRule", "ClassMap", "CrossEntropy", "Divergence", "ForwardKL", "HeadStatistics",
    "JensenShannon", "LinearTeacher", "Logits", "LossStats", "LowRankWeight", "Pair", "Probabilities", "ReverseKL",
    "SkewKL", "SoftmaxRegression", "SoftmaxRegressionCV", "TopK", "TopKCache", "TopKWriter", "chain_rule",
    "contrastive_loss", "cross_entropy", "curvature", "divergence", "entropy", "functional", "js_divergence",
    "kl_divergence", "lazy_logits",
    "linear_cross_entropy", "linear_distillation", "linear_divergence", "linear_js_divergence", "linear_kl_divergence",
    "linear_log_probs", "linear_topk", "nn", "reference", "softmax_jacobian", "softmax_jacobian_product", "typing",
]  # fmt: skip


# A type checker takes the names from the imports above, and must not take any other name for an object.
if not TYPE_CHECKING:
    # A completion and ``import *`` look up each name, and must not end in the error of a missing dependency.
    if not _installed("sklearn", "scipy", "safetensors"):
        __all__ = [name for name in __all__ if name not in _OF_FIT.values()]

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return _import_module(f"softcurve.{name}")  # which the import system sets as an attribute
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'softcurve' has no attribute {name!r}")
        with _needed(f"softcurve.{name}", "fit"):
            value = globals()[name] = getattr(_import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    """The public names, the lazy ones too; the other modules of the package are internal."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


del TYPE_CHECKING
