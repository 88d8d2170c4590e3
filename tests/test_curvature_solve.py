"""Conjugate gradients against dense solutions."""

from __future__ import annotations

import math

import pytest
import torch

from softcurve.curvature.algorithms.conjugate_gradients import solve

from .symmetric_matrices import Matrix, with_spectrum

POSITIVE = with_spectrum(torch.logspace(-2, 1, 60, dtype=torch.float64))


def relative_residuals(matrix, x, b):
    return torch.linalg.vector_norm(b - matrix @ x, dim=0) / torch.linalg.vector_norm(b, dim=0)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(60,), (60, 1), (60, 5)])
def test_the_solution_is_the_dense_one(damping, shape):
    b = torch.randn(shape, dtype=torch.float64)
    operator = Matrix(POSITIVE)
    solution = solve(operator, b, damping=damping, tol=1e-12)
    damped = POSITIVE + damping * torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(solution.x, torch.linalg.solve(damped, b), rtol=1e-8, atol=1e-9)
    assert solution.residuals.shape == solution.converged.shape == solution.indefinite.shape == shape[1:]
    assert solution.converged.all()
    assert not solution.indefinite.any()
    torch.testing.assert_close(solution.residuals, relative_residuals(damped, solution.x, b), rtol=1e-3, atol=1e-14)
    assert solution.products == operator.products


def test_the_method_is_the_function():
    b = torch.randn(60, dtype=torch.float64)
    ours, theirs = Matrix(POSITIVE).solve(b, damping=0.1), solve(Matrix(POSITIVE), b, damping=0.1)
    assert torch.equal(ours.x, theirs.x)
    assert ours.iterations == theirs.iterations


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10])
def test_the_tolerance_is_met_and_not_much_more(tol):
    b = torch.randn(60, 4, dtype=torch.float64)
    residuals = solve(Matrix(POSITIVE), b, tol=tol).residuals
    assert (residuals <= tol).all()
    assert (residuals > tol / 100).all()


def test_as_many_iterations_as_distinct_eigenvalues():
    """In exact arithmetic; here the eigenvalues are few and well apart."""
    eigenvalues = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64).repeat(10)
    solution = solve(Matrix(with_spectrum(eigenvalues)), torch.ones(40, dtype=torch.float64), tol=1e-10)
    assert solution.converged
    assert solution.iterations == 4


def test_many_columns_are_each_alone_and_share_the_passes():
    matrix = with_spectrum(torch.linspace(1, 4, 60, dtype=torch.float64))
    b = torch.randn(60, 5, dtype=torch.float64) * torch.logspace(-8, 8, 5, dtype=torch.float64)
    b[:, 1] = torch.linalg.eigh(matrix).eigenvectors[:, ::20].sum(1)  # converges earlier
    operator = Matrix(matrix)
    together = solve(operator, b, tol=1e-8)
    alone = [solve(Matrix(matrix), column, tol=1e-8) for column in b.mT]
    for i, solution in enumerate(alone):
        assert torch.linalg.vector_norm(together.x[:, i] - solution.x) < 1e-6 * torch.linalg.vector_norm(solution.x)
        assert together.residuals[i] <= 1e-8
    assert len({solution.iterations for solution in alone}) > 1
    assert together.iterations == max(solution.iterations for solution in alone)
    # A converged column takes no further products.
    assert together.products == sum(solution.products for solution in alone) == operator.products
    assert operator.calls < together.products / 3


def test_a_good_preconditioner_saves_iterations_and_changes_no_solution():
    scales = torch.logspace(-3, 3, 60, dtype=torch.float64)
    matrix = with_spectrum(torch.linspace(1, 2, 60, dtype=torch.float64)) * scales.unsqueeze(1) * scales
    b = torch.randn(60, 3, dtype=torch.float64)
    seen = []

    def jacobi(residuals):
        seen.append(residuals.shape)
        return residuals / matrix.diagonal().unsqueeze(1)

    with pytest.warns(UserWarning, match="give a preconditioner"):
        plain = solve(Matrix(matrix), b, tol=1e-8)
    preconditioned = solve(Matrix(matrix), b, tol=1e-8, preconditioner=jacobi)
    assert preconditioned.converged.all()
    assert preconditioned.iterations < 40
    assert plain.iterations > 3 * preconditioned.iterations
    assert (relative_residuals(matrix, preconditioned.x, b) <= 1e-8).all()
    assert all(len(shape) == 2 and shape[0] == 60 for shape in seen)
    exact = solve(Matrix(matrix), b, tol=1e-8, preconditioner=lambda r: torch.linalg.solve(matrix, r))
    assert exact.iterations <= 2


def test_negative_curvature_ends_a_column_and_is_reported():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64))
    b = torch.eye(4, dtype=torch.float64)[:, [0, 3]] + torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="not converged in 1 of 2 columns.*curvature <= 0"):
        solution = solve(Matrix(matrix), b)
    assert solution.indefinite.tolist() == [False, True]
    assert solution.converged.tolist() == [True, False]
    torch.testing.assert_close(solution.x[:, 0], torch.tensor([1.0, 1 / 2, 1 / 3, 0.0], dtype=torch.float64))
    torch.testing.assert_close(solution.residuals, relative_residuals(matrix, solution.x, b), rtol=1e-6, atol=1e-15)
    with pytest.warns(UserWarning, match="not converged: the relative residual is 1 after"):
        first = solve(Matrix(-matrix[:3, :3]), torch.ones(3, dtype=torch.float64))
    assert first.indefinite
    assert not first.x.any()
    assert first.residuals == 1
    damped = solve(Matrix(matrix), b, damping=1.5)
    assert damped.converged.all()
    assert not damped.indefinite.any()


def test_a_flat_direction_is_not_positive():
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.warns(UserWarning, match="curvature <= 0"):
        solution = solve(Matrix(singular), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert solution.indefinite
    assert not solution.converged
    assert not solution.x.any()
    consistent = solve(Matrix(singular), torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert consistent.converged
    assert consistent.x.tolist() == [2, 0]


@pytest.mark.parametrize("start", [None, 1.0])
def test_a_column_of_zeros_has_the_solution_zero(start):
    b = torch.randn(60, 3, dtype=torch.float64)
    b[:, 1] = 0
    x0 = None if start is None else torch.full_like(b, start)
    solution = solve(Matrix(POSITIVE), b, x0=x0)
    assert not solution.x[:, 1].any()
    assert solution.residuals[1] == 0
    assert solution.converged.all()
    operator = Matrix(POSITIVE)
    alone = solve(operator, b[:, 1])
    assert (alone.iterations, alone.products, operator.products) == (0, 0, 0)
    assert solve(operator, b[:, :0]).x.shape == (60, 0)


def test_a_start_at_the_solution_takes_one_product():
    b = torch.randn(60, dtype=torch.float64)
    x0 = torch.linalg.solve(POSITIVE, b)
    kept = x0.clone()
    solution = solve(Matrix(POSITIVE), b, x0=x0)
    assert (solution.iterations, solution.products) == (0, 1)
    assert torch.equal(solution.x, x0)
    near = solve(Matrix(POSITIVE), b, x0=x0 + 1e-3)
    far = solve(Matrix(POSITIVE), b)
    assert near.converged
    assert near.iterations < far.iterations
    assert torch.equal(x0, kept)


def test_a_residual_of_the_recurrence_that_drifted_is_computed_anew():
    """From so far away, rounding at the start exceeds the tolerance; the recurrence does not know."""
    b = torch.randn(60, 2, dtype=torch.float64)
    solution = solve(Matrix(POSITIVE), b, tol=1e-10, x0=1e9 * torch.randn(60, 2, dtype=torch.float64))
    assert solution.converged.all()
    assert (relative_residuals(POSITIVE, solution.x, b) <= 1e-10).all()


@pytest.mark.parametrize("limit", [0, 3])
def test_giving_up_says_so_with_the_true_residual(limit):
    b = torch.randn(60, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match=f"not converged in 2 of 2 columns: .* after {limit} iterations"):
        solution = solve(Matrix(POSITIVE), b, max_iterations=limit)
    assert solution.iterations == limit
    assert not solution.converged.any()
    assert not solution.indefinite.any()
    torch.testing.assert_close(solution.residuals, relative_residuals(POSITIVE, solution.x, b))


def test_narrow_products_solve_as_far_as_their_rounding_lets_them():
    matrix = with_spectrum(torch.logspace(-3, 0, 60, dtype=torch.float64)).float()
    b = torch.randn(60, 2)
    solution = solve(Matrix(matrix), b, tol=1e-4)
    assert solution.x.dtype == torch.float32
    assert solution.converged.all()
    true = relative_residuals(matrix.double(), solution.x.double(), b.double())
    assert (true <= 1.5e-4).all()
    # Below what float32 can: the recurrence's residual falls on, the true one does not, and the solver sees it.
    with pytest.warns(UserWarning, match="precision of the dtype"):
        beyond = solve(Matrix(matrix), b, tol=1e-12)
    assert not beyond.converged.any()
    assert beyond.iterations < 600
    true = relative_residuals(matrix.double(), beyond.x.double(), b.double())
    assert (true < 1e-4).all()
    assert (beyond.residuals < 1e-4).all()
    half = solve(Matrix(torch.eye(9, dtype=torch.bfloat16) * 2), torch.ones(9, dtype=torch.bfloat16))
    assert half.x.dtype == torch.float32
    assert half.x.tolist() == [0.5] * 9


@pytest.mark.parametrize(
    ("b", "options", "error", "message"),
    [
        (torch.ones(59), {}, ValueError, r"b must be of shape \(60,\) or \(60, k\), got shape \(59,\)"),
        (torch.ones(60, 1, 1), {}, ValueError, r"b must be of shape"),
        (torch.ones(60, dtype=torch.long), {}, TypeError, "b must be a floating-point tensor, got torch.int64"),
        (torch.ones(60, device="meta"), {}, ValueError, "b must be on the operator's device cpu, got meta"),
        (torch.full((60,), math.nan), {}, ValueError, "b must hold finite numbers, got NaN or infinity"),
        (torch.ones(60), {"x0": torch.ones(60, 1)}, ValueError, r"x0 must be of b's shape \(60,\), got \(60, 1\)"),
        (torch.ones(60), {"x0": torch.full((60,), math.inf)}, ValueError, "x0 must hold finite numbers"),
        (torch.ones(60), {"damping": -1.0}, ValueError, "damping must be a finite number at least 0, got -1.0"),
        (torch.ones(60), {"tol": 0.0}, ValueError, "tol must be a finite number above 0, got 0.0"),
        (torch.ones(60), {"max_iterations": -1}, ValueError, "max_iterations must be a whole number >= 0, got -1"),
        (torch.ones(60), {"preconditioner": lambda r: -r}, ValueError, "preconditioner must be positive definite"),
        (
            torch.ones(60),
            {"preconditioner": lambda r: r[:-1]},
            ValueError,
            r"\(n, k\) to \(n, k\), got shape \(59, 1\)",
        ),
    ],
)
def test_bad_arguments_are_refused(b, options, error, message):
    with pytest.raises(error, match=message):
        solve(Matrix(POSITIVE), b, **options)


def test_products_that_are_not_finite_are_refused():
    matrix = POSITIVE.clone()
    matrix[0, 0] = math.nan
    with pytest.raises(ValueError, match="operator must give finite products, got NaN or infinity"):
        solve(Matrix(matrix), torch.ones(60))
