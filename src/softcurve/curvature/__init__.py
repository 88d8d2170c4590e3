"""Second-order matrices of heads and whole networks at vocabulary scale, as linear operators.

Every matrix is known by its products, which are exact and computed tile by tile: no ``N × C`` logits, no ``C × C``
blocks, no Jacobians.
"""

from softcurve.curvature.algorithms.conjugate_gradients import Solution
from softcurve.curvature.algorithms.eigenpairs import Eigenpairs
from softcurve.curvature.algorithms.estimates import DiagonalEstimate, Estimate
from softcurve.curvature.algorithms.spectral_density import SpectralDensity
from softcurve.curvature.empirical_fisher import EmpiricalFisher
from softcurve.curvature.fisher import Fisher
from softcurve.curvature.ggn import GGN
from softcurve.curvature.gradient_noise import GradientNoise, gradient_noise
from softcurve.curvature.head import HeadCurvature
from softcurve.curvature.hessian import Hessian
from softcurve.curvature.influence import Influence, influence
from softcurve.curvature.kfac import KroneckerFactors
from softcurve.curvature.laplace import LastLayerLaplace
from softcurve.curvature.operator import SymmetricOperator
from softcurve.curvature.split import split_head
from softcurve.head.products import Direction

__all__ = [
    "GGN", "DiagonalEstimate", "Direction", "Eigenpairs", "EmpiricalFisher", "Estimate", "Fisher", "GradientNoise",
    "HeadCurvature", "Hessian", "Influence", "KroneckerFactors", "LastLayerLaplace", "Solution", "SpectralDensity",
    "SymmetricOperator", "gradient_noise", "influence", "split_head",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
