"""Unmade logits compute what made ones do, whatever a model or a loss does with them.

The oracle is torch on the logits that the head makes: the same function, the same model, without ``lazy_logits``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from softcurve import lazy_logits
from softcurve.lazy import LazyLogits

from .lazy_cases import (
    CONSUMED,
    INDEX,
    MASK,
    PROBABILITIES,
    ROWS,
    C,
    Y,
    check,
    features,
    model,
    numbers,
    same,
)

IN_TORCH = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch on its kl_div


# --- without the logits ------------------------------------------------------------------------------------------------


@IN_TORCH
@pytest.mark.parametrize("name", CONSUMED)
def test_consumed_without_making(name):
    check(CONSUMED[name])


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda z: z, "divided": lambda z: z / 2, "scaled": lambda z: z * 3,
    "capped": lambda z: torch.tanh(z / 0.4) * 0.4, "capped and scaled": lambda z: torch.tanh(z * 0.9) * 1.5 / 2,
}  # fmt: skip


@pytest.mark.parametrize("teacher", MAPS)
@pytest.mark.parametrize("student", MAPS)
def test_teacher_keeps_its_temperature(student, teacher):
    # A cross-entropy does not divide its target by the student's temperature; a divergence does.
    map, of_teacher = MAPS[student], MAPS[teacher]
    check(lambda z: F.cross_entropy(map(z)[0], of_teacher(z)[1].softmax(-1)))
    check(lambda z: F.kl_div(map(z)[0].log_softmax(-1), of_teacher(z)[1].softmax(-1), reduction="sum"))


@pytest.mark.parametrize("teacher_lowered", [False, True])
def test_teacher_of_another_autocast(teacher_lowered):
    net, x = model(bias=False, dtype=torch.float32), features(5, dtype=torch.float32)

    def function() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=teacher_lowered):
            teacher = net(x).float() * 30
        with torch.autocast("cpu", torch.bfloat16, enabled=not teacher_lowered):
            student = net(x).float()
        probabilities = teacher.softmax(-1)
        divergence = F.kl_div(student.log_softmax(-1), probabilities, reduction="batchmean")
        return torch.stack([F.cross_entropy(student, probabilities), divergence])

    expected = function()
    with lazy_logits(net, "2"):
        assert same([function().detach()], [expected.detach()], 1e-6)


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
    "collated": (lambda z: torch.utils.data.default_collate([z, z]), 1),
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


def of_columns(z: Tensor) -> Tensor:
    return torch.stack([z.view(-1, C)[:, 0], z.view(-1, C)[:, 3]])


WRITTEN: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "gather of a view": lambda z: (v := z.view(-1, C), v.gather(-1, INDEX.view(-1, 1)), z.div_(100.0), v * 1)[2:],
    "topk of a part": lambda z: (v := z[:, -1:], v.topk(2), z.fill_(-9.0), v * 1, z * 1)[3:],
    "max of a part": lambda z: (v := z[0, 0], v.max(-1), z.mul_(0.0), v.softmax(-1))[3:],
    "argmax of a base": lambda z: (v := z.view(-1, C), z.max(-1), v.mul_(7.0), of_columns(z), v * 1)[3:],
    "of a view of a view": lambda z: (
        v := z.flatten(0, 1), w := v[1:], v.topk(3), w.topk(2), v.add_(1.0), w * 1, v * 1, z * 1,
    )[5:],
}  # fmt: skip


SHARED: dict[str, Callable[[Tensor], Any]] = {
    "an overload": lambda v: torch.ops.aten.mul_.Tensor(v, torch.tensor(2.0)),
    "an overload packet": lambda v: torch.ops.aten.fill_(v, 2.0),
    "an overload with out": lambda v: torch.ops.aten.add.out(torch.ones_like(v), torch.ones_like(v), out=v),
    "data": lambda v: v.data.fill_(3.0),
    "numpy": lambda v: v.numpy().fill(5.0),
    "an array": lambda v: np.asarray(v).fill(6.0),
    "dlpack": lambda v: torch.from_dlpack(v).zero_(),
    "foreach": lambda v: torch._foreach_mul_([v], 2.0),
}


@pytest.mark.parametrize("name", SHARED)
def test_writes_into_a_small_view_are_seen_in_the_base(name):
    net, x = model(), features(2, 3)

    def function(z: Tensor) -> list[Tensor]:
        v = z[:1, :1]
        SHARED[name](v)
        return [z * 1, v * 1]

    with torch.no_grad():
        expected = function(net(x))
        with lazy_logits(net, "2"):
            assert same(function(net(x)), expected)


@pytest.mark.parametrize("name", WRITTEN)
def test_writes_stay_after_values_were_returned(name):
    net, x = model(), features(2, 3)
    with torch.no_grad():
        expected = WRITTEN[name](net(x))
        with lazy_logits(net, "2"):
            assert same([each * 1 for each in WRITTEN[name](net(x))], expected)


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
