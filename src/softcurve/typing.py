"""Type aliases of the public signatures, for annotating code that passes such arguments on."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

__all__ = ["ChainLoss", "FitLoss", "FitPrecision", "Integer", "KLDirection", "Number", "ReductionKind", "TopKTail"]

Number: TypeAlias = int | float | np.integer[Any] | np.floating[Any] | Tensor
"""A real number: Python's, numpy's, or a 0-d tensor that requires no gradient, which is read at once.

``torch.compile`` traces Python's numbers alone without a break.
"""

Integer: TypeAlias = int | np.integer[Any] | Tensor
"""A whole number: Python's, numpy's, or a 0-d integer tensor."""

ReductionKind: TypeAlias = Literal["none", "sum", "mean", "batchmean"]
"""How the losses of the rows become one number."""

KLDirection: TypeAlias = Literal["forward", "reverse"]
"""``"forward"`` is ``D(target‖model)``, ``"reverse"`` is ``D(model‖target)``."""

TopKTail: TypeAlias = Literal["bucket", "renormalize"]
"""What a :class:`softcurve.TopK` assumes of the classes that it does not list."""

ChainLoss: TypeAlias = Literal["cross_entropy", "forward_kl", "reverse_kl"]
"""The losses of :func:`softcurve.chain_rule`."""

FitLoss: TypeAlias = Literal["cross_entropy", "forward_kl", "reverse_kl", "js"]
"""The losses of :class:`softcurve.SoftmaxRegression`; ``"js"`` is the Jensen-Shannon divergence with ``β = ½``."""

FitPrecision: TypeAlias = Literal["auto", "mixed", "float64"]
"""The floating-point precision of a fit."""


def __dir__() -> list[str]:
    return __all__
