"""The spectrum of a symmetric matrix from its products: eigenpairs at its ends, and the density of all eigenvalues.

Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017.
Ghorbani, Krishnan, Xiao, An investigation into neural net optimization via Hessian eigenvalue density, 2019.
"""

from __future__ import annotations

import math
import os
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import numpy as np
import torch
from torch import Tensor

from softcurve import checks
from softcurve.array_types import Float, Float64
from softcurve.curvature.estimates import Draws, Estimate
from softcurve.curvature.operator import (
    EigenMethod,
    End,
    SymmetricOperator,
    require_count,
    require_finite,
    working_dtype,
)
from softcurve.extras import needed
from softcurve.records import dataclass_repr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Eigenpairs", "SpectralDensity", "eigsh", "spectral_density"]

POWERS = 3  # products that measure the size of a matrix
STAGE = 20  # steps of LOBPCG between looks at the residuals


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues, from the largest down, with unit eigenvectors and the norms of the true residuals ``A v − λ v``.

    ``products`` of the matrix with a column were taken, those for the residuals included; ``method`` found them,
    ``"dense"`` where the matrix is too small for another.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residuals: Float[Tensor, " k"]
    products: int
    method: str

    __repr__ = dataclass_repr


def eigsh(
    operator: SymmetricOperator,
    k: int = 6,
    *,
    which: End = "LA",
    tol: float = 0.0,
    max_products: int | None = None,
    seed: int = 0,
    method: EigenMethod = "lanczos",
) -> Eigenpairs:
    """The ``k`` largest (``"LA"``), smallest (``"SA"``) or absolutely largest (``"LM"``) eigenvalues, or both ends.

    ``"BE"``, both ends, takes half from either, the larger half from above.

    ``"lanczos"`` (ARPACK by scipy, restarted, on the CPU between products) takes the fewest products, a column each;
    its ``tol`` is relative to the eigenvalue; the lower end of a singular matrix, a cluster at 0, it does not reach:
    set ``max_products``. ``tol=0`` is the dtype's precision. It may miss copies of an eigenvalue that
    stands several times. ``"lobpcg"`` (Knyazev, 2001, by scipy; ``"LA"`` and ``"SA"`` only) takes more, but ``k``
    columns at once, which share the passes of a product over the data, and finds the copies; its ``tol`` bounds
    residuals relative to the largest eigenvalue met, and 0 is the root of the dtype's precision: the error of an
    eigenvalue that stands apart is of second order in the residual. A matrix too small for either is made dense.

    Raises:
        ValueError: ``k`` is not in ``1 … n``, or ``max_products`` is too small to begin.
        RuntimeError: not converged within ``max_products`` (``None``: ``10 n`` restarts of Lanczos, ``200 (k + 5)``
            products of LOBPCG); the message names what did converge.
    """
    n = operator.shape[0]
    checks.require_choice("which", which, get_args(End))
    checks.require_choice("method", method, get_args(EigenMethod))
    checks.require_between("tol", tol, 0.0, 1.0)
    require_count("k", k, 1)
    require_count("seed", seed, 0)
    if max_products is not None:
        require_count("max_products", max_products, 1)
    if k > n:
        raise ValueError(f"k must be at most n = {n}, got {k}; a matrix has no more eigenvalues than columns")
    if method == "lobpcg" and which not in ("LA", "SA"):
        raise ValueError(f"which must be 'LA' or 'SA' for method='lobpcg', got {which!r}; use method='lanczos'")
    if which == "BE" and k == 1:
        which = "LA"  # which ARPACK takes from below
    width = max(2 * k + 1, 20)
    first = POWERS + (width if method == "lanczos" else 5 * k + 4)
    if n <= first - POWERS:
        _require_products(max_products, n, f"a dense matrix of {n} columns")
        return _dense(operator, k, which)
    least = first + width + 1 if method == "lanczos" else first
    _require_products(max_products, least, f"method={method!r} and k={k}")
    if method == "lanczos":
        return _lanczos(operator, k, which, tol, max_products, seed, width)
    return _lobpcg(operator, k, which, tol, 200 * (k + 5) if max_products is None else max_products, seed)


def _require_products(max_products: int | None, least: int, purpose: str) -> None:
    if max_products is not None and max_products < least:
        raise ValueError(f"max_products must be at least {least} for {purpose}, got {max_products}")


def _chosen(values: Float[Tensor, " m"], k: int, which: str) -> Tensor:
    """The places of the ``k`` wanted among ascending ``values``, from the largest down."""
    downwards = torch.arange(len(values) - 1, -1, -1, device=values.device)
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)[:k].sort(descending=True).values
    above = {"LA": k, "SA": 0, "BE": (k + 1) // 2}[which]
    return torch.cat([downwards[:above], downwards[len(values) - (k - above) :]])


def _dense(operator: SymmetricOperator, k: int, which: str) -> Eigenpairs:
    n = operator.shape[0]
    matrix = operator.to_dense(columns_at_once=n).to(working_dtype(operator))
    require_finite(matrix)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    places = _chosen(values, k, which)
    return _with_residuals(values[places], vectors[:, places], matrix @ vectors[:, places], n, "dense")


def _with_residuals(values: Tensor, vectors: Tensor, images: Tensor, products: int, method: str) -> Eigenpairs:
    # In float64: squares of small residuals are below float32's range.
    residuals = torch.linalg.vector_norm(images.double() - vectors.double() * values.double(), dim=0)
    return Eigenpairs(values, vectors, residuals.to(values.dtype), products, method)


def _magnitude(operator: SymmetricOperator, start: Float[Tensor, " n"]) -> float:
    """About the size of the matrix, by :data:`POWERS` products; the solvers' own floors are absolute numbers."""
    norm = 0.0
    for _ in range(POWERS):
        image = (operator @ start).double()
        require_finite(image)
        norm = float(torch.linalg.vector_norm(image))
        if norm == 0:
            break
        start = (image / norm).to(start.dtype)
    return norm


def _not_converged(method: str, found: list[float], k: int, products: int, tol: float) -> RuntimeError:
    which = f" (converged: {', '.join(f'{value:.6g}' for value in found)})" if found else ""
    return RuntimeError(
        f"{method} found {len(found)} of {k} eigenpairs to tol={tol:g} in {products} products{which}; "
        "raise max_products or tol, or ask for fewer"
    )


def _lanczos(
    operator: SymmetricOperator, k: int, which: str, tol: float, max_products: int | None, seed: int, width: int
) -> Eigenpairs:
    """ARPACK: ``width + 1`` products, then at most ``width − k`` a restart, of the matrix divided by its size."""
    with needed("eigsh", "fit"):
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
        from scipy.sparse.linalg import eigsh as arpack

    matrix, dtype = operator.to_scipy(), working_dtype(operator)
    start = next(Draws(operator, "normal", seed).chunks(1, 1)).squeeze(1)
    scale, counted = _magnitude(operator, start / torch.linalg.vector_norm(start)), POWERS
    if scale == 0:
        zeros = torch.zeros(matrix.shape[0], k, dtype=dtype, device=operator.device)
        return _with_residuals(zeros[0], zeros.clone().fill_diagonal_(1), zeros, 1, "lanczos")

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal counted
        counted += 1
        vector = vector.reshape(-1)
        image = operator @ vector
        require_finite(image)
        return (image / scale).astype(matrix.dtype, copy=False)

    restarts = None if max_products is None else (max_products - POWERS - k - width - 1) // (width - k)
    tol = tol or torch.finfo(operator.dtype).eps
    counting = LinearOperator(matrix.shape, matvec=product, dtype=matrix.dtype)
    try:
        values, vectors = arpack(
            counting, k, which=cast("End", which), v0=start.cpu().numpy(), ncv=width, maxiter=restarts, tol=tol
        )
    except ArpackNoConvergence as stopped:
        found = sorted((scale * float(value) for value in stopped.eigenvalues), reverse=True)
        raise _not_converged("lanczos", found, k, counted, tol) from None
    order = np.argsort(-values, kind="stable")
    held = torch.from_numpy(vectors[:, order].copy()).to(operator.device)
    images = (operator @ held).to(held.dtype)
    eigenvalues = torch.from_numpy(scale * values[order].astype(float)).to(held)
    return _with_residuals(eigenvalues, held, images, counted + k, "lanczos")


def _lobpcg(operator: SymmetricOperator, k: int, which: str, tol: float, max_products: int, seed: int) -> Eigenpairs:
    """scipy's, in stages: its tolerance is absolute, and how large the matrix is shows only on the way.

    It warns, or breaks down, where it does not reach the tolerance; the residuals judge here.
    """
    with needed("eigsh", "fit"):
        from scipy.sparse.linalg import LinearOperator, lobpcg

    dtype = working_dtype(operator)
    accuracy = tol or max(math.sqrt(torch.finfo(dtype).eps), torch.finfo(operator.dtype).eps)
    matrix, start = operator.to_scipy(), Draws(operator, "normal", seed).columns(k)
    unit, products = _magnitude(operator, start[:, 0] / torch.linalg.vector_norm(start[:, 0])) or 1.0, POWERS

    def product(columns: np.ndarray) -> np.ndarray:
        nonlocal products
        columns = columns.reshape(matrix.shape[0], -1)
        products += columns.shape[1]
        return ((operator @ columns.astype(matrix.dtype, copy=False)) / unit).astype(matrix.dtype, copy=False)

    counting = LinearOperator(matrix.shape, matvec=product, matmat=product, dtype=matrix.dtype)
    vectors = np.linalg.qr(start.cpu().numpy().astype(matrix.dtype))[0]
    scale = 0.0  # of the matrix in units of its size
    while True:
        images = product(vectors)
        require_finite(images)
        values, mix = np.linalg.eigh(vectors.T.astype(float) @ images)
        order = np.argsort(-values, kind="stable")
        values, mix = values[order], mix[:, order].astype(matrix.dtype)
        vectors, images = vectors @ mix, images @ mix
        scale = max(scale, float(np.abs(values).max()))
        residuals = np.linalg.norm(images - vectors * values.astype(matrix.dtype), axis=0)
        good = residuals <= accuracy * scale
        steps = min(STAGE, (max_products - products) // k - 4)
        if good.all():
            like = torch.empty(0, dtype=dtype, device=operator.device)
            eigenvalues, block, image = (
                torch.from_numpy(np.ascontiguousarray(part)).to(like)
                for part in (unit * values, vectors, unit * images.astype(float))
            )
            return _with_residuals(eigenvalues, block, image, products, "lobpcg")
        if steps < 1:
            raise _not_converged("lobpcg", (unit * values[good]).tolist(), k, products, accuracy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = lobpcg(counting, vectors, tol=accuracy * scale / 2, maxiter=steps, largest=which == "LA")[1]
        vectors = np.linalg.qr(found)[0]


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The distribution of the ``n`` eigenvalues, as one Gauss quadrature of each random unit vector.

    Probe i sees the eigenvalues through ``Σ_j weights[i, j] f(nodes[i, j]) ≈ vᵀf(A)v``, exactly for polynomials of a
    degree below twice the steps; its weights sum to 1, and are 0 where it ended before the others. The mean over
    probes estimates ``tr f(A)/n``. ``products`` of the matrix with a column were taken in all.
    """

    nodes: Float64[Tensor, "probes steps"]
    weights: Float64[Tensor, "probes steps"]
    n: int
    products: int

    __repr__ = dataclass_repr

    @property
    def trace(self) -> Estimate:
        """``tr A = n`` times the first moment."""
        mean = self.moment(1)
        return Estimate(self.n * mean.value, self.n * mean.standard_error, mean.samples, self.products, mean.method)

    def moment(self, power: int) -> Estimate:
        """``tr A^power / n``, the mean over eigenvalues, with the standard error over probes (NaN for one probe)."""
        require_count("power", power, 0)
        samples = (self.weights * self.nodes**power).sum(1)
        error = samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return Estimate(samples.mean().item(), error, len(samples), self.products, "lanczos quadrature")

    @property
    def width(self) -> float:
        """The default broadening: a hundredth of the range of the spectrum."""
        low, high = self.nodes.min().item(), self.nodes.max().item()
        size = max(abs(low), abs(high))
        # Rounding errors alone are no range: a multiple of the identity has one eigenvalue.
        return (high - low if high - low > 1e-10 * size else size or 1.0) / 100

    def density(self, grid: Float[Tensor, " points"], width: float | None = None) -> Float64[Tensor, " points"]:
        """The density at the points of a grid, each node a normal distribution of standard deviation ``width``."""
        return self._densities(grid, width).mean(0)

    def _densities(self, grid: Tensor, width: float | None) -> Float64[Tensor, "probes points"]:
        width = self.width if width is None else width
        checks.require_positive("width", width)
        grid = grid.to(self.nodes)
        scale = 1 / (width * math.sqrt(2 * math.pi))
        rows = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            rows.append(scale * (weights @ torch.exp(-0.5 * ((grid - nodes.unsqueeze(1)) / width) ** 2)))
        return torch.stack(rows)

    def cumulative(self, grid: Float[Tensor, " points"]) -> Float64[Tensor, " points"]:
        """The share of eigenvalues up to and including each point, without broadening."""
        nodes, order = self.nodes.flatten().sort()
        shares = torch.cat([nodes.new_zeros(1), self.weights.flatten()[order].cumsum(0) / len(self.nodes)])
        return shares[torch.searchsorted(nodes, grid.to(nodes), right=True)]

    def plot(self, ax: Axes | None = None, path: str | Path | None = None, *, width: float | None = None) -> Axes:
        """The density on a logarithmic scale, with a band of one standard error over probes.

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
        axes = _new_axes() if ax is None else ax
        upper, lower = ((mean + sign * error).clamp(min=floor).numpy() for sign in (1, -1))
        axes.fill_between(grid.numpy(), lower, upper, color="tab:blue", alpha=0.25, linewidth=0)
        axes.plot(grid.numpy(), mean.clamp(min=floor).numpy(), color="tab:blue", linewidth=1.2)
        axes.set(yscale="log", xlabel="eigenvalue", ylabel="density", xlim=(low, high))
        axes.set_ylim(floor, 2 * float(upper.max()))
        axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            _save(axes, Path(path))
        return axes


def spectral_density(
    operator: SymmetricOperator,
    *,
    probes: int = 10,
    steps: int = 80,
    seed: int = 0,
    columns_at_once: int | None = None,
) -> SpectralDensity:
    """The distribution of the eigenvalues by stochastic Lanczos quadrature, fully reorthogonalised.

    ``columns_at_once`` probes (``None``: all) take their steps together, in one product a step, and hold ``steps``
    columns of length n each. A probe that has found an invariant subspace (after ``n`` steps at the latest) is complete
    and takes no further products. The probes are normal vectors, drawn from ``seed`` on the CPU, alike on every device.
    """
    require_count("probes", probes, 1)
    require_count("steps", steps, 1)
    require_count("seed", seed, 0)
    if columns_at_once is not None:
        require_count("columns_at_once", columns_at_once, 1)
    n = operator.shape[0]
    steps = min(steps, n)
    nodes = torch.zeros(probes, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    products = row = 0
    for vectors in Draws(operator, "normal", seed).chunks(probes, columns_at_once or probes):
        for jacobi in _jacobi_matrices(operator, vectors, steps):
            m = len(jacobi)
            values, mix = torch.linalg.eigh(jacobi)
            nodes[row], weights[row, :m] = values[-1], mix[0].square()
            nodes[row, :m] = values
            products += m
            row += 1
    return SpectralDensity(nodes, weights, n, products)


def _jacobi_matrices(
    operator: SymmetricOperator, vectors: Float[Tensor, "n probes"], steps: int
) -> list[Float64[Tensor, "_m _m"]]:
    """The tridiagonal matrix of each probe, of as many rows as it took steps."""
    probes = vectors.shape[1]
    open_ = torch.arange(probes, device=vectors.device)
    basis = torch.empty(probes, steps, vectors.shape[0], dtype=vectors.dtype, device=vectors.device)
    basis[:, 0] = (vectors / torch.linalg.vector_norm(vectors, dim=0)).mT
    diagonal = torch.zeros(probes, steps, dtype=torch.float64, device=vectors.device)
    beside, length = torch.zeros_like(diagonal), torch.full_like(open_, steps)
    for step in range(steps):
        current = basis[:, step]
        rest = (operator @ current.mT).to(basis.dtype).mT
        require_finite(rest)
        diagonal[open_, step] = torch.linalg.vecdot(current.double(), rest.double())
        held = basis[:, : step + 1]
        for _ in range(2):  # twice is enough (Giraud, Langou, Rozložník, van den Eshof, 2005)
            rest = rest - ((held @ rest.unsqueeze(2)).mT @ held).squeeze(1)
        norms = torch.linalg.vector_norm(rest.double(), dim=1)
        if step == steps - 1:
            break
        scale = (diagonal[open_].abs() + beside[open_]).amax(1)
        going = norms > 10 * torch.finfo(basis.dtype).eps * scale
        if not going.all():
            length[open_[~going]] = step + 1
            open_, basis, rest, norms = open_[going], basis[going], rest[going], norms[going]
            if len(open_) == 0:
                break
        beside[open_, step] = norms
        basis[:, step + 1] = rest / norms.to(rest.dtype).unsqueeze(1)
    return [
        torch.diag(a[:m]) + torch.diag(b[: m - 1], 1) + torch.diag(b[: m - 1], -1)
        for a, b, m in zip(diagonal.cpu(), beside.cpu(), length.tolist(), strict=True)
    ]


def _new_axes() -> Axes:
    """Axes on a figure of their own, which belongs to nobody's list of open figures."""
    with needed("plot", "app"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def _save(axes: Axes, path: Path) -> None:
    """Write the figure beside its place, then rename."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("ax must belong to a figure for a path to be written, got axes of none")
    place = Path(os.path.realpath(path))
    part = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        figure.savefig(part, format=place.suffix[1:] or "png", dpi=150)
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)
