"""One table of transforms for every loss, on logits and on a head: torch.func, autograd and their nestings equal dense ones.

The settings are pairwise: any two of loss, kind of target, transform, options and reduction meet in one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import softcurve
import softcurve.losses.autograd

from . import oracle
from .cases import (
    BY_NAME,
    CASES_OF,
    HEAD_ROUTE,
    LOGIT_ROUTE,
    REDUCTIONS,
    Problem,
    along,
    assert_same,
    directions,
    everything,
    problem,
)
from .pairwise import pairwise
from .placement import ON_CPU

pytestmark = [
    pytest.mark.usefixtures("without_shape_checks"),
    # torch's own doing when forward mode is first used.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

ROUTES = (LOGIT_ROUTE, HEAD_ROUTE) if ON_CPU else (HEAD_ROUTE,)
# Each way in which a target enters a tile, and each divergence. Probabilities and a LinearTeacher become logits or a
# dense target by torch's own operations where there is no head.
CHOSEN = (
    "cross_entropy-indices",
    "cross_entropy-float",
    "cross_entropy-bucket",
    "cross_entropy-LinearTeacher",
    "forward-Probabilities",
    "forward-bucket",
    "reverse-Logits",
    "reverse-LinearTeacher",
    "js0.3-LinearTeacher",
    "js0.3-renormalize",
)
FEW = ("cross_entropy-indices", "cross_entropy-bucket", "forward-Logits", "reverse-LinearTeacher")
ON_ROUTES = [
    (route, name) for route in ROUTES for name in CHOSEN if route == HEAD_ROUTE or "Teacher" not in name
]  # fmt: skip

Function = Callable[..., Tensor]
Arguments = tuple[Tensor, ...]


def everywhere(arguments: Arguments) -> tuple[int, ...]:
    return tuple(range(len(arguments)))


TRANSFORMS: dict[str, Callable[[Function, Arguments], Any]] = {
    "grad": lambda f, a: grad(f, everywhere(a))(*a),
    "grad in the first": lambda f, a: grad(f)(*a),
    "grad in the second": lambda f, a: grad(f, min(1, len(a) - 1))(*a),
    "grad_and_value": lambda f, a: grad_and_value(f, everywhere(a))(*a),
    "vjp": lambda f, a: vjp(f, *a)[1](torch.tensor(0.7, dtype=torch.float64)),
    "jvp": lambda f, a: jvp(f, a, directions(a)),
    "jvp in the first": lambda f, a: jvp(lambda z: f(z, *a[1:]), a[:1], directions(a[:1])),
    "jvp in the last": lambda f, a: jvp(lambda t: f(*a[:-1], t), a[-1:], directions(a[-1:])),
    "jacrev": lambda f, a: jacrev(f, everywhere(a))(*a),
    "jacfwd": lambda f, a: jacfwd(f, everywhere(a))(*a),
    "hessian in the first": lambda f, a: hessian(f)(*a),
    "jvp(grad)": lambda f, a: jvp(grad(f, everywhere(a)), a, directions(a)),
    "vjp(grad)": lambda f, a: vjp(grad(f, everywhere(a)), *a)[1](directions(a)),
    "jvp(jvp)": lambda f, a: jvp(lambda *b: jvp(f, b, directions(a))[1], a, directions(a)),
    "grad(jvp)": lambda f, a: grad(lambda *b: jvp(f, b, directions(a))[1], everywhere(a))(*a),
    "grad(grad)": lambda f, a: grad(lambda *b: along(grad(f, everywhere(a))(*b)), everywhere(a))(*a),
    "vmap(jvp(grad))": lambda f, a: vmap(lambda *v: jvp(grad(f, everywhere(a)), a, v)[1])(
        *(torch.stack([d, -0.4 * d.flip(-1)]) for d in directions(a))
    ),
}
# Whole matrices of second derivatives, each entry of which is a pass through a head.
MATRICES: dict[str, Callable[[Function, Arguments], Any]] = {
    "hessian": lambda f, a: hessian(f, everywhere(a))(*a),
    "jacrev(jacrev)": lambda f, a: jacrev(jacrev(f, everywhere(a)), everywhere(a))(*a),
    "jacrev(jacfwd)": lambda f, a: jacrev(jacfwd(f, everywhere(a)), everywhere(a))(*a),
    "jacfwd(jacfwd)": lambda f, a: jacfwd(jacfwd(f, everywhere(a)), everywhere(a))(*a),
}
# Of third and higher order, which a head refuses.
HIGHER: dict[str, Callable[[Function, Arguments], Any]] = {
    "jacfwd(hessian)": lambda f, a: jacfwd(hessian(f))(*a),
    "jacrev(hessian)": lambda f, a: jacrev(hessian(f))(*a),
    "jacfwd(jacfwd(jacfwd))": lambda f, a: jacfwd(jacfwd(jacfwd(f)))(*a),
    "grad(jvp(grad))": lambda f, a: grad(
        lambda *b: along(jvp(grad(f, everywhere(a)), b, directions(a))[1]), everywhere(a)
    )(*a),
}


def assert_equal(got: Any, expected: Any, route: str = HEAD_ROUTE, bound: float = 1e-10) -> None:
    got, expected = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for n, (one, other) in enumerate(zip(got, expected, strict=True)):
        if route == LOGIT_ROUTE:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
        else:
            assert_same(one, other, f"output {n}", bound)


def small(
    name: str, options: str, reduction: str = "none", rows: tuple[int, ...] = (2,), route: str = HEAD_ROUTE
) -> Problem:
    """Without the shift, which needs a dimension that vmap takes away."""
    case = BY_NAME[name]
    chosen = everything(case, "shift") if options == "everything" else {}
    return problem(case, chosen, reduction, rows, 2, 7 if case.kind.listed else 4, route)


def assert_transforms(transform: Callable[[Function, Arguments], Any], posed: Problem, route: str) -> None:
    arguments = tuple(a.detach() for a in posed.arguments)
    ours, dense = (lambda *a, f=f: f(*a).sin().sum() for f in (posed.ours, posed.dense))
    assert_equal(transform(ours, arguments), transform(dense, arguments), route)


def settings(route: str, transforms: dict[str, Any]) -> list[dict[str, Any]]:
    names = {str(case) for case in CASES_OF[route]}
    kinds = ["indices", "float", "Logits", "bucket", "renormalize"]
    kinds += ["Probabilities", "LinearTeacher"] if route == HEAD_ROUTE else []
    factors = {"transform": tuple(transforms), "kind": kinds, "loss": ("cross_entropy", "forward", "reverse", "js0.3")}
    factors |= {"options": ("everything", "plain"), "reduction": ("none", "mean")}

    def possible(name: str, level: Any, other: str, value: Any) -> bool:
        return (name, other) != ("kind", "loss") or f"{value}-{level}" in names

    return pairwise(factors, possible)


@pytest.mark.parametrize(
    ("route", "setting"),
    [
        pytest.param(route, setting, id=f"{route}-{setting['transform']}-{setting['loss']}-{setting['kind']}-{n}")
        for route, table in ((LOGIT_ROUTE, TRANSFORMS | MATRICES | HIGHER), (HEAD_ROUTE, TRANSFORMS))
        if route in ROUTES
        for n, setting in enumerate(settings(route, table))
    ],
)
def test_func(route: str, setting: dict[str, Any]) -> None:
    transform = (TRANSFORMS | MATRICES | HIGHER)[setting["transform"]]
    name, rows = f"{setting['loss']}-{setting['kind']}", (1,) if setting["transform"] in HIGHER else (2,)
    assert_transforms(transform, small(name, setting["options"], setting["reduction"], rows, route), route)


@pytest.mark.parametrize(
    ("transform", "name", "options"),
    [
        ("hessian", "cross_entropy-indices", "everything"),
        ("jacrev(jacrev)", "cross_entropy-bucket", "everything"),
        ("jacrev(jacfwd)", "reverse-Logits", "everything"),
        ("jacfwd(jacfwd)", "forward-Logits", "plain"),
    ],
)
def test_matrices_of_a_head(transform: str, name: str, options: str) -> None:
    assert_transforms(MATRICES[transform], small(name, options, rows=(1,)), HEAD_ROUTE)


# --- against differences -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_shape_checks")  # thousands of calls
@pytest.mark.slow
@pytest.mark.parametrize(
    ("route", "name", "reduction", "batched"),
    [(*chosen, REDUCTIONS[n % 4], n % 2 == 0) for n, chosen in enumerate(ON_ROUTES)],
)
def test_gradcheck_and_gradgradcheck(route: str, name: str, reduction: str, batched: bool) -> None:
    """Reverse, forward and batched mode, forward over reverse and reverse over reverse, at random directions."""
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), reduction, (3,), 2, 6, route)
    modes = {"check_batched_grad": batched, "fast_mode": True}
    forward = {"check_forward_ad": True, "check_batched_forward_grad": batched and route == HEAD_ROUTE}
    assert gradcheck(posed.ours, posed.arguments, **forward, **modes)
    assert gradgradcheck(posed.ours, posed.arguments, check_fwd_over_rev=True, check_rev_over_rev=True, **modes)


@pytest.mark.usefixtures("without_shape_checks")  # thousands of calls
@pytest.mark.parametrize(
    ("route", "name"),
    [
        ("logits", "cross_entropy-indices"),
        ("logits", "cross_entropy-float"),
        ("logits", "forward-Logits"),
        ("logits", "reverse-Logits"),
        ("logits", "js0.3-Logits"),
        ("head", "cross_entropy-indices"),
        ("head", "reverse-Logits"),
    ],
)
def test_entry_by_entry(route: str, name: str) -> None:
    """The same in full, entry by entry."""
    if route in ROUTES:
        posed = problem(BY_NAME[name], {"bias": True}, "none", (2,), 2, 3, route)
        assert gradcheck(posed.ours, posed.arguments, check_forward_ad=True)
        assert gradgradcheck(posed.ours, posed.arguments, check_fwd_over_rev=True)


def test_entropy_entry_by_entry() -> None:
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(softcurve.entropy, z, check_forward_ad=True)
    assert gradgradcheck(softcurve.entropy, z, check_fwd_over_rev=True)


# --- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "name"), [(route, name) for route in ROUTES for name in FEW[:3] if route == LOGIT_ROUTE or name == FEW[1]]
)
def test_legacy_functional(route: str, name: str) -> None:
    posed = problem(BY_NAME[name], {"bias": True, "sample_weight": True}, "none", (2,), 1, 6, route)
    expected = torch.autograd.functional.jacobian(posed.dense, posed.arguments)
    for options in ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        assert_equal(torch.autograd.functional.jacobian(posed.ours, posed.arguments, **options), expected, route)
    ours, dense = (lambda *a, f=f: f(*a).square().sum() for f in (posed.ours, posed.dense))
    expected = torch.autograd.functional.hessian(dense, posed.arguments)
    assert_equal(torch.autograd.functional.hessian(ours, posed.arguments), expected, route)
    assert_equal(torch.autograd.functional.hessian(ours, posed.arguments, vectorize=True), expected, route)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("route", "name"), ON_ROUTES)
def test_graphs_are_kept(route: str, name: str, reduction: str) -> None:
    """Again and again through one graph, with other scales between: always the same, and ``.grad`` only adds up."""
    posed = small(name, "everything", reduction, (3,), route)
    value = posed.ours(*posed.arguments)
    scales = [torch.tensor(numbers, dtype=torch.float64) for numbers in ([0.5, -2.0, 3.0], [1e6, -1e6, 7.0])]
    scales = scales if reduction == "none" else [scale[2] for scale in scales]
    first = torch.autograd.grad(value, posed.arguments, scales[0], retain_graph=True, materialize_grads=True)
    kept = [g.clone() for g in first]
    for scale in (scales[1], scales[0]):
        again = torch.autograd.grad(value, posed.arguments, scale, retain_graph=True, materialize_grads=True)
    assert all(torch.equal(g, k) for g, k in zip(first, kept, strict=True))
    assert all(torch.equal(g, k) for g, k in zip(again, kept, strict=True))
    value.backward(scales[0], retain_graph=True)
    once = {n: a.grad.clone() for n, a in zip(posed.names, posed.arguments, strict=True) if a.grad is not None}
    value.backward(scales[0])
    for argument, (name, gradient) in zip(
        (a for a in posed.arguments if a.grad is not None), once.items(), strict=True
    ):
        assert_same(argument.grad, 2 * gradient, name, 1e-14)


@pytest.mark.parametrize(("route", "name"), ON_ROUTES)
def test_create_graph(route: str, name: str) -> None:
    """A gradient penalty, twice over one graph; without a head a graph of a graph of a graph as well."""
    posed = small(name, "everything", "sum", (3,), route)
    totals = []
    for f in (posed.ours, posed.dense):
        value = f(*posed.arguments)
        gradients = torch.autograd.grad(value, posed.arguments, create_graph=True, materialize_grads=True)
        penalty = value.square() + sum(g.square().sum() for g in gradients)
        grown = {"create_graph": True} if route == LOGIT_ROUTE else {"retain_graph": True}
        again = [torch.autograd.grad(penalty, posed.arguments, **grown, materialize_grads=True) for _ in range(2)]
        if route == LOGIT_ROUTE:
            again.append(torch.autograd.grad(along(again[0]), posed.arguments, materialize_grads=True))
        totals.append(again)
    assert all(torch.equal(a, b) for a, b in zip(*totals[0][:2], strict=True))
    assert_equal(totals[0], totals[1], route)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FEW)
def test_dual_numbers_and_no_grad(name: str, route: str) -> None:
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), "mean", (5,), 3, 6, route)
    arguments, tangents = tuple(a.detach() for a in posed.arguments), []
    for f in (posed.ours, posed.dense):
        with forward_ad.dual_level():
            dual = f(*(forward_ad.make_dual(a, d) for a, d in zip(arguments, directions(arguments), strict=True)))
            tangents.append(forward_ad.unpack_dual(dual).tangent)
    assert_equal(*tangents, route)
    expected = posed.ours(*posed.arguments).detach()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            value = posed.ours(*posed.arguments)
            assert not value.requires_grad
            assert_same(value.clone(), expected, bound=1e-14)
    assert not posed.ours(*arguments).requires_grad


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FEW)
def test_forward_mode_over_a_backward_pass(name: str, route: str) -> None:
    """A backward pass without ``create_graph`` is differentiated in forward mode as well."""
    posed, products = problem(BY_NAME[name], everything(BY_NAME[name]), "mean", (5,), 3, 6, route), []
    for f in (posed.ours, posed.dense):
        with forward_ad.dual_level():
            leaves = [a.detach().clone().requires_grad_() for a in posed.arguments]
            duals = [forward_ad.make_dual(a, d) for a, d in zip(leaves, directions(posed.arguments), strict=True)]
            gradients = torch.autograd.grad(f(*duals).square(), duals, materialize_grads=True)
            tangents = [forward_ad.unpack_dual(g).tangent for g in gradients]
            products.append([torch.zeros_like(a) if t is None else t for a, t in zip(leaves, tangents, strict=True)])
    assert_equal(*products, route)


# --- vmap on logits (of a head: test_head_transforms.py) ---------------------------------------------------------------


@pytest.mark.parametrize("name", [name for route, name in ON_ROUTES if route == LOGIT_ROUTE])
def test_vmap(name: str) -> None:
    """Over rows, with what is not mapped shared; per-sample gradients and Hessians; nested and by chunks."""
    posed = problem(BY_NAME[name], {}, "none", (), classes=6, route=LOGIT_ROUTE)
    one = tuple(a.detach() for a in posed.arguments)
    many = torch.randn(5, 6, dtype=torch.float64)
    shared = (0, *(None for _ in one[1:]))
    expected = torch.stack([posed.dense(z, *one[1:]) for z in many])
    assert_equal(vmap(posed.ours, shared)(many, *one[1:]), expected, LOGIT_ROUTE)
    assert_equal(vmap(posed.ours, (1, *shared[1:]))(many.T, *one[1:]), expected, LOGIT_ROUTE)
    assert_equal(vmap(posed.ours, shared, chunk_size=2)(many, *one[1:]), expected, LOGIT_ROUTE)
    for derivative in (grad, jacfwd, hessian):
        ours, dense = (derivative(f, everywhere(one)) for f in (posed.ours, posed.dense))
        rows = [dense(z, *one[1:]) for z in many]
        stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *rows)
        assert_equal(vmap(ours, shared)(many, *one[1:]), stacked, LOGIT_ROUTE)
    for at, argument in enumerate(one[1:], start=1):  # the target mapped, the logits shared
        dims = tuple(0 if i == at else None for i in everywhere(one))
        stretched = [torch.stack([argument, argument]) if i == at else a for i, a in enumerate(one)]
        assert_equal(vmap(posed.ours, dims)(*stretched), torch.stack([posed.dense(*one)] * 2), LOGIT_ROUTE)
    nested = vmap(vmap(posed.ours, shared), (0, *shared[1:]))
    twice = torch.stack([many, many.flip(0)])
    assert_equal(nested(twice, *one[1:]), torch.stack([expected, expected.flip(0)]), LOGIT_ROUTE)


@pytest.mark.parametrize("route", ROUTES)
def test_vmap_over_class_indices(route: str) -> None:
    z, indices = torch.randn(5, 4, dtype=torch.float64), torch.tensor([[0, 3, 1, 2, -100], [1, 1, 0, 2, 3]])

    def loss(z: Tensor, target: Tensor) -> Tensor:
        if route == LOGIT_ROUTE:
            return softcurve.cross_entropy(z, target)
        return softcurve.linear_cross_entropy(z, torch.eye(4, dtype=z.dtype), target)

    expected = torch.stack([torch.nn.functional.cross_entropy(z, t) for t in indices])
    assert_equal(vmap(loss, (None, 0))(z, indices), expected, route)
    residual = torch.softmax(z, -1) - torch.eye(4, dtype=torch.float64)[indices[1]]
    assert_equal(vmap(grad(loss))(z, indices[1]), residual, route)


def test_per_sample_gradients_of_a_model() -> None:
    model, x, y = torch.nn.Linear(3, 4).double(), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 4
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return softcurve.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    got = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    residual = torch.softmax(model(x), -1) - torch.eye(4, dtype=torch.float64)[y]
    assert_equal(got, {"weight": residual.unsqueeze(-1) * x.unsqueeze(-2), "bias": residual}, LOGIT_ROUTE)


def test_jacobian_and_its_product_are_differentiable() -> None:
    z, v = torch.randn(2, 3, 4, dtype=torch.float64)
    ours = jacrev(jacfwd(softcurve.softmax_jacobian_product, (0, 1)), (0, 1))(z, v)
    dense = jacrev(
        jacfwd(lambda z, v: (softcurve.reference.softmax_jacobian(z.softmax(-1)) @ v[..., None])[..., 0], (0, 1)),
        (0, 1),
    )
    assert_equal(ours, dense(z, v), LOGIT_ROUTE)
    assert_equal(
        hessian(lambda z: softcurve.softmax_jacobian(z).sin().sum())(z),
        hessian(lambda z: softcurve.reference.softmax_jacobian(z.softmax(-1)).sin().sum())(z),
        LOGIT_ROUTE,
    )
    jacobian = softcurve.reference.softmax_jacobian(oracle.seen_by_softmax(z).softmax(-1))
    assert_equal(vmap(softcurve.softmax_jacobian)(z), jacobian, LOGIT_ROUTE)


# --- tiles of rows on logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 12, 25, 230])
@pytest.mark.parametrize("name", [name for route, name in ON_ROUTES if route == LOGIT_ROUTE])
def test_tiles_change_nothing(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However ragged: a row's arithmetic is its own, up to how exp rounds at the end of a vector register."""
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), "none", (3, 7), classes=11, route=LOGIT_ROUTE)

    def all_of_it() -> list[Tensor]:
        value = posed.ours(*posed.arguments)
        first = torch.autograd.grad(value.sin().sum(), posed.arguments, create_graph=True, materialize_grads=True)
        return [value, *first, *torch.autograd.grad(along(first), posed.arguments, materialize_grads=True)]

    whole = all_of_it()
    monkeypatch.setitem(softcurve.losses.autograd.TILE_ELEMENTS, "cpu", elements)
    for got, expected in zip(all_of_it(), whole, strict=True):
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
