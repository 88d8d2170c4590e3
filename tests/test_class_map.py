"""``ClassMap`` against dense grouped probabilities: sums of softmaxes over the classes of each group, in plain torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import softcurve
from softcurve import (
    AlphaDivergence,
    ClassMap,
    ForwardKL,
    JensenShannon,
    LinearTeacher,
    Logits,
    Probabilities,
    ReverseKL,
    TopK,
)

from . import oracle
from .cases import assert_same, derivatives, least_of
from .pairwise import pairwise
from .test_head_memory import MOST, PREAMBLE

F64 = torch.float64
STUDENT, TEACHER = 11, 14  # classes


@dataclass(frozen=True)
class OwnMember(AlphaDivergence):
    """A member that no kernel names, with the formulas of the α-divergence."""


def log(p: Tensor) -> Tensor:
    """The logarithm, and 0 of a group that has no class."""
    return torch.where(p > 0, p, 1.0).log()


def alpha_rows(y: Tensor, p: Tensor) -> Tensor:
    both = torch.where((y > 0) & (p > 0), torch.exp(0.3 * log(y) + 0.7 * log(p)), 0.0)
    return (1 - both.sum(-1)) / (0.3 * 0.7)


def js_rows(y: Tensor, p: Tensor) -> Tensor:
    mixed = log(0.3 * y + 0.7 * p)
    return (0.3 * y * (log(y) - mixed) + 0.7 * p * (log(p) - mixed)).sum(-1)


DIVERGENCES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "forward": (ForwardKL(), lambda y, p: (y * (log(y) - log(p))).sum(-1)),
    "reverse": (ReverseKL(), lambda y, p: (p * (log(p) - log(y))).sum(-1)),
    "js": (JensenShannon(0.3), js_rows),
    "alpha": (AlphaDivergence(0.3), alpha_rows),
    "own": (OwnMember(0.3), alpha_rows),
}
# One group of most classes and the others of one; groups of 1 to 5 classes on both sides; and group 0 of the model alone.
MAPS = {
    "bucket": ([0, 1, 2, 3, *[4] * 7], [4, 3, 4, 4, 0, *[4] * 7, 1, 2]),
    "ragged": ([0, 2, 2, 1, 1, 1, 3, 3, 3, 3, 3], [3, 3, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 3]),
    "one-sided": ([0, 1, 2, 0, 0, 2, 2, 1, 3, 3, 2], [1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 1, 1, 1, 1]),
}


def map_of(name: str) -> ClassMap:
    return ClassMap(*map(torch.tensor, MAPS[name]))


def grouped(logits: Tensor, groups: Tensor, count: int) -> Tensor:
    """The probability of each group."""
    p = torch.softmax(logits, -1)
    return p.new_zeros(*p.shape[:-1], count).scatter_add(-1, groups.expand(p.shape), p)


def teacher_of(kind: str, rows: tuple[int, ...]) -> tuple[Callable[..., Any], list[Tensor], Callable[..., Tensor]]:
    """How the target is made of its leaves, the leaves, and its logits in plain torch."""
    if kind == "head":
        leaves = [torch.randn(*rows, 3, dtype=F64), torch.randn(TEACHER, 3, dtype=F64), torch.randn(TEACHER, dtype=F64)]
        return (
            lambda *t: LinearTeacher(*t, softcap=3.0, scale=0.7),
            leaves,
            lambda e, u, b: oracle.seen_by_softmax(0.7 * (e @ u.T + b), 1.0, 3.0),
        )
    values = torch.randn(*rows, TEACHER, dtype=F64)
    if kind == "logits":
        return Logits, [values], lambda t: t
    return Probabilities, [values.softmax(-1)], lambda y: y.log()


LEVELS: dict[str, Any] = {
    "divergence": list(DIVERGENCES),
    "teacher": ["head", "logits", "probabilities"],
    "map": list(MAPS),
    "temperature": [1.0, 0.7, 2.0],
    "softcap": [None, 2.5],
    "tiles": ["whole", "few rows"],
    "reduction": ["mean", "none"],
}
SETTINGS = pairwise(
    LEVELS,
    lambda name, level, other, value: (name, level, other, value) != ("divergence", "reverse", "map", "one-sided"),
)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_value_and_both_derivatives_equal_those_of_grouped_probabilities(setting: dict[str, Any]) -> None:
    """On both routes, in all tensors of the model and of the teacher."""
    (divergence, rows_of), class_map = DIVERGENCES[setting["divergence"]], map_of(setting["map"])
    made, of_teacher, logits = teacher_of(setting["teacher"], (2, 4))
    x, w, b = (torch.randn(shape, dtype=F64) for shape in ((2, 4, 4), (STUDENT, 4), (STUDENT,)))
    leaves = tuple(leaf.requires_grad_() for leaf in (x, w, b, *of_teacher))
    temperature, softcap, reduction = (setting[name] for name in ("temperature", "softcap", "reduction"))

    z = oracle.seen_by_softmax(x @ w.T + b, 1.0, softcap)
    y = grouped(logits(*of_teacher) / temperature, class_map.of_teacher, class_map.count)
    rows = rows_of(y, grouped(z / temperature, class_map.of_student, class_map.count))
    truth = rows.mean() if reduction == "mean" else rows
    expected = derivatives(truth, leaves)

    target, given = class_map.target(made(*of_teacher)), {"divergence": divergence, "temperature": temperature}

    def on_head(budget: int | None) -> Tensor:
        return softcurve.linear_divergence(
            x, w, target, linear_bias=b, softcap=softcap, reduction=reduction, memory_budget=budget, **given
        )

    budget = None
    if setting["tiles"] == "few rows":
        with pytest.raises(ValueError, match="memory_budget") as refused:
            on_head(1)
        budget = least_of(str(refused.value))
        with pytest.raises(ValueError, match=f"at least {budget} bytes"):
            on_head(budget - 1)
    z = oracle.seen_by_softmax(x @ w.T + b, 1.0, softcap)
    for route, value in {
        "head": on_head(budget),
        "logits": softcurve.divergence(target, z, reduction=reduction, **given),
    }.items():
        assert_same(value, truth, route, bound=1e-9)
        for n, (got, right) in enumerate(zip(derivatives(value, leaves), expected, strict=True)):
            assert_same(got, right, f"{route}: derivative {n}", bound=1e-9)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_a_list_is_compared_by_the_tokens_that_both_have(divergence: str) -> None:
    """Its outcomes in plain torch: listed classes that are a group with one class of the model, and all others as one."""
    class_map, (member, rows_of) = map_of("bucket"), DIVERGENCES[divergence]
    shared = {0: 4, 1: 12, 2: 13, 3: 1}  # classes of the model and of the teacher; all others are the bucket of the map
    x, w = (torch.randn(shape, dtype=F64) for shape in ((5, 4), (STUDENT, 4)))
    at = torch.tensor([[12, 4, 7], [0, 2, 5], [1, 13, 12], [3, 4, 0], [4, 12, 13]])
    log_y = torch.randn(5, TEACHER, dtype=F64).log_softmax(-1).gather(-1, at)
    log_y[4, 2] = -math.inf  # a filler, whatever class it names
    leaves = tuple(leaf.requires_grad_() for leaf in (x, w, log_y))

    def outcomes(number: int) -> tuple[Tensor, Tensor]:
        places = {int(c): j for j, c in enumerate(at[number]) if log_y[number, j] > -math.inf}
        pairs = [(places[b], a) for a, b in shared.items() if b in places]
        y = torch.stack([log_y[number, j].exp() for j, _ in pairs] or [log_y.new_zeros(())])
        p = (x[number] @ w.T).softmax(-1)
        p = torch.stack([p[a] for _, a in pairs] or [p.new_zeros(())])
        return tuple(torch.cat([q, 1 - q.sum(-1, keepdim=True)]) for q in (y, p))  # type: ignore[return-value]

    truth = torch.stack([rows_of(*outcomes(number)) for number in range(5)]).mean()
    expected = derivatives(truth, leaves)
    for on_route in (
        lambda t: softcurve.linear_divergence(x, w, t, divergence=member),
        lambda t: softcurve.divergence(t, x @ w.T, divergence=member),
        lambda t: softcurve.linear_distillation(x, w, torch.arange(5), t, alpha=0.0, divergence=member),
    ):
        value = on_route(class_map.target(TopK(at, log_y)))
        assert_same(value, truth, bound=1e-9)
        for got, right in zip(derivatives(value, leaves), expected, strict=True):
            assert_same(got, right, bound=1e-8)
    target = class_map.target(TopK(at, log_y.detach()))
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=F64)
    spoiled = TopK(at.index_fill(0, torch.tensor(1), 99), log_y.detach())
    kept = softcurve.linear_divergence(x, w, target, divergence=member, sample_weight=weight)
    assert_same(
        softcurve.linear_divergence(x, w, class_map.target(spoiled), divergence=member, sample_weight=weight), kept
    )


def test_a_list_gives_no_more_than_the_groups() -> None:
    class_map, z, y = map_of("ragged"), torch.randn(20, STUDENT), torch.randn(20, TEACHER)
    log_y, at = y.log_softmax(-1).topk(6)
    for divergence in (ForwardKL(), ReverseKL(), JensenShannon(0.3)):
        of_list, of_all = (
            softcurve.divergence(class_map.target(t), z, divergence=divergence, reduction="none")
            for t in (TopK(at, log_y), Logits(y))
        )
        assert (of_list >= 0).all()
        assert (of_list <= of_all * (1 + 1e-5) + 1e-6).all()


def test_excluded_classes_are_those_of_the_model() -> None:
    """Also all of a group of one class, which then has no mass; the teacher's classes stay as they are."""
    class_map, (made, of_teacher, logits) = map_of("bucket"), teacher_of("logits", (6,))
    x, w = torch.randn(6, 4, dtype=F64), torch.randn(STUDENT, 4, dtype=F64)
    leaves = tuple(leaf.requires_grad_() for leaf in (x, w, *of_teacher))
    exclude = torch.tensor([[1, 7], [7, -1], [-1, -1], [4, 5], [0, 0], [2, 3]])
    masked = torch.zeros(6, STUDENT + 1, dtype=torch.bool).scatter(1, exclude % (STUDENT + 1), True)[:, :-1]
    target = class_map.target(made(*of_teacher))
    for name in ("js", "alpha"):
        divergence, rows_of = DIVERGENCES[name]
        p = grouped((x @ w.T).masked_fill(masked, -math.inf), class_map.of_student, class_map.count)
        truth = rows_of(grouped(logits(*of_teacher), class_map.of_teacher, class_map.count), p).mean()
        expected = derivatives(truth, leaves)
        given = {"divergence": divergence, "exclude": exclude}
        for value in (
            softcurve.linear_divergence(x, w, target, **given),
            softcurve.divergence(target, x @ w.T, **given),
        ):
            assert_same(value, truth)
            for got, right in zip(derivatives(value, leaves), expected, strict=True):
                assert_same(got, right, bound=1e-9)


def test_distillation() -> None:
    """Beside labels and an entropy, which see the model's classes without the temperature."""
    class_map, (made, of_teacher, logits) = map_of("ragged"), teacher_of("head", (6,))
    x, w = torch.randn(6, 4, dtype=F64), torch.randn(STUDENT, 4, dtype=F64)
    leaves, labels = tuple(leaf.requires_grad_() for leaf in (x, w, *of_teacher)), torch.randint(STUDENT, (6,))
    for softcap in (None, 2.0):
        got = softcurve.linear_distillation(
            x, w, labels, class_map.target(made(*of_teacher)), alpha=0.4, divergence=ReverseKL(), temperature=2.0,
            entropy_bonus=0.1, softcap=softcap,
        )  # fmt: skip
        z = oracle.seen_by_softmax(x @ w.T, 1.0, softcap)
        y, p = grouped(logits(*of_teacher) / 2, class_map.of_teacher, 4), grouped(z / 2, class_map.of_student, 4)
        of_labels = torch.nn.functional.cross_entropy(z, labels)
        truth = 0.4 * of_labels + 0.6 * 4 * DIVERGENCES["reverse"][1](y, p).mean() - 0.1 * oracle.entropy_rows(z).mean()
        assert_same(got, truth)
        for ours, right in zip(derivatives(got, leaves), derivatives(truth, leaves), strict=True):
            assert_same(ours, right, bound=1e-9)


def test_statistics_are_in_the_classes_of_the_model() -> None:
    class_map, z = ClassMap(torch.tensor([0, 1, 1, 2]), torch.tensor([2, 1, 0])), 4 * torch.eye(4, dtype=F64)
    teacher = Logits(4 * torch.eye(3, dtype=F64)[[2, 1, 1, 1]])
    options = {"temperature": 0.7, "return_stats": True}
    _, stats = softcurve.linear_kl_divergence(torch.eye(4, dtype=F64), z, class_map.target(teacher), **options)
    assert_same(stats.lse, torch.logsumexp(z / 0.7, -1))
    assert_same(stats.entropy, oracle.entropy_rows(z / 0.7))
    assert stats.predicted.tolist() == [0, 1, 2, 3]
    assert stats.correct.tolist() == [True, True, True, False]


# torch's own doing when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("without_shape_checks")
def test_transforms() -> None:
    """Forward over forward mode and gradients of each row; a third derivative is an error."""
    class_map, (made, of_teacher, logits) = map_of("ragged"), teacher_of("head", (3,))
    primal = (torch.randn(3, 2, dtype=F64), torch.randn(STUDENT, 2, dtype=F64), *of_teacher)
    tangents = tuple(map(torch.randn_like, primal))

    def on_head(x: Tensor, w: Tensor, *teacher: Tensor) -> Tensor:
        return softcurve.linear_js_divergence(x, w, class_map.target(made(*teacher)), beta=0.3, reduction="none")

    def on_logits(x: Tensor, w: Tensor, *teacher: Tensor) -> Tensor:
        return softcurve.js_divergence(class_map.target(made(*teacher)), x @ w.T, beta=0.3, reduction="none")

    def dense(x: Tensor, w: Tensor, *teacher: Tensor) -> Tensor:
        y = grouped(logits(*teacher), class_map.of_teacher, class_map.count)
        return js_rows(y, grouped(x @ w.T, class_map.of_student, class_map.count))

    def twice(f: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(lambda *p: torch.func.jvp(f, p, tangents)[1], primal, tangents)[1]

    def of_rows(f: Callable[..., Tensor]) -> Tensor:
        def one(x: Tensor, e: Tensor) -> Tensor:
            return f(x, primal[1], e, *primal[3:])

        return torch.func.vmap(torch.func.grad(one))(primal[0], primal[2])

    for ours in (on_head, on_logits):
        assert_same(twice(ours), twice(dense))
        assert_same(of_rows(ours), of_rows(dense))
    with pytest.raises(RuntimeError, match="third"):
        torch.func.jacrev(torch.func.hessian(lambda x: on_head(x, *primal[1:]).sum()))(primal[0])


# --- exactness ---------------------------------------------------------------------------------------------------------


def exact_kl(y: Tensor, of_teacher: Tensor, z: Tensor, of_student: Tensor, count: int) -> list[float]:
    """The forward KL of each row, with 60 digits."""
    values = []
    with mpmath.workdps(60):
        for of_row in zip(y.tolist(), z.tolist(), strict=True):
            sides = []
            for logits, groups in zip(of_row, (of_teacher, of_student), strict=True):
                masses = [mpmath.mpf(0)] * count
                for logit, group in zip(logits, groups.tolist(), strict=True):
                    masses[group] += mpmath.exp(mpmath.mpf(logit))
                sides.append([mass / mpmath.fsum(masses) for mass in masses])
            values.append(float(sum(p * mpmath.log(p / q) for p, q in zip(*sides, strict=True) if p)))
    return values


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_single_precision_is_exact_beside_offsets_and_in_confident_rows(offset: float) -> None:
    """Logits are multiples of 2⁻⁹, which an offset of 1e4 leaves as they are. A loss is 1e-9 in the second row."""
    class_map = map_of("bucket")
    y, z = (torch.randint(-1500, 1500, (4, count)) / 512 for count in (TEACHER, STUDENT))
    y[1, 0], z[1, 5] = 26.0, 26.0  # the bucket, of other classes on each side
    y[2, 1], z[2, 3] = 12.0, 12.0  # a group of one class
    z[:, 7], y[:, 5] = -math.inf, -math.inf
    truth = exact_kl(y, class_map.of_teacher, z, class_map.of_student, class_map.count)
    y, z = y + offset, z + offset
    on_logits = softcurve.kl_divergence(class_map.target(Logits(y)), z, reduction="none")
    x, w = torch.eye(4), z.masked_fill(z == -math.inf, 0.0).T.contiguous()
    bias = torch.zeros(STUDENT).masked_fill(z[0] == -math.inf, -math.inf)
    on_head = softcurve.linear_kl_divergence(x, w, class_map.target(Logits(y)), linear_bias=bias, reduction="none")
    assert truth[1] < 1e-8
    for values in (on_logits, on_head):
        assert values.dtype == torch.float32
        assert values.tolist() == pytest.approx(truth, rel=1e-5)

    wide = [(t - offset).double().requires_grad_() for t in (y, z)]
    p = [
        grouped(t, of, class_map.count)
        for t, of in zip(wide, (class_map.of_teacher, class_map.of_student), strict=True)
    ]
    right = torch.autograd.grad(DIVERGENCES["forward"][1](*p).sum(), wide)
    leaves = [t.clone().requires_grad_() for t in (y, w)]
    target = class_map.target(Logits(leaves[0]))
    value = softcurve.linear_kl_divergence(x, leaves[1], target, linear_bias=bias, reduction="sum")
    in_y, in_w = torch.autograd.grad(value, leaves)
    for got, expected in zip((in_y, in_w.T), right, strict=True):
        assert ((got - expected).abs() <= 1e-5 * expected.abs().amax(-1, keepdim=True)).all()


def test_half_precision() -> None:
    """The result is float32, and right for the very numbers of the inputs."""
    class_map = map_of("ragged")
    given = tuple(torch.randn(shape).bfloat16() for shape in ((5, 8), (STUDENT, 8), (5, 8), (TEACHER, 8)))
    (x, w, e, u), wide = given, [t.double() for t in given]
    value = softcurve.linear_kl_divergence(x, w, class_map.target(LinearTeacher(e, u)), reduction="none")
    truth = softcurve.linear_kl_divergence(*wide[:2], class_map.target(LinearTeacher(*wide[2:])), reduction="none")
    assert value.dtype == torch.float32
    assert value.tolist() == pytest.approx(truth.tolist(), rel=1e-5)


def test_the_identity_is_the_loss_without_a_map() -> None:
    class_map, (made, of_teacher, _) = ClassMap(torch.arange(TEACHER), torch.arange(TEACHER)), teacher_of("head", (5,))
    x, w = torch.randn(5, 4, dtype=F64), torch.randn(TEACHER, 4, dtype=F64)
    leaves, teacher = tuple(leaf.requires_grad_() for leaf in (x, w, *of_teacher)), made(*of_teacher)
    for divergence, _ in DIVERGENCES.values():
        for of_loss in (softcurve.linear_divergence, lambda x, w, t, **o: softcurve.divergence(t, x @ w.T, **o)):
            plain, mapped = (of_loss(x, w, t, divergence=divergence) for t in (teacher, class_map.target(teacher)))
            assert_same(mapped, plain, bound=1e-12)
            for got, right in zip(derivatives(mapped, leaves), derivatives(plain, leaves), strict=True):
                assert_same(got, right, bound=1e-11)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int32])
def test_groups_of_any_integer_dtype(dtype: torch.dtype) -> None:
    made, wide = ClassMap(*(torch.tensor(of).to(dtype) for of in MAPS["ragged"])), map_of("ragged")
    for ours, right in ((made.of_student, wide.of_student), (made.of_teacher, wide.of_teacher)):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, right)


@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_a_coarser_map_never_gives_more(divergence: str) -> None:
    """Data processing: groups are merged until one is left, whose divergence is 0; equal models have 0 at once."""
    member, count = DIVERGENCES[divergence][0], 9
    z, y = 2 * torch.randn(20, count), 2 * torch.randn(20, count)
    groups, before = torch.arange(count), None
    while True:
        class_map = ClassMap(groups, groups)
        value = softcurve.divergence(class_map.target(Logits(y)), z, divergence=member, reduction="none")
        on_head = softcurve.linear_divergence(
            torch.eye(20), z.T.contiguous(), class_map.target(Logits(y)), divergence=member, reduction="none"
        )
        same = softcurve.divergence(class_map.target(Logits(y)), y, divergence=member, reduction="none")
        assert not same.any()
        torch.testing.assert_close(on_head, value, rtol=1e-5, atol=1e-6)
        for found in (value, on_head):
            assert (found >= 0).all()
            assert before is None or (found <= before * (1 + 1e-6) + 1e-7).all()
        if class_map.count == 1:
            assert not value.any()
            break
        before, groups = value, groups.clamp(max=class_map.count - 2)


# --- edges -------------------------------------------------------------------------------------------------------------


def test_mass_in_a_group_that_the_other_side_lacks_is_infinite() -> None:
    """As of classes without mass: only in the direction from the side that has it; a Jensen-Shannon divergence is finite."""
    z, y = torch.randn(3, 3), torch.randn(3, 4)
    for of_student, of_teacher, infinite in (
        ([0, 1, 2], [0, 1, 1, 0], "reverse"),
        ([0, 1, 1], [0, 1, 2, 1], "forward"),
    ):
        target = ClassMap(torch.tensor(of_student), torch.tensor(of_teacher)).target(Logits(y))
        for direction in ("forward", "reverse"):
            sides = (target, z) if direction == "forward" else (z, target)
            for value in (
                softcurve.linear_kl_divergence(torch.eye(3), z.T, target, direction=direction),
                softcurve.kl_divergence(*sides),
            ):
                assert (value == math.inf) == (direction == infinite)
                assert not value.isnan()
        weight = z.T.clone().requires_grad_()
        value = softcurve.linear_js_divergence(torch.eye(3), weight, target)
        assert value.isfinite()
        assert torch.autograd.grad(value, weight)[0].isfinite().all()


def test_rows_of_weight_0_shapes_and_one_class() -> None:
    class_map = map_of("ragged")
    x, w = torch.randn(4, 3, dtype=F64, requires_grad=True), torch.randn(STUDENT, 3, dtype=F64, requires_grad=True)
    y, weight = torch.randn(4, TEACHER, dtype=F64), torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=F64)
    spoiled = y.masked_fill(weight.unsqueeze(-1) == 0, math.nan).requires_grad_()
    truth = softcurve.linear_kl_divergence(x[::2], w, class_map.target(Logits(y[::2])), sample_weight=weight[::2])
    hidden = x.masked_fill(weight.unsqueeze(-1) == 0, math.nan)
    for value in (
        softcurve.linear_kl_divergence(x, w, class_map.target(Logits(spoiled)), sample_weight=weight),
        softcurve.kl_divergence(class_map.target(Logits(spoiled)), hidden @ w.T, sample_weight=weight),
    ):
        assert_same(value, truth)
        (gradient,) = torch.autograd.grad(value, spoiled)
        assert gradient.isfinite().all()
        assert not gradient[1::2].any()
    one = ClassMap(torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int16))
    assert softcurve.linear_kl_divergence(torch.randn(3), torch.randn(1, 3), one.target(Logits(torch.randn(3)))) == 0
    empty = class_map.target(Logits(torch.randn(0, TEACHER)))
    assert softcurve.linear_kl_divergence(torch.randn(0, 3), torch.randn(STUDENT, 3), empty, reduction="sum") == 0
    assert softcurve.kl_divergence(empty, torch.randn(0, STUDENT), reduction="none").shape == (0,)
    module = softcurve.nn.LinearKLDivergenceLoss(3, STUDENT).double()
    on_module = module(x, class_map.target(Logits(y)))
    assert_same(on_module, softcurve.linear_kl_divergence(x, module.linear.weight, class_map.target(Logits(y))))


# The tokens of both sides, the sizes of the heads, and the groups of both.
VOCABULARIES: list[tuple[Any, Any, dict[str, int], list[int], list[int]]] = [
    (["a", "b", "c"], ["c", "x", "a"], {}, [0, 2, 1], [1, 2, 0]),
    (["a", "b"], ["b", "a"], {}, [0, 1], [1, 0]),
    ({"b": 2, "a": 0}, {"a": 1}, {"teacher_classes": 3}, [0, 1, 1], [1, 0, 1]),
    (["a", "a", "b", None], ["b", "a", None], {}, [1, 1, 0, 1], [0, 1, 1]),
    ([b"a"], ["a"], {}, [0], [0]),
]


@pytest.mark.parametrize(("student", "teacher", "sizes", "of_student", "of_teacher"), VOCABULARIES)
def test_of_tokens(student: Any, teacher: Any, sizes: Any, of_student: list[int], of_teacher: list[int]) -> None:
    class_map = ClassMap.of_tokens(student, teacher, **sizes)
    assert class_map.of_student.tolist() == of_student
    assert class_map.of_teacher.tolist() == of_teacher


BAD = {
    "ClassMap([0, 1], i)": ("TypeError", "ClassMap of_student must be a tensor of integers"),
    "ClassMap(i, i.float())": ("TypeError", "ClassMap of_teacher must be a tensor of integers"),
    "ClassMap(i > 2, i)": ("TypeError", "got shape (5,), torch.bool; convert it with .long()"),
    "ClassMap.of_tokens([0.5, 1.5], ['a'])": (
        "TypeError",
        "student must hold tokens (str, bytes, or None for no token)",
    ),
    "ClassMap.of_tokens(['a'], [3, 4])": ("TypeError", "teacher must hold tokens (str, bytes, or None for no token)"),
    "ClassMap.of_tokens(['a'], [['a']])": ("TypeError", "got ['a']; pass tokenizer.get_vocab()"),
    "ClassMap.of_tokens({'a': 0.0}, ['a'])": ("TypeError", "integer number of their class, got 'a' for 0.0"),
    "ClassMap.of_tokens({0: 'a'}, ['a'])": ("TypeError", "got 0 for 'a'; pass tokenizer.get_vocab()"),
    "ClassMap.of_tokens(x, ['a'])": ("TypeError", "student must be a sequence of tokens or a mapping"),
    "ClassMap.of_tokens(['a'], ['a'], student_classes=1.5)": ("ValueError", "student_classes must be a whole number"),
    "ClassMap.of_tokens(['a'], {'a': -1}, teacher_classes=2)": ("ValueError", "got 'a' for -1"),
    "ClassMap(i.unsqueeze(0), i)": (
        "ValueError",
        "of_student must have one group per class, shape (C,), got shape (1, 5)",
    ),
    "ClassMap(i, i[:0])": ("ValueError", "of_teacher must have one group per class"),
    "ClassMap(i - 1, i)": ("ValueError", "ClassMap of_student must hold groups >= 0, got -1"),
    "ClassMap(2 * i, 2 * i)": ("ValueError", "numbered from 0 to the largest, 8, each with a class on one side"),
    "ClassMap.of_tokens('ab', ['a'])": ("TypeError", "student must be a sequence of tokens"),
    "ClassMap.of_tokens(['a'], {'a': 1}, teacher_classes=1)": ("ValueError", "teacher must name classes from 0 to 0"),
    "ClassMap.of_tokens({'a': 0, 'b': 0}, ['a'])": ("ValueError", "each by one token, got 'b' for 0"),
    "ClassMap.of_tokens(['a', 'b'], ['a'], student_classes=1)": ("ValueError", "pass student_classes"),
    "m.target(t)": ("TypeError", "teacher must be one of softcurve.Probabilities, Logits, LinearTeacher, got Tensor"),
    "m.target(softcurve.TopK(i[:1].expand(3, 1), t[:, :1], 'renormalize'))": ("ValueError", "TopK with tail='bucket'"),
    "KL(x, w, m.target(softcurve.TopK(i[:1].expand(3, 1) + 5, -t[:, :1] ** 2)))": ("ValueError", "TopK log_probs must"),
    "m.target(m.target(Logits(t)))": ("ValueError", "to every class, got GroupedTarget"),
    "m.target(Logits(t[:, :4]))": ("ValueError", "teacher must have the 5 classes of ClassMap.of_teacher, got 4"),
    "KL(x, w[:4], m.target(Logits(t)))": ("ValueError", "must have the shape (3, 4) of the logits"),
    "KL(x[:2], w, m.target(Logits(t)))": ("ValueError", "(2, 5)"),
    "softcurve.kl_divergence(m.target(Logits(t)), t[:, :4])": (
        "ValueError",
        "must have the shape (3, 4) of the logits",
    ),
    "softcurve.kl_divergence(m.target(Logits(t)), m.target(Logits(t)))": (
        "ValueError",
        "can be one side of a divergence",
    ),
    "softcurve.cross_entropy(t, m.target(Logits(t)))": ("ValueError", "target must be over the model's own classes"),
    "softcurve.linear_cross_entropy(x, w, m.target(Logits(t)))": ("ValueError", "use a divergence"),
    "KL(x, w, m.target(Probabilities(t)))": ("ValueError", "target probabilities must"),
    "KL(x, w, m.target(Logits(t * math.nan)))": ("ValueError", "NaN"),
    "softcurve.curvature.HeadCurvature(x, w, m.target(Logits(t)), loss='forward_kl')": (
        "NotImplementedError",
        "ClassMap",
    ),
    "softcurve.chain_rule(torch.nn.Linear(2, 2), torch.nn.Linear(2, 5), x, m.target(Logits(t)))": (
        "ValueError",
        "groups",
    ),
}


def test_errors_and_compiled_calls(run_python: Callable[[str], object]) -> None:
    """In a process without the checks of shapes, which break graphs and come before our errors."""
    body = f"""
import json, math, torch, warnings, softcurve
from softcurve import ClassMap, Logits, Probabilities, TopK
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)  # torch's own
i, x, w, t = torch.arange(5), torch.randn(3, 2), torch.randn(5, 2), torch.randn(3, 5)
m, KL, found = ClassMap(i, i // 2 * 2 % 3 + i % 2), softcurve.linear_kl_divergence, []
for code in {list(BAD)!r}:
    try:
        found.append(["returned", str(eval(code))])
    except softcurve.checks.InvalidEntriesError as error:  # a ValueError to users
        found.append(["ValueError", str(error)])
    except Exception as error:
        found.append([type(error).__name__, str(error)])

def both(x, w, t):
    target, of_list = m.target(Logits(t)), m.target(TopK(*reversed(t.log_softmax(-1).topk(2))))
    return KL(x, w, target, temperature=0.7) + softcurve.js_divergence(target, x @ w.T) + KL(x, w, of_list)

given, results = [tensor.requires_grad_() for tensor in (x, w, t)], []
for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
    value = function(*given)
    results.append([value.detach(), *torch.autograd.grad(value, given)])
same = [bool(torch.allclose(p, q, rtol=1e-5, atol=1e-6)) for p, q in zip(*results)]
print(json.dumps([found, same]))
"""
    found, same = json.loads(run_python(body).stdout.splitlines()[-1])  # type: ignore[attr-defined]
    for (code, (kind, words)), (got, message) in zip(BAD.items(), found, strict=True):
        assert got == kind, (code, message)
        assert words in message, (code, message)
    assert same == [True] * 4


@pytest.mark.parametrize("sharded", [False, True])
def test_memory_stays_within_the_budget(sharded: bool, run_python: Callable[[str], object]) -> None:
    """Groups of both sides beside both sides' logits, of a teacher with more classes; what messages made is kept."""
    body = f"""
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))

def placed(t):
    return DTensor.from_local(t.detach(), mesh, [Shard(0)]) if {sharded} else t.detach()

def teacher(rows, features, classes):
    groups = [torch.randperm(count).clamp(max=classes * 7 // 10) for count in (classes, classes * 13 // 10)]
    return torch.randn(rows, 96), torch.randn(len(groups[1]), 96) / 96**0.5, *groups

def distilled(x, w, t, h, *groups):
    target, w = softcurve.ClassMap(*groups).target(softcurve.LinearTeacher(t, placed(h))), placed(w).requires_grad_()
    return torch.autograd.grad(softcurve.linear_kl_divergence(x, w, target, memory_budget=BUDGET), (x, w))

warm_and_extra(distilled, 256, 64, 100000, teacher)
"""
    done = run_python(PREAMBLE + body)
    assert json.loads(done.stdout.splitlines()[-1]) <= MOST  # type: ignore[attr-defined]
