"""The density of all eigenvalues of a symmetric matrix, by stochastic Lanczos quadrature.

Ubaru, Chen, Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.
Ghorbani, Krishnan, Xiao 2019, An investigation into neural net optimization via Hessian eigenvalue density.
"""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float, Float64
from softcurve.curvature.algorithms.estimates import Estimate
from softcurve.curvature.algorithms.matrix import SymmetricMatrix, product, random_chunks
from softcurve.extras import needed
from softcurve.records import ShortRepr

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(ShortRepr):
    """The distribution of the ``n`` eigenvalues, as one Gauss quadrature for each random unit vector.

    Probe i gives ``Σ_j weights[i, j] f(nodes[i, j]) ≈ vᵀf(A)v``, exact for polynomials of a degree below twice the
    steps. Its weights sum to 1 and are 0 beyond its last step. The mean over probes estimates ``tr f(A)/n``.
    ``products`` counts the matrix-vector products.
    """

    nodes: Float64[Tensor, "probes steps"]
    weights: Float64[Tensor, "probes steps"]
    n: int
    products: int

    @property
    def trace(self) -> Estimate:
        """``tr A = n`` times the first moment."""
        mean = self.moment(1)
        return Estimate(self.n * mean.value, self.n * mean.standard_error, mean.samples, self.products, mean.method)

    def moment(self, power: int) -> Estimate:
        """Return ``tr A^power / n``, a mean over eigenvalues, with its standard error over probes (NaN for one)."""
        checks.require_count("power", power, 0)
        return Estimate.mean_of((self.weights * self.nodes**power).sum(1), self.products, "lanczos quadrature")

    @property
    def width(self) -> float:
        """The default broadening: a hundredth of the range of the spectrum."""
        low, high = (bound.item() for bound in self.nodes.aminmax())
        size = max(abs(low), abs(high))
        # Rounding errors alone are no range: a multiple of the identity has one eigenvalue.
        return (high - low if high - low > 1e-10 * size else size or 1.0) / 100

    def density(self, grid: Float[Tensor, " points"], width: float | None = None) -> Float64[Tensor, " points"]:
        """Return the density at points, with each node a normal distribution of standard deviation ``width``."""
        return self._densities(grid, width).mean(0)

    def _densities(self, grid: Tensor, width: float | None) -> Float64[Tensor, "probes points"]:
        width = self.width if width is None else width
        checks.require_positive("width", width)
        grid, scale = grid.to(self.nodes), 1 / (width * math.sqrt(2 * math.pi))
        rows = zip(self.nodes, self.weights, strict=True)
        return torch.stack([scale * (w @ torch.exp(-0.5 * ((grid - x.unsqueeze(1)) / width) ** 2)) for x, w in rows])

    def cumulative(self, grid: Float[Tensor, " points"]) -> Float64[Tensor, " points"]:
        """Return the share of eigenvalues up to and including each point, without broadening."""
        nodes, order = self.nodes.flatten().sort()
        shares = torch.cat([nodes.new_zeros(1), self.weights.flatten()[order].cumsum(0) / len(self.nodes)])
        return shares[torch.searchsorted(nodes, grid.to(nodes), right=True)]

    def plot(self, ax: Axes | None = None, path: str | Path | None = None, *, width: float | None = None) -> Axes:
        """Draw the density on a logarithmic scale, with a band of one standard error over probes.

        The scale ends at a tenth of what a single eigenvalue would show. ``path`` is written whole or not at all, in
        the format of its suffix (PNG without one). Needs matplotlib, of the extra ``app``.
        """
        width = self.width if width is None else width
        checks.require_positive("width", width)
        low, high = self.nodes.min().item() - 5 * width, self.nodes.max().item() + 5 * width
        grid = torch.linspace(low, high, min(100_000, 1 + math.ceil(8 * (high - low) / width)), dtype=torch.float64)
        densities = self._densities(grid, width)
        mean = densities.mean(0)
        error = densities.std(0) / math.sqrt(len(densities)) if len(densities) > 1 else torch.zeros_like(mean)
        floor = 0.1 / (self.n * width * math.sqrt(2 * math.pi))
        if ax is None:  # a figure that pyplot does not keep in its list of open figures
            with needed("plot", "app"):
                from matplotlib.figure import Figure

            ax = Figure(figsize=(6.4, 3.6), layout="constrained").subplots()
        upper, lower = ((mean + sign * error).clamp(min=floor).numpy() for sign in (1, -1))
        ax.fill_between(grid.numpy(), lower, upper, color="tab:blue", alpha=0.25, linewidth=0)
        ax.plot(grid.numpy(), mean.clamp(min=floor).numpy(), color="tab:blue", linewidth=1.2)
        ax.set(yscale="log", xlabel="eigenvalue", ylabel="density", xlim=(low, high))
        ax.set_ylim(floor, 2 * float(upper.max()))
        ax.spines[["top", "right"]].set_visible(False)
        if path is not None:
            _save(ax, Path(path))
        return ax


def spectral_density(
    matrix: SymmetricMatrix, *, probes: int = 10, steps: int = 80, seed: int = 0, columns_at_once: int | None = None
) -> SpectralDensity:
    """Return the distribution of the eigenvalues by stochastic Lanczos quadrature, fully reorthogonalised.

    ``columns_at_once`` probes (``None``: all) share one product per step and hold ``steps`` columns of length ``n``
    each. A probe that has found an invariant subspace (after ``n`` steps at the latest) is complete and takes no more
    products. The probes are normal vectors, drawn from ``seed`` on the CPU, the same on every device.
    """
    checks.require_count("probes", probes, 1)
    checks.require_count("steps", steps, 1)
    checks.require_count("seed", seed, 0)
    columns_at_once = probes if columns_at_once is None else columns_at_once
    checks.require_count("columns_at_once", columns_at_once, 1)
    n = matrix.shape[0]
    steps = min(steps, n)
    nodes = torch.zeros(probes, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    products = row = 0
    for vectors in random_chunks(matrix, probes, columns_at_once, seed=seed):
        for jacobi in _jacobi_matrices(matrix, vectors, steps):
            m = len(jacobi)
            values, mix = torch.linalg.eigh(jacobi)
            nodes[row], weights[row, :m] = values[-1], mix[0].square()
            nodes[row, :m] = values
            products += m
            row += 1
    return SpectralDensity(nodes, weights, n, products)


def _jacobi_matrices(matrix: SymmetricMatrix, vectors: Float[Tensor, "n probes"], steps: int) -> list[Tensor]:
    """Return the tridiagonal matrix of each probe, of as many rows as it took steps."""
    probes = vectors.shape[1]
    active = torch.arange(probes, device=vectors.device)
    basis = torch.empty(probes, steps, vectors.shape[0], dtype=vectors.dtype, device=vectors.device)
    basis[:, 0] = (vectors / torch.linalg.vector_norm(vectors, dim=0)).mT
    diagonal = torch.zeros(probes, steps, dtype=torch.float64, device=vectors.device)
    beside, length = torch.zeros_like(diagonal), torch.full_like(active, steps)
    for step in range(steps):
        current = basis[:, step]
        rest = product(matrix, current.mT).mT
        diagonal[active, step] = torch.linalg.vecdot(current.double(), rest.double())
        held = basis[:, : step + 1]
        for _ in range(2):  # twice is enough (Giraud, Langou, Rozložník, van den Eshof 2005)
            rest = rest - ((held @ rest.unsqueeze(2)).mT @ held).squeeze(1)
        norms = torch.linalg.vector_norm(rest.double(), dim=1)
        if step == steps - 1:
            break
        scale = (diagonal[active].abs() + beside[active]).amax(1)
        going = norms > 10 * torch.finfo(basis.dtype).eps * scale
        if not going.all():
            length[active[~going]] = step + 1
            active, basis, rest, norms = active[going], basis[going], rest[going], norms[going]
            if len(active) == 0:
                break
        beside[active, step] = norms
        basis[:, step + 1] = rest / norms.to(rest.dtype).unsqueeze(1)
    return [
        torch.diag(a[:m]) + torch.diag(b[: m - 1], 1) + torch.diag(b[: m - 1], -1)
        for a, b, m in zip(diagonal.cpu(), beside.cpu(), length.tolist(), strict=True)
    ]


def _save(axes: Axes, path: Path) -> None:
    """Write the figure to a temporary file in the same directory, then rename it."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("ax must belong to a figure where path is given, got axes without one")
    place = Path(os.path.realpath(path))
    part = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        figure.savefig(part, format=place.suffix[1:] or "png", dpi=150)
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)
