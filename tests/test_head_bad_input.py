"""The head's doors × everything wrong that may come through them: the exception, the argument's name, what came, a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from .placement import ON_CPU, PLACED

# Run in one process without the import hook, whose own TypeCheckError would come before ours.
# name: (code, exception, words that the message must have: the argument, what came or must be, the remedy)
# "nan" among the exceptions: the loss may also come back as NaN; "a|b" among the words: one of them.
BAD: dict[str, tuple[str, str, list[str]]] = {
    # --- input
    "input list": ("CE([[1.0, 2.0]], w, i)", "TypeError", ["input", "list", "Tensor"]),
    "input int": ("CE(x.long(), w, i)", "TypeError", ["input", "int64", ".float()"]),
    "input bool": ("CE(x > 0, w, i)", "TypeError", ["input", "bool"]),
    "input complex": ("CE(x + 0j, w, i)", "TypeError", ["input", "complex64"]),
    "input scalar": ("CE(torch.tensor(1.0), w, torch.tensor(0))", "ValueError", ["input", "(..., d)", "()"]),
    "input narrow": ("CE(x[:, :1], w, i)", "ValueError", ["linear_weight", "(5, 2)", "input", "1"]),
    "input NaN": ("CE(x.index_fill(1, one, NAN), w, i)", "ValueError|nan", ["input", "NaN"]),
    "input inf": ("CE(x.index_fill(1, one, INF), w, i)", "ValueError|nan", ["input", "inf"]),
    "kl input list": ("KL([[1.0, 2.0]], w, y)", "TypeError", ["input", "list"]),
    "js input int": ("JS(x.long(), w, y)", "TypeError", ["input", "int64"]),
    "kl input NaN": ("KL(x.index_fill(1, one, NAN), w, Probabilities(y))", "ValueError|nan", ["input", "NaN"]),
    # --- linear_weight
    "weight list": ("CE(x, [[1.0, 2.0]], i)", "TypeError", ["linear_weight", "list", "Tensor"]),
    "weight int": ("CE(x, w.long(), i)", "TypeError", ["linear_weight", "int64", ".float()"]),
    "weight vector": ("CE(x, w[0], i)", "ValueError", ["linear_weight", "(C, 2)", "(2,)"]),
    "weight wide": ("CE(x, torch.ones(5, 3), i)", "ValueError", ["linear_weight", "(5, 3)", "2"]),
    "weight transposed": ("CE(x, w.T, i)", "ValueError", ["linear_weight", "(2, 5)", "2"]),
    "weight without classes": ("CE(x, w[:0], i)", "ValueError", ["linear_weight", "(0, 2)"]),
    "weight NaN": ("CE(x, w.index_fill(0, one, NAN), i)", "ValueError|nan", ["linear_weight", "NaN"]),
    "weight module": ("CE(x, torch.nn.Linear(2, 5), i)", "TypeError", ["linear_weight", "Linear", "Tensor"]),
    "kl weight of K dimensions": (
        "KL(x, torch.ones(5, 4, 2), y)",
        "ValueError",
        ["linear_weight", "(C, 2)", "(5, 4, 2)"],
    ),
    "K dimensions of one row": ("CE(x[0], torch.ones(5, 4, 2), i[0])", "ValueError", ["input", "(2,)", "(N, d)"]),
    "K dimensions of a sequence": (
        "CE(x[None], torch.ones(5, 4, 2), i[None])",
        "ValueError",
        ["input", "(1, 3, 2)", "(N, d)"],
    ),
    # --- linear_bias
    "bias list": ("CE(x, w, i, linear_bias=[0.0] * 5)", "TypeError", ["linear_bias", "list", "Tensor"]),
    "bias int": ("CE(x, w, i, linear_bias=torch.zeros(5).long())", "TypeError|ValueError", ["linear_bias", "int64"]),
    "bias short": ("CE(x, w, i, linear_bias=torch.zeros(4))", "ValueError", ["linear_bias", "(5,)", "(4,)"]),
    "bias column": ("CE(x, w, i, linear_bias=torch.zeros(5, 1))", "ValueError", ["linear_bias", "(5,)", "(5, 1)"]),
    "bias one for all": ("KL(x, w, y, linear_bias=torch.zeros(1))", "ValueError", ["linear_bias", "(5,)", "(1,)"]),
    "bias of K dimensions": (
        "CE(x, torch.ones(5, 4, 2), torch.zeros(3, 4).long(), linear_bias=torch.zeros(5))",
        "ValueError",
        ["linear_bias", "(5, 4)", "(5,)"],
    ),
    "bias NaN": ("CE(x, w, i, linear_bias=torch.full((5,), NAN))", "ValueError|nan", ["linear_bias", "NaN"]),
    # --- target
    "target None": ("CE(x, w, None)", "TypeError", ["target", "NoneType", "Probabilities"]),
    "target list": ("CE(x, w, [0, 1, 2])", "TypeError", ["target", "list", "tensor"]),
    "target bool": ("CE(x, w, i > 0)", "TypeError", ["target", "bool", "int64"]),
    "target complex": ("CE(x, w, y + 0j)", "TypeError", ["target", "complex64"]),
    "target too many": ("CE(x, w, torch.zeros(4).long())", "ValueError", ["target", "(3,)", "(4,)"]),
    "target one-hot int": ("CE(x, w, torch.eye(5)[:3].long())", "ValueError", ["target", "(3,)", "(3, 5)"]),
    "target of K dimensions": (
        "CE(x, torch.ones(5, 4, 2), torch.zeros(3, 3).long())",
        "ValueError",
        ["target", "(3, 4)", "(3, 3)"],
    ),
    "target too large": (
        "CE(x, w, torch.tensor([0, 5, 1]))",
        "ValueError",
        ["target", "0 … 4", "got 5", "ignore_index"],
    ),
    "target negative": ("CE(x, w, torch.tensor([0, -1, 1]))", "ValueError", ["target", "got -1", "ignore_index"]),
    "target not the ignored": (
        "CE(x, w, torch.tensor([0, -100, 1]), ignore_index=-1)",
        "ValueError",
        ["target", "-100", "ignore_index (-1)"],
    ),
    "target shape": ("CE(x, w, torch.full((3, 6), 0.2))", "ValueError", ["target", "(3, 5)", "(3, 6)"]),
    "target rows": ("CE(x, w, y[:2])", "ValueError", ["target", "(3, 5)", "(2, 5)"]),
    "target NaN": ("CE(x, w, y.index_fill(0, one, NAN))", "ValueError|nan", ["target", "NaN"]),
    "target Probabilities rows": ("CE(x, w, Probabilities(y[:2]))", "ValueError", ["target", "(3, 5)", "(2, 5)"]),
    "target Logits classes": ("CE(x, w, Logits(y[:, :4]))", "ValueError", ["target", "(3, 5)", "(3, 4)"]),
    "target Logits NaN": ("CE(x, w, Logits(y.index_fill(0, one, NAN)))", "ValueError|nan", ["target", "NaN"]),
    "target Logits all masked": ("CE(x, w, Logits(y.index_fill(0, one, -INF)))", "ValueError|nan", ["target", "mass"]),
    "target teacher rows": ("KL(x, w, LinearTeacher(x[:2], w))", "ValueError", ["target", "(3, 5)", "(2, 5)"]),
    "target teacher classes": (
        "KL(x, w, LinearTeacher(x, w[:4]))",
        "ValueError",
        ["target", "(3, 5)", "(3, 4)", "linear_weight[:4]"],
    ),
    "target teacher NaN": ("KL(x, w, LinearTeacher(x * NAN, w))", "ValueError|nan", ["target", "NaN"]),
    "TopK out of range": ("CE(x, w, TopK(k + 3, l))", "ValueError", ["TopK indices", "0 … 4", "got 5"]),
    "TopK negative": ("KL(x, w, TopK(k - 1, l))", "ValueError", ["TopK indices", "0 … 4", "-1"]),
    "TopK rows": ("CE(x, w, TopK(k[:2], l[:2]))", "ValueError", ["TopK indices", "(3,)", "(2, 2)"]),
    "TopK too many": ("JS(x, w[:1], TopK(k, l))", "ValueError", ["TopK indices", "k <= 1", "(3, 2)"]),
    "kl indices": ("KL(x, w, i)", "TypeError", ["target", "int64", "linear_cross_entropy"]),
    "js indices": ("JS(x, w, i)", "TypeError", ["target", "int64", "linear_cross_entropy"]),
    "kl target None": ("KL(x, w, None)", "TypeError", ["target", "NoneType"]),
    "kl target logits": ("KL(x, w, z)", "TypeError", ["target", "Probabilities", "Logits"]),
    "js target plain": ("JS(x, w, y)", "TypeError", ["target", "float32", "Probabilities", "Logits"]),
    "js target unnormalised": (
        "JS(x, w, Probabilities(2 * y))",
        "ValueError",
        ["robabilities", "sum to 1", "sums to 2"],
    ),
    # --- what does not go with a kind of target
    "ignore_index float": ("CE(x, w, i, ignore_index=1.0)", "TypeError", ["ignore_index", "int", "float"]),
    "ignore_index bool": ("CE(x, w, i, ignore_index=True)", "TypeError", ["ignore_index", "int", "bool"]),
    "ignore_index and probabilities": (
        "CE(x, w, y, ignore_index=-1)",
        "ValueError",
        ["ignore_index", "distribution", "sample_weight", "-1"],
    ),
    "ignore_index and Logits": (
        "CE(x, w, Logits(y), ignore_index=2)",
        "ValueError",
        ["ignore_index", "distribution", "sample_weight", "2"],
    ),
    "ignore_index and TopK": (
        "CE(x, w, TopK(k, l), ignore_index=0)",
        "ValueError",
        ["ignore_index", "distribution", "sample_weight"],
    ),
    "ignore_index and teacher": (
        "CE(x, w, LinearTeacher(x, w), ignore_index=-1)",
        "ValueError",
        ["ignore_index", "distribution", "sample_weight"],
    ),
    "bucket weight": ("CE(x, w, TopK(k, l), weight=torch.ones(5))", "ValueError", ["weight", "bucket", "renormalize"]),
    "bucket temperature": (
        "KL(x, w, TopK(k, l), temperature=2.0)",
        "ValueError",
        ["temperature", "bucket", "renormalize"],
    ),
    "bucket temperature js": ("JS(x, w, TopK(k, l), temperature=2.0)", "ValueError", ["temperature", "bucket"]),
    "renormalize reverse": (
        "KL(x, w, TopK(k, l, 'renormalize'), direction='reverse')",
        "ValueError",
        ["renormalize", "infinite", "bucket"],
    ),
    "renormalize js one": (
        "JS(x, w, TopK(k, l, 'renormalize'), beta=1.0)",
        "ValueError",
        ["renormalize", "infinite", "bucket"],
    ),
    # --- options of cross-entropy
    "class weight length": ("CE(x, w, i, weight=torch.ones(3))", "ValueError", ["weight", "(5,)", "(3,)"]),
    "class weight int": (
        "CE(x, w, i, weight=torch.ones(5).long())",
        "ValueError|TypeError",
        ["weight", "floating", "int64"],
    ),
    "class weight negative": ("CE(x, w, i, weight=-torch.ones(5))", "ValueError", ["weight", ">= 0"]),
    "class weight NaN": ("CE(x, w, i, weight=torch.full((5,), NAN))", "ValueError", ["weight", "NaN"]),
    "class weight list": ("CE(x, w, i, weight=[1.0] * 5)", "TypeError", ["weight", "list"]),
    "class weight learned": (
        "CE(x, w, i, weight=torch.ones(5, requires_grad=True))",
        "ValueError",
        ["weight", "grad", "detach"],
    ),
    "smoothing above": (
        "CE(x, w, i, label_smoothing=1.1)",
        "ValueError",
        ["label_smoothing", "between 0 and 1", "1.1"],
    ),
    "smoothing below": ("CE(x, w, i, label_smoothing=-0.1)", "ValueError", ["label_smoothing", "-0.1"]),
    "smoothing NaN": ("CE(x, w, i, label_smoothing=NAN)", "ValueError", ["label_smoothing", "nan"]),
    "smoothing word": ("CE(x, w, i, label_smoothing='a')", "TypeError|ValueError", ["label_smoothing", "'a'"]),
    "z_loss negative": ("CE(x, w, i, z_loss=-1e-4)", "ValueError", ["z_loss", "at least 0", "-0.0001"]),
    "z_loss inf": ("CE(x, w, i, z_loss=INF)", "ValueError", ["z_loss", "finite", "inf"]),
    "shift negative": ("CE(x, w, i, shift=-1)", "ValueError", ["shift", "-1"]),
    "shift float": ("CE(x, w, i, shift=1.0)", "TypeError|ValueError", ["shift", "int", "1.0|float"]),
    "shift bool": ("CE(x, w, i, shift=True)", "TypeError|ValueError", ["shift", "int", "True|bool"]),
    "shift of one row": ("CE(x[0], w, i[0], shift=1)", "ValueError", ["shift", "single row"]),
    "shift and probabilities": ("CE(x, w, y, shift=1)", "ValueError", ["shift", "class indices"]),
    "shift and Logits": ("CE(x, w, Logits(y), shift=1)", "ValueError", ["shift", "class indices"]),
    "shift and kl": ("KL(x, w, Probabilities(y), shift=1)", "ValueError", ["shift", "class indices"]),
    "shift and js": ("JS(x, w, Logits(y), shift=2)", "ValueError", ["shift", "class indices"]),
    # --- options of all
    "temperature zero": ("CE(x, w, i, temperature=0.0)", "ValueError", ["temperature", "above 0", "0.0"]),
    "temperature NaN": ("KL(x, w, Probabilities(y), temperature=NAN)", "ValueError", ["temperature", "nan"]),
    "temperature None": (
        "JS(x, w, Probabilities(y), temperature=None)",
        "TypeError|ValueError",
        ["temperature", "None"],
    ),
    "softcap zero": ("CE(x, w, i, softcap=0.0)", "ValueError", ["softcap", "above 0"]),
    "softcap negative": ("KL(x, w, Probabilities(y), softcap=-30.0)", "ValueError", ["softcap", "-30"]),
    "softcap inf": ("JS(x, w, Probabilities(y), softcap=INF)", "ValueError", ["softcap", "finite", "inf"]),
    "reduction": ("CE(x, w, i, reduction='average')", "ValueError", ["reduction", "'batchmean'", "'average'"]),
    "reduction None": ("KL(x, w, Probabilities(y), reduction=None)", "TypeError|ValueError", ["reduction", "None"]),
    "base one": ("CE(x, w, i, base=1.0)", "ValueError", ["base", "1.0"]),
    "base zero": ("KL(x, w, Probabilities(y), base=0.0)", "ValueError", ["base", "above 0"]),
    "direction": (
        "KL(x, w, Probabilities(y), direction='sideways')",
        "ValueError",
        ["direction", "'forward'", "'reverse'", "'sideways'"],
    ),
    "direction None": (
        "KL(x, w, Probabilities(y), direction=None)",
        "TypeError|ValueError",
        ["direction", "'forward'", "None"],
    ),
    "beta above": ("JS(x, w, Probabilities(y), beta=1.5)", "ValueError", ["beta", "between 0 and 1", "1.5"]),
    "beta below": ("JS(x, w, Probabilities(y), beta=-0.5)", "ValueError", ["beta", "-0.5"]),
    "beta NaN": ("JS(x, w, Probabilities(y), beta=NAN)", "ValueError", ["beta", "nan"]),
    "sample_weight length": (
        "CE(x, w, i, sample_weight=torch.ones(4))",
        "ValueError",
        ["sample_weight", "(3,)", "(4,)"],
    ),
    "sample_weight column": (
        "KL(x, w, Probabilities(y), sample_weight=torch.ones(3, 1))",
        "ValueError",
        ["sample_weight", "(3,)", "(3, 1)"],
    ),
    "sample_weight NaN": ("CE(x, w, i, sample_weight=torch.full((3,), NAN))", "ValueError", ["sample_weight", "NaN"]),
    "sample_weight list": (
        "JS(x, w, Probabilities(y), sample_weight=[1.0] * 3)",
        "TypeError|ValueError",
        ["sample_weight", "list"],
    ),
    "memory_budget zero": (
        "CE(x, w, i, memory_budget=0)",
        "ValueError",
        ["memory_budget", "positive int of bytes", "got 0"],
    ),
    "memory_budget negative": (
        "KL(x, w, Probabilities(y), memory_budget=-1)",
        "ValueError",
        ["memory_budget", "positive int of bytes", "got -1"],
    ),
    "memory_budget tiny": (
        "JS(x, w, Probabilities(y), memory_budget=8)",
        "ValueError",
        ["memory_budget", "at least", "bytes", "got 8"],
    ),
    "memory_budget word": (
        "CE(x, w, i, memory_budget='64MB')",
        "TypeError|ValueError",
        ["memory_budget", "bytes", "64MB|str"],
    ),
    "memory_budget float": (
        "CE(x, w, i, memory_budget=1e9)",
        "TypeError|ValueError",
        ["memory_budget", "int", "got 1000000000.0"],
    ),
    "memory_budget bool": (
        "CE(x, w, i, memory_budget=True)",
        "TypeError|ValueError",
        ["memory_budget", "int", "bool|True"],
    ),
    # --- modules
    "module reduction": ("nn.LinearCrossEntropyLoss(2, 5, reduction='x')", "ValueError", ["reduction", "'x'"]),
    "module smoothing": (
        "nn.LinearCrossEntropyLoss(2, 5, label_smoothing=1.5)",
        "ValueError",
        ["label_smoothing", "1.5"],
    ),
    "module temperature": (
        "nn.LinearCrossEntropyLoss(2, 5, temperature=0.0)",
        "ValueError",
        ["temperature", "above 0"],
    ),
    "module softcap": ("nn.LinearKLDivergenceLoss(2, 5, softcap=-1.0)", "ValueError", ["softcap", "-1.0"]),
    "module z_loss": ("nn.LinearCrossEntropyLoss(2, 5, z_loss=-1.0)", "ValueError", ["z_loss", "-1.0"]),
    "module weight": (
        "nn.LinearCrossEntropyLoss(2, 5, weight=torch.ones(4))",
        "ValueError",
        ["weight", "(5,)", "(4,)"],
    ),
    "module base": ("nn.LinearKLDivergenceLoss(2, 5, base=1.0)", "ValueError", ["base"]),
    "module direction": (
        "nn.LinearKLDivergenceLoss(2, 5, direction='up')",
        "ValueError",
        ["direction", "'reverse'", "'up'"],
    ),
    "module beta": ("nn.LinearJSDivergenceLoss(2, 5, beta=2.0)", "ValueError", ["beta", "between 0 and 1", "2.0"]),
    "module shift": ("nn.LinearCrossEntropyLoss(2, 5, shift=-1)", "ValueError", ["shift", "-1"]),
    "module input": (
        "nn.LinearCrossEntropyLoss(2, 5).to(x.device)(x[:, :1], i)",
        "ValueError",
        ["linear_weight", "(5, 2)", "1"],
    ),
    "module ignore_index": (
        "nn.LinearCrossEntropyLoss(2, 5, ignore_index=1).to(x.device)(x, y)",
        "ValueError",
        ["ignore_index", "distribution", "sample_weight"],
    ),
}

# What only a look at the values shows. They are looked at on the CPU alone; elsewhere such a loss is NaN, or the device
# refuses (see softcurve.checks), but for two values that torch takes as well.
UNSEEN = {
    *("target too large", "target negative", "target not the ignored", "TopK out of range", "TopK negative"),
    *("kl target logits", "class weight NaN", "sample_weight NaN", "target Logits all masked"),
}
TAKEN = {"js target unnormalised", "class weight negative"}

# What is not an error, so that the checks above cannot pass by refusing everything.
GOOD = {
    "as in torch": "CE(x, w, i)",
    "dense": "CE(x, w, y)",
    "dense of any mass": "CE(x, w, 2 * y)",
    "int32 indices": "CE(x, w, i.int())",
    "half-precision probabilities": "CE(x, w, y.to(torch.bfloat16)) + KL(x, w, Probabilities(y.to(torch.bfloat16)))",
    "one masked class": "CE(x, w, i, linear_bias=torch.tensor([0, 0, 0, 0, -INF]))",
    "options as ints": "CE(x, w, i, base=2, temperature=2, label_smoothing=0, softcap=3, z_loss=1)",
    "empty sum": "CE(x[:0], w, i[:0], reduction='sum')",
    "bucket": "KL(x, w, TopK(k, l)) + KL(x, w, TopK(k, l), direction='reverse') + JS(x, w, TopK(k, l))",
    "bucket in cross-entropy": "CE(x, w, TopK(k, l), temperature=2.0, label_smoothing=0.1)",
    "renormalize": "KL(x, w, TopK(k, l, 'renormalize'), temperature=2.0) + JS(x, w, TopK(k, l, 'renormalize'), beta=0.0)",
    "a row that counts against": "CE(x, w, i, sample_weight=-torch.ones(3), reduction='sum')",
    "an index that is ignored": "CE(x, w, torch.tensor([0, -1, 1]), ignore_index=-1)",
    "no shift of a distribution": "CE(x, w, y, shift=0) + KL(x, w, Probabilities(y), shift=0) + JS(x, w, Probabilities(y), shift=0)",
    "no ignore_index of a distribution": "CE(x, w, y, ignore_index=None) + CE(x, w, y, ignore_index=-100)",
    "a teacher of another width": "KL(x, w, LinearTeacher(torch.randn(3, 7), torch.randn(5, 7)))",
    "a budget": "CE(x, w, i, memory_budget=1 << 20) + JS(x, w, Probabilities(y), memory_budget=1 << 20)",
    "modules": (
        "nn.LinearCrossEntropyLoss(2, 5, ignore_index=1).to(x.device)(x, i)"
        " + nn.LinearKLDivergenceLoss(2, 5).to(x.device)(x, Probabilities(y)) + nn.LinearJSDivergenceLoss(2, 5).to(x.device)(x, Probabilities(y))"
    ),
}

PREAMBLE = f"""{PLACED}
import json, torch, softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK, nn
CE, KL, JS = softcurve.linear_cross_entropy, softcurve.linear_kl_divergence, softcurve.linear_js_divergence
NAN, INF = float("nan"), float("inf")
x, w, i, one = torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 2, 1]), torch.tensor([1])
z = x @ w.T
y = torch.softmax(torch.randn(3, 5), -1)
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
    # A device that has refused refuses everything that follows.
    codes |= {name: codes.pop(name) for name in UNSEEN}
    done = run_python(f"{PREAMBLE}\nprint(json.dumps({{n: outcome(c) for n, c in {codes!r}.items()}}))")
    return json.loads(done.stdout)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BAD)
def test_error_names_argument_and_remedy(name: str, outcomes: dict[str, list[str]]) -> None:
    _, exception, words = BAD[name]
    kind, message = outcomes[name]
    if not ON_CPU and name in UNSEEN:
        exception += "|nan|RuntimeError|AcceleratorError"
        words = []
    if not ON_CPU and name in TAKEN:
        pytest.skip("values are not looked at on this device")
    if kind == "returned" and "nan" in exception.split("|"):
        assert message.startswith("tensor(nan")
        return
    assert kind in exception.split("|"), message
    missing = [word for word in words if not any(choice in message for choice in word.split("|"))]
    assert missing == [], message


@pytest.mark.parametrize("name", GOOD)
def test_no_error(name: str, outcomes: dict[str, list[str]]) -> None:
    kind, shown = outcomes[name]
    assert kind == "returned", shown
    assert "nan" not in shown
