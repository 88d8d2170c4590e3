"""What the head's autograd has beyond the table of test_transforms.py: tiles, vmap over heads, frozen arguments, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import softcurve
from softcurve.head import workspace

from .cases import BIASLESS_TEACHER, BY_NAME, CASES, Case, along, assert_same, directions, everything, problem
from .placement import DEVICE
from .test_head_conformance import products_of
from .test_transforms import CHOSEN, FEW, TRANSFORMS, assert_equal, everywhere, small

pytestmark = [
    pytest.mark.usefixtures("without_shape_checks"),
    # torch's own doing when forward mode is first used.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

# --- tiles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_shape_checks")  # thousands of calls
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy-bucket", "forward-Logits"])
def test_gradcheck_of_tiles(name: str) -> None:
    """With rows and classes cut."""
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), "none", (2,), 1, 19)
    budget = posed.budget("least")

    def ours(*arguments: Tensor) -> Tensor:
        return posed.ours(*arguments, memory_budget=budget)

    assert gradcheck(ours, posed.arguments, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(ours, posed.arguments, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vjp(grad)", "vmap(jvp(grad))"])
@pytest.mark.parametrize("name", FEW)
def test_func_of_tiles(name: str, transform: str) -> None:
    case = BY_NAME[name]
    posed = problem(case, everything(case, "shift"), "mean", (3,), 1, 21)
    budget, arguments = posed.budget("least"), tuple(a.detach() for a in posed.arguments)
    got = TRANSFORMS[transform](lambda *a: posed.ours(*a, memory_budget=budget), arguments)
    assert_equal(got, TRANSFORMS[transform](posed.dense, arguments))


@pytest.mark.parametrize("name", FEW)
def test_stats_beside_transforms(name: str) -> None:
    posed = problem(BY_NAME[name], {"bias": True}, "mean")
    arguments = tuple(a.detach() for a in posed.arguments)
    gradients, stats = grad(lambda *a: posed.ours(*a, return_stats=True), everywhere(arguments), has_aux=True)(
        *arguments
    )
    assert_equal(gradients, grad(posed.dense, everywhere(arguments))(*arguments))
    truth = posed.dense_stats()
    for column in ("log_probs", "entropy", "lse", "mean_logit", "collision"):
        assert_equal(getattr(stats, column), getattr(truth, column).detach())
    assert torch.equal(stats.correct, posed.dense_stats().correct)


@pytest.mark.parametrize("name", CHOSEN)
def test_vmap(name: str) -> None:
    """Over each argument alone (features, heads, biases, targets), and over all; by chunks, and nested."""
    posed = problem(BY_NAME[name], {"bias": True, "sample_weight": True, "temperature": 0.7}, "mean", (3,), 2, 4)
    one = tuple(a.detach() for a in posed.arguments)
    for mapped in (*((at,) for at in everywhere(one)), everywhere(one)):
        dims = tuple(0 if at in mapped else None for at in everywhere(one))
        # Halves and thirds keep a list's mass below 1 and a distribution's sum at 1 only in logits: leaves repeat as they are.
        many = [
            torch.stack([a, a, a]) if posed.names[at].startswith("target") else torch.stack([a, a / 2, a / 3])
            for at, a in enumerate(one)
        ]
        arguments = [many[at] if at in mapped else one[at] for at in everywhere(one)]
        rows = [[many[at][i] if at in mapped else one[at] for at in everywhere(one)] for i in range(3)]
        expected = torch.stack([posed.dense(*row) for row in rows])
        chunks = {"chunk_size": 2} if mapped == (0,) else {}
        assert_equal(vmap(posed.ours, dims, **chunks)(*arguments), expected)
        ours, dense = (grad(f, everywhere(one)) for f in (posed.ours, posed.dense))
        stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *[dense(*row) for row in rows])
        assert_equal(vmap(ours, dims)(*arguments), stacked)
    twice = [torch.stack([a, a.flip(0)]) for a in arguments]
    assert_equal(vmap(vmap(posed.ours))(*twice), torch.stack([expected, expected.flip(0)]))


@pytest.mark.parametrize(("name", "budget"), [(name, ("whole", "least")[n % 2]) for n, name in enumerate(CHOSEN)])
def test_per_sample_gradients(name: str, budget: str) -> None:
    """``vmap(grad(...))`` over single rows, shared head; and their Hessian products."""
    posed = problem(BY_NAME[name], {"bias": True}, "none", (), 2, 5)
    one = tuple(a.detach() for a in posed.arguments)
    of_budget = posed.budget(budget)
    x = torch.randn(3, 2, dtype=torch.float64)
    dims = (0, *(None for _ in one[1:]))

    def ours(*arguments: Tensor) -> Tensor:
        return posed.ours(*arguments, memory_budget=of_budget)

    for transform in (
        lambda f: grad(f, everywhere(one)),
        lambda f: lambda *a: vjp(grad(f, everywhere(one)), *a)[1](directions(a)),
        lambda f: lambda *a: jvp(grad(f, everywhere(one)), a, directions(a))[1],
    ):
        rows = [transform(posed.dense)(row, *one[1:]) for row in x]
        stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *rows)
        assert_equal(vmap(transform(ours), dims)(x, *one[1:]), stacked)


def test_per_sample_gradients_of_a_model() -> None:
    """The parameters of features and head, by ``functional_call``, for every sample."""
    features = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).double().to(DEVICE)
    head = softcurve.nn.LinearCrossEntropyLoss(4, 7, bias=True, dtype=torch.float64).to(DEVICE)
    dense = torch.nn.Linear(4, 7).double().to(DEVICE)
    dense.load_state_dict({name.removeprefix("linear."): p for name, p in head.state_dict().items()})
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(7, (6,))

    def ours(body: dict[str, Tensor], top: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(head, top, (torch.func.functional_call(features, body, (x,)), y))

    def plain(body: dict[str, Tensor], top: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            torch.func.functional_call(dense, top, (torch.func.functional_call(features, body, (x,)),)), y
        )

    body, top, of_dense = ({n: p.detach() for n, p in m.named_parameters()} for m in (features, head, dense))
    got = vmap(grad(ours, (0, 1)), (None, None, 0, 0))(body, top, x, y)
    expected = vmap(grad(plain, (0, 1)), (None, None, 0, 0))(body, of_dense, x, y)
    assert_equal(got[0], expected[0])
    assert_equal([got[1][f"linear.{name}"] for name in of_dense], [expected[1][name] for name in of_dense])


# --- graphs ------------------------------------------------------------------------------------------------------------


def test_a_caller_may_write_to_a_gradient() -> None:
    """Clipping in place between two passes through one graph does not reach what the graph holds."""
    for name in FEW:
        posed = problem(BY_NAME[name], {"bias": True}, "mean")
        value = posed.ours(*posed.arguments)
        first = torch.autograd.grad(value, posed.arguments, retain_graph=True)
        kept = [g.clone() for g in first]
        for gradient in first:
            gradient.mul_(1e3)
        again = torch.autograd.grad(value, posed.arguments, create_graph=True)
        assert all(torch.equal(g, k) for g, k in zip(again, kept, strict=True))
        second = torch.autograd.grad(along(again), posed.arguments)
        truth = torch.autograd.grad(posed.dense(*posed.arguments), posed.arguments, create_graph=True)
        assert_equal(second, torch.autograd.grad(along(truth), posed.arguments))


def test_a_freed_graph_is_an_error() -> None:
    posed = problem(BY_NAME[FEW[0]])
    value = posed.ours(*posed.arguments)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_an_argument_that_was_changed_is_an_error() -> None:
    """The second derivative needs the features as they were."""
    for at in (0, 1):
        posed = problem(BY_NAME[FEW[0]])
        (gradient,) = torch.autograd.grad(posed.ours(*posed.arguments), posed.arguments[at], create_graph=True)
        with torch.no_grad():
            posed.arguments[at].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(gradient.square().sum(), posed.arguments[at])


@pytest.mark.parametrize("name", FEW)
def test_third_derivatives_are_an_error(name: str) -> None:
    """Never a wrong number: an error that says so."""
    posed = small(name, "everything", "sum", (3,))
    arguments = posed.arguments[:2]
    first = torch.autograd.grad(posed.ours(*posed.arguments).sin(), arguments, create_graph=True)
    second = torch.autograd.grad(along(first), arguments, create_graph=True)
    with pytest.raises(RuntimeError, match="third"):
        torch.autograd.grad(along(second), arguments)
    frozen = tuple(a.detach() for a in posed.arguments)
    with pytest.raises(RuntimeError, match="third"):
        jacrev(hessian(posed.ours))(*frozen)
    with pytest.raises(RuntimeError, match="third"):
        jvp(lambda x: jvp(grad(lambda x: posed.ours(x, *frozen[1:])), (x,), (x,))[1], frozen[:1], frozen[:1])


# --- what is not asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.kind is not BIASLESS_TEACHER], ids=str)
def test_frozen_arguments(case: Case) -> None:
    """Any one argument alone, or all but one: the same gradients, ``None`` for the rest, and second derivatives too."""
    posed = problem(case, everything(case), "mean", (5,), 2, 7)
    value = posed.dense(*posed.arguments)
    expected = torch.autograd.grad(value, posed.arguments, create_graph=True, materialize_grads=True)
    for at in everywhere(posed.arguments):
        for free in ((at,), tuple(n for n in everywhere(posed.arguments) if n != at)):
            given = tuple(a.detach().requires_grad_(n in free) for n, a in enumerate(posed.arguments))
            loss = posed.ours(*given)
            loss.backward(retain_graph=True)
            assert all(a.grad is None for n, a in enumerate(given) if n not in free)
            wanted = tuple(given[n] for n in free)
            first = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
            assert_equal(first, tuple(expected[n] for n in free))
            if not any(g.requires_grad for g in first):
                continue
            truth = torch.autograd.grad(
                along([expected[n] for n in free]),
                [posed.arguments[n] for n in free],
                retain_graph=True,
                materialize_grads=True,
            )
            assert_equal(torch.autograd.grad(along(first), wanted, materialize_grads=True), truth)


def test_frozen_arguments_cost_nothing() -> None:
    """One product of the tile's size for the loss, one for each gradient that is wanted; in tiles, one more to recompute."""
    x, w, target = torch.randn(64, 32), torch.randn(512, 32), torch.arange(64)
    one = 64 * 32 * 512

    def products(
        of_x: bool, of_w: bool, run: Callable[[Tensor], object] = lambda loss: loss.backward(), **options
    ) -> float:
        leaves = x.clone().requires_grad_(of_x), w.clone().requires_grad_(of_w)

        def work() -> None:
            run(softcurve.linear_cross_entropy(*leaves, target, **options))

        return sum(m * k * n for m, k, n in products_of(work)) / one

    assert products(False, False, lambda loss: loss.item()) == 1
    assert products(True, False) == 2
    assert products(False, True) == 2
    assert products(True, True) == 3
    with torch.no_grad():
        assert products(True, True, lambda loss: loss.item()) == 1
    with torch.inference_mode():
        assert products(True, True, lambda loss: loss.item()) == 1


def test_a_frozen_teacher_costs_one_product() -> None:
    x, w, t, head = torch.randn(64, 32), torch.randn(512, 32), torch.randn(64, 16), torch.randn(512, 16)
    leaves = x.requires_grad_(), w.requires_grad_()
    for direction, most in (("forward", 3.5), ("reverse", 3.5)):
        shapes = products_of(
            lambda direction=direction: softcurve.linear_kl_divergence(
                *leaves, softcurve.LinearTeacher(t, head), direction=direction
            ).backward()
        )
        assert sum(m * k * n for m, k, n in shapes) <= most * 64 * 32 * 512


def test_module_hooks_and_accumulation() -> None:
    """Micro-batches add up in ``.grad``, and hooks on the head's weight see each of them once."""
    head = softcurve.nn.LinearCrossEntropyLoss(3, 7, dtype=torch.float64, reduction="sum").to(DEVICE)
    x, y, seen = torch.randn(8, 3, dtype=torch.float64), torch.randint(7, (8,)), []
    head.linear.weight.register_hook(lambda g: seen.append(g.clone()))
    for part in range(4):
        head(x[2 * part : 2 * part + 2], y[2 * part : 2 * part + 2]).backward()
    assert len(seen) == 4
    whole = torch.autograd.grad(F.cross_entropy(x @ head.linear.weight.T, y, reduction="sum"), head.linear.weight)[0]
    assert_same(head.linear.weight.grad, whole)


# --- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cross_entropy-indices", "cross_entropy-bucket", "forward-LinearTeacher", "js0.3-Logits"]
)
def test_autocast(name: str) -> None:
    """The loss in float32 from products in bfloat16; float32 parameters get float32 gradients, within bfloat16's error."""
    posed = problem(BY_NAME[name], {"bias": True}, "mean", (33,), 16, 129)
    arguments = tuple(a.detach().float().requires_grad_() for a in posed.arguments)
    exact = torch.autograd.grad(posed.dense(*posed.arguments), posed.arguments)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        value = posed.ours(*arguments)
    gradients = torch.autograd.grad(value, arguments)
    assert value.dtype == torch.float32
    assert abs(value.item() / posed.dense(*posed.arguments).item() - 1) < 2e-2
    for what, got, truth in zip(posed.names, gradients, exact, strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - truth).norm() <= 3e-2 * truth.norm(), what
    # What torch does itself, at the same place, is no better.
    x, w = (a.detach().requires_grad_() for a in arguments[:2])
    target, double = torch.randint(129, (33,)), (x.double() @ w.double().T)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = softcurve.linear_cross_entropy(x, w, target)
        plain = F.cross_entropy(F.linear(x, w), target)
    truth = torch.autograd.grad(F.cross_entropy(double, target), (x, w))
    for got, other, true in zip(
        torch.autograd.grad(ours, (x, w)), torch.autograd.grad(plain, (x, w)), truth, strict=True
    ):
        assert (got - true).norm() <= 1.01 * (other - true).norm()


def test_autocast_of_a_model() -> None:
    """Features come in bfloat16, the head's weight is float32: each gets its gradient in its own dtype."""
    body = torch.nn.Linear(8, 16).to(DEVICE)
    head = softcurve.nn.LinearCrossEntropyLoss(16, 57, bias=True).to(DEVICE)
    x, y = torch.randn(9, 8), torch.randint(57, (9,))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        e = body(x)
        assert e.dtype == torch.bfloat16
        loss = head(e, y)
    assert loss.dtype == torch.float32
    loss.backward()
    truth = F.cross_entropy(F.linear(body(x), head.linear.weight, head.linear.bias), y)
    assert abs(loss.item() / truth.item() - 1) < 2e-2
    for parameter in (*body.parameters(), *head.parameters()):
        assert parameter.grad.dtype == torch.float32
        (true,) = torch.autograd.grad(truth, parameter, retain_graph=True)
        assert (parameter.grad - true).norm() <= 3e-2 * true.norm()


def test_training_after_evaluation_in_inference_mode() -> None:
    """Tiles outlive a call; one that was made in inference mode must not be one that a later call cannot write to."""
    workspace._kept.clear()
    x, w, t = torch.randn(64, 16), torch.randn(500, 16, requires_grad=True), torch.randint(500, (64,))
    with torch.inference_mode():
        evaluated = softcurve.linear_cross_entropy(x, w, t).item()
    loss = softcurve.linear_cross_entropy(x, w, t)
    loss.backward()
    assert loss.item() == evaluated
    assert_same(w.grad, torch.autograd.grad(F.cross_entropy(x @ w.T, t), w)[0], bound=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_features_and_sample_weights_mixed(inner: Any, outer: Any, reduction: str) -> None:
    """The second derivative in a sample weight and features, whichever is first and by whichever mode."""
    x, w, s = (torch.randn(size, dtype=torch.float64) for size in ((3, 2), (4, 2), (3,)))
    target, s = torch.tensor([0, 3, 1]), s.exp()

    def ours(x: Tensor, s: Tensor) -> Tensor:
        return softcurve.linear_cross_entropy(x, w, target, sample_weight=s, reduction=reduction)

    def dense(x: Tensor, s: Tensor) -> Tensor:
        return softcurve.cross_entropy(x @ w.T, target, sample_weight=s, reduction=reduction)

    for first, second in ((0, 1), (1, 0)):
        assert_equal(outer(inner(ours, first), second)(x, s), outer(inner(dense, first), second)(x, s))


def test_gradients_that_are_handed_over_are_not_scaled_in_place() -> None:
    saved: list[Tensor] = []
    x, w, t = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True), torch.randint(7, (5,))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = softcurve.linear_cross_entropy(x, w, t)
    before = [tensor.clone() for tensor in saved]
    (5 * loss).backward()
    assert all(map(torch.equal, saved, before))


# --- products that are differentiated in their directions ------------------------------------------------------------


@pytest.mark.parametrize("tiling", ["whole", "blocks", "least"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CHOSEN)
def test_hvp_of_autograd(name: str, reduction: str, tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.autograd.functional.hvp`` is the derivative of a product of Hessian and vector in the vector."""
    posed = problem(BY_NAME[name], everything(BY_NAME[name]), reduction, (3,), 2, 41 if tiling == "blocks" else 7)
    monkeypatch.setattr("softcurve.head.plan.KEPT_ENTRIES", 40 if tiling == "blocks" else 2**20)
    budget = posed.budget("least" if tiling == "least" else "whole")
    arguments, options = tuple(a.detach() for a in posed.arguments), {"memory_budget": budget}
    v = directions(arguments)

    def ours(*of_loss: Tensor) -> Tensor:
        return posed.ours(*of_loss, **options).square().sum()

    expected = torch.autograd.functional.hvp(lambda *a: posed.dense(*a).square().sum(), arguments, v)
    assert_equal(torch.autograd.functional.hvp(ours, arguments, v), expected)


def products_of_log_probs(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, dense: bool) -> Tensor:
    if dense:
        log_p = F.linear(x, weight, bias).log_softmax(-1)
        return (log_p.gather(-1, index) * (log_p.exp() * log_p).sum(-1, keepdim=True)).sum()
    stats = softcurve.linear_log_probs(x, weight, index, linear_bias=bias)
    return -(stats.log_probs * stats.entropy.unsqueeze(-1)).sum()


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_hvp_of_log_probs_and_no_third_derivative(rows: int) -> None:
    tensors = tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((rows, 3), (7, 3), (7,)))
    index, v = torch.randint(7, (rows, 2)), tuple(torch.randn_like(t) for t in tensors)

    def ours(*of_head: Tensor) -> Tensor:
        return products_of_log_probs(*of_head, index, False)

    expected = torch.autograd.functional.hvp(lambda *a: products_of_log_probs(*a, index, True), tensors, v)
    assert_equal(torch.autograd.functional.hvp(ours, tensors, v), expected)
    # In the tensors themselves it is of third order, by every way.
    leaves = [t.clone().requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(ours(*leaves), leaves, create_graph=True)
    product = sum((g * part).sum() for g, part in zip(gradients, v, strict=True))
    for each in torch.autograd.grad(product, leaves, create_graph=True):
        with pytest.raises(NotImplementedError, match="none of third order"):
            torch.autograd.grad(each.sum(), leaves[1], retain_graph=True)
    with pytest.raises(NotImplementedError, match="none of third order"):
        grad(lambda w: along(jvp(grad(lambda u: ours(tensors[0], u, tensors[2])), (w,), (v[1],))[1]))(tensors[1])


def test_the_operator_of_products_refuses_third_derivatives() -> None:
    """``torch.compile`` calls it without the functions around it."""
    x, weight, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3), (7, 3), (5, 3)))
    calls = []
    operator = torch.ops.softcurve.head_hessian_product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.softcurve, "head_hessian_product", lambda *a: calls.append(a) or operator(*a))
        jvp(grad(lambda e: softcurve.linear_cross_entropy(e, weight, torch.arange(5), z_loss=0.1)), (x,), (v,))
    names = [argument.name for argument in operator.default._schema.arguments]
    arguments = {
        name: a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for name, a in zip(names, calls[0], strict=True)
    }
    products = operator(**arguments)[1]
    torch.autograd.grad(products.sum(), arguments["input_v"], retain_graph=True)
    with pytest.raises(NotImplementedError, match="none of third order"):
        torch.autograd.grad(products.sum(), arguments["input"])
