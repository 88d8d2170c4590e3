"""``linear_distillation`` against its definition: dense losses of each term, weighted and reduced together."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import softcurve
from softcurve import AlphaDivergence, ForwardKL, JensenShannon, LinearTeacher, Logits, Probabilities, ReverseKL, TopK

from . import oracle
from .cases import assert_same
from .pairwise import pairwise
from .test_head_conformance import work_of

TRUTH = torch.float64
LEVELS: dict[str, list[Any]] = {
    "teacher": ["head", "logits", "probabilities", "bucket", "renormalize", "fillers"],
    "divergence": [ForwardKL(), ReverseKL(), JensenShannon(0.3), AlphaDivergence(0.5)],
    "temperature": [1.0, 2.0, 0.7],
    "softcap": [None, 3.0],
    "classes": [13, 300],  # in whole rows, and in blocks
    "alpha": [0.0, 0.5, 1.0],
    "entropy_bonus": [0.0, 0.2],
    "reduction": ["mean", "sum", "none"],
    "options": ["none", "smoothing", "z_loss", "both"],
    "weight": [False, True],
    "shift": [0, 1],
    "base": [math.e, 2],
}


def goes_together(name: str, level: Any, other: str, value: Any) -> bool:
    """Leave out what a list refuses: a temperature of a bucket, and a mass of 0 where the model has some."""
    if (name, other) == ("teacher", "temperature"):
        return level != "bucket" or value == 1
    if (name, other) == ("teacher", "divergence"):
        return level != "renormalize" or isinstance(value, ForwardKL | JensenShannon)
    return True


def teacher_of(kind: str, rows: tuple[int, ...], classes: int) -> tuple[Any, list[Tensor]]:
    if kind == "head":
        leaves = [torch.randn(*rows, 3, dtype=TRUTH), torch.randn(classes, 3, dtype=TRUTH)]
        made: Any = LinearTeacher
    elif kind in ("logits", "probabilities"):
        leaves = [torch.randn(*rows, classes, dtype=TRUTH)]
        made = Logits if kind == "logits" else Probabilities
        leaves = leaves if kind == "logits" else [leaves[0].softmax(-1)]
    else:
        log_probs, indices = torch.randn(*rows, classes, dtype=TRUTH).log_softmax(-1).topk(3)
        leaves = [log_probs]

        def made(values: Tensor) -> TopK:
            if kind == "fillers":
                return TopK(indices, torch.where(torch.arange(3) == 1, -math.inf, values))
            return TopK(indices, values, tail=kind)  # type: ignore[arg-type]

    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return made(*leaves), leaves


@pytest.mark.parametrize("setting", pairwise(LEVELS, goes_together), ids=lambda s: "-".join(map(str, s.values())))
def test_values_and_both_derivatives_equal_the_definition(setting: dict[str, Any]) -> None:
    classes, shift, named = setting["classes"], setting["shift"], dict(setting)
    rows = (2, 5) if classes == 13 else (70,)
    teacher, of_teacher = teacher_of(named.pop("teacher"), rows, named.pop("classes"))
    x, w, b = (torch.randn(*s, dtype=TRUTH, requires_grad=True) for s in ((*rows, 4), (classes, 4), (classes,)))
    target, sample_weight = torch.randint(0, classes, rows), torch.rand(rows, dtype=TRUTH)
    target[..., 0], sample_weight[..., 1] = -100, 0.0
    options = named.pop("options")
    class_weight = torch.rand(classes, dtype=TRUTH) if named.pop("weight") else torch.ones(classes, dtype=TRUTH)
    smoothing, z_loss = 0.1 * (options in ("smoothing", "both")), 0.01 * (options in ("z_loss", "both"))
    got = softcurve.linear_distillation(
        x, w, target, teacher, linear_bias=b, sample_weight=sample_weight, label_smoothing=smoothing, z_loss=z_loss,
        weight=class_weight if setting["weight"] else None, memory_budget=None if classes == 13 else 8 * 6000, **named,
    )  # fmt: skip

    z = oracle.seen_by_softmax(x @ w.T + b, 1.0, named["softcap"])
    log_p, nats = z.log_softmax(-1), math.log(named["base"])
    if shift:
        target = torch.cat([target[..., 1:], torch.full_like(target[..., :1], -100)], -1)
        sample_weight = torch.cat([sample_weight[..., 1:], torch.zeros_like(sample_weight[..., :1])], -1)
    weight = torch.where(target == -100, 0.0, sample_weight)
    of_class = class_weight[target.clamp(min=0)]
    of_labels = -of_class * log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    of_labels = (1 - smoothing) * of_labels - smoothing * (class_weight * log_p).mean(-1)
    of_labels = of_labels + z_loss * nats * z.logsumexp(-1) ** 2
    if named["reduction"] == "mean":  # the mean of each term, of which that of the labels is torch's
        of_labels = of_labels * weight.sum() / (weight * of_class).sum()
    options_of_divergence = {"divergence": named["divergence"], "temperature": named["temperature"]}
    apart = softcurve.divergence(teacher, z, reduction="none", **options_of_divergence)
    alpha, squared = named["alpha"], named["temperature"] ** 2
    entropy = -(log_p.exp() * log_p).sum(-1)
    each = alpha * of_labels + (1 - alpha) * squared * apart - named["entropy_bonus"] * entropy
    each = weight * each / nats
    right = {"none": each, "sum": each.sum(), "mean": each.sum() / weight.sum()}[named["reduction"]]
    leaves = [x, w, b, *of_teacher]
    for ours, truth in zip(derivatives(got, leaves), derivatives(right, leaves), strict=True):
        assert_same(ours, truth, bound=1e-9)


def derivatives(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return the value, its gradients, and the gradients of those along fixed directions."""

    def along(part: Tensor) -> Tensor:
        return (part * torch.arange(1, part.numel() + 1, dtype=TRUTH).sin().reshape(part.shape)).sum()

    first = torch.autograd.grad(along(value), leaves, create_graph=True, materialize_grads=True)
    total = torch.stack([along(gradient) for gradient in first]).sum()
    second = torch.autograd.grad(total, leaves, materialize_grads=True, retain_graph=True)
    return [part.detach() for part in (value, *first, *second)]


SOFT_LEVELS: dict[str, list[Any]] = {
    "labels": ["plain", "probabilities", "logits", "bucket", "renormalize", "fillers"],
    "teacher": ["head", "logits", "bucket"],
    "divergence": [ForwardKL(), JensenShannon(0.3)],
    "temperature": [1.0, 2.0],
    "softcap": [None, 3.0],
    "classes": [13, 300],
    "alpha": [0.0, 0.4, 1.0],
    "entropy_bonus": [0.0, 0.2],
    "reduction": ["mean", "none"],
    "options": ["none", "smoothing", "z_loss"],
    "weight": [False, True],
    "exclude": [False, True],
    "base": [math.e, 2],
    "moves": [False, True],
}


def soft_go_together(name: str, level: Any, other: str, value: Any) -> bool:
    """A bucket of labels has no class weights; an excluded class has no mass in what the divergence compares."""
    levels = {name: level, other: value}
    if levels.get("weight") and levels.get("labels") in ("bucket", "fillers"):
        return False
    if levels.get("exclude") and (levels.get("labels", "logits") != "logits" or levels.get("teacher") == "bucket"):
        return False
    return goes_together(name, level, other, value)


@pytest.mark.parametrize(
    "setting", pairwise(SOFT_LEVELS, soft_go_together), ids=lambda s: "-".join(map(str, s.values()))
)
def test_soft_labels_are_the_sum_of_both_losses(setting: dict[str, Any]) -> None:
    """Also in the labels themselves, whether a pass of the divergence sees them or, as they move, one of their own."""
    named, classes, alpha = dict(setting), setting["classes"], setting["alpha"]
    rows = (2, 5) if classes == 13 else (6,)
    labels, of_labels = teacher_of("probabilities" if named["labels"] == "plain" else named["labels"], rows, classes)
    if not named["moves"]:
        labels = detached(labels)
    if named["labels"] == "plain":
        labels = labels.values
    teacher, of_teacher = teacher_of(named["teacher"], rows, classes)
    x, w, b = (torch.randn(*s, dtype=TRUTH, requires_grad=True) for s in ((*rows, 4), (classes, 4), (classes,)))
    sample_weight = torch.rand(rows, dtype=TRUTH)
    sample_weight[..., 1] = 0.0
    exclude = torch.randint(-1, classes, (*rows, 2)) if named["exclude"] else None
    shared = {"linear_bias": b, "sample_weight": sample_weight, "exclude": exclude}
    shared |= {name: named[name] for name in ("softcap", "base", "reduction")}
    of_terms = {
        "label_smoothing": 0.1 * (named["options"] == "smoothing"),
        "z_loss": 0.01 * (named["options"] == "z_loss"),
    }
    of_terms["weight"] = torch.rand(classes, dtype=TRUTH) if named["weight"] else None
    of_divergence = {name: named[name] for name in ("divergence", "temperature")}
    got = softcurve.linear_distillation(
        x, w, labels, teacher, alpha=alpha, entropy_bonus=named["entropy_bonus"],
        memory_budget=None if classes == 13 else 8 * 3000, **shared, **of_terms, **of_divergence,
    )  # fmt: skip
    right = torch.zeros_like(got)
    if alpha:
        right = right + alpha * softcurve.linear_cross_entropy(x, w, labels, **shared, **of_terms)
    if alpha < 1:
        squared = named["temperature"] ** 2
        right = right + (1 - alpha) * squared * softcurve.linear_divergence(x, w, teacher, **shared, **of_divergence)
    if named["entropy_bonus"]:
        stats = softcurve.linear_log_probs(x, w, None, linear_bias=b, softcap=named["softcap"], exclude=exclude)
        each = sample_weight * stats.entropy / math.log(named["base"])
        right = right - 0.2 * (each if named["reduction"] == "none" else each.sum() / sample_weight.sum())
    leaves = [x, w, b, *of_teacher, *(of_labels if named["moves"] and alpha else [])]
    for ours, truth in zip(derivatives(got, leaves), derivatives(right, leaves), strict=True):
        assert_same(ours, truth, bound=1e-9)


def detached(labels: Any) -> Any:
    """The same soft labels without gradients."""
    moving = {name: t.detach() for name, t in vars(labels).items() if isinstance(t, Tensor) and t.requires_grad}
    return dataclasses.replace(labels, **moving)


def test_one_product_serves_soft_labels_too() -> None:
    """And their statistics; labels that receive gradients take a pass of their own."""
    x, w = torch.randn(16, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    teacher, y = LinearTeacher(torch.randn(16, 8), torch.randn(40, 8)), torch.randn(16, 40).softmax(-1)
    options: dict[str, Any] = {"alpha": 0.5, "entropy_bonus": 0.1, "temperature": 2.0}

    def value(y: Tensor) -> Tensor:
        return softcurve.linear_distillation(x, w, Probabilities(y), teacher, **options)

    assert work_of(lambda: value(y).backward()) == 4 * 16 * 8 * 40
    assert work_of(lambda: value(y.clone().requires_grad_()).backward()) == 7 * 16 * 8 * 40
    _, stats = softcurve.linear_distillation(x, w, Probabilities(y), teacher, return_stats=True, **options)
    _, right = softcurve.linear_cross_entropy(x, w, Probabilities(y), return_stats=True)
    for ours, truth in zip(stats, right, strict=True):
        assert ours.shape == truth.shape
        assert torch.allclose(ours.double(), truth.double(), rtol=1e-5)


# torch's own doing when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("without_shape_checks")
def test_soft_labels_in_transforms_and_in_rows_left_out() -> None:
    """Whether the transform moves the labels or not; NaN in a row of weight 0 has no part."""
    x, w, y = torch.randn(6, 4, dtype=TRUTH), torch.randn(9, 4, dtype=TRUTH), torch.randn(6, 9, dtype=TRUTH).softmax(-1)
    teacher = LinearTeacher(torch.randn(6, 3, dtype=TRUTH), torch.randn(9, 3, dtype=TRUTH))
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0], dtype=TRUTH)

    def ours(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return softcurve.linear_distillation(x, w, y, teacher, alpha=0.4, temperature=2.0, sample_weight=weight)

    def dense(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z, t = x @ w.T, teacher.logits(TRUTH) / 2
        apart = (t.softmax(-1) * (t.log_softmax(-1) - (z / 2).log_softmax(-1))).sum(-1)
        return (weight * (0.6 * 4 * apart - 0.4 * (y * z.log_softmax(-1)).sum(-1))).sum() / weight.sum()

    primals, tangents = (x, w, y), tuple(map(torch.randn_like, (x, w, y)))
    for way in (
        lambda f: torch.func.grad(f, (0, 1, 2))(*primals),
        lambda f: torch.func.jvp(f, primals, tangents),
        lambda f: torch.func.jvp(lambda *moving: f(*moving, y), primals[:2], tangents[:2]),
        lambda f: (torch.func.hessian(lambda w: f(x, w, y))(w),),
        lambda f: (torch.func.vmap(torch.func.grad(lambda y: f(x, w, y)))(torch.stack([y, y.flip(0)])),),
    ):
        for got, right in zip(way(ours), way(dense), strict=True):
            assert_same(got, right)
    assert_same(ours(x, w, y.masked_fill(weight.unsqueeze(-1) == 0, math.nan)), dense(x, w, y))


STATISTICS = ("log_probs", "entropy", "lse", "mean_logit", "collision")


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["head", "bucket"])
@pytest.mark.parametrize("budget", [None, 8 * 6000])
def test_statistics_are_those_of_the_model_at_temperature_1(kind: str, alpha: float, budget: int | None) -> None:
    """Beside the same loss, with their gradients; a label whose class is masked does no harm where alpha is 0."""
    teacher, _ = teacher_of(kind, (40,), 300)
    x, w = (torch.randn(*shape, dtype=TRUTH, requires_grad=True) for shape in ((40, 4), (300, 4)))
    target = torch.randint(0, 300, (40,)).index_fill(0, torch.tensor([3]), -100)
    exclude = torch.randint(0, 300, (40, 2)) if alpha == 0 and kind == "head" else None
    if exclude is not None:
        exclude[0, 0] = target[0]
    options = {"alpha": alpha, "temperature": 1.0 if kind == "bucket" else 2.0, "softcap": 3.0, "entropy_bonus": 0.1}
    options |= {"exclude": exclude, "memory_budget": budget, "base": 2}
    loss, stats = softcurve.linear_distillation(x, w, target, teacher, return_stats=True, **options)
    assert loss.isfinite()
    plain = softcurve.linear_distillation(x, w, target, teacher, **options)
    for ours, truth in zip(derivatives(loss, [x, w]), derivatives(plain, [x, w]), strict=True):
        assert_same(ours, truth, bound=1e-10)
    right = softcurve.linear_log_probs(x, w, target.clamp(min=0), softcap=3.0, exclude=exclude)
    counted = (target != -100) & ~right.log_probs.isinf()
    for name in STATISTICS:
        columns = [torch.where(counted | (name != "log_probs"), getattr(of, name), 0.0) for of in (stats, right)]
        for ours, truth in zip(derivatives(columns[0], [x, w]), derivatives(columns[1], [x, w]), strict=True):
            assert_same(ours, truth, bound=1e-9)
    z = oracle.seen_by_softmax(x @ w.T, 1.0, 3.0)
    z = z if exclude is None else z.scatter(-1, exclude, -math.inf)
    assert torch.equal(stats.predicted, z.argmax(-1))
    assert torch.equal(stats.correct, z.argmax(-1) == target)
    assert stats.log_probs[3] == 0


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, at the first jvp
def test_class_weights_of_zero_and_their_mean() -> None:
    """If no label has a weight the mean is NaN with gradient 0, unless the labels have no share of the loss."""
    x, w, target = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3), torch.tensor([0, 1])
    teacher, weight = Logits(torch.randn(2, 5)), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    undefined = softcurve.linear_distillation(x, w, target, teacher, alpha=0.5, weight=weight)
    assert undefined.isnan()
    assert not torch.autograd.grad(undefined, x)[0].any()
    expected = softcurve.linear_kl_divergence(x, w, teacher)
    assert torch.allclose(softcurve.linear_distillation(x, w, target, teacher, alpha=0.0, weight=weight), expected)
    options: dict[str, Any] = {"alpha": 0.5, "weight": weight + 1, "sample_weight": torch.rand(2, requires_grad=True)}
    with pytest.raises(ValueError, match="sample_weight must not require gradients beside weight"):
        softcurve.linear_distillation(x, w, target, teacher, **options)
    with pytest.raises(ValueError, match="sample_weight must not require gradients beside weight"):
        torch.func.jvp(
            lambda s: softcurve.linear_distillation(x, w, target, teacher, **options | {"sample_weight": s}),
            (torch.rand(2),), (torch.rand(2),),
        )  # fmt: skip
    softcurve.linear_distillation(x, w, target, teacher, reduction="sum", **options).backward()
    assert options["sample_weight"].grad.all()


def test_one_product_with_the_weight_serves_all_terms() -> None:
    """A loss with its gradients takes the products of one loss: three of the student's, and one of the teacher's."""
    x, w = torch.randn(16, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    teacher, target = LinearTeacher(torch.randn(16, 8), torch.randn(40, 8)), torch.randint(0, 40, (16,))
    options = {"alpha": 0.5, "entropy_bonus": 0.1, "temperature": 2.0}
    work = work_of(lambda: softcurve.linear_distillation(x, w, target, teacher, **options).backward())
    assert work == 4 * 16 * 8 * 40


def test_all_of_the_teacher_and_none_of_it() -> None:
    """At the ends of ``alpha`` the loss is the divergence or the cross-entropy, even where the other is infinite."""
    x, w, target = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
    one_hot = Probabilities(torch.eye(5)[:4])
    options: dict[str, Any] = {"divergence": ReverseKL()}
    assert softcurve.linear_distillation(x, w, target, one_hot, alpha=0.5, **options) == math.inf
    only_labels = softcurve.linear_distillation(x, w, target, one_hot, alpha=1.0, **options)
    assert torch.allclose(only_labels, softcurve.linear_cross_entropy(x, w, target))
    bias = torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0])
    teacher = Logits(bias.expand(4, 5))
    only_teacher = softcurve.linear_distillation(x, w, target, teacher, alpha=0.0, linear_bias=bias)
    assert torch.allclose(only_teacher, softcurve.linear_kl_divergence(x, w, teacher, linear_bias=bias))


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, "alpha must be"),
        ({"entropy_bonus": -1.0}, ValueError, "entropy_bonus must be"),
        ({"teacher": torch.zeros(2, 9)}, TypeError, "teacher must be one of"),
        ({"teacher": Logits(torch.zeros(2, 8))}, ValueError, r"^teacher \(Logits\) must have the shape \(2, 9\)"),
        ({"teacher": Probabilities(torch.ones(2, 9))}, ValueError, "^teacher probabilities must hold rows that sum"),
        ({"teacher": Logits(torch.full((2, 9), math.nan))}, ValueError, "^teacher must hold numbers, got NaN"),
        ({"target": Logits(torch.full((2, 9), math.nan))}, ValueError, "^target must hold numbers, got NaN"),
        ({"target": torch.zeros(2, 8)}, ValueError, r"^target .* must have the shape \(2, 9\)"),
        ({"target": torch.zeros(2, 9), "shift": 1}, ValueError, "shift must be 0 unless"),
        ({"target": torch.zeros(2, 9), "ignore_index": 1}, ValueError, "ignore_index must not be"),
        ({"target": Probabilities(torch.ones(2, 9))}, ValueError, "probabilities must"),
        ({"target": LinearTeacher(torch.zeros(2, 1), torch.zeros(9, 1))}, TypeError, "got LinearTeacher; pass it as"),
        ({"target": torch.tensor([0, 9])}, ValueError, "target must hold classes in 0 … 8"),
        ({"divergence": softcurve.CrossEntropy()}, ValueError, "divergence must compare two distributions"),
        ({"shift": -1}, ValueError, "shift must be an int >= 0"),
        ({"weight": torch.ones(8)}, ValueError, "weight must be a floating-point tensor of one factor per class"),
        ({"exclude": torch.zeros(2).long()}, ValueError, "exclude must be of shape"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_errors(named: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"target": torch.tensor([0, 1]), "teacher": Logits(torch.zeros(2, 9)), "alpha": 0.5} | named
    with pytest.raises(error, match=message):
        softcurve.linear_distillation(torch.randn(2, 3), torch.randn(9, 3), **given)


def test_the_module_is_the_function_with_its_options() -> None:
    options = {"alpha": 0.3, "temperature": 2.0, "entropy_bonus": 0.1, "divergence": ReverseKL(), "reduction": "none"}
    options["weight"] = torch.rand(9)
    module = softcurve.nn.LinearDistillationLoss(3, 9, bias=True, **options)
    x, target, teacher = torch.randn(2, 3), torch.tensor([0, 1]), Logits(torch.randn(2, 9))
    head = {"linear_bias": module.linear.bias, "sample_weight": torch.tensor([0.5, 2.0])}
    expected = softcurve.linear_distillation(x, module.linear.weight, target, teacher, **head, **options)
    assert torch.equal(module(x, target, teacher, sample_weight=head["sample_weight"]), expected)
    assert module.state_dict().keys() == {"weight", "linear.weight", "linear.bias"}
    more = {"exclude": torch.tensor([[2], [3]]), "return_stats": True}
    expected = softcurve.linear_distillation(x, module.linear.weight, target, teacher, **head, **options, **more)
    for part, right in zip(
        module(x, target, teacher, sample_weight=head["sample_weight"], **more), expected, strict=True
    ):
        assert all(map(torch.equal, part, right))
    with pytest.raises(ValueError, match="alpha must be"):
        softcurve.nn.LinearDistillationLoss(3, 9, alpha=2.0)
