"""Unmade logits compute what made ones do, whatever a model or a loss does with them.

The oracle is torch on the logits that the head makes: the same function, the same model, without ``lazy_logits``.
"""

from __future__ import annotations

import ast
import copy
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import softcurve
from softcurve import lazy_logits
from softcurve.lazy import LazyHead, LazyLogits

from . import process_cases

C = 11
Y = torch.tensor([[3, 0, 10], [7, -100, 2]])
INDEX = Y.clamp(min=0).unsqueeze(-1)
MASK = Y > 1
BIAS = torch.linspace(-1, 1, C, dtype=torch.float64)
MASKED = torch.where(torch.arange(C) == 5, -torch.inf, 0.0).double()
ROWS = torch.tensor([[[0.5], [2.0], [-1.0]], [[1.0], [3.0], [0.25]]], dtype=torch.float64)
PROBABILITIES = torch.softmax(torch.arange(66.0, dtype=torch.float64).view(2, 3, C) % 5, -1)
WEIGHT = torch.arange(1.0, C + 1, dtype=torch.float64)
IN_TORCH = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch on its kl_div


def model(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, C, bias=bias)).to(dtype)


def features(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*leading, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def numbers(function: Callable[[Tensor], Any], net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results of a function of the logits, and the gradients of a weighted sum of them in every parameter."""
    results = function(net(x))
    results = list(results) if isinstance(results, tuple) else [results]
    total = sum(((each * torch.linspace(1, 2, each.numel()).view(each.shape)).sum() for each in results if
                 each.is_floating_point() and each.requires_grad), torch.zeros(()))  # fmt: skip
    if not total.requires_grad:
        return results, []
    return results, list(torch.autograd.grad(total, list(net.parameters()), materialize_grads=True))


def same(got: Sequence[Tensor], expected: Sequence[Tensor], bound: float = 1e-11) -> bool:
    return len(got) == len(expected) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=bound, atol=bound,
                                                                     equal_nan=True)
        for a, b in zip(got, expected, strict=True)
    )  # fmt: skip


def check(
    function: Callable[[Tensor], Any], made: int = 0, *, net: nn.Module | None = None, x: Tensor | None = None,
    head: str = "2",
) -> None:  # fmt: skip
    net, x = net or model(), features(2, 3) if x is None else x
    expected = numbers(function, net, x)
    with lazy_logits(net, head) as lazy:
        got = numbers(function, net, x)
    assert lazy.materialized == made
    assert all(map(same, got, expected)), (got, expected)


# --- without the logits ------------------------------------------------------------------------------------------------


def smoothed(z: Tensor) -> Tensor:
    """The label smoother of transformers."""
    log_probs = -F.log_softmax(z, dim=-1)
    nll, uniform = log_probs.gather(dim=-1, index=INDEX), log_probs.sum(dim=-1, keepdim=True, dtype=torch.float64)
    padding = Y.unsqueeze(-1).eq(-100)
    nll.masked_fill_(padding, 0.0)
    uniform.masked_fill_(padding, 0.0)
    return 0.9 * nll.sum() + 0.1 / C * uniform.sum()


def selected(z: Tensor) -> Tensor:
    """The log-probabilities of TRL."""
    chosen = torch.gather(z, dim=-1, index=INDEX).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in z])


CONSUMED = {
    "cross-entropy": lambda z: F.cross_entropy(z.view(-1, C), Y.view(-1)),
    "by its module": lambda z: nn.CrossEntropyLoss()(z.flatten(0, 1), Y.flatten()),
    "by keywords": lambda z: F.cross_entropy(input=z[0], target=Y[0]),
    "shifted": lambda z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, C), Y[..., 1:].reshape(-1)),
    "options": lambda z: F.cross_entropy(z.view(-1, C), INDEX.view(-1), WEIGHT, None, 7, None, "sum", 0.2),
    "smoothed and weighted": lambda z: F.cross_entropy(
        z.reshape(6, -1), Y.view(-1), weight=WEIGHT, label_smoothing=0.1, reduction="none"
    ),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), Y, reduction="none"),
    "classes second, moved": lambda z: F.cross_entropy(z.movedim(-1, 1), PROBABILITIES.movedim(-1, 1)),
    "classes second, permuted": lambda z: F.cross_entropy(z.permute(1, 2, 0), Y.T),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, C), PROBABILITIES.view(-1, C), label_smoothing=0.3),
    "one row": lambda z: F.cross_entropy(z[1, 0], Y[1, 0]),
    "rows of a mask": lambda z: F.cross_entropy(z[MASK], Y[MASK]),
    "rows of an index": lambda z: F.cross_entropy(z[:, [2, 0]].view(-1, C), Y[:, [2, 0]].view(-1)),
    "parts": lambda z: torch.stack([F.cross_entropy(a, b) for a, b in zip(z, Y, strict=True)]),
    "split": lambda z: F.cross_entropy(z.split([1, 2], dim=1)[1][0], Y[0, 1:]) + F.cross_entropy(
        z.chunk(2)[1].squeeze(0), Y[1]
    ) + F.cross_entropy(z.unbind(1)[2].narrow(0, 0, 1).unsqueeze(0)[0], Y[:1, 2]),
    "vocabulary without padding": lambda z: F.cross_entropy(z[..., :7].reshape(-1, 7), INDEX.view(-1) % 7),
    "scaled": lambda z: F.cross_entropy((z * 0.3 / 2)[0], Y[0]),
    "twice negative": lambda z: F.cross_entropy((-(-2.0 * z))[0], Y[0]),
    "negative tensor": lambda z: F.cross_entropy((z * torch.tensor(-0.7))[0], Y[0]),
    "zero tensor": lambda z: F.cross_entropy((torch.zeros((), dtype=torch.float64) * z)[0], Y[0]),
    "cap": lambda z: F.cross_entropy((torch.tanh(z / 0.4) * 0.4 / 2).view(-1, C), Y.view(-1)),
    "added bias": lambda z: F.cross_entropy((BIAS + z.mul(2) + MASKED)[0], Y[0]),
    "twice a log-softmax": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, C), Y.view(-1), reduction="sum"),
    "nll of classes second": lambda z: F.nll_loss(z.log_softmax(-1).transpose(1, 2), Y, weight=WEIGHT),
    "gather": lambda z: torch.gather(F.log_softmax(z, -1), -1, INDEX).squeeze(-1),
    "gather of a softmax": lambda z: 3 * z.softmax(-1).gather(2, INDEX.expand(2, 3, 4)),
    "take along": lambda z: torch.take_along_dim(torch.log_softmax(z, dim=-1), INDEX, dim=-1),
    "gather of many logits": lambda z: z.gather(-1, torch.arange(C).expand(2, 3, C)),
    "gather of capped logits": lambda z: ((z / 3).tanh() * 3).gather(-1, INDEX),
    # Without gradients: that of a log-probability of −inf is 0 here, and in torch that of another class beside it.
    "gather of masked logits": lambda z: F.log_softmax(z.detach() + MASKED, -1).gather(-1, INDEX * 0 + 5),
    "log-probabilities": selected,
    "log-sum-exp": lambda z: (z / 2 + MASKED).logsumexp((-1,), keepdim=True),
    "label smoother": smoothed,
    "mean of masked log-probabilities": lambda z: F.log_softmax(z.detach() + MASKED, -1).mean(-1),
    "scaled log-softmax": lambda z: (-2 * F.log_softmax(z, -1) / 4).mean(dim=-1),
    "exp of a log-softmax": lambda z: F.log_softmax(z, -1).exp().gather(-1, INDEX),
    "argmax": lambda z: (z.argmax(-1), (z * 2).softmax(-1).argmax(dim=2, keepdim=True)),
    "max": lambda z: z.max(-1),
    "topk": lambda z: (torch.tanh(z) * 5).topk(3),
    "topk of many": lambda z: z.double().topk(C, -1),
    "divergence": lambda z: F.kl_div(F.log_softmax(z / 2, -1), F.softmax(z[[1, 0]] / 2, -1), reduction="batchmean"),
    "divergence of detached": lambda z: F.kl_div(
        F.log_softmax((z / 0.3).tanh() * 0.3, -1), F.log_softmax((z.detach() / 9).tanh() * 1.5, -1), reduction="sum",
        log_target=True,
    ),
    "distilled cross-entropy": lambda z: F.cross_entropy(z[0], F.softmax(z[1] * 2, -1)),
    "casts": lambda z: F.cross_entropy(z.double().to(z.dtype).to(z.device, copy=True)[0], Y[0]),
    "clone": lambda z: F.cross_entropy(z.clone()[0], Y[0]),
    "masked class of a bias": lambda z: F.cross_entropy((z + MASKED)[0], Y[0], label_smoothing=0.0),
    "shape": lambda z: torch.tensor([*z.shape, z.numel(), z.ndim, len(z), *z.stride(), *z.transpose(0, 2).stride()]),
}  # fmt: skip


@IN_TORCH
@pytest.mark.parametrize("name", CONSUMED)
def test_consumed_without_making(name):
    check(CONSUMED[name])


@pytest.mark.parametrize("net", [model(bias=False), model()], ids=["no bias", "bias"])
def test_scale_of_each_row(net):
    temperature = ROWS.clone().requires_grad_()
    function = lambda z: F.cross_entropy((z / temperature)[0], Y[0])  # noqa: E731
    check(function, made=0 if net[2].bias is None else 1, net=net)
    loss = function(net(features(2, 3)))
    expected = torch.autograd.grad(loss, temperature)
    with lazy_logits(net, "2"):
        assert same(torch.autograd.grad(function(net(features(2, 3))), temperature), expected)


def test_learnable_scale_has_its_gradient():
    net, scale = model(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(F.cross_entropy((net(features(3)) * scale), Y[0]), scale)
    with lazy_logits(net, "2") as lazy:
        assert same(torch.autograd.grad(F.cross_entropy((net(features(3)) * scale), Y[0]), scale), expected)
    assert lazy.materialized == 0


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (5, 1, 2)], ids=str)
def test_shapes_of_batches(leading):
    labels = torch.arange(torch.Size(leading).numel()) % C
    rows = lambda z: z if z.ndim == 1 else z.reshape(-1, C) if z.numel() else z.flatten(0, -2) if z.ndim > 2 else z  # noqa: E731
    target = labels.view(()) if leading == () else labels
    check(lambda z: F.cross_entropy(rows(z), target, reduction="sum"), x=features(*leading))
    check(lambda z: F.log_softmax(z, -1).gather(-1, labels.view(*leading, 1)), x=features(*leading))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offsets_change_nothing(offset):
    net = model()
    with torch.no_grad():
        net[2].bias += offset
    check(CONSUMED["cross-entropy"], net=net)
    check(CONSUMED["label smoother"], net=net)


# --- with the logits ---------------------------------------------------------------------------------------------------


def written(write: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Write into a clone of the logits by a view of it and compare both, with a clone from before."""

    def function(z: Tensor) -> tuple[Tensor, ...]:
        z = z * 1
        before, part, whole = z.clone(), z[:1], z.view(-1, C)
        write(part)
        return z * 1, part * 1, whole * 1, before * 1, F.cross_entropy(whole, Y.view(-1))

    return function


def add_to(z: Tensor) -> None:
    z += 1.5


def set_masked(z: Tensor) -> None:
    z[..., 3] = -1e4


def square_into(z: Tensor) -> Tensor:
    out = torch.empty(0, dtype=z.dtype)
    with torch.no_grad():
        return torch.mul(z, z, out=out)


MADE = {
    "square": (lambda z: (z**2).mean(), 1),
    "made once": (lambda z: (z.exp(), z.sum(), F.cross_entropy(z[0], Y[0])), 1),
    "mean of logits": (lambda z: z.mean(-1), 1),
    "columns": (lambda z: z[..., 3], 1),
    "integer scale of a tensor": (lambda z: F.cross_entropy((z * torch.tensor(2))[0], Y[0]), 1),
    "negative scale": (lambda z: F.cross_entropy((-z)[0], Y[0]), 1),
    "zero scale": (lambda z: F.cross_entropy((z * 0)[0], Y[0]), 1),
    "infinite scale": (lambda z: F.cross_entropy((z / 0.0)[0], Y[0]), 1),
    "negative cap": (lambda z: F.cross_entropy((z.tanh() * -2.0)[0], Y[0]), 1),
    "argmin by sign": (lambda z: (-z).argmax(-1), 1),
    "smallest": (lambda z: z.topk(2, largest=False).values, 1),
    "divergence of each class": (lambda z: F.kl_div(F.log_softmax(z, -1), PROBABILITIES, reduction="none"), 1),
    "log-softmax of rows": (lambda z: F.log_softmax(z, 1), 1),
    "whole softmax": (lambda z: F.softmax(z, -1, dtype=torch.float64), 1),
    "index of a tensor": (lambda z: z[torch.tensor(1)], 1),
    "addition": (lambda z: z + PROBABILITIES, 1),
    "out": (square_into, 1),
    "to integers": (lambda z: z.detach().mul(10).long(), 1),
    "numpy": (lambda z: torch.from_numpy(z.detach().numpy().copy()), 1),
    "written, by a method": (written(lambda z: z.mul_(3)), 2),
    "written, by an operator": (written(add_to), 2),
    "written, by an index": (written(set_masked), 2),
    "written, to a base of views": (lambda z: (v := z.view(-1, C), z.mul_(2), v * 1, z[0] * 1)[2:], 1),
    "written, after parts were made": (lambda z: (p := z[0, :1], p.exp(), z.mul_(2), p * 1, z * 1)[3:], 2),
    "written, to a copy": (lambda z: (c := z.transpose(0, 1).contiguous(), c.mul_(2), z * 1)[2], 2),
    "written, to itself": (lambda z: (c := z.contiguous().double().to(z), c.mul_(2), z[1] * 1)[2], 1),
    "written, to itself unchanged": (lambda z: (c := z.to(z.dtype).double(), c.div_(2), z[1] * 1)[2], 1),
    "written, to a selection": (lambda z: (c := z[MASK], c.mul_(2), z * 1)[2], 2),
    "written, behind a selection": (lambda z: (c := z[MASK], z.mul_(2), c * 1)[2], 2),
}


@pytest.mark.parametrize("name", MADE)
def test_made_where_entries_are_needed(name):
    function, made = MADE[name]
    check(function, made)


STEPS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda z: z.view(-1, z.shape[-1]), "reshape": lambda z: z.reshape(-1, 1, z.shape[-1]),
    "flatten": lambda z: z.flatten(0, 1), "first": lambda z: z[0], "tail": lambda z: z[1:], "none": lambda z: z[:, None],
    "rows": lambda z: z[[-1, 0]], "transpose": lambda z: z.transpose(0, 1), "back": lambda z: z.movedim(0, -1),
    "contiguous": lambda z: z.contiguous(), "clone": lambda z: z.clone(), "scale": lambda z: z * 0.5,
    "float": lambda z: z.double(), "detach": lambda z: z.detach(), "squeeze": lambda z: z.squeeze(0),
    "chunk": lambda z: z.chunk(2)[0], "unsqueeze": lambda z: z.unsqueeze(0), "slice": lambda z: z[..., :4],
    "tanh": lambda z: z.tanh(), "write": lambda z: z.mul_(1.5), "set": lambda z: z.__setitem__(0, 0.25),
    "increase": lambda z: z.__iadd__(1.0), "read": lambda z: z.exp(), "unrecorded": lambda z: torch.no_grad()(z.view)(-1),
    "frozen": lambda z: torch.no_grad()(lambda: z * 2)(),
}  # fmt: skip


def ran(z: Tensor, program: Sequence[tuple[str, int]]) -> tuple[list[Tensor], list[tuple[str, int]]]:
    """Return all tensors that a program makes of the logits, and the steps of it that torch allows."""
    pool, done = [z * 1], []
    for name, place in program:
        try:
            result = STEPS[name](pool[place % len(pool)])
        except (RuntimeError, IndexError):
            continue
        done.append((name, place))
        pool.append(pool[0] if result is None else result)
    return pool, done


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 7)), min_size=1, max_size=7))
def test_views_and_writes_are_those_of_torch(program):
    net, x = model(), features(2, 3)
    steps: list[tuple[str, int]] = []

    def dense(z: Tensor) -> tuple[Tensor, ...]:
        pool, done = ran(z, program)
        steps.extend(done)
        return tuple(each.clone() for each in pool)

    try:
        expected = numbers(dense, net, x)
    except RuntimeError:  # a gradient needs what the program has overwritten
        reject()
    with lazy_logits(net, "2"):
        got = numbers(lambda z: tuple(each.clone() for each in ran(z, steps)[0]), net, x)
    plain = [each.materialize() if isinstance(each, LazyLogits) else each for each in got[0]]
    assert same(plain, expected[0])
    assert same(got[1], expected[1])


def kept(z: Tensor, k: int) -> Tensor:
    return (z >= torch.topk(z, k).values[..., -1:]).sum(-1)


COMPARED = {
    "filter of the largest": lambda z: kept(z, 3),
    "of a slice": lambda z: kept(z[:, -1], 4),
    "of a scaled view": lambda z: kept(z.view(-1, C) / 3, C - 1),
    "rank of a label": lambda z: (z > z.gather(-1, INDEX)).sum(-1),
    "rank by log-probabilities": lambda z: (lambda p: (p > p.gather(-1, INDEX)).sum(-1))(F.log_softmax(z, -1)),
    "largest": lambda z: (z == z.max(-1, keepdim=True).values).sum(-1),
}


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_compare_with_the_made_logits(name, dtype):
    # The same number from another product may be rounded otherwise, and a filter would drop it.
    net = model(dtype=dtype)
    for seed in range(20):
        x = features(2, 3, dtype=dtype) + seed
        with lazy_logits(net, "2"):
            got = COMPARED[name](net(x))
        if dtype == torch.float32:  # in half precision the logits of two classes are often the same
            assert got.equal(COMPARED[name](net(x)))
        else:
            assert bool((got > 0).all()) or "rank" in name


def test_reports():
    net, x = model(), features(2)
    with lazy_logits(net, "2", on_materialize="warn") as lazy:
        z = net(x)
        with pytest.warns(
            UserWarning, match=r"lazy_logits: exp needs the entries of logits \(2, 11\), which take"
        ) as all_:
            z.exp()
        assert all_[0].filename == __file__
        z.exp()
        assert lazy.materialized == 1
    with lazy_logits(net, "2", on_materialize="raise"), pytest.raises(RuntimeError, match="lazy_logits: mean needs"):
        net(x).mean()


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
        assert same([z * 1 if False else z.materialize()], [expected])
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
        results.sum().backward() if False else None
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
        assert z.gather(-1, INDEX[0]).dtype == torch.bfloat16


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


# --- heads -------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(C, 8), nn.Linear(8, C, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_tied_weight_and_default_head():
    net = Tied().double()
    check(CONSUMED["cross-entropy"], net=net, x=INDEX.squeeze(-1), head="head")
    with lazy_logits(nn.DataParallel(net)) as lazy:
        assert isinstance(net(Y.clamp(min=0)), LazyLogits)
    assert lazy.module is net.head


class Lora(nn.Module):
    """The attributes of a LoRA ``Linear`` of peft, and its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, C)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, C, bias=False)})
        self.scaling, self.active_adapters = {"default": 0.5}, ["default"]
        self.merged = self.disable_adapters = False

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x)
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]


@pytest.mark.parametrize("name", ["cross-entropy", "gather of capped logits", "vocabulary without padding", "topk",
                                  "divergence", "label smoother", "gather of many logits"])  # fmt: skip
def test_adapter(name):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Lora()).double()
    net[2].base_layer.weight.requires_grad_(False)
    net[2].base_layer.weight.grad = None
    trained = nn.ModuleList([net[0], net[2].lora_A, net[2].lora_B])
    trained.forward = net.forward
    expected = numbers(CONSUMED[name], trained, features(2, 3))
    with lazy_logits(net, "2") as lazy:
        got = numbers(CONSUMED[name], trained, features(2, 3))
        assert lazy.materialized == 0
        assert all(map(same, got, expected))
        made = net(features(2)).materialize()
        net[2].disable_adapters = True
        assert same([net(features(2)).materialize()], [net[2].base_layer(net[:2](features(2)))])
    net[2].disable_adapters = False
    assert same([made], [net(features(2))])


def test_adapter_under_autocast():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Lora())
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(features(2, dtype=torch.float32))
        with lazy_logits(net, "2"):
            z = net(features(2, dtype=torch.float32))
            assert z.dtype == expected.dtype
            assert same([z.materialize()], [expected], 1e-2)
            assert same([F.cross_entropy(z, Y[0, :2])], [F.cross_entropy(expected.float(), Y[0, :2])], 1e-2)


class Renamed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3,), TypeError, r"model must be a torch\.nn\.Module, got int"),
        ((model(),), ValueError, r"head must be given for a Sequential, which has no get_output_embeddings\(\)"),
        ((model(), "3"), ValueError, r"must be the name of one module .* got '3', which names none; .* \['0', '2'\]"),
        ((nn.Sequential(model(), model()), "2"), ValueError, r"names \['0\.2', '1\.2'\]"),
        (
            (model(), nn.Linear(2, 3)),
            ValueError,
            "head must be a module of the model or its name, got a Linear outside",
        ),
        ((model(), "1"), TypeError, r"head must be a torch\.nn\.Linear, .* got Tanh; pass the linear layer itself"),
        ((nn.Sequential(Renamed(4, 2)), "0"), TypeError, "got Renamed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("without_shape_checks")
def test_heads_that_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        lazy_logits(*arguments)


@pytest.mark.usefixtures("without_shape_checks")
def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="on_materialize must be one of"):
        lazy_logits(model(), "2", on_materialize="often")  # type: ignore[arg-type]
    net = model()
    net.get_output_embeddings = lambda: None
    with pytest.raises(
        ValueError, match=r"head must be given for a Sequential, whose get_output_embeddings.* returns None"
    ):
        lazy_logits(net)
    with lazy_logits(model(), "2") as lazy:
        with pytest.raises(ValueError, match="input of the head must have 8 features, as its weight"):
            lazy.module(torch.randn(2, 5))
        with pytest.raises(
            ValueError, match=r"input of the head must be on cpu, as its weight, got meta; .* DataParallel"
        ):
            lazy.module(torch.empty(2, 8, dtype=torch.float64, device="meta"))
        z = lazy.module(torch.randn(2, 8, dtype=torch.float64))
        with pytest.raises(ValueError, match="index"):
            z.gather(-1, torch.full((2, 1), -100))
        with pytest.raises((IndexError, RuntimeError)):
            z.unsqueeze(5)


def test_nan_is_an_error_or_nan():
    net = model()
    with lazy_logits(net, "2"):
        z = net(features(3) * torch.nan)
        with pytest.raises(ValueError, match="NaN"):
            F.cross_entropy(z, Y[0])
        assert bool(z.exp().isnan().all())


def test_ties_go_to_the_lower_class():
    net = model()
    with torch.no_grad():
        net[2].weight[7] = net[2].weight[3]
        net[2].bias[[3, 7]] = 50.0
    with lazy_logits(net, "2") as lazy:
        assert net(features(2, 3)).argmax(-1).tolist() == [[3] * 3] * 2
        assert net(features(2, 3)).max(-1).indices.tolist() == [[3] * 3] * 2
    assert lazy.materialized == 0


# --- compiled ----------------------------------------------------------------------------------------------------------

COMPILED = """
import torch, softcurve
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 11)).double()
Y = torch.tensor([3, 0, 10, -100, 2])

def loss(x, y):
    z = net(x)
    capped = torch.tanh(z[:-1].double() / 2) * 2
    chosen = F.log_softmax(z, -1).gather(-1, y.clamp(min=0)[:, None])
    with torch.no_grad():
        old = F.log_softmax(z, -1)
    return F.cross_entropy(capped, y[:-1]) + F.cross_entropy(z[None].transpose(1, 2), y[None]) + chosen.mean() + \\
        z.logsumexp(-1).mean() + old.gather(-1, y.clamp(min=0)[:, None]).mean() + (z * z).mean()

def figures(function, n):
    x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    value = function(x, Y[:n])
    return [value, *torch.autograd.grad(value, list(net.parameters()))]

def compiled(function, **options):
    return torch.compile(function, backend="aot_eager", **options)

def raises(function, words):
    try:
        function()
    except Exception as error:
        assert words in str(error), error
    else:
        raise AssertionError("no error")

with softcurve.lazy_logits(net, "2") as lazy:
    function = compiled(loss, fullgraph=True)
    for n in (5, 3):  # the second time with a dynamic shape
        with torch.no_grad():
            net[2].weight.mul_(1.1)  # compiled code does not remember a weight
        got = figures(function, n)
        lazy.remove()
        expected = figures(loss, n)
        lazy = softcurve.lazy_logits(net, "2")
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    x = torch.randn(5, 4, dtype=torch.float64)
    out = compiled(net)(x)
    raises(lambda: F.cross_entropy(out, Y), "unmade logits left compiled code, which loses their gradients")
    with torch.no_grad():
        torch.testing.assert_close(F.cross_entropy(out, Y), F.cross_entropy(net(x), Y))
    assert (out.detach().argmax(-1) == net(x).argmax(-1)).all()

    def broken(x):
        z = net(x)
        torch._dynamo.graph_break()
        return F.cross_entropy(z, Y)

    def written(x):
        z = net(x)
        z.div_(2)
        return F.cross_entropy(z, Y)

    raises(lambda: compiled(broken)(x), "unmade logits left compiled code")
    raises(lambda: compiled(written)(x), "div_ writes into unmade logits, which compiled code cannot")
"""


def test_compiled(run_forked):
    run_forked(COMPILED)


def test_no_file_for_a_library():
    """The only contact with a model is ``get_output_embeddings`` and torch, so that new versions of it break nothing."""
    for path in Path(softcurve.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("transformers.models") for name in names), path
            in_lazy = "lazy" in path.relative_to(Path(softcurve.__file__).parent).parts
            assert not in_lazy or all(name.split(".")[0] not in ("transformers", "peft", "trl") for name in names), path


@pytest.mark.slow
def test_processes():
    cases = process_cases.run("lazy_processes", 2)
    assert {case.split(":")[0].split(",")[0].split(" ")[0] for case in cases} == {"DDP", "FSDP2", "sharded"}
    assert not process_cases.wrong(cases)
