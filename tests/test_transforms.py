"""Every transform of torch.func and of autograd, and their nestings, on every loss: equal to those of the dense formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import softcurve

from . import oracle
from .cases import CASES, Case, problem

# torch's own doing when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

EXACT = {"rtol": 1e-11, "atol": 1e-12}
# Probabilities and a LinearTeacher become logits or a dense target by torch's own operations.
KINDS = ("indices", "float", "Logits", "bucket", "renormalize", "none")
CHOSEN = [
    case
    for case in CASES
    if case.name in ("cross_entropy", "forward", "reverse", "js0.3", "entropy") and case.kind.name in KINDS
]

Function = Callable[..., Tensor]


def directions(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.arange(a.numel(), dtype=a.dtype).add(0.3).cos().reshape(a.shape) for a in arguments)


def everywhere(arguments: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(arguments)))


TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, a: grad(f, everywhere(a))(*a),
    "grad_and_value": lambda f, a: grad_and_value(f, everywhere(a))(*a),
    "vjp": lambda f, a: vjp(f, *a)[1](torch.tensor(0.7, dtype=torch.float64)),
    "jvp": lambda f, a: jvp(f, a, directions(a)),
    "jvp in logits": lambda f, a: jvp(lambda z: f(z, *a[1:]), a[:1], directions(a[:1])),
    "jacrev": lambda f, a: jacrev(f, everywhere(a))(*a),
    "jacfwd": lambda f, a: jacfwd(f, everywhere(a))(*a),
    "hessian": lambda f, a: hessian(f, everywhere(a))(*a),
    "jacrev(jacrev)": lambda f, a: jacrev(jacrev(f, everywhere(a)), everywhere(a))(*a),
    "jacrev(jacfwd)": lambda f, a: jacrev(jacfwd(f, everywhere(a)), everywhere(a))(*a),
    "jacfwd(jacfwd)": lambda f, a: jacfwd(jacfwd(f, everywhere(a)), everywhere(a))(*a),
    "jvp(grad)": lambda f, a: jvp(grad(f, everywhere(a)), a, directions(a)),
    "vjp(grad)": lambda f, a: vjp(grad(f, everywhere(a)), *a)[1](directions(a)),
    "jvp(jvp)": lambda f, a: jvp(lambda *b: jvp(f, b, directions(a))[1], a, directions(a)),
    "grad(jvp)": lambda f, a: grad(lambda *b: jvp(f, b, directions(a))[1], everywhere(a))(*a),
    "vmap(jvp(grad))": lambda f, a: vmap(lambda *v: jvp(grad(f, everywhere(a)), a, v)[1])(
        *(torch.stack([d, -0.4 * d.flip(-1)]) for d in directions(a))
    ),
    "jacfwd(hessian)": lambda f, a: jacfwd(hessian(f))(*a),
    "jacrev(hessian)": lambda f, a: jacrev(hessian(f))(*a),
    "jacfwd(jacfwd(jacfwd))": lambda f, a: jacfwd(jacfwd(jacfwd(f)))(*a),
    "grad(jvp(grad))": lambda f, a: grad(
        lambda *b: dot(jvp(grad(f, everywhere(a)), b, directions(a))[1]), everywhere(a)
    )(*a),
}


def dot(tensors: tuple[Tensor, ...]) -> Tensor:
    return sum(((t * d).sum() for t, d in zip(tensors, directions(tensors), strict=True)), start=torch.zeros(()))


def assert_equal(got: Any, expected: Any) -> None:
    got, expected = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_func(case: Case, transform: str) -> None:
    for option in ("plain", "everything") if case.is_cross_entropy else ("everything",):
        posed = problem(case, option, "none", (2,), 3)
        arguments = tuple(a.detach() for a in posed.arguments)
        ours, dense = (lambda *a, f=f: f(*a).sin().sum() for f in (posed.ours, posed.dense))
        assert_equal(TRANSFORMS[transform](ours, arguments), TRANSFORMS[transform](dense, arguments))


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_vmap(case: Case) -> None:
    """Over rows, with what is not mapped shared; per-sample gradients and Hessians; nested and by chunks."""
    posed = problem(case, "plain", "none", (), 4)
    one = tuple(a.detach() for a in posed.arguments)
    many = torch.randn(5, 4, dtype=torch.float64)
    shared = (0, *(None for _ in one[1:]))
    expected = torch.stack([posed.dense(z, *one[1:]) for z in many])
    assert_equal(vmap(posed.ours, shared)(many, *one[1:]), expected)
    assert_equal(vmap(posed.ours, (1, *shared[1:]))(many.T, *one[1:]), expected)
    assert_equal(vmap(posed.ours, shared, chunk_size=2)(many, *one[1:]), expected)
    for derivative in (grad, jacfwd, hessian):
        ours, dense = (derivative(f, everywhere(one)) for f in (posed.ours, posed.dense))
        rows = [dense(z, *one[1:]) for z in many]
        stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *rows)
        assert_equal(vmap(ours, shared)(many, *one[1:]), stacked)
    for at, argument in enumerate(one[1:], start=1):  # the target mapped, the logits shared
        dims = tuple(0 if i == at else None for i in everywhere(one))
        stretched = [torch.stack([argument, argument]) if i == at else a for i, a in enumerate(one)]
        assert_equal(vmap(posed.ours, dims)(*stretched), torch.stack([posed.dense(*one)] * 2))
    nested = vmap(vmap(posed.ours, shared), (0, *shared[1:]))
    assert_equal(nested(torch.stack([many, many.flip(0)]), *one[1:]), torch.stack([expected, expected.flip(0)]))


def test_vmap_over_class_indices() -> None:
    z, indices = torch.randn(5, 4, dtype=torch.float64), torch.tensor([[0, 3, 1, 2, -100], [1, 1, 0, 2, 3]])
    expected = torch.stack([torch.nn.functional.cross_entropy(z, t) for t in indices])
    assert_equal(vmap(softcurve.cross_entropy, (None, 0))(z, indices), expected)
    gradients = vmap(grad(lambda z, t: softcurve.cross_entropy(z, t)))(z, indices[1])
    assert_equal(gradients, torch.softmax(z, -1) - torch.eye(4, dtype=torch.float64)[indices[1]])


def test_per_sample_gradients_of_a_model() -> None:
    model, x, y = torch.nn.Linear(3, 4).double(), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 4
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return softcurve.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    got = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    residual = torch.softmax(model(x), -1) - torch.eye(4, dtype=torch.float64)[y]
    assert_equal(got, {"weight": residual.unsqueeze(-1) * x.unsqueeze(-2), "bias": residual})


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_legacy_functional(case: Case) -> None:
    posed = problem(case, "everything", "none", (3,), 4)
    expected = torch.autograd.functional.jacobian(posed.dense, posed.arguments)
    for options in ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        assert_equal(torch.autograd.functional.jacobian(posed.ours, posed.arguments, **options), expected)
    ours, dense = (lambda *a, f=f: f(*a).square().sum() for f in (posed.ours, posed.dense))
    expected = torch.autograd.functional.hessian(dense, posed.arguments)
    assert_equal(torch.autograd.functional.hessian(ours, posed.arguments, vectorize=True), expected)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_graphs_are_kept_and_built(case: Case) -> None:
    """Twice through one graph is twice the same; a graph of a graph of a graph is that of the dense formula."""
    posed = problem(case, "everything", "none", (3,), 4)
    value, scale = posed.ours(*posed.arguments), torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    again = [
        torch.autograd.grad(value, posed.arguments, scale, retain_graph=True, materialize_grads=True) for _ in range(3)
    ]
    for gradients in again[1:]:
        assert all(torch.equal(g, first) for g, first in zip(gradients, again[0], strict=True))

    def thrice(value: Tensor) -> list[Any]:
        found, along = [], (value * scale).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(along, posed.arguments, create_graph=True, materialize_grads=True)
            found.append(gradients)
            along = dot(gradients) + along.square()
        return found

    assert_equal(thrice(value), thrice(posed.dense(*posed.arguments)))


def test_dual_numbers_and_no_grad() -> None:
    z, v = torch.randn(2, 3, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1])
    with forward_ad.dual_level():
        dual = softcurve.cross_entropy(forward_ad.make_dual(z, v), target)
        tangent = forward_ad.unpack_dual(dual).tangent
    residual = (torch.softmax(z, -1) - torch.eye(4, dtype=torch.float64)[target]) / 3
    torch.testing.assert_close(tangent, (residual * v).sum(), **EXACT)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert not softcurve.cross_entropy(z.clone().requires_grad_(), target).requires_grad


def test_arguments_are_left_alone() -> None:
    """The passes write into their own temporaries, never into what they were given or what a caller holds."""
    z, t = torch.randn(2, 6, 5).requires_grad_()
    index, weight = torch.arange(6) % 5, torch.rand(5)
    before = [a.detach().clone() for a in (z, t, index, weight)]
    for loss in (
        softcurve.cross_entropy(z, index, weight=weight, reduction="none"),
        softcurve.cross_entropy(z, torch.softmax(t, -1).detach(), z_loss=0.1, label_smoothing=0.1, reduction="none"),
        softcurve.kl_divergence(z, t, reduction="none"),
        softcurve.js_divergence(z, t, beta=0.2, reduction="none"),
        softcurve.entropy(z),
    ):
        scale = torch.rand(6)
        kept = scale.clone()
        torch.autograd.grad(loss, (z, t), scale, allow_unused=True)
        assert torch.equal(scale, kept)
    assert all(torch.equal(a, b) for a, b in zip((z, t, index, weight), before, strict=True))


def test_jacobian_and_its_product_are_differentiable() -> None:
    z, v = torch.randn(2, 3, 4, dtype=torch.float64)
    ours = jacrev(jacfwd(softcurve.softmax_jacobian_product, (0, 1)), (0, 1))(z, v)
    dense = jacrev(
        jacfwd(lambda z, v: (softcurve.reference.softmax_jacobian(z.softmax(-1)) @ v[..., None])[..., 0], (0, 1)),
        (0, 1),
    )
    assert_equal(ours, dense(z, v))
    assert_equal(
        hessian(lambda z: softcurve.softmax_jacobian(z).sin().sum())(z),
        hessian(lambda z: softcurve.reference.softmax_jacobian(z.softmax(-1)).sin().sum())(z),
    )
    assert_equal(
        vmap(softcurve.softmax_jacobian)(z), softcurve.reference.softmax_jacobian(oracle.seen_by_softmax(z).softmax(-1))
    )


# --- tiles ---------------------------------------------------------------------------------------------------------------


def everything_of(case: Case) -> list[Tensor]:
    """Value, gradients and a Hessian product, on 3 × 7 rows of 11 classes."""
    torch.manual_seed(1)
    posed = problem(case, "everything", "none", (3, 7), 11)
    value = posed.ours(*posed.arguments)
    first = torch.autograd.grad(value.sin().sum(), posed.arguments, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(dot(first), posed.arguments, materialize_grads=True)
    return [value, *first, *second]


@pytest.mark.parametrize("elements", [1, 12, 25, 100, 230])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_tiles_change_nothing(case: Case, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However ragged: a row's arithmetic is its own, up to how exp rounds at the end of a vector register."""
    whole = everything_of(case)
    monkeypatch.setitem(softcurve.losses.autograd.TILE_ELEMENTS, "cpu", elements)
    for got, expected in zip(everything_of(case), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_more_than_a_tile() -> None:
    """A batch of several real tiles, the last ragged, against torch."""
    limit = softcurve.losses.autograd.TILE_ELEMENTS["cpu"]
    classes = 1 << 12
    z = torch.randn(2 * limit // classes + 13, classes, dtype=torch.float64, requires_grad=True)
    target = torch.arange(z.shape[0]) * 31 % classes
    target[::5] = -100
    ours, torchs = (f(z, target) for f in (softcurve.cross_entropy, torch.nn.functional.cross_entropy))
    torch.testing.assert_close(ours, torchs, rtol=1e-14, atol=0)
    got, expected = (torch.autograd.grad(loss, z)[0] for loss in (ours, torchs))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-18)
