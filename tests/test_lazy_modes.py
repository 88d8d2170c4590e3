"""Unmade logits in the modes of autograd, in half precision, and after changes of what they are made of."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from softcurve import lazy_logits
from softcurve.lazy import LazyHead, LazyLogits

from .lazy_cases import (
    BIAS,
    INDEX,
    ROWS,
    C,
    Y,
    check,
    features,
    model,
    numbers,
    same,
)

# --- the modes of autograd ---------------------------------------------------------------------------------------------


def test_no_gradient_where_torch_records_none():
    def function(z: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            old, view = F.log_softmax(z, -1), z.view(-1, C)
            z.exp()  # made without a graph, which must not be kept
        return F.cross_entropy(z[0], Y[0]), old.gather(-1, INDEX), view.exp(), (z.exp() + z.detach()).mean()

    check(function, made=1)
    with lazy_logits(net := model(), "2"), torch.no_grad():
        assert not net(features(2)).requires_grad


def test_inference_mode():
    net = model()
    expected = net(features(2, 3)).detach()
    with lazy_logits(net, "2"), torch.inference_mode():
        z = net(features(2, 3))
        assert z.is_inference()
        assert same([F.cross_entropy(z[0], Y[0])], [F.cross_entropy(expected[0], Y[0])])
        assert same([z.materialize()], [expected])
    with lazy_logits(net, "2"):
        z = net(features(2, 3))
        with torch.inference_mode():
            assert same([z.materialize()], [expected])
        z.exp().mean().backward()  # made inside the mode, with the graph that it had outside
        assert net[0].weight.grad is not None


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Viewed(Reversed):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)


@pytest.mark.parametrize("function", [Reversed, Viewed])
def test_function_of_autograd_is_not_passed_by(function):
    check(lambda z: F.cross_entropy(function.apply(z)[0], Y[0]), made=1)
    check(lambda z: F.cross_entropy(function.apply(z * 2)[0], Y[0]) + F.cross_entropy(z[1], Y[1]), made=1)


def test_hooks_see_the_gradient():
    def function(z: Tensor) -> Tensor:
        z.register_hook(lambda gradient: gradient.clamp(max=0.0))
        return F.cross_entropy(z[0], Y[0])

    check(function, made=1)


def test_retained_gradient():
    net = model()
    with lazy_logits(net, "2"):
        z = net(features(3))
        z.retain_grad()
        F.cross_entropy(z, Y[0]).backward()
        probabilities = torch.softmax(z.materialize(), -1)
        assert same([z.grad], [((probabilities - F.one_hot(Y[0], C)) / 3).detach()])
        z = net(features(3))
        with pytest.raises(
            RuntimeError, match=r"with respect to unmade logits does not exist; call logits\.materialize"
        ):
            torch.autograd.grad(F.cross_entropy(z, Y[0]), z, allow_unused=True)


@pytest.mark.parametrize("of", [lambda z: z, lambda z: z.view(-1, C) / 3, lambda z: z[:, -1], lambda z: z.softmax(-1)])
def test_gradients_of_the_logits(of):
    net, x = model(), features(2, 3).requires_grad_()
    inputs = [x, *net.parameters()]

    def gradients() -> list[Tensor]:
        z = of(net(x))
        gradient = torch.linspace(1, 2, z.numel(), dtype=z.dtype).view(z.shape)
        first = torch.autograd.grad(z, inputs, gradient, create_graph=True)
        return [*first, *torch.autograd.grad([of(net(x)), first[0].sum()], inputs, [gradient, None], allow_unused=True)]

    expected = gradients()
    with lazy_logits(net, "2") as lazy:
        assert same(gradients(), expected)
    assert lazy.materialized == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_model(reentrant):
    net, x = model(), features(3).requires_grad_()
    F.cross_entropy(net(x), Y[0]).backward()
    expected = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    with lazy_logits(net, "2") as lazy:
        F.cross_entropy(checkpoint(net, x, use_reentrant=reentrant), Y[0]).backward()
    assert same([parameter.grad for parameter in net.parameters()], expected)
    assert lazy.materialized == (2 if reentrant else 0)
    net.zero_grad()
    with lazy_logits(net, "2") as lazy:
        checkpoint(lambda x: F.cross_entropy(net(x), Y[0]), x, use_reentrant=reentrant).backward()
    assert same([parameter.grad for parameter in net.parameters()], expected)
    assert lazy.materialized == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func on itself
def test_transforms():
    net, x = model(), features(3)
    parameters = dict(net.named_parameters())
    bias = "2.bias"

    def loss(values: dict[str, Tensor], x: Tensor = x, y: Tensor = Y[0]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, values, (x,)).view(-1, C), y.view(-1))

    def figures() -> list[Tensor]:
        ones = {name: torch.ones_like(value) for name, value in parameters.items()}
        frozen = torch.func.grad(lambda values: loss({**parameters, bias: torch.no_grad()(lambda: values[bias] * 1)()}))
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, Y[0])
        return [
            *torch.func.grad(loss)(parameters).values(), torch.func.jvp(loss, (parameters,), (ones,))[1],
            torch.func.hessian(lambda b: loss({**parameters, bias: b}))(parameters[bias]), *per_sample.values(),
            frozen(parameters)[bias],
        ]  # fmt: skip

    expected = figures()
    with lazy_logits(net, "2") as lazy:
        assert same([each.detach() for each in figures()], [each.detach() for each in expected], 1e-9)
        with torch.autograd.forward_ad.dual_level():
            dual = {n: torch.autograd.forward_ad.make_dual(v, torch.ones_like(v)) for n, v in parameters.items()}
            tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
            assert same([tangent.detach()], [expected[len(parameters)].detach()])
    assert lazy.materialized == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func on itself
@pytest.mark.parametrize(
    "of", [lambda z: z, lambda z: 2 * z.view(-1, C), lambda z: z.log_softmax(-1), lambda z: (z, z.exp())[0]]
)
def test_logits_that_leave_a_transform(of):
    net, x = model(), features(3)
    parameters = dict(net.named_parameters())

    def function(values: dict[str, Tensor], x: Tensor = x) -> Tensor:
        return of(torch.func.functional_call(net, values, (x,)))

    def of_bias(bias: Tensor) -> Tensor:
        return function({**parameters, "2.bias": bias})

    def with_aux(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        z = torch.func.functional_call(net, values, (x,))
        return F.cross_entropy(z, Y[0]), of(z)

    def figures() -> list[Tensor]:
        ones = {name: torch.ones_like(value) for name, value in parameters.items()}
        values, pull = torch.func.vjp(function, parameters)
        gradients, aux = torch.func.grad(with_aux, has_aux=True)(parameters)
        return [
            F.log_softmax(values, -1).gather(-1, INDEX[0]), values * 1, *pull(torch.linspace(1, 2, values.numel()).view(
                values.shape).double())[0].values(), *torch.func.jacrev(function)(parameters).values(),
            torch.func.jacrev(torch.func.jacrev(of_bias))(parameters["2.bias"]), aux * 1, *gradients.values(),
            torch.func.jvp(function, (parameters,), (ones,))[1], torch.func.jacfwd(of_bias)(parameters["2.bias"]),
            torch.func.vmap(function, (None, 0))(parameters, x[:, None]),
            torch.func.vmap(torch.func.jacrev(function), (None, 0))(parameters, x[:, None])["0.weight"],
        ]  # fmt: skip

    expected = figures()
    with lazy_logits(net, "2"):
        assert same([each.detach() for each in figures()], [each.detach() for each in expected], 1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func on itself
def test_vmap_makes_the_logits():
    net, x = model(), features(5)
    with lazy_logits(net, "2") as lazy:
        assert same([torch.func.vmap(net)(x).detach()], [net(x).materialize().detach()])
    assert lazy.materialized == 2

    def with_aux(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(net(x), Y[0, 0]), net(x)

    with (
        lazy_logits(net, "2"),
        pytest.raises(RuntimeError, match=r"leave vmap .* let the function return logits\.materialize\(\)"),
    ):
        torch.func.vmap(torch.func.grad(with_aux, has_aux=True))(x)


def test_second_derivatives():
    net, x = model(), features(3)

    def products() -> list[Tensor]:
        parameters = list(net.parameters())
        first = torch.autograd.grad(F.cross_entropy(net(x), Y[0]), parameters, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in first), parameters))

    expected = products()
    with lazy_logits(net, "2") as lazy:
        assert same(products(), expected)
    assert lazy.materialized == 0


def test_accumulated_and_repeated_calls():
    net = model()

    def train() -> list[Tensor]:
        net.zero_grad()
        for seed in range(3):
            x = features(2, 3) + seed
            a, b = net(x), net(x / 2)  # a model may call its head more than once
            (F.cross_entropy(a[0], Y[0]) + F.cross_entropy((b / 2)[1], Y[1])).div(3).backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    expected = train()
    with lazy_logits(net, "2") as lazy:
        assert same(train(), expected)
    assert lazy.materialized == 0


# --- dtypes and autocast -----------------------------------------------------------------------------------------------

LOW = {
    "cross-entropy": lambda z: F.cross_entropy(z[0].float(), Y[0]),
    "scaled rows": lambda z: F.cross_entropy((z / ROWS.abs().float())[0], Y[0]),
    "scaled by a tensor": lambda z: F.cross_entropy((z * torch.tensor(0.5)).float()[0], Y[0]),
    "log-probabilities": lambda z: F.log_softmax(z, -1, dtype=torch.float32).gather(-1, INDEX),
    "softmax": lambda z: z.softmax(-1, torch.float32).gather(-1, INDEX),
    "made": lambda z: (z / ROWS.abs().float()).exp(),
    "made with another bias": lambda z: (z + BIAS.float()).exp(),
    "chosen": lambda z: z.float().gather(-1, INDEX),
}


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(name, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    net, x = model(bias=name != "scaled rows", dtype=dtype), features(2, 3, dtype=dtype)
    exact = copy.deepcopy(net).double()
    truth, of_truth = numbers(lambda z: LOW[name](z).double(), exact, x.double())

    def run() -> tuple[list[Tensor], list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = LOW[name](net(x))
        total = (results * torch.linspace(1, 2, results.numel()).view(results.shape)).sum()
        return [results], list(torch.autograd.grad(total, list(net.parameters())))

    dense, of_dense = run()
    with lazy_logits(net, "2"):
        got, of_got = run()
    assert got[0].dtype == dense[0].dtype == torch.float32
    for ours, theirs, true in zip([*got, *of_got], [*dense, *of_dense], [*truth, *of_truth], strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = (ours.double() - true).norm(), (theirs.double() - true).norm()
        assert error <= 1.5 * allowed + 2e-3 * true.norm()


def test_losses_are_float32():
    net = model(dtype=torch.bfloat16)
    with lazy_logits(net, "2"):
        z = net(features(3, dtype=torch.bfloat16))
        assert z.dtype == torch.bfloat16
        assert F.cross_entropy(z, Y[0]).dtype == torch.float32
        assert F.cross_entropy(z.double(), Y[0]).dtype == torch.float64
        assert F.log_softmax(z, -1).gather(-1, INDEX[0]).dtype == torch.float32
        assert z.logsumexp(-1).dtype == torch.float32
        assert z.gather(-1, INDEX[0]).dtype == torch.bfloat16


def test_results_of_narrowed_logits_have_their_dtype():
    net, x = model(), features(2, 3)

    def function(z: Tensor) -> tuple[Tensor, ...]:
        z = z.float()  # as models of transformers do, also where they are float64
        rows = F.cross_entropy(z[0], Y[0], reduction="none"), z.log_softmax(-1).gather(-1, INDEX)
        return F.cross_entropy(z[0], Y[0]), *rows, z.logsumexp(-1), z.max(-1).values

    expected = numbers(function, net, x)
    with lazy_logits(net, "2", on_materialize="raise"):
        got = numbers(function, net, x)
    assert all(same(ours, theirs, 1e-6) for ours, theirs in zip(got, expected, strict=True))


# --- what changes under unmade logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_changes_in_place_are_errors(name):
    net = model()
    with lazy_logits(net, "2"):
        e = net[:2](features(3)).detach()
        z = net[2](e)
        kept = z.clone()
        with torch.no_grad():
            {"input": e, "weight": net[2].weight, "bias": net[2].bias}[name].mul_(2)
        for use in (lambda: F.cross_entropy(z, Y[0]), z.exp, kept.materialize, lambda: z.view(-1)):
            with pytest.raises(RuntimeError, match="were changed in place after the head ran"):
                use()
        F.cross_entropy(net[2](e), Y[0])  # of the new ones
        made = net[2](e)
        expected = made.materialize().clone()
        with torch.no_grad():
            net[2].weight.mul_(2)
        assert same([made * 1], [expected * 1])


def test_remains_valid_without_the_context():
    net = model()
    expected = F.cross_entropy(net(features(3)), Y[0])
    with lazy_logits(net, "2") as lazy:
        z = net(features(3))
    assert same([F.cross_entropy(z, Y[0]).detach()], [expected.detach()])
    assert type(net(features(3))) is Tensor
    assert "removed" in repr(lazy)
    lazy.remove()


def test_handle_and_nesting():
    net = model()
    first = lazy_logits(net, net[2])
    assert isinstance(first, LazyHead)
    with pytest.raises(ValueError, match="head must have its own forward, got a Linear whose forward was replaced"):
        lazy_logits(net, "2")
    first.remove()
    with lazy_logits(net, "2") as outer, lazy_logits(net, "0") as inner:  # two heads at once
        net(features(3)).exp()
    assert (outer.materialized, inner.materialized) == (1, 1)


def test_handle_removes_only_itself():
    net = model()
    first = lazy_logits(net, "2")
    first.remove()
    second = lazy_logits(net, "2")
    first.remove()
    assert ("removed" in repr(first), "active" in repr(second)) == (True, True)
    assert isinstance(net(features(3)), LazyLogits)
    second.remove()
    assert type(net(features(3))) is Tensor


@pytest.mark.parametrize("budget", [0, -1])
def test_budget_is_validated_at_the_start(budget):
    net = model()
    with pytest.raises(ValueError, match="memory_budget must be a positive int"):
        lazy_logits(net, "2", memory_budget=budget)
    assert type(net(features(3))) is Tensor


class Largest(TorchDispatchMode):
    """Records the number of entries of the largest tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in pytree.tree_leaves(result) if isinstance(each, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return result


@pytest.mark.parametrize(
    "function", [lambda z: z.topk(40).values, lambda z: z.gather(-1, torch.arange(40).expand(70, 40))]
)
def test_chosen_logits_keep_to_the_budget(function):
    head, x = torch.nn.Linear(4, 200), features(70, dtype=torch.float32)
    expected = function(head(x))
    for budget, copies in ((2**15, False), (None, True)):
        with lazy_logits(head, head, memory_budget=budget) as lazy, torch.no_grad(), Largest() as seen:
            assert same([function(head(x))], [expected], 1e-5)
        assert ((seen.entries >= 70 * 40 * 4), lazy.materialized) == (copies, 0)


def test_copies():
    net = model()
    with lazy_logits(net, "2") as lazy:
        other = copy.deepcopy(net)
        with torch.no_grad():
            other[2].weight.zero_()
        assert not F.cross_entropy(other(features(3)), Y[0]).allclose(F.cross_entropy(net(features(3)), Y[0]))
        z = net(features(3)).detach()
        assert type(copy.deepcopy(z)) is Tensor
        assert same([pickle.loads(pickle.dumps(z))], [z.materialize()])  # noqa: S301
        buffer = io.BytesIO()
        torch.save({"logits": z}, buffer)
        buffer.seek(0)
        assert same([torch.load(buffer)["logits"]], [z.materialize()])
        assert lazy.materialized == 1


def test_calls_from_below_autograd():
    net = model()
    with lazy_logits(net, "2"), torch.no_grad():
        z = net(features(3))
        torch.ops.aten.mul_.Tensor(z, torch.tensor(2.0))
        torch._C._nn.gelu(z)
        expected = z.materialize().clone()
        with torch._C.DisableTorchFunctionSubclass():
            torch.ops.aten.mul_.Tensor(z, torch.tensor(2.0))
        assert same([z.materialize()], [2 * expected])
        z = net(features(3))
        with torch._C.DisableTorchFunctionSubclass():
            torch.ops.aten.mul_.Tensor(z, torch.tensor(2.0))
        assert same([z.materialize()], [expected])
    with lazy_logits(net, "2"):
        z = net(features(3))
        with (
            pytest.raises(RuntimeError, match=r"writes into unmade logits that require gradients, below autograd"),
            torch._C.DisableTorchFunctionSubclass(),
        ):
            torch.ops.aten.mul_.Tensor(z, torch.tensor(2.0))
