"""Type aliases of the public signatures, for annotating code that passes these arguments on."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

__all__ = ["ChainLoss", "FitLoss", "FitPrecision", "Integer", "KLDirection", "Number", "ReductionKind", "TopKTail"]

Number: TypeAlias = int | float | np.integer[Any] | np.floating[Any] | Tensor
"""A real number from Python or numpy, or a 0-d tensor without gradient, which is converted to a Python number.

``torch.compile`` traces only Python numbers without a graph break.
"""

Integer: TypeAlias = int | np.integer[Any] | Tensor
"""An integer from Python or numpy, or a 0-d integer tensor."""

ReductionKind: TypeAlias = Literal["none", "sum", "mean", "batchmean"]
"""The reductions of the losses of all rows."""

KLDirection: TypeAlias = Literal["forward", "reverse"]
"""``"forward"`` is ``D(target‖model)``, ``"reverse"`` is ``D(model‖target)``."""

TopKTail: TypeAlias = Literal["bucket", "renormalize"]
"""The classes that a :class:`softcurve.TopK` does not list are one outcome, or have probability zero."""

ChainLoss: TypeAlias = Literal["cross_entropy", "forward_kl", "reverse_kl"]
"""The losses of :func:`softcurve.chain_rule`."""

FitLoss: TypeAlias = Literal["cross_entropy", "forward_kl", "reverse_kl", "js"]
"""The losses of :class:`softcurve.SoftmaxRegression`; ``"js"`` is the Jensen-Shannon divergence with ``β = ½``."""

FitPrecision: TypeAlias = Literal["auto", "mixed", "float64"]
"""The floating-point precision of a fit."""


def __dir__() -> list[str]:
    return __all__
