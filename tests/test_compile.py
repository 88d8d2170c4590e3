"""``torch.compile(fullgraph=True)``: every public loss, forward and backward, equal to eager; in processes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest

PREAMBLE = """
import json, warnings, torch, softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK
# Dynamo's own doing when it traces an autograd.Function.
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
torch.set_num_threads(1)
torch.manual_seed(0)
f64 = torch.float64

CE, KL, JS = softcurve.cross_entropy, softcurve.kl_divergence, softcurve.js_divergence
weight = torch.rand(5, dtype=f64) + 0.5
head = torch.randn(5, 3, dtype=f64)


def index(z):
    return torch.arange(z.shape[0], device=z.device) % 5


def listed(z, t):
    i = torch.stack([index(z), (index(z) + 2) % 5], -1)
    return i, torch.log_softmax(t, -1).gather(-1, i)


def ignoring(z):
    return torch.where(index(z) == 1, -100, index(z))


LOSSES = {
    "index": lambda z, t: CE(z, index(z)) + 0 * t.sum(),
    "weighted": lambda z, t: CE(z, ignoring(z), weight=weight, sample_weight=t.exp().sum(-1)),
    "options": lambda z, t: CE(z, ignoring(z), label_smoothing=0.1, temperature=0.7, softcap=3.0, z_loss=0.2, base=2.0) + 0 * t.sum(),
    "dense": lambda z, t: CE(z, torch.softmax(t, -1)),
    "Probabilities": lambda z, t: CE(z, Probabilities(torch.softmax(t, -1)), reduction="sum"),
    "Logits": lambda z, t: CE(z, Logits(t)),
    "bucket": lambda z, t: CE(z, TopK(*listed(z, t))) + KL(TopK(*listed(z, t)), z) + KL(z, TopK(*listed(z, t))),
    "renormalize": lambda z, t: CE(z, TopK(*listed(z, t), tail="renormalize")) + KL(TopK(*listed(z, t), tail="renormalize"), z),
    "LinearTeacher": lambda z, t: CE(z, LinearTeacher(t[:, :3], head)) + KL(z, LinearTeacher(t[:, :3], head)),
    "forward": lambda z, t: KL(t, z, reduction="mean"),
    "reverse": lambda z, t: KL(z, t, temperature=2.0, reduction="none").sum(),
    "probabilities both": lambda z, t: KL(Probabilities(torch.softmax(z, -1)), Probabilities(torch.softmax(t, -1))),
    "js": lambda z, t: JS(t, z, beta=0.3),
    "entropy": lambda z, t: softcurve.entropy(z).sum() + 0 * t.sum(),
    "jacobian": lambda z, t: softcurve.softmax_jacobian(z).sin().sum() + softcurve.softmax_jacobian_product(z, t).cos().sum(),
    "module": lambda z, t: softcurve.nn.CrossEntropyLoss(label_smoothing=0.1)(z, index(z)) + 0 * t.sum(),
}


def evaluated(f, rows, dtype=f64):
    torch.manual_seed(rows)
    z, t = (torch.randn(rows, 5, dtype=dtype).requires_grad_() for _ in range(2))
    value = f(z, t)
    return [value.detach(), *torch.autograd.grad(value, (z, t))]


def worst(got, expected):
    return max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(got, expected, strict=True))


def together(names):  # in one graph, for a compilation costs as much as many of its nodes
    return lambda z, t: sum(n * LOSSES[name](z, t) for n, name in enumerate(names, start=1))
"""


def compiled(run_forked: Callable[[str], object], body: str) -> dict[str, float]:
    done = run_forked(PREAMBLE + body)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[attr-defined]


def assert_small(found: dict[str, float], count: int) -> None:
    assert len(found) == count
    assert {name: error for name, error in found.items() if not error <= 1e-12} == {}


@pytest.mark.slow
def test_fullgraph(run_forked: Callable[[str], object]) -> None:
    """All of the losses, several of them in each graph."""
    body = """
groups = [list(LOSSES)[first::3] for first in range(3)]
print(json.dumps({
    ", ".join(names): worst(evaluated(torch.compile(together(names), fullgraph=True, backend="aot_eager"), 6), evaluated(together(names), 6))
    for names in groups
}))
"""
    assert_small(compiled(run_forked, body), 3)


@pytest.mark.slow
def test_dynamic_shapes(run_forked: Callable[[str], object]) -> None:
    """A graph made for one batch serves batches of any size: none of them compiles anew."""
    body = """
found = {}
for names in (("index", "Logits", "reverse"),):
    f = together(names)
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    g = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    errors, compiled = [], []
    for rows in (4, 9, 17):
        errors.append(worst(evaluated(g, rows), evaluated(f, rows)))
        compiled.append(backend.frame_count)
    found[" ".join(names)] = max(errors) + compiled[-1] - compiled[0]
print(json.dumps(found))
"""
    assert_small(compiled(run_forked, "import torch._dynamo.testing\n" + body), 1)


@pytest.mark.slow
def test_func_grad(run_forked: Callable[[str], object]) -> None:
    """Compiled, ``torch.func.grad`` passes by an autograd.Function's backward; the gradient is right all the same."""
    body = """
def of(f):
    return f(*torch.randn(2, 6, 5, dtype=f64, generator=torch.Generator().manual_seed(3)))

found = {}
for names in (("index", "dense"), ("renormalize", "reverse")):
    torch._dynamo.reset()
    gradient = torch.func.grad(together(names), (0, 1))
    found[" ".join(names)] = worst(of(torch.compile(gradient, fullgraph=True, backend="aot_eager")), of(gradient))
print(json.dumps(found))
"""
    assert_small(compiled(run_forked, body), 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(run_forked: Callable[[str], object]) -> None:
    """The default backend, which makes code of its own for the row passes."""
    body = """
f = lambda z, t: LOSSES["index"](z, t) + LOSSES["forward"](z, t)
print(json.dumps({"both": worst(evaluated(torch.compile(f, fullgraph=True), 6), evaluated(f, 6))}))
"""
    assert_small(compiled(run_forked, body), 1)
