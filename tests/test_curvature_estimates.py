"""Trace and diagonal of a symmetric matrix from products: against the matrix itself, and their errors against their own."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from softcurve.curvature.algorithms.estimates import Estimate, diagonal, trace

from .symmetric_matrices import Matrix, with_spectrum

TRACE_METHODS = ["hutchinson", "hutch++", "xtrace"]
VARIANTS = [
    ("hutchinson", "rademacher"),
    ("hutchinson", "normal"),
    ("hutch++", "rademacher"),
    ("xtrace", "rademacher"),
    ("xtrace", "normal"),
]


def ranks(n):
    return torch.arange(1, n + 1, dtype=torch.float64)


SPECTRA = {
    "flat": torch.linspace(1, 3, 100, dtype=torch.float64),
    "slow": (-1) ** ranks(100) / ranks(100),  # indefinite
    "fast": 1 / ranks(100) ** 2,
}


def low_rank(n, rank, seed=1):
    eigenvalues = torch.zeros(n, dtype=torch.float64)
    eigenvalues[:rank] = torch.linspace(-2, 5, rank, dtype=torch.float64)
    return with_spectrum(eigenvalues, seed)


class TestOperator:
    matrix = with_spectrum(torch.linspace(-1, 2, 7, dtype=torch.float64))

    @pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3), (7, 0)])
    def test_a_product_keeps_the_kind_and_the_shape(self, shape):
        v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        product = Matrix(self.matrix) @ v
        assert product.shape == shape
        assert not product.requires_grad
        torch.testing.assert_close(product, self.matrix @ v.detach())
        array = Matrix(self.matrix) @ v.detach().numpy()
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, product.numpy(), rtol=1e-15)

    @pytest.mark.parametrize(
        ("dtype", "numpy_dtype"),
        [(torch.float64, "float64"), (torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.half, "float32")],
    )
    def test_a_product_is_in_the_operators_dtype(self, dtype, numpy_dtype):
        operator = Matrix(self.matrix.to(dtype))
        assert (operator @ torch.ones(7, dtype=torch.float64)).dtype == dtype
        assert (operator @ torch.ones(7, 2)).dtype == dtype
        assert (operator @ np.ones(7)).dtype == numpy_dtype
        assert operator.to_scipy().dtype == numpy_dtype
        assert operator.to_dense().dtype == dtype

    def test_an_array_in_any_layout(self):
        array = np.random.default_rng(0).standard_normal((3, 14)).T[::-2]
        array.flags.writeable = False
        expected = self.matrix.numpy() @ array
        np.testing.assert_allclose(Matrix(self.matrix) @ array, expected, rtol=1e-13)
        np.testing.assert_allclose(Matrix(self.matrix) @ array.astype(">f8"), expected, rtol=1e-13)

    @pytest.mark.parametrize(
        ("vectors", "error", "message"),
        [
            ([1.0] * 7, TypeError, "vectors must be a torch.Tensor or a numpy array, got list"),
            (torch.ones(7, dtype=torch.long), TypeError, "must hold real floating-point numbers, got torch.int64"),
            (
                torch.ones(7, dtype=torch.cfloat),
                TypeError,
                "must hold real floating-point numbers, got torch.complex64",
            ),
            (np.ones(7, dtype=int), TypeError, "must hold real floating-point numbers, got int64"),
            (np.ones(7, dtype=complex), TypeError, "must hold real floating-point numbers, got complex128"),
            (torch.ones(6), ValueError, r"of shape \(7,\) or \(7, k\) for an operator of shape \(7, 7\), got \(6,\)"),
            (torch.ones(2, 7), ValueError, r"got \(2, 7\)"),
            (np.ones((7, 1, 1)), ValueError, r"got \(7, 1, 1\)"),
            (torch.ones(()), ValueError, r"got \(\)"),
            (torch.ones(7, device="meta"), ValueError, "must be on the operator's device cpu, got meta"),
        ],
    )
    def test_what_is_no_vector_is_refused(self, vectors, error, message):
        with pytest.raises(error, match=message):
            Matrix(self.matrix) @ vectors

    def test_numpy_does_not_take_the_operator_apart(self):
        with pytest.raises(TypeError):
            np.ones(7) @ Matrix(self.matrix)

    @pytest.mark.parametrize("columns_at_once", [1, 3, 7, 100])
    def test_to_dense(self, columns_at_once):
        operator = Matrix(self.matrix)
        assert torch.equal(operator.to_dense(columns_at_once=columns_at_once), self.matrix)
        assert operator.products == 7
        assert operator.widest == min(columns_at_once, 7)

    def test_to_scipy(self):
        from scipy.sparse.linalg import cg

        damped = self.matrix + 2 * torch.eye(7, dtype=torch.float64)
        linear = Matrix(damped).to_scipy()
        b = np.arange(7.0)
        x, info = cg(linear, b, rtol=1e-12)
        assert info == 0
        np.testing.assert_allclose(x, np.linalg.solve(damped.numpy(), b), rtol=1e-9)
        np.testing.assert_allclose(linear.T @ np.eye(7)[:, :2], damped.numpy()[:, :2], rtol=1e-13)
        np.testing.assert_allclose(linear @ np.arange(7), damped.numpy() @ b, rtol=1e-13)

    def test_methods_are_the_functions(self):
        operator = Matrix(self.matrix)
        assert operator.trace(method="hutchinson", products=5, seed=3) == trace(
            operator, method="hutchinson", products=5, seed=3
        )
        ours, theirs = operator.diagonal(products=4, seed=3), diagonal(operator, products=4, seed=3)
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.standard_error, theirs.standard_error)


@pytest.mark.parametrize(("method", "distribution"), VARIANTS)
@pytest.mark.parametrize("spectrum", ["flat", "fast"])
def test_the_standard_error_of_a_trace_is_that_of_its_error(method, distribution, spectrum):
    """Root mean squares over 200 seeds: a standard error wrong by a factor of 1.3 fails, the paper's for XTrace too."""
    matrix = with_spectrum(SPECTRA[spectrum])
    truth = matrix.trace().item()
    options = {"method": method, "distribution": distribution, "products": 24, "columns_at_once": 24}
    estimates = [trace(Matrix(matrix), seed=seed, **options) for seed in range(200)]
    errors = torch.tensor([estimate.value - truth for estimate in estimates])
    stated = torch.tensor([estimate.standard_error for estimate in estimates])
    ratio = (stated.square().mean() / errors.square().mean()).sqrt().item()
    assert 0.85 < ratio < 1.25, f"stated over true: {ratio}"
    within = [(errors.abs() <= bound * stated).double().mean().item() for bound in (1, 2, 3)]
    assert 0.53 < within[0] < 0.8
    assert 0.84 < within[1] < 0.985
    assert within[2] > 0.92
    assert errors.mean().abs() < 3.5 * errors.std() / math.sqrt(200), "biased"


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
@pytest.mark.parametrize("spectrum", ["flat", "slow"])
def test_the_standard_errors_of_a_diagonal_are_those_of_its_errors(method, spectrum):
    matrix = with_spectrum(SPECTRA[spectrum])
    estimates = [diagonal(Matrix(matrix), method=method, products=24, seed=seed) for seed in range(200)]
    errors = torch.stack([estimate.values - matrix.diagonal() for estimate in estimates])
    stated = torch.stack([estimate.standard_error for estimate in estimates])
    ratio = (stated.square().mean(0) / errors.square().mean(0)).sqrt()
    assert 0.9 < ratio.median() < 1.15
    assert 0.9 < (errors.abs() <= 2 * stated).double().mean() < 0.975
    # The squared bias of each entry in units of its variance has mean 1.
    assert (errors.mean(0).square() / (errors.var(0) / 200)).mean() < 1.6


def typical_error(matrix, method, products, seeds=40):
    truth = matrix.trace().item()
    errors = [trace(Matrix(matrix), method=method, products=products, seed=seed).value - truth for seed in range(seeds)]
    return math.sqrt(sum(error**2 for error in errors) / seeds)


@pytest.mark.parametrize(
    ("method", "slope"), [("hutchinson", (-0.65, -0.35)), ("hutch++", (-3, -1.2)), ("xtrace", (-3, -1.2))]
)
def test_how_errors_fall_with_the_products(method, slope):
    """``m^(−1/2)`` for Hutchinson; for eigenvalues ``1/i²`` what is left beyond a sketch of m falls like ``m^(−3/2)``."""
    matrix = with_spectrum(1 / ranks(200) ** 2)
    few, many = typical_error(matrix, method, 12), typical_error(matrix, method, 96)
    assert slope[0] < math.log(many / few) / math.log(8) < slope[1]


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_a_trace_of_low_rank_is_exact(method, distribution):
    matrix = low_rank(80, 7)
    estimate = trace(Matrix(matrix), method=method, products=24, distribution=distribution)
    assert estimate.value == pytest.approx(matrix.trace().item(), rel=1e-12)
    assert estimate.standard_error < 1e-12
    assert estimate.products <= 24


@pytest.mark.parametrize("rank", [1, 10, 11])
def test_xtrace_and_xdiag_are_exact_up_to_one_rank_below_half(rank):
    matrix = low_rank(80, rank)
    estimate = trace(Matrix(matrix), products=24)
    assert estimate.value == pytest.approx(matrix.trace().item(), rel=1e-9)
    assert estimate.standard_error < 1e-9
    estimate = diagonal(Matrix(matrix), products=24)
    torch.testing.assert_close(estimate.values, matrix.diagonal(), rtol=1e-9, atol=1e-10)
    assert estimate.standard_error.max() < 1e-9


def test_a_rank_of_half_the_products_is_not_exact_and_says_so():
    matrix = low_rank(80, 12)
    estimates = [trace(Matrix(matrix), products=24, seed=seed) for seed in range(50)]
    errors = [abs(estimate.value - matrix.trace().item()) for estimate in estimates]
    assert min(errors) > 1e-9
    assert all(estimate.standard_error > 1e-4 for estimate in estimates)


@pytest.mark.parametrize(
    ("method", "distribution"), [("xtrace", "rademacher"), ("xtrace", "normal"), ("xdiag", "rademacher")]
)
def test_downdates_are_leaving_out(method, distribution):
    """By the definitions: a QR for every vector left out, and for every pair of them, of the same vectors."""
    n, count = 30, 5
    matrix = with_spectrum(1 / ranks(n))
    generator = torch.Generator().manual_seed(3)
    omega = torch.empty(count, n, dtype=torch.float64)
    for row in omega:
        if distribution == "normal":
            row.normal_(generator=generator)
        else:
            row.copy_(2 * torch.empty_like(row).bernoulli_(0.5, generator=generator) - 1)
    omega = omega.mT

    def sample(i, *others):
        kept = [j for j in range(count) if j not in (i, *others)]
        q, _ = torch.linalg.qr(matrix @ omega[:, kept])
        beyond = torch.eye(n, dtype=torch.float64) - q @ q.mT
        if method == "xdiag":
            return (q @ q.mT @ matrix).diagonal() + omega[:, i] * (beyond @ matrix @ omega[:, i])
        rest = beyond @ omega[:, i]
        scale = (n - len(kept)) / (rest @ rest) if distribution == "normal" else 1
        return (q.mT @ matrix @ q).trace() + scale * (rest @ matrix @ rest)

    samples = torch.stack([sample(i) for i in range(count)])
    changes = {(i, j): samples[i] - sample(i, j) for i in range(count) for j in range(count) if i != j}
    covariance = sum(changes[i, j] * changes[j, i] for i, j in changes) / len(changes)
    expected = (samples.var(0) / count + covariance.clamp(min=0)).sqrt()
    assert (covariance > 0).any()
    if method == "xtrace":
        estimate = trace(Matrix(matrix), products=10, seed=3, distribution=distribution)
        assert estimate.value == pytest.approx(samples.mean().item(), rel=1e-12)
        assert estimate.standard_error == pytest.approx(expected.item(), rel=1e-10)
    else:
        estimate = diagonal(Matrix(matrix), products=10, seed=3)
        torch.testing.assert_close(estimate.values, samples.mean(0), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(estimate.standard_error, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", TRACE_METHODS)
@pytest.mark.parametrize(("n", "products"), [(1, 1), (1, 64), (3, 3), (20, 20), (20, 64)])
def test_as_many_products_as_columns_are_exact(method, n, products):
    matrix = with_spectrum(ranks(n) - 2.5)
    operator = Matrix(matrix)
    estimate = trace(operator, method=method, products=products, columns_at_once=3)
    assert estimate.value == pytest.approx(matrix.trace().item(), rel=1e-14)
    assert (estimate.standard_error, estimate.products, estimate.method) == (0, n, "exact")
    assert operator.products == n
    assert operator.widest <= 3
    estimate = diagonal(operator, method="hutchinson", products=products, columns_at_once=3)
    assert torch.equal(estimate.values, matrix.diagonal())
    assert not estimate.standard_error.any()


@pytest.mark.parametrize("method", TRACE_METHODS)
def test_a_matrix_of_zeros_has_trace_zero(method):
    operator = Matrix(torch.zeros(50, 50, dtype=torch.float64))
    for distribution in ("rademacher", "normal"):
        estimate = trace(operator, method=method, products=8, distribution=distribution)
        assert (estimate.value, estimate.standard_error) == (0, 0)
    for name in ("hutchinson", "xdiag"):
        estimate = diagonal(operator, method=name, products=8)
        assert not estimate.values.any()
        assert not estimate.standard_error.any()


@pytest.mark.parametrize("n", [5, 9])
def test_tiny_matrices_where_sign_vectors_repeat(n):
    """Of 2ⁿ⁻¹ sign vectors up to sign some come twice, and the sketch then lacks rank."""
    matrix = with_spectrum(ranks(n))
    truth = matrix.trace().item()
    estimates = [trace(Matrix(matrix), products=4, seed=seed) for seed in range(200)]
    errors = torch.tensor([estimate.value - truth for estimate in estimates])
    assert errors.isfinite().all()
    assert errors.mean().abs() < 4 * errors.std() / math.sqrt(200)
    for seed in range(50):
        estimate = diagonal(Matrix(matrix), products=4, seed=seed)
        assert estimate.values.isfinite().all()
        assert estimate.standard_error.isfinite().all()


@pytest.mark.parametrize(("method", "products"), [("hutchinson", 17), ("hutch++", 17), ("xtrace", 17), ("xtrace", 4)])
def test_products_are_counted_and_kept_within_the_budget(method, products):
    operator = Matrix(with_spectrum(SPECTRA["slow"]))
    estimate = trace(operator, method=method, products=products, columns_at_once=5)
    assert estimate.products == operator.products <= products
    assert operator.products >= products - 1
    assert operator.widest <= 5
    operator = Matrix(operator.matrix)
    diagonals = diagonal(operator, method="xdiag", products=products, columns_at_once=5)
    assert diagonals.products == operator.products <= products
    assert operator.widest <= 5


@pytest.mark.parametrize("method", TRACE_METHODS)
def test_a_trace_is_the_seeds_and_not_the_chunks(method):
    matrix = with_spectrum(SPECTRA["slow"])
    first = trace(Matrix(matrix), method=method, products=30, seed=5)
    assert trace(Matrix(matrix), method=method, products=30, seed=5) == first
    assert trace(Matrix(matrix), method=method, products=30, seed=6).value != first.value
    for columns_at_once in (1, 7, 30):
        other = trace(Matrix(matrix), method=method, products=30, seed=5, columns_at_once=columns_at_once)
        assert other.value == pytest.approx(first.value, rel=1e-12)
        assert other.standard_error == pytest.approx(first.standard_error, rel=1e-8)


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_a_diagonal_is_the_seeds_and_not_the_chunks(method):
    matrix = with_spectrum(SPECTRA["slow"])
    first = diagonal(Matrix(matrix), method=method, products=30, seed=5)
    assert torch.equal(diagonal(Matrix(matrix), method=method, products=30, seed=5).values, first.values)
    assert not torch.equal(diagonal(Matrix(matrix), method=method, products=30, seed=6).values, first.values)
    for columns_at_once in (1, 7, 30):
        other = diagonal(Matrix(matrix), method=method, products=30, seed=5, columns_at_once=columns_at_once)
        torch.testing.assert_close(other.values, first.values, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other.standard_error, first.standard_error, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", TRACE_METHODS)
def test_narrow_products_cost_their_own_rounding_only(dtype, method):
    matrix = low_rank(300, 5)
    operator = Matrix(matrix.to(dtype))
    exact = trace(Matrix(operator.matrix.double()), method=method, products=40).value
    estimate = trace(operator, method=method, products=40)
    size = torch.linalg.eigvalsh(matrix).abs().sum().item()
    assert abs(estimate.value - exact) < 4 * torch.finfo(dtype).eps * size
    values = diagonal(operator, products=40).values
    assert values.dtype == torch.float32
    reference = diagonal(Matrix(operator.matrix.double()), products=40).values
    assert (values - reference).abs().max() < 4 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize(("method", "least"), [("hutchinson", 2), ("hutch++", 4), ("xtrace", 4), ("xdiag", 4)])
def test_too_few_products_are_refused_and_the_least_suffice(method, least):
    operator = Matrix(with_spectrum(SPECTRA["slow"]))
    estimate = diagonal if method == "xdiag" else trace
    message = re.escape(f"products must be at least {least} for method={method!r} on a matrix of shape (100, 100)")
    with pytest.raises(ValueError, match=message):
        estimate(operator, method=method, products=least - 1)
    assert operator.products == 0
    assert estimate(operator, method=method, products=least).products == least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact"}, "method must be one of 'hutchinson', 'hutch\\+\\+', 'xtrace', got 'exact'"),
        ({"distribution": "cauchy"}, "distribution must be one of 'rademacher', 'normal', got 'cauchy'"),
        ({"products": 0}, "products must be a whole number >= 1, got 0"),
        ({"columns_at_once": 0}, "columns_at_once must be a whole number >= 1, got 0"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trace(Matrix(torch.eye(9)), **options)


@pytest.mark.parametrize("method", TRACE_METHODS)
def test_products_that_are_not_finite_are_refused(method):
    matrix = torch.eye(50)
    matrix[3, 3] = math.nan
    with pytest.raises(ValueError, match="operator must give finite products, got NaN or infinity"):
        trace(Matrix(matrix), method=method, products=10)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.3412, 0.0512, "12.341 ± 0.051 (xtrace, 64 products)"),
        (-0.5, 0.25, "-0.50 ± 0.25 (xtrace, 64 products)"),
        (123456789.0, 12345.0, "1.23457e+08 ± 1.2e+04 (xtrace, 64 products)"),
        (1.2345e-20, 1.2e-22, "1.234e-20 ± 1.2e-22 (xtrace, 64 products)"),
        (3.0, 20.0, "3 ± 20 (xtrace, 64 products)"),
        (0.0, 0.1, "0.00 ± 0.10 (xtrace, 64 products)"),
        (2.5, 0.0, "2.5 ± 0 (xtrace, 64 products)"),
        (2.5, math.nan, "2.5 ± nan (xtrace, 64 products)"),
    ],
)
def test_an_estimate_reads_well(value, error, text):
    assert str(Estimate(value, error, 32, 64, "xtrace")) == text
