"""The public curvature of a head and its Kronecker factors: against dense matrices built from explicit sums over rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve.curvature import Direction, HeadCurvature

N, D, C = 13, 4, 7


class Given:
    """Rows, a head, and the dense matrices of the cross-entropy: ``B_i`` of each row and its weight in the mean."""

    def __init__(self, *, bias: bool = True, rows: tuple[int, ...] = (N,), weighted: bool = True) -> None:
        n = math.prod(rows)
        self.e = torch.randn(*rows, D, dtype=torch.float64)
        self.w = torch.randn(C, D, dtype=torch.float64)
        self.b = torch.randn(C, dtype=torch.float64) if bias else None
        self.target = torch.randint(C, rows)
        if n > 2:
            self.target.view(-1)[2] = -100
        self.class_weight = 0.5 + torch.rand(C, dtype=torch.float64) if weighted else None
        self.sample_weight = torch.rand(rows, dtype=torch.float64) if weighted else None
        flat = self.e.reshape(n, D)
        self.ones = torch.cat([flat, torch.ones(n, 1, dtype=torch.float64)], -1) if bias else flat
        z = flat @ self.w.T + (0 if self.b is None else self.b)
        self.p = torch.softmax(z, -1)
        kept = self.target.view(-1) != -100
        self.y = self.target.view(-1).clamp(min=0)
        weight = kept.double()
        if weighted:
            weight = weight * self.sample_weight.view(-1) * self.class_weight[self.y]
        self.a = weight / weight.sum()
        self.blocks = torch.diag_embed(self.p) - self.p.unsqueeze(-1) * self.p.unsqueeze(-2)

    def curvature(self, **options) -> HeadCurvature:
        return HeadCurvature(
            self.e, self.w, self.target, linear_bias=self.b, weight=self.class_weight,
            sample_weight=self.sample_weight, **options,
        )  # fmt: skip

    def matrix(self) -> Tensor:
        """In ``[W | b]``, row by row."""
        return sum(
            a * torch.kron(block, torch.outer(e, e)) for a, block, e in zip(self.a, self.blocks, self.ones, strict=True)
        )

    def joined(self, direction: Direction) -> Tensor:
        return (
            direction.weight if direction.bias is None else torch.cat([direction.weight, direction.bias[:, None]], -1)
        )

    def random(self) -> Direction:
        return Direction(
            torch.randn_like(self.e), torch.randn_like(self.w), None if self.b is None else torch.randn_like(self.b)
        )


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("budget", [None, 20_000])
def test_closed_forms(bias, budget):
    given = Given(bias=bias)
    of_head, dense = given.curvature(memory_budget=budget), given.matrix()
    width = D + bias
    close(given.joined(of_head.diagonal()).reshape(-1), dense.diagonal())
    assert of_head.trace() == pytest.approx(dense.trace().item(), rel=1e-12)
    found = of_head.ggnvp(Direction(None, *given.random()[1:]), parts=("weight", "bias"))
    assert found.input is None
    direction = given.random()._replace(input=None)
    product = of_head.ggnvp(direction)
    close(given.joined(product).reshape(-1), dense @ given.joined(direction).reshape(-1))
    assert dense.shape == (C * width, C * width)


@pytest.mark.parametrize("bias", [True, False])
def test_the_hessian_is_that_of_the_loss(bias):
    given = Given(bias=bias, rows=(3, 4))

    def loss(e, w, *b):
        return softcurve.cross_entropy(
            torch.nn.functional.linear(e, w, *b), given.target, weight=given.class_weight,
            sample_weight=given.sample_weight,
        )  # fmt: skip

    leaves = (given.e, given.w) if given.b is None else (given.e, given.w, given.b)
    directions = [given.random() for _ in range(3)]
    of_head = given.curvature()
    together = of_head.hvp(directions)
    for direction, found in zip(directions, together, strict=True):
        _, expected = torch.autograd.functional.hvp(loss, leaves, tuple(d for d in direction if d is not None))
        for got, right in zip((f for f in found if f is not None), expected, strict=True):
            assert got.shape == right.shape
            close(got, right)
        for alone, shared in zip(of_head.hvp(direction), found, strict=True):
            assert (alone is None) == (shared is None)
            if alone is not None:
                close(alone, shared)


@pytest.mark.parametrize("bias", [True, False])
def test_gradient_norms_are_those_of_each_rows_own_loss(bias):
    given = Given(bias=bias, rows=(3, 4), weighted=False)
    one_hot = torch.nn.functional.one_hot(given.y, C)
    el2n = torch.where(given.target.view(-1) == -100, 0.0, torch.linalg.vector_norm(given.p - one_hot, dim=-1))
    of_head = given.curvature()
    close(of_head.gradient_norms("el2n"), el2n.view(3, 4))
    close(of_head.gradient_norms(), (el2n * torch.linalg.vector_norm(given.ones, dim=-1)).view(3, 4))
    in_bits = given.curvature(base=2.0)
    close(in_bits.gradient_norms("el2n"), el2n.view(3, 4) / math.log(2))


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({}, None),
        ({"temperature": 0.5, "z_loss": 0.4}, None),
        ({"loss": "reverse_kl"}, "logits"),
        ({"loss": "js", "beta": 0.7}, "logits"),
    ],
)
def test_the_bound_is_above_the_largest_eigenvalue(options, target):
    e, w, b = torch.randn(9, 3).double(), 3 * torch.randn(5, 3).double(), torch.randn(5).double()
    y = torch.randint(5, (9,)) if target is None else softcurve.Logits(torch.randn(9, 5).double())
    of_head = HeadCurvature(e, w, y, linear_bias=b, **options)
    size = 5 * 4
    columns = [Direction(None, v[:15].view(5, 3), v[15:]) for v in torch.eye(size).double()]
    dense = torch.stack([torch.cat([f.weight.reshape(-1), f.bias]) for f in of_head.ggnvp(columns)])
    largest = torch.linalg.eigvalsh(dense)[-1].item()
    assert 0 < largest <= of_head.largest_eigenvalue_bound()


def test_the_bound_is_met_by_two_even_classes():
    e = torch.tensor([[2.0], [2.0]]).double()
    of_head = HeadCurvature(e, torch.zeros(2, 1).double(), torch.tensor([0, 1]))
    # B = ¼ [[1, −1], [−1, 1]] ⊗ 4, whose largest eigenvalue is 2.
    assert of_head.largest_eigenvalue_bound() == pytest.approx(2.0, rel=1e-14)


@pytest.mark.parametrize("tiling", ["whole", "blocks", "classes"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_confident_rows_whose_target_is_another_class(kind, tiling, monkeypatch):
    """What is left beside a class of probability 1 is as exact in float32 as the logits are."""
    budget = 60_000 if tiling == "classes" else None
    if tiling == "blocks":
        monkeypatch.setattr("softcurve.head.plan.KEPT_ENTRIES", 1000)
    e, w = 4 * torch.eye(3).repeat(2, 1), torch.randn(1500, 3)
    w[torch.tensor([7, 700, 1400]), torch.arange(3)] = torch.tensor([8.0, 8.5, 9.0])
    y = torch.tensor([7, 700, 1400, 3, 3, 3])
    target = y if kind == "indices" else F.one_hot(y, 1500).float()
    narrow = HeadCurvature(e, w, target, memory_budget=budget)
    wide = HeadCurvature(e.double(), w.double(), target if kind == "indices" else target.double())
    assert wide.gradient_norms("el2n")[0] < 1e-6
    for row in range(6):
        # A direction that is all in one row's features: the products of confident rows are not drowned by others.
        direction = torch.zeros(6, 3)
        direction[row] = torch.randn(3)
        found = narrow.ggnvp(Direction(direction, None, None)).input[row]
        truth = wide.ggnvp(Direction(direction.double(), None, None)).input[row]
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())
    assert narrow.trace() == pytest.approx(wide.trace(), rel=1e-4)


# --- Kronecker factors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["dense", "low_rank"])
def test_kronecker_factors(bias, form):
    given = Given(bias=bias)
    factors = given.curvature().kfac(form=form, rank=C)
    b = torch.einsum("n,nij->ij", given.a, given.blocks)
    a = torch.einsum("n,ni,nj->ij", given.a, given.ones, given.ones)
    close(factors.features, a)
    close(factors.classes.to_dense(), b)
    direction = given.random()
    joined = given.joined(direction)
    close(_joined(factors.product(*direction[1:])), b @ joined @ a)
    for damping in (7.0, 0.03):  # the preparations for one damping do not serve another
        dense = torch.kron(b, a) + damping * torch.eye(b.shape[0] * a.shape[0]).double()
        solved = _joined(factors.solve(*direction[1:], damping=damping)).reshape(-1)
        torch.testing.assert_close(solved, torch.linalg.solve(dense, joined.reshape(-1)), rtol=1e-7, atol=1e-9)
    scales = torch.tensor([0.0, 0.3, 2.0]).double()
    inverse = [torch.linalg.inv(s * b + 0.03 * torch.eye(C).double()) for s in scales]
    damped = factors.form.damped(scales, 0.03)
    found = damped.inverse_diagonal()
    torch.testing.assert_close(found, torch.stack([i.diagonal() for i in inverse], 1), rtol=1e-7, atol=0)
    logs = torch.stack([-torch.logdet(i) for i in inverse])
    torch.testing.assert_close(damped.log_determinants(), logs, rtol=1e-8, atol=1e-9)


def _joined(parts: tuple[Tensor, Tensor | None]) -> Tensor:
    return parts[0] if parts[1] is None else torch.cat([parts[0], parts[1][:, None]], -1)


def test_a_low_rank_form_stays_above_the_factor():
    e, w = torch.randn(60, 5).double(), 2 * torch.randn(40, 5).double()
    of_head = HeadCurvature(e, w, torch.randint(40, (60,)))
    exact = of_head.kfac(form="dense").classes.to_dense()
    errors = []
    for rank in (2, 8, 30):
        form = of_head.kfac(form="low_rank", rank=rank).form
        held = form.diagonal.diag() - form.low @ form.low.T
        assert torch.linalg.eigvalsh(held - exact)[0] > -1e-12
        errors.append(torch.linalg.matrix_norm(held - exact, 2).item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_damping_below_the_rounding_of_a_low_rank_form_is_refused():
    e, w = 30 * torch.randn(60, 5), 2 * torch.randn(40, 5)
    factors = HeadCurvature(e, w, torch.randint(40, (60,)), reduction="sum").kfac(form="low_rank", rank=40)
    with pytest.raises(ValueError, match="damping must be larger than the rounding errors of a class factor of low r"):
        factors.solve(torch.randn(40, 5), damping=1e-14)


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"softcap": 2.0}, None),
        ({"loss": "js"}, "logits"),
        ({"loss": "cross_entropy"}, "bucket"),
        ({"z_loss": 0.2}, None),
    ],
)
def test_class_factors_of_other_losses(options, target):
    e, w = torch.randn(9, 3).double(), torch.randn(6, 3).double()
    log_probs, indices = torch.log_softmax(torch.randn(9, 6).double(), -1).topk(2)
    y = {
        None: torch.randint(6, (9,)),
        "logits": softcurve.Logits(torch.randn(9, 6).double()),
        "bucket": softcurve.TopK(indices, log_probs),
    }[target]
    of_head = HeadCurvature(e, w, y, linear_bias=torch.zeros(6).double(), **options)
    # In the bias alone the matrix is B.
    columns = [Direction(None, None, v) for v in torch.eye(6).double()]
    dense = torch.stack([f.bias for f in of_head.ggnvp(columns, parts=("bias",))])
    close(of_head.kfac(form="dense").classes.to_dense(), dense)
    if "z_loss" not in options:
        with pytest.raises(ValueError, match="form must be 'dense' for a soft cap, JS or a TopK with a bucket"):
            of_head.kfac(form="low_rank")
    else:
        form = of_head.kfac(form="low_rank", rank=6).form
        torch.testing.assert_close(form.diagonal.diag() - form.low @ form.low.T, dense, rtol=1e-7, atol=1e-9)


def test_a_z_loss_that_turns_the_products_round_is_refused_for_a_low_rank():
    e, w = torch.randn(30, 4).double(), 0.1 * torch.randn(40, 4).double()
    of_head = HeadCurvature(e, w, torch.randint(40, (30,)), linear_bias=torch.full((40,), -4.0).double(), z_loss=3.0)
    with pytest.raises(ValueError, match="form must be 'dense' for so large a z_loss"):
        of_head.kfac(form="low_rank", rank=40)


@pytest.mark.parametrize("smoothing", [0.0, 1e-12])
def test_class_weights_are_in_gradient_norms(smoothing):
    e, w, y = torch.randn(6, 4).double(), torch.randn(5, 4).double(), torch.tensor([0, 3, -100, 1, 4, 3])
    weight = torch.rand(5).double() + 0.5
    z = (e @ w.T).requires_grad_()
    F.cross_entropy(z, y, weight, reduction="sum").backward()
    of_head = HeadCurvature(e, w, y, weight=weight, label_smoothing=smoothing, sample_weight=torch.rand(6).double())
    torch.testing.assert_close(of_head.gradient_norms("el2n"), z.grad.norm(dim=-1), rtol=1e-9, atol=1e-12)


def test_gradient_norms_of_confident_rows():
    for gap in (20, 50, 80):
        w = torch.zeros(6, 1)
        w[0, 0] = gap
        found = HeadCurvature(torch.ones(2, 1), w, torch.zeros(2).long()).gradient_norms("el2n")
        p = math.exp(-gap) / (1 + 5 * math.exp(-gap))
        assert found[0].item() == pytest.approx(p * math.sqrt(25 + 5), rel=1e-6)


# --- doors -----------------------------------------------------------------------------------------------------------


def test_half_precision_is_computed_in_float32():
    e, w, y = torch.randn(9, 3), torch.randn(6, 3), torch.randint(6, (9,))
    half = HeadCurvature(e.bfloat16(), w.bfloat16(), y)
    wide = HeadCurvature(e.bfloat16().double(), w.bfloat16().double(), y)
    direction = Direction(None, torch.randn(6, 3), None)
    found = half.ggnvp(direction)
    assert found.weight.dtype == torch.float32
    torch.testing.assert_close(found.weight.double(), wide.ggnvp(direction).weight, rtol=1e-4, atol=1e-6)
    assert half.trace() == pytest.approx(wide.trace(), rel=1e-5)


@pytest.mark.usefixtures("without_shape_checks")  # which know the words too
def test_bad_arguments_are_named():
    e, w, y = torch.randn(5, 3), torch.randn(4, 3), torch.randint(4, (5,))
    of_head = HeadCurvature(e, w, y)
    with pytest.raises(ValueError, match=r"direction.weight must be of shape \(4, 3\), got shape \(3, 4\)"):
        of_head.hvp(Direction(None, torch.randn(3, 4), None))
    with pytest.raises(ValueError, match=r"direction.bias must be None: the head has none"):
        of_head.hvp(Direction(None, None, torch.randn(4)))
    with pytest.raises(ValueError, match="parts must be one of 'input', 'weight', 'bias', got 'features'"):
        of_head.hvp(Direction(None, None, None), parts=("features",))
    with pytest.raises(ValueError, match="matrix must be one of 'hessian', 'gauss_newton', 'fisher', got 'ggn'"):
        of_head.trace(matrix="ggn")
    with pytest.raises(ValueError, match="target must have a row that counts, got none"):
        HeadCurvature(e, w, torch.full((5,), -100))
    with pytest.raises(
        ValueError,
        match="loss must be one of 'cross_entropy', 'forward_kl', 'reverse_kl', 'js' or a Divergence, got 'kl'",
    ):
        HeadCurvature(e, w, y, loss="kl")
    with pytest.raises(ValueError, match=r"label_smoothing must not be given for loss='js', got 0\.1"):
        HeadCurvature(e, w, softcurve.Logits(torch.randn(5, 4)), loss="js", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"damping must be a finite number above 0, got 0\.0"):
        of_head.kfac().solve(torch.randn(4, 3), damping=0.0)
    with pytest.raises(ValueError, match="bias must be None: the head has none"):
        of_head.kfac().product(torch.randn(4, 3), torch.randn(4))
    with pytest.raises(ValueError, match="rank must be a whole number >= 1, got 0"):
        of_head.kfac(rank=0)
