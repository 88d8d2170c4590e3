"""``linear_log_probs`` against dense float64 autograd, mpmath, transforms and compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import softcurve

from .cases import assert_same
from .pairwise import pairwise

# torch's own, at the first derivative in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TRUTH = torch.float64
LEVELS: dict[str, list[Any]] = {
    "index": [None, "one", "many"],
    "bias": [None, "plain", "masked"],
    "temperature": [1.0, 0.7, "rows"],
    "softcap": [None, 3.0],
    "tiles": ["whole", "rows", "classes"],
    "spread": [1.0, 20.0],  # of the features: with the larger one most rows have a dominant class
    "leading": [(7,), (2, 3), ()],
}
BUDGETS = {"whole": None, "rows": 8 * 40_000, "classes": 8 * 5000}
MASKED = [3, 20, 41]


def dense(x: Tensor, w: Tensor, b: Tensor | None, index: Tensor | None, temperature: Any, cap: Any) -> list[Tensor]:
    """Return the statistics by their definitions, on the logits."""
    z = x @ w.T if b is None else x @ w.T + b
    z = z if cap is None else torch.where(z == -torch.inf, z, cap * torch.tanh(z / cap))
    z = z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    log_p = z.log_softmax(-1)
    p, some = log_p.exp(), z > -torch.inf
    entropy = -(p * torch.where(some, log_p, 0.0)).sum(-1)
    found = [entropy, z.logsumexp(-1), (p * torch.where(some, z, 0.0)).sum(-1), p.square().sum(-1).log()]
    if index is None:
        return [log_p[..., :0], *found]
    one = index.ndim < x.ndim
    listed = log_p.gather(-1, index.unsqueeze(-1) if one else index)
    return [listed.squeeze(-1) if one else listed, *found]


@pytest.mark.parametrize("setting", pairwise(LEVELS), ids=str)
def test_values_and_both_derivatives_equal_the_dense_ones(setting: dict[str, Any]) -> None:
    tiles, leading = setting["tiles"], setting["leading"]
    classes = 300 if tiles != "whole" else 50
    leading = (90,) if tiles == "classes" and leading else leading
    x = (setting["spread"] * torch.randn(*leading, 5, dtype=TRUTH)).requires_grad_()
    w = torch.randn(classes, 5, dtype=TRUTH, requires_grad=True)
    leaves, b = [x, w], None
    if setting["bias"]:
        b = torch.randn(classes, dtype=TRUTH)
        if setting["bias"] == "masked":
            b[MASKED] = -torch.inf
        leaves.append(b.requires_grad_())
    index = None
    if setting["index"]:
        index = torch.randint(0, classes, (*leading, 4) if setting["index"] == "many" else leading)
        index = torch.where(torch.isin(index, torch.tensor(MASKED)), 1, index)
        if setting["index"] == "many":
            index[..., 3] = index[..., 0]  # a class may be asked for twice
    temperature = torch.rand(leading, dtype=TRUTH) + 0.5 if setting["temperature"] == "rows" else setting["temperature"]
    options = {"temperature": temperature, "softcap": setting["softcap"], "memory_budget": BUDGETS[tiles]}
    got = list(softcurve.linear_log_probs(x, w, index, linear_bias=b, **options))
    right = dense(x, w, b, index, temperature, setting["softcap"])
    incoming = [torch.randn_like(part) for part in right]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    for found in (got, right):
        combined = sum((part * v).sum() for part, v in zip(list(found), incoming, strict=True))
        first = torch.autograd.grad(combined, leaves, create_graph=True)
        along = sum((torch.nan_to_num(g) * v).sum() for g, v in zip(first, directions, strict=True))
        found += [torch.nan_to_num(g.detach()) for g in first]
        found += [torch.nan_to_num(h) for h in torch.autograd.grad(along, leaves)]
    for number, (ours, truth) in enumerate(zip(got, right, strict=True)):
        assert_same(ours.detach(), truth.detach(), f"part {number}", 1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("gap", [0.25, 5.25, 20.25, 80.25])
def test_float32_is_right_relatively(gap: float, offset: float) -> None:
    """Statistics and gradients of confident rows, and of rows that are sure of another class, against 50 digits."""
    z = torch.randn(4, 300)
    z[:, 7] = z.amax(-1) + gap
    z = (z * 1024).round() / 1024 + offset  # the logits below are these, exactly
    index = torch.tensor([7, 7, 3, 5])
    with mpmath.workdps(50):
        truth = [_exact(row, 7, int(at)) for row, at in zip(z.double(), index, strict=True)]
    for budget in (None, 4 * 3000):
        weight = z.T.contiguous().requires_grad_()
        found = softcurve.linear_log_probs(torch.eye(4), weight, index, memory_budget=budget)
        parts = (found.log_probs, found.entropy, found.collision)
        columns = [*found, *(torch.autograd.grad(part.sum(), weight, retain_graph=True)[0][7] for part in parts)]
        for number, column in enumerate(columns):
            for got, row in zip(column.tolist(), truth, strict=True):
                assert abs(got - row[number]) <= 5e-7 * max(abs(row[number]), 1e-37), (number, got, row[number])
        _, stats = softcurve.linear_cross_entropy(torch.eye(4), weight, index, memory_budget=budget, return_stats=True)
        for number, column in enumerate(stats[:5]):
            for at, got, row in zip(index.tolist(), column.tolist(), truth, strict=True):
                least = 1e-37 if at == 7 else 4e-9  # beside a class that the target does not name, to an ulp of float64
                assert abs(got - row[number]) <= 5e-7 * max(abs(row[number]), least), (number, got, row[number])


def _exact(z: Tensor, top: int, at: int) -> list[mpmath.mpf]:
    """Return the five statistics of a row, and the derivatives of three of them in the logit of class ``top``."""
    logits = [mpmath.mpf(value) for value in z.tolist()]
    total = mpmath.fsum(mpmath.exp(value - logits[top]) for value in logits)
    lse = logits[top] + mpmath.log(total)
    p = [mpmath.exp(value - lse) for value in logits]
    mean = mpmath.fsum(a * b for a, b in zip(p, logits, strict=True))
    square = mpmath.fsum(a * a for a in p)
    others = mpmath.fsum(a for k, a in enumerate(p) if k != top)
    of_log_prob = others if at == top else -p[top]
    of_collision = 2 * p[top] * (p[top] - square) / square
    return [
        logits[at] - lse, lse - mean, lse, mean, mpmath.log(square),
        of_log_prob, -p[top] * (logits[top] - mean), of_collision,
    ]  # fmt: skip


def test_the_statistics_of_a_loss_are_the_same_record() -> None:
    """By name and value, of rows with and without a label, and with the first and second derivatives of it."""
    assert softcurve.LossStats._fields[:5] == softcurve.HeadStatistics._fields
    x, w = torch.randn(5, 3, dtype=TRUTH, requires_grad=True), torch.randn(7, 3, dtype=TRUTH, requires_grad=True)
    y, exclude = torch.tensor([0, 4, -100, 6, 2]), torch.tensor([[1], [4], [3], [-1], [5]])
    options = {"temperature": 0.7, "softcap": 2.0, "exclude": exclude}
    ours = softcurve.linear_cross_entropy(x, w, y, label_smoothing=0.2, base=2, return_stats=True, **options)[1]
    right = softcurve.linear_log_probs(x, w, y.clamp(min=0), **options)
    for found, truth in zip(ours, right, strict=False):
        weight = torch.tensor([1.0, 2.0, 3.0 * (found is not ours.log_probs), 4.0, 5.0], dtype=TRUTH)
        weight[1] *= found is not ours.log_probs  # −inf
        for part in (found, truth):
            assert part.shape == (5,)
        of_ours, of_truth = ([column * weight] for column in (found.nan_to_num(), truth.nan_to_num()))
        for parts in (of_ours, of_truth):
            parts += torch.autograd.grad(parts[0].sin().sum(), (x, w), create_graph=True)
            parts += torch.autograd.grad(parts[1].sin().sum() + parts[2].sin().sum(), (x, w), retain_graph=True)
        for a, b in zip(of_ours, of_truth, strict=True):
            assert_same(a.detach(), b.detach(), bound=1e-10)
    assert ours.log_probs[[1, 2]].tolist() == [-torch.inf, 0.0]
    soft = softcurve.linear_cross_entropy(x, w, torch.rand(5, 7, dtype=TRUTH).softmax(-1), return_stats=True)[1]
    assert soft.log_probs.shape == (5, 0)
    positions = torch.randn(7, 2, 4, 3, dtype=TRUTH)
    for target, shape in ((torch.zeros(5, 2, 4).long(), (5, 2, 4)), (torch.full((5, 7, 2, 4), 1 / 7), (5, 2, 4, 0))):
        stats = softcurve.linear_cross_entropy(x, positions, target, return_stats=True)[1]
        assert stats.log_probs.shape == shape
        assert_same(stats.lse, torch.einsum("nd,cijd->nijc", x, positions).logsumexp(-1))


def test_a_confident_token_keeps_its_digits() -> None:
    z = torch.tensor([[20.0, 0.0, 0.0, 0.0]])
    found = softcurve.linear_log_probs(z, torch.eye(4), torch.tensor([0]))
    assert abs(found.log_probs.item() / -6.183461e-9 - 1) < 1e-6


def test_bfloat16_is_as_exact_as_its_inputs() -> None:
    x, w = torch.randn(9, 64).bfloat16(), torch.randn(1000, 64).bfloat16()
    index = torch.randint(0, 1000, (9,))
    found = softcurve.linear_log_probs(x, w, index)
    right = dense(x.double(), w.double(), None, index, 1.0, None)
    for got, truth in zip(found, right, strict=True):
        assert got.dtype == torch.float32
        assert (got - truth).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        cast = softcurve.linear_log_probs(x.float(), w.float(), index)
    assert all(torch.equal(a, b) for a, b in zip(cast, found, strict=True))


def test_gradcheck_in_every_mode() -> None:
    x, w, b = (torch.randn(*shape, dtype=TRUTH, requires_grad=True) for shape in ((4, 3), (6, 3), (6,)))
    index = torch.randint(0, 6, (4, 2))

    def found(*a: Tensor) -> tuple[Any, ...]:
        return tuple(softcurve.linear_log_probs(*a[:2], index, linear_bias=a[2], temperature=0.7, softcap=2.0))

    batched = {"check_batched_grad": True}
    assert gradcheck(found, (x, w, b), check_forward_ad=True, check_batched_forward_grad=True, **batched)
    assert gradgradcheck(found, (x, w, b), **batched)


POLICY = """
def loss(x, w):
    found = linear_log_probs(x, w, index)
    return (found.log_probs ** 2).sum() + 0.1 * found.entropy.sin().sum()
def dense(x, w):
    log_p = (x @ w.T).log_softmax(-1)
    return (log_p.gather(-1, index) ** 2).sum() - 0.1 * (log_p.exp() * log_p).sum(-1).sin().sum()
"""


def test_transforms() -> None:
    names: dict[str, Any] = {"linear_log_probs": softcurve.linear_log_probs, "index": torch.randint(0, 6, (4, 2))}
    exec(POLICY, names)
    x, w = torch.randn(4, 3, dtype=TRUTH), torch.randn(6, 3, dtype=TRUTH)
    two = torch.stack([x, 2 * x])
    for transform in (
        lambda f: grad(f)(x, w), lambda f: hessian(f)(x, w), lambda f: jacrev(jacrev(f))(x, w),
        lambda f: jacfwd(jacrev(f))(x, w), lambda f: vmap(grad(f), (0, None))(two, w),
    ):  # fmt: skip
        assert_same(transform(names["loss"]), transform(names["dense"]))


def test_compiled_without_a_graph_break(run_python: Callable[[str], object]) -> None:
    body = """
x, w = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w), (x, w))
right = torch.autograd.grad(dense(x, w), (x, w))
assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, right))
"""
    run_python(
        "import torch\nfrom softcurve import linear_log_probs\ntorch.manual_seed(0)\n"
        f"index = torch.randint(0, 6, (4, 2))\n{POLICY}{body}"
    )


def test_shapes() -> None:
    """Leading dimensions, no rows, one class, no index, an empty list, an index of int32."""
    w = torch.randn(6, 3)
    for leading in ((), (0,), (2, 4), (2, 0)):
        x = torch.randn(*leading, 3)
        for index, shape in ((torch.zeros(leading, dtype=torch.int32), leading), (None, None)):
            found = softcurve.linear_log_probs(x, w, index)
            assert all(part.shape == leading for part in found[1:])
            assert found.log_probs.shape == ((*leading, 0) if shape is None else shape)
        assert softcurve.linear_log_probs(x, w, torch.zeros(*leading, 0).long()).log_probs.shape == (*leading, 0)
    one = softcurve.linear_log_probs(torch.randn(2, 3), torch.randn(1, 3), torch.zeros(2).long())
    assert one.log_probs.tolist() == one.entropy.tolist() == one.collision.tolist() == [0.0, 0.0]


def test_rows_without_an_incoming_gradient_are_left_out() -> None:
    """So a mask of padding costs nothing, and infinite values there do no harm."""
    x = torch.randn(3, 4, requires_grad=True)
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0])
    found = softcurve.linear_log_probs(x, torch.randn(5, 4), torch.tensor([0, 1, 2]), linear_bias=bias)
    assert found.log_probs[1] == -torch.inf
    (gradient,) = torch.autograd.grad(found.log_probs[[0, 2]].sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[1].any()


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"index": torch.tensor([0, 9])}, ValueError, "index must hold classes in 0 … 8, got 9"),
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, "index must hold class indices"),
        ({"index": torch.zeros(3).long()}, ValueError, "index must have one class per row"),
        ({"index": [0, 1]}, TypeError, "index must be a torch.Tensor"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must have one entry per row"),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "temperature must not require gradients"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number above 0"),
        ({"linear_bias": torch.full((9,), -torch.inf)}, ValueError, "linear_bias must have at least one finite"),
        ({"linear_bias": torch.full((9,), torch.inf)}, ValueError, "linear_bias must be below \\+inf"),
        ({"memory_budget": 100}, ValueError, "memory_budget must be at least"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_errors(named: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        softcurve.linear_log_probs(torch.randn(2, 3), torch.randn(9, 3), **{"index": None} | named)
