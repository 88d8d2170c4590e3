"""Every door × everything wrong that may come through it: the type of the exception, the argument's name, a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

import softcurve

NAN, INF = float("nan"), float("inf")

# Run in one process without the import hook, whose own TypeCheckError would come before ours.
# name: (code, exception, words that the message must have: the argument, what came or must be, the remedy)
BAD: dict[str, tuple[str, str, list[str]]] = {
    # --- cross_entropy: logits
    "logits list": ("CE([[1.0, 2.0]], i)", "TypeError", ["logits", "list", "Tensor"]),
    "logits int": ("CE(z.long(), i)", "TypeError", ["logits", "int64", ".float()"]),
    "logits bool": ("CE(z > 0, i)", "TypeError", ["logits", "bool"]),
    "logits complex": ("CE(z + 0j, i)", "TypeError", ["logits", "complex64"]),
    "logits scalar": ("CE(torch.tensor(1.0), torch.tensor(0))", "ValueError", ["logits", "(..., C)"]),
    "logits no class": ("CE(torch.zeros(3, 0), i)", "ValueError", ["logits", "(3, 0)"]),
    "logits NaN": ("CE(z.index_fill(1, one, NAN), i)", "ValueError", ["logits", "NaN", "mask"]),
    "logits NaN dense": ("CE(z.index_fill(1, one, NAN), y)", "ValueError", ["logits", "NaN", "mask"]),
    "logits inf": ("CE(z.index_fill(1, one, INF), i)", "ValueError", ["logits", "+inf", "clamp"]),
    "logits all masked": ("CE(z.index_fill(0, one, -INF), i)", "ValueError", ["logits", "-inf", "unmask"]),
    # --- cross_entropy: target
    "target None": ("CE(z, None)", "TypeError", ["target", "NoneType", "Probabilities"]),
    "target list": ("CE(z, [0, 1, 2])", "TypeError", ["target", "list", "tensor"]),
    "target bool": ("CE(z, i > 0)", "TypeError", ["target", "bool", "int64"]),
    "target complex": ("CE(z, y + 0j)", "TypeError", ["target", "complex64"]),
    "target too many": ("CE(z, torch.zeros(4, dtype=torch.int64))", "ValueError", ["target", "(3,)", "(4,)"]),
    "target one-hot int": ("CE(z, torch.eye(4)[:3].long())", "ValueError", ["target", "(3,)", "(3, 4)"]),
    "target too large": ("CE(z, torch.tensor([0, 4, 1]))", "ValueError", ["target", "0 … 3", "got 4", "ignore_index"]),
    "target negative": ("CE(z, torch.tensor([0, -1, 1]))", "ValueError", ["target", "got -1", "ignore_index"]),
    "target not the ignored": (
        "CE(z, torch.tensor([0, -100, 1]), ignore_index=-1)",
        "ValueError",
        ["target", "-100", "ignore_index (-1)"],
    ),
    "target shape": ("CE(z, torch.full((3, 5), 0.2))", "ValueError", ["target", "(3, 4)", "(3, 5)"]),
    "target rows": ("CE(z, y[:2])", "ValueError", ["target", "(3, 4)", "(2, 4)"]),
    "target negative probability": (
        "CE(z, torch.tensor([[1.5, -0.5, 0, 0]]).expand(3, 4))",
        "ValueError",
        ["robabilities", ">= 0", "-0.5", "Logits"],
    ),
    "target unnormalised": (
        "CE(z, Probabilities(2 * y))",
        "ValueError",
        ["robabilities", "sum to 1", "sums to 2", "divide"],
    ),
    "target zero row": ("CE(z, Probabilities(0 * y))", "ValueError", ["robabilities", "sum to 1", "sums to 0"]),
    "target slightly off": ("CE(z, Probabilities(1.001 * y))", "ValueError", ["robabilities", "sum to 1", "1.001"]),
    "target logits taken for probabilities": ("CE(z, z)", "ValueError", ["robabilities", "Logits"]),
    "target NaN": ("CE(z, y.index_fill(0, one, NAN))", "ValueError", ["robabilities", "NaN", "mask"]),
    "target inf": ("CE(z, y.index_fill(0, one, INF))", "ValueError", ["robabilities", "finite", "inf", "divide"]),
    "Logits NaN": ("CE(z, Logits(z.index_fill(0, one, NAN)))", "ValueError", ["target", "NaN", "mask"]),
    "Logits all masked": ("CE(z, Logits(z.index_fill(0, one, -INF)))", "ValueError", ["target", "mass", "mask"]),
    # --- cross_entropy: options
    "weight length": ("CE(z, i, weight=torch.ones(3))", "ValueError", ["weight", "(4,)", "(3,)"]),
    "weight int": ("CE(z, i, weight=torch.ones(4).long())", "ValueError", ["weight", "floating", "int64"]),
    "weight negative": ("CE(z, i, weight=-torch.ones(4))", "ValueError", ["weight", ">= 0"]),
    "weight NaN": ("CE(z, i, weight=torch.full((4,), NAN))", "ValueError", ["weight", "NaN"]),
    "weight list": ("CE(z, i, weight=[1.0] * 4)", "TypeError|ValueError", ["weight", "list"]),
    "sample_weight length": ("CE(z, i, sample_weight=torch.ones(4))", "ValueError", ["sample_weight", "(3,)", "(4,)"]),
    "sample_weight column": (
        "CE(z, i, sample_weight=torch.ones(3, 1))",
        "ValueError",
        ["sample_weight", "(3,)", "(3, 1)"],
    ),
    "sample_weight NaN": ("CE(z, i, sample_weight=torch.full((3,), NAN))", "ValueError", ["sample_weight", "NaN"]),
    "sample_weight list": ("CE(z, i, sample_weight=[1.0] * 3)", "TypeError|ValueError", ["sample_weight", "list"]),
    "smoothing above": ("CE(z, i, label_smoothing=1.1)", "ValueError", ["label_smoothing", "between 0 and 1", "1.1"]),
    "smoothing below": ("CE(z, i, label_smoothing=-0.1)", "ValueError", ["label_smoothing", "-0.1"]),
    "smoothing NaN": ("CE(z, i, label_smoothing=NAN)", "ValueError", ["label_smoothing", "nan"]),
    "smoothing word": ("CE(z, i, label_smoothing='a')", "TypeError|ValueError", ["label_smoothing", "'a'"]),
    "temperature zero": ("CE(z, i, temperature=0.0)", "ValueError", ["temperature", "above 0", "0.0"]),
    "temperature negative": ("CE(z, i, temperature=-1.0)", "ValueError", ["temperature", "-1.0"]),
    "temperature inf": ("CE(z, i, temperature=INF)", "ValueError", ["temperature", "finite", "inf"]),
    "temperature NaN": ("CE(z, i, temperature=NAN)", "ValueError", ["temperature", "nan"]),
    "temperature None": ("CE(z, i, temperature=None)", "TypeError|ValueError", ["temperature", "None"]),
    "softcap zero": ("CE(z, i, softcap=0.0)", "ValueError", ["softcap", "above 0"]),
    "softcap negative": ("CE(z, i, softcap=-30.0)", "ValueError", ["softcap", "-30"]),
    "softcap inf": ("CE(z, i, softcap=INF)", "ValueError", ["softcap", "finite", "inf"]),
    "z_loss negative": ("CE(z, i, z_loss=-1e-4)", "ValueError", ["z_loss", "at least 0"]),
    "z_loss inf": ("CE(z, i, z_loss=INF)", "ValueError", ["z_loss", "finite", "inf"]),
    "reduction": ("CE(z, i, reduction='average')", "ValueError", ["reduction", "'batchmean'", "'average'"]),
    "reduction None": ("CE(z, i, reduction=None)", "TypeError|ValueError", ["reduction", "None"]),
    "base one": ("CE(z, i, base=1.0)", "ValueError", ["base", "1.0"]),
    "base zero": ("CE(z, i, base=0.0)", "ValueError", ["base", "above 0"]),
    "base inf": ("CE(z, i, base=INF)", "ValueError", ["base", "finite"]),
    # --- kl_divergence, js_divergence
    "p indices": ("KL(i, z)", "TypeError", ["p ", "int64", "cross_entropy"]),
    "q indices": ("KL(z, i)", "TypeError", ["q ", "int64", "cross_entropy"]),
    "p None": ("KL(None, z)", "TypeError", ["p ", "NoneType"]),
    "js q list": ("JS(z, [1.0])", "TypeError", ["q ", "list"]),
    "shapes": ("KL(z, z[:, :3])", "ValueError", ["p and q", "(3, 3)", "(3, 4)"]),
    "rows": ("KL(z, z[:2])", "ValueError", ["(2, 4)", "(3, 4)"]),
    "p NaN": ("KL(z.index_fill(0, one, NAN), z)", "ValueError", ["p must", "NaN"]),
    "q NaN": ("KL(z, z.index_fill(0, one, NAN))", "ValueError", ["q must", "NaN"]),
    "p inf": ("KL(z.index_fill(0, one, INF), z)", "ValueError", ["p must", "+inf"]),
    "q inf": ("JS(z, z.index_fill(0, one, INF))", "ValueError", ["q must", "+inf"]),
    "p one inf": ("KL(z.index_fill(1, one, INF), z)", "ValueError", ["p must", "+inf"]),
    "q all masked": ("KL(z, z.index_fill(0, one, -INF))", "ValueError", ["q must", "-inf"]),
    "p all masked": ("JS(z.index_fill(0, one, -INF), z)", "ValueError", ["p must", "-inf"]),
    "kl temperature": ("KL(z, z, temperature=0.0)", "ValueError", ["temperature", "above 0"]),
    "kl reduction": ("KL(z, z, reduction='x')", "ValueError", ["reduction", "'x'"]),
    "kl sample_weight": ("KL(z, z, sample_weight=torch.ones(2))", "ValueError", ["sample_weight", "(3,)", "(2,)"]),
    "beta above": ("JS(z, z, beta=1.5)", "ValueError", ["beta", "between 0 and 1", "1.5"]),
    "beta below": ("JS(z, z, beta=-0.5)", "ValueError", ["beta", "-0.5"]),
    "beta NaN": ("JS(z, z, beta=NAN)", "ValueError", ["beta", "nan"]),
    "kl Probabilities unnormalised": (
        "KL(Probabilities(2 * y), z)",
        "ValueError",
        ["robabilities", "sums to 2", "divide"],
    ),
    "kl Probabilities shape": ("KL(Probabilities(y[:2]), z)", "ValueError", ["(2, 4)", "(3, 4)"]),
    # --- entropy, softmax_jacobian, softmax_jacobian_product
    "entropy int": ("softcurve.entropy(i)", "TypeError", ["logits", "int64"]),
    "entropy NaN": ("softcurve.entropy(z.index_fill(0, one, NAN))", "ValueError", ["logits", "NaN"]),
    "entropy inf": ("softcurve.entropy(z.index_fill(1, one, INF))", "ValueError", ["logits", "+inf"]),
    "entropy all masked": ("softcurve.entropy(z.index_fill(0, one, -INF))", "ValueError", ["logits", "-inf"]),
    "entropy base": ("softcurve.entropy(z, base=1.0)", "ValueError", ["base"]),
    "jacobian int": ("softcurve.softmax_jacobian(i)", "TypeError", ["logits", "int64"]),
    "jacobian scalar": ("softcurve.softmax_jacobian(torch.tensor(1.0))", "ValueError", ["logits", "(..., C)"]),
    "product int": ("softcurve.softmax_jacobian_product(z, i)", "TypeError", ["vector", "int64"]),
    "product shape": (
        "softcurve.softmax_jacobian_product(z, z[0])",
        "ValueError",
        ["vector", "(3, 4)", "(4,)", "expand"],
    ),
    # --- the targets themselves
    "Probabilities int": ("Probabilities(i)", "TypeError", ["robabilities", "int64"]),
    "Probabilities list": ("Probabilities([0.5, 0.5])", "TypeError", ["robabilities", "list"]),
    "Probabilities negative": ("CE(z, Probabilities(-y))", "ValueError", ["robabilities", ">= 0"]),
    "Probabilities NaN": ("JS(Probabilities(y * NAN), z)", "ValueError", ["robabilities", "NaN"]),
    "Logits int": ("Logits(i)", "TypeError", ["Logits", "int64"]),
    "teacher int": ("LinearTeacher(i, z)", "TypeError", ["LinearTeacher input", "int64"]),
    "teacher weight": (
        "LinearTeacher(z, torch.ones(5, 3))",
        "ValueError",
        ["LinearTeacher linear_weight", "(C, 4)", "(5, 3)"],
    ),
    "teacher weight int": ("LinearTeacher(z, torch.ones(5, 4).long())", "TypeError", ["linear_weight", "int64"]),
    "teacher bias": (
        "LinearTeacher(z, torch.ones(5, 4), torch.ones(4))",
        "ValueError",
        ["LinearTeacher linear_bias", "(5,)", "(4,)"],
    ),
    "teacher of other classes": (
        "CE(z, LinearTeacher(z, torch.ones(5, 4)))",
        "ValueError",
        ["target", "(3, 4)", "(3, 5)"],
    ),
    # --- TopK
    "TopK tail": ("TopK(k, l, tail='drop')", "ValueError", ["tail", "'bucket'", "'drop'"]),
    "TopK log_probs int": ("TopK(k, k)", "TypeError", ["log_probs", "int64"]),
    "TopK indices float": ("TopK(l, l)", "TypeError", ["indices", "int64"]),
    "TopK indices int32": ("TopK(k.int(), l)", "TypeError", ["indices", "int64", ".long()"]),
    "TopK shapes": ("TopK(k[:, :1], l)", "ValueError", ["indices", "(3, 2)", "(3, 1)"]),
    "TopK repeats": ("CE(z, TopK(torch.zeros_like(k), l))", "ValueError", ["indices", "distinct", "twice"]),
    "TopK mass": ("KL(TopK(k, l + 2), z)", "ValueError", ["log_probs", "mass", "log_softmax"]),
    "TopK NaN": ("JS(z, TopK(k, l * NAN))", "ValueError", ["log_probs", "nan"]),
    "TopK out of range": ("CE(z, TopK(k + 2, l))", "ValueError", ["TopK indices", "0 … 3"]),
    "TopK negative": ("KL(TopK(k - 1, l), z)", "ValueError", ["TopK indices", "0 … 3", "-1"]),
    "TopK rows": ("CE(z, TopK(k[:2], l[:2]))", "ValueError", ["TopK indices", "(3,)", "(2, 2)"]),
    "TopK too many": ("CE(z[:, :1], TopK(k, l))", "ValueError", ["TopK indices", "k <= 1", "(3, 2)"]),
    "TopK both": ("KL(TopK(k, l), TopK(k, l))", "ValueError", ["TopK", "logits for all classes"]),
    "bucket weight": ("CE(z, TopK(k, l), weight=torch.ones(4))", "ValueError", ["weight", "bucket", "renormalize"]),
    "bucket temperature": (
        "KL(TopK(k, l), z, temperature=2.0)",
        "ValueError",
        ["temperature", "bucket", "renormalize"],
    ),
    "bucket temperature js": ("JS(z, TopK(k, l), temperature=2.0)", "ValueError", ["temperature", "bucket"]),
    "renormalize reverse": ("KL(z, TopK(k, l, 'renormalize'))", "ValueError", ["renormalize", "infinite", "bucket"]),
    "renormalize js one": ("JS(TopK(k, l, 'renormalize'), z, beta=1.0)", "ValueError", ["renormalize", "infinite"]),
    "renormalize js zero": ("JS(z, TopK(k, l, 'renormalize'), beta=0.0)", "ValueError", ["renormalize", "infinite"]),
    # --- modules
    "module reduction": ("nn.CrossEntropyLoss(reduction='x')", "ValueError", ["reduction", "'x'"]),
    "module base": ("nn.KLDivergenceLoss(base=1.0)", "ValueError", ["base"]),
    "module temperature": ("nn.CrossEntropyLoss(temperature=0.0)(z, i)", "ValueError", ["temperature", "above 0"]),
    "module beta": ("nn.JSDivergenceLoss(beta=2.0)(z, z)", "ValueError", ["beta", "between 0 and 1"]),
}

# A plan of what is not an error, so that the checks above cannot pass by refusing everything.
GOOD = {
    "as in torch": "CE(z, i)",
    "dense": "CE(z, y)",
    "dense of any mass": "CE(z, 2 * y) + CE(z, 0 * y) + CE(z, 1.001 * y)",
    "int32 indices": "CE(z, i.int())",
    "half-precision probabilities": "CE(z, y.to(torch.bfloat16))",
    "one masked class": "CE(z.index_fill(1, torch.tensor([3]), -INF), i)",
    "base as an int": "CE(z, i, base=2, temperature=2, label_smoothing=0)",
    "empty sum": "CE(z[:0], i[:0], reduction='sum')",
    "bucket": "KL(TopK(k, l), z) + KL(z, TopK(k, l))",
    "renormalize": "KL(TopK(k, l, 'renormalize'), z, temperature=2.0) + JS(TopK(k, l, 'renormalize'), z)",
    "a row that counts against": "CE(z, i, sample_weight=-torch.ones(3), reduction='sum')",
    "an index that is ignored": "CE(z, torch.tensor([0, -1, 1]), ignore_index=-1)",
}

PREAMBLE = """
import json, torch, softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK, nn
CE, KL, JS, NAN, INF = softcurve.cross_entropy, softcurve.kl_divergence, softcurve.js_divergence, float("nan"), float("inf")
z, i, one = torch.randn(3, 4), torch.tensor([0, 2, 1]), torch.tensor([1])
y = torch.softmax(torch.randn(3, 4), -1)
k, l = torch.tensor([[0, 1], [2, 1], [1, 0]]), torch.log_softmax(z, -1)[:, :2]

def outcome(code):
    try:
        return ["returned", repr(eval(code))]
    except BaseException as error:
        return [type(error).__name__, str(error)]
"""


@pytest.fixture(scope="module")
def outcomes(run_python: Callable[[str], object]) -> dict[str, list[str]]:
    codes = {name: code for name, (code, _, _) in BAD.items()} | GOOD
    done = run_python(f"{PREAMBLE}\nprint(json.dumps({{n: outcome(c) for n, c in {codes!r}.items()}}))")
    return json.loads(done.stdout)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BAD)
def test_error_names_argument_and_remedy(name: str, outcomes: dict[str, list[str]]) -> None:
    _, exception, words = BAD[name]
    kind, message = outcomes[name]
    assert kind in exception.split("|"), message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", GOOD)
def test_no_error(name: str, outcomes: dict[str, list[str]]) -> None:
    kind, shown = outcomes[name]
    assert kind == "returned", shown
    assert "nan" not in shown


# --- rows that have no part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"temperature": 2.0, "softcap": 5.0}])
def test_ignored_rows_may_hold_anything(poison: float, reduction: str, options: dict[str, float]) -> None:
    """Exactly zero value, gradient and Hessian product, as if they held zeros."""
    clean = torch.randn(5, 4, dtype=torch.float64)
    target = torch.tensor([0, -100, 2, -100, 3])
    results = []
    for fill in (0.0, poison):
        z = clean.clone()
        z[1::2] = fill
        z.requires_grad_()
        loss = softcurve.cross_entropy(z, target, reduction=reduction, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
        (second,) = torch.autograd.grad((gradient * clean).sum(), z)
        assert (gradient[1::2] == 0).all()
        assert (second[1::2] == 0).all()
        results.append((loss, gradient, second))
    for got, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(got, expected)


WEIGHTED = {
    "index": lambda z, t, w: softcurve.cross_entropy(z, torch.arange(5) % 4, sample_weight=w, reduction="sum"),
    "smoothed": lambda z, t, w: softcurve.cross_entropy(
        z, torch.arange(5) % 4, sample_weight=w, label_smoothing=0.1, z_loss=0.1
    ),
    "logits": lambda z, t, w: softcurve.cross_entropy(z, softcurve.Logits(t), sample_weight=w),
    "forward": lambda z, t, w: softcurve.kl_divergence(t, z, sample_weight=w, reduction="mean"),
    "reverse": lambda z, t, w: softcurve.kl_divergence(z, t, sample_weight=w, temperature=2.0),
    "js": lambda z, t, w: softcurve.js_divergence(z, t, sample_weight=w, beta=0.3, reduction="sum"),
}


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("name", WEIGHTED)
def test_rows_of_weight_zero_may_hold_anything(name: str, poison: float) -> None:
    clean = torch.randn(2, 5, 4, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    results = []
    for fill in (0.0, poison):
        both = clean.clone()
        both[:, 1::2] = fill
        z, t = both.requires_grad_()
        loss = WEIGHTED[name](z, t, weight)
        first = torch.autograd.grad(loss, (z, t), create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(
            sum((g * c).sum() for g, c in zip(first, clean, strict=True)), (z, t), materialize_grads=True
        )
        assert all((g[1::2] == 0).all() for g in (*first, *second))
        results.append((loss, *first, *second))
    for got, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(got, expected)
