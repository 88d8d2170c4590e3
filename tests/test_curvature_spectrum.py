"""Eigenpairs and spectral densities against dense eigenvalues."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from softcurve.curvature.algorithms.eigenpairs import eigsh
from softcurve.curvature.algorithms.spectral_density import SpectralDensity, spectral_density

from .symmetric_matrices import Matrix, with_spectrum

METHODS = ["lanczos", "lobpcg"]


# Both ends apart from the bulk, the lower the larger in size.
ENDS = torch.cat([torch.tensor([-9.0, -6.0, -4.0]), torch.linspace(-1, 1, 90), torch.tensor([2.0, 3.5, 5.0, 7.0])])
ENDS = ENDS.double()
WANTED = {
    ("LA", 4): [7, 5, 3.5, 2],
    ("SA", 3): [-4, -6, -9],
    ("LM", 5): [7, 5, -4, -6, -9],
    ("BE", 5): [7, 5, 3.5, -6, -9],
    ("LA", 1): [7],
}


@pytest.mark.parametrize(
    ("method", "which", "k"),
    [(method, *wanted) for method in METHODS for wanted in WANTED if method == "lanczos" or wanted[0] in ("LA", "SA")],
)
def test_eigenpairs_of_the_ends(method, which, k):
    matrix = with_spectrum(ENDS)
    operator = Matrix(matrix)
    pairs = eigsh(operator, k, which=which, method=method)
    torch.testing.assert_close(pairs.values, torch.tensor(WANTED[which, k], dtype=torch.float64), rtol=1e-11, atol=0)
    bound = 1e-12 if method == "lanczos" else 9 * 1.5e-8
    torch.testing.assert_close(
        pairs.residuals,
        torch.linalg.vector_norm(matrix @ pairs.vectors - pairs.vectors * pairs.values, dim=0),
        rtol=1e-3,
        atol=1e-14,
    )
    assert pairs.residuals.max() < bound
    torch.testing.assert_close(pairs.vectors.mT @ pairs.vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    assert pairs.products == operator.products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_eigenpairs_from_narrow_products(method, dtype):
    matrix = with_spectrum(ENDS).to(dtype)
    truth = torch.linalg.eigvalsh((matrix.double() + matrix.double().mT) / 2).flip(0)[:4]
    pairs = eigsh(Matrix(matrix), 4, method=method)
    assert pairs.values.dtype == pairs.vectors.dtype == torch.float32
    rounding = 40 * torch.finfo(dtype).eps
    residual = rounding if method == "lanczos" else max(rounding, 9 * 3.5e-4)
    assert pairs.residuals.max() < residual
    # The gaps are 1 and more: the error of an eigenvalue is of second order.
    assert (pairs.values - truth).abs().max() < rounding + residual**2


def test_lobpcg_shares_passes_and_finds_copies():
    eigenvalues = ENDS.clone()
    eigenvalues[-4:] = 7
    operator = Matrix(with_spectrum(eigenvalues))
    pairs = eigsh(operator, 4, method="lobpcg")
    torch.testing.assert_close(pairs.values, torch.full((4,), 7, dtype=torch.float64), rtol=1e-11, atol=0)
    assert pairs.products == operator.products > 3 * operator.calls


@pytest.mark.parametrize("method", METHODS)
def test_tol_is_what_the_residuals_meet(method):
    matrix = with_spectrum(torch.linspace(-1, 1, 100, dtype=torch.float64))
    loose, tight = (eigsh(Matrix(matrix), 3, tol=tol, method=method) for tol in (1e-2, 1e-10))
    assert tight.residuals.max() < 1e-10 < 1e-6 < loose.residuals.max() < 1e-2
    assert loose.products < tight.products


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (7, 6), (7, 7), (20, 3)])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_small_matrices(method, n, k, which):
    if method == "lobpcg" and which in ("LM", "BE"):
        with pytest.raises(ValueError, match="which must be 'LA' or 'SA' for method='lobpcg', got"):
            eigsh(Matrix(torch.eye(n)), k, which=which, method=method)
        return
    eigenvalues = torch.linspace(-3, 2, n, dtype=torch.float64)
    operator = Matrix(with_spectrum(eigenvalues))
    pairs = eigsh(operator, k, which=which, method=method)
    by = {"LA": -eigenvalues, "SA": eigenvalues, "LM": -eigenvalues.abs()}
    if which == "BE":
        expected = torch.cat([eigenvalues[: k // 2], eigenvalues[n - (k + 1) // 2 :]])
    else:
        expected = eigenvalues[by[which].argsort()[:k]]
    torch.testing.assert_close(pairs.values, expected.sort(descending=True).values, rtol=1e-12, atol=1e-12)
    assert pairs.residuals.max() < 1e-7
    assert pairs.products == operator.products


@pytest.mark.parametrize("method", METHODS)
def test_eigenpairs_of_degenerate_matrices(method):
    zeros = eigsh(Matrix(torch.zeros(50, 50)), 3, method=method)
    assert not zeros.values.any()
    assert not zeros.residuals.any()
    torch.testing.assert_close(zeros.vectors.mT @ zeros.vectors, torch.eye(3))
    ones = eigsh(Matrix(torch.eye(50, dtype=torch.float64)), 3, method=method)
    torch.testing.assert_close(ones.values, torch.ones(3, dtype=torch.float64))
    low = torch.cat([torch.tensor([3.0, 2.0]), torch.zeros(48)]).double()
    pairs = eigsh(Matrix(with_spectrum(low)), 4, method=method)
    torch.testing.assert_close(pairs.values, low[:4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_eigenpairs_are_the_seeds(method):
    matrix = with_spectrum(ENDS)
    first, again, other = (Matrix(matrix).eigsh(3, method=method, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("method", "max_products"), [("lanczos", 25), ("lanczos", 55), ("lanczos", 75), ("lobpcg", 60), ("lobpcg", 100)]
)
def test_products_stay_within_their_limit_and_what_converged_is_named(method, max_products):
    eigenvalues = torch.cat([torch.linspace(-1, 1, 200), torch.tensor([50.0])]).double()
    operator = Matrix(with_spectrum(eigenvalues))
    message = rf"{method} found 1 of 5 eigenpairs to tol=1e-08 in \d+ products \(converged: 50\); raise max_products"
    with pytest.raises(RuntimeError, match=message) as raised:
        eigsh(operator, 5, tol=1e-8, max_products=max_products, method=method)
    assert operator.products <= max_products
    assert f"in {operator.products} products" in str(raised.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-24), (torch.float32, 1e24), (torch.float64, 1e-100)])
def test_a_matrix_of_any_size(method, dtype, scale):
    """ARPACK's floor of ``eps^(2/3)`` and LOBPCG's tolerance are absolute numbers; ours are not."""
    eigenvalues = torch.linspace(1, 9, 60, dtype=torch.float64)
    pairs = eigsh(Matrix((scale * with_spectrum(eigenvalues)).to(dtype)), 3, method=method)
    expected = scale * eigenvalues.flip(0)[:3]
    torch.testing.assert_close(pairs.values.double(), expected, rtol=1e-5, atol=0)
    assert 0 < pairs.residuals.max() < 1e-2 * scale


def test_both_ends_of_one_eigenvalue_are_the_upper():
    assert eigsh(Matrix(with_spectrum(torch.linspace(-1, 1, 60).double())), 1, which="BE").values.item() > 0.999


def test_of_a_multiple_of_the_identity_the_density_is_one_hump():
    density = spectral_density(Matrix(with_spectrum(torch.ones(100).double())))
    grid = torch.linspace(0.5, 1.5, 2001, dtype=torch.float64)
    assert torch.trapezoid(density.density(grid), grid).item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be a whole number >= 1, got 0"),
        ({"k": 98}, "k must be at most n = 97, got 98"),
        ({"which": "SM"}, "which must be one of 'LA', 'SA', 'LM', 'BE', got 'SM'"),
        ({"method": "power"}, "method must be one of 'lanczos', 'lobpcg', got 'power'"),
        ({"tol": -1.0}, "tol must be a finite number between 0 and 1, got -1.0"),
        ({"max_products": 25}, "max_products must be at least 26 for method='lanczos' and k=6, got 25"),
        ({"max_products": 26, "method": "lobpcg"}, "max_products must be at least 37 for method='lobpcg' and k=6"),
        ({"k": 97, "max_products": 96}, "max_products must be at least 97 for a dense matrix of 97 columns, got 96"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_options_of_eigsh_are_refused(options, message):
    operator = Matrix(with_spectrum(ENDS))
    with pytest.raises(ValueError, match=message):
        eigsh(operator, **options)
    assert operator.products == 0


BULK = torch.cat([torch.linspace(-1, 2, 195), torch.tensor([8.0, 9.0, 12.0, 15.0, 20.0])]).double()


def exact_moments(matrix, probes, seed, powers):
    """``vᵀAᵖv`` of the unit normal vectors that the seed draws, by repeated products."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.stack([torch.randn(len(matrix), dtype=torch.float64, generator=generator) for _ in range(probes)], 1)
    v = v / torch.linalg.vector_norm(v, dim=0)
    return [(v * (torch.linalg.matrix_power(matrix, p) @ v)).sum(0) for p in powers]


@pytest.mark.parametrize("columns_at_once", [None, 1, 2])
def test_a_quadrature_is_exact_below_twice_its_steps(columns_at_once):
    matrix = with_spectrum(BULK)
    density = spectral_density(Matrix(matrix), probes=3, steps=6, seed=4, columns_at_once=columns_at_once)
    for power, expected in enumerate(exact_moments(matrix, 3, 4, range(12))):
        quadrature = (density.weights * density.nodes**power).sum(1)
        torch.testing.assert_close(quadrature, expected, rtol=1e-10, atol=1e-12)
    beyond = (density.weights * density.nodes**12).sum(1)
    (expected,) = exact_moments(matrix, 3, 4, [12])
    assert (beyond / expected - 1).abs().min() > 1e-12


def test_orthogonality_holds_for_many_steps():
    """Without reorthogonalisation the outer eigenvalues come again as ghosts within 60 steps."""
    density = spectral_density(Matrix(with_spectrum(BULK)), probes=2, steps=60)
    for nodes in density.nodes:
        assert (nodes > 5).sum() == 5
        torch.testing.assert_close(nodes.sort().values[-5:], BULK[-5:], rtol=1e-10, atol=0)
    narrow = spectral_density(Matrix(with_spectrum(BULK).float()), probes=2, steps=60)
    assert ((narrow.nodes > 5).sum(1) == 5).all()


def test_moments_and_their_standard_errors():
    matrix = with_spectrum(BULK)
    truths = [(BULK**power).mean().item() for power in (1, 2, 3)]
    densities = [spectral_density(Matrix(matrix), probes=10, steps=4, seed=seed) for seed in range(200)]
    for power, truth in zip((1, 2, 3), truths, strict=True):
        estimates = [density.moment(power) for density in densities]
        errors = torch.tensor([estimate.value - truth for estimate in estimates])
        stated = torch.tensor([estimate.standard_error for estimate in estimates])
        assert 0.85 < (stated.square().mean() / errors.square().mean()).sqrt() < 1.18
        assert 0.84 < (errors.abs() < 2 * stated).double().mean() < 0.975
    trace = densities[0].trace
    assert trace.value == pytest.approx(200 * densities[0].moment(1).value)
    assert trace.standard_error == pytest.approx(200 * densities[0].moment(1).standard_error)
    assert (trace.samples, trace.products) == (10, 40)
    assert math.isnan(spectral_density(Matrix(matrix), probes=1, steps=3).trace.standard_error)
    assert densities[0].moment(0).value == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("width", [None, 0.05, 1.0])
def test_a_density_integrates_to_one(width):
    density = spectral_density(Matrix(with_spectrum(BULK)), probes=4, steps=40)
    grid = torch.linspace(-15, 35, 5001, dtype=torch.float64)
    values = density.density(grid, width)
    assert (values >= 0).all()
    assert torch.trapezoid(values, grid).item() == pytest.approx(1, abs=1e-9)
    mean = torch.trapezoid(values * grid, grid).item()
    assert mean == pytest.approx(density.moment(1).value, abs=1e-8)
    variance = torch.trapezoid(values * grid**2, grid).item() - density.moment(2).value
    assert variance == pytest.approx((width or density.width) ** 2, rel=1e-6)


def test_a_density_is_that_of_the_eigenvalues():
    quantiles = torch.special.ndtri(torch.linspace(0.001, 0.999, 400, dtype=torch.float64))
    density = spectral_density(Matrix(with_spectrum(quantiles)), probes=30, steps=60)
    grid = torch.linspace(-4, 4, 81, dtype=torch.float64)
    exact = torch.exp(-0.5 * ((grid - quantiles.unsqueeze(1)) / 0.3) ** 2).mean(0) / (0.3 * math.sqrt(2 * math.pi))
    # 30 probes of 400: relative errors of (2/(30·400·share))^½, some 2 % at the top.
    assert (density.density(grid, 0.3) - exact).abs().max() < 0.02
    shares = (quantiles <= grid.unsqueeze(1)).double().mean(1)
    assert (density.cumulative(grid) - shares).abs().max() < 0.03


def test_the_cumulative_distribution():
    density = spectral_density(Matrix(with_spectrum(BULK)), probes=4, steps=30)
    points = torch.tensor([-2.0, 25.0, 5.0], dtype=torch.float64)
    assert density.cumulative(points).tolist()[:2] == pytest.approx([0, 1], abs=1e-12)
    expected = (density.weights * (density.nodes <= 5)).sum(1).mean()
    torch.testing.assert_close(density.cumulative(points)[2], expected)
    node = density.nodes[0, 0]
    around = density.cumulative(torch.stack([node - 1e-12, node]))
    assert (around[1] - around[0]).item() == pytest.approx(density.weights[0, 0].item() / 4, rel=1e-9)
    assert density.cumulative(torch.tensor([5.0])).dtype == torch.float64


@pytest.mark.parametrize(
    ("eigenvalues", "steps"), [([0.0] * 40, 1), ([2.0] * 40, 1), ([3.0] + [0.0] * 39, 2), ([3.0, 1.0, -1.0] * 13, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_probe_ends_with_its_invariant_subspace(eigenvalues, steps, dtype):
    """After as many steps as there are distinct eigenvalues, which are then the nodes."""
    spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
    operator = Matrix(with_spectrum(spectrum).to(dtype))
    density = spectral_density(operator, probes=5, steps=20)
    distinct = spectrum.unique()
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        assert density.products == operator.products == 5 * steps
    else:  # rounding errors may carry a probe on; they carry no weight
        assert density.products == operator.products >= 5 * steps
    far = (density.nodes.unsqueeze(2) - distinct).abs().amin(2) > 100 * eps
    assert (density.weights * far).sum() < eps
    torch.testing.assert_close(density.weights.sum(1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(density.trace.value / len(spectrum), density.moment(1).value)


def test_probes_that_end_early_leave_the_others_alone():
    """A block matrix whose probes cannot all end at once: each is as it is alone."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 2.0, 2.0, 5.0], dtype=torch.float64))
    together = spectral_density(Matrix(matrix), probes=6, steps=5, seed=2)
    alone = spectral_density(Matrix(matrix), probes=6, steps=5, seed=2, columns_at_once=1)
    torch.testing.assert_close(together.nodes, alone.nodes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together.weights, alone.weights, rtol=1e-9, atol=1e-9)
    single = spectral_density(Matrix(torch.full((1, 1), -3.0)), probes=2)
    assert single.nodes.tolist() == [[-3.0], [-3.0]]
    assert single.products == 2


def test_all_probes_share_each_pass():
    operator = Matrix(with_spectrum(BULK))
    density = spectral_density(operator, probes=7, steps=15)
    assert (operator.calls, operator.products, density.products) == (15, 105, 105)


def test_a_density_is_the_seeds():
    matrix = with_spectrum(BULK)
    first, again, other = (Matrix(matrix).spectral_density(probes=3, steps=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.nodes, other.nodes)
    with pytest.raises(FrozenInstanceError):
        first.n = 3


@pytest.mark.parametrize("suffix", [".png", ".svg", ""])
def test_a_plot_is_written_whole(tmp_path, suffix):
    density = spectral_density(Matrix(with_spectrum(BULK)), probes=4, steps=20)
    path = tmp_path / f"density{suffix}"
    path.write_bytes(b"before")
    axes = density.plot(path=path)
    assert path.read_bytes().startswith(b"<?xml" if suffix == ".svg" else b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    assert axes.get_yscale() == "log"
    (line,) = axes.lines
    grid = torch.from_numpy(line.get_xdata())
    shown = torch.from_numpy(line.get_ydata())
    floor = axes.get_ylim()[0]
    torch.testing.assert_close(shown, density.density(grid).clamp(min=floor))
    assert ((shown > floor) & (grid > 19)).any(), "a single eigenvalue shows"


def test_a_plot_on_axes_of_the_callers(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    density = spectral_density(Matrix(torch.zeros(5, 5)), probes=1)
    assert density.plot(axes, width=0.5) is axes
    with pytest.raises(ValueError, match="not supported"):
        density.plot(axes, tmp_path / "density.nonsense")
    assert list(tmp_path.iterdir()) == []
    density.plot(axes, str(tmp_path / "density.pdf"))
    assert (tmp_path / "density.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes must be a whole number >= 1, got 0"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"columns_at_once": 0}, "columns_at_once must be a whole number >= 1, got 0"),
    ],
)
def test_bad_options_of_a_density_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(Matrix(torch.eye(9)), **options)


def test_a_width_must_be_positive_and_a_power_whole():
    density = SpectralDensity(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), 3, 1)
    with pytest.raises(ValueError, match=r"width must be a finite number above 0, got 0\.0"):
        density.density(torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match="power must be a whole number >= 0, got -1"):
        density.moment(-1)


def test_scipy_and_matplotlib_are_loaded_where_they_are_used(run_python):
    run_python(
        "import sys\nfrom softcurve.curvature import operator\nassert not {'scipy', 'matplotlib'} & set(sys.modules)"
    )


@pytest.mark.parametrize("method", METHODS)
def test_fewer_eigenvalues_than_are_asked_for(method):
    eigenvalues = torch.zeros(300).double()
    eigenvalues[:4] = torch.tensor([4.0, 3.0, 2.0, 0.01])
    pairs = eigsh(Matrix(with_spectrum(eigenvalues)), 10, method=method)
    torch.testing.assert_close(pairs.values, eigenvalues[:10], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("of", [lambda a: a.eigsh(3), lambda a: a.eigsh(3, method="lobpcg"), Matrix.spectral_density])
def test_products_that_are_not_finite_are_an_error(of):
    matrix = with_spectrum(ENDS)
    matrix[3, 4] = math.nan
    with pytest.raises(ValueError, match="operator must give finite products, got NaN or infinity"):
        of(Matrix(matrix))
