"""The head's operators, and ``torch.compile`` around them: one graph, whatever the losses, the shapes and the transforms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import softcurve
from softcurve.head.tensors import DIFFERENTIABLE

from .cases import BY_NAME, Case, along, directions, everything, problem
from .test_transforms import CHOSEN, everywhere
from .test_transforms import FEW as FEW_NAMES

FEW = [BY_NAME[name] for name in FEW_NAMES]

# torch's own doing when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


# --- operators ---------------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Every call of an operator of ``softcurve``, with its arguments as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func.namespace == "softcurve":
            copied = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
            self.calls.setdefault(func.name(), []).append((func, *copied))
        return func(*args, **kwargs)


def calls_of(cases: list[Case]) -> dict[str, list[Any]]:
    with Recorded() as recorded:
        for case in cases:
            for options in ({}, everything(case)):
                posed = problem(case, options, "mean", (5,), 3, 7)
                value = posed.ours(*posed.arguments)
                first = torch.autograd.grad(value, posed.arguments, create_graph=True, materialize_grads=True)
                torch.autograd.grad(along(first), posed.arguments, materialize_grads=True)
                posed.ours(*(a.detach() for a in posed.arguments), return_stats=True)
                arguments = tuple(a.detach() for a in posed.arguments)
                jvp(grad(posed.ours, everywhere(arguments)), arguments, directions(arguments))
        for options in ({}, {"linear_bias": torch.randn(7), "temperature": 0.7, "softcap": 2.5}):
            softcurve.linear_topk(torch.randn(5, 3), torch.randn(7, 3), 4, **options)
    return recorded.calls


def operators() -> set[str]:
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return {name for name in names if name.startswith("softcurve::")}


def test_every_operator_is_called() -> None:
    called = {name.split(".")[0] for name in calls_of(FEW)}
    assert operators()
    assert operators() == called


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", CHOSEN)
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, registration and AOT dispatch with dynamic shapes, on the arguments of real calls."""
    for calls in calls_of([BY_NAME[name]]).values():
        for func, args, kwargs in (calls[0], calls[-1]):  # without options, and with all of them
            torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("case", FEW[1::2], ids=str)
def test_opcheck_with_gradients(case: Case) -> None:
    """The operator's own derivatives, in all its tensors, with what was asked for saved and without."""
    func, args, _ = calls_of([case])["softcurve::head_losses"][-1]
    learned = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in args[:10]]
    wanted = [t is not None and t.requires_grad for t in learned[:DIFFERENTIABLE]]
    for saved in (wanted, [False] * DIFFERENTIABLE):
        torch.library.opcheck(func, (*learned, *args[10:-4], True, False, True, saved))


# --- torch.compile -----------------------------------------------------------------------------------------------------

PREAMBLE = """
import json, warnings, torch, softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK
# Dynamo's own doing when it traces an autograd.Function.
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
torch.set_num_threads(1)
torch.manual_seed(0)
f64 = torch.float64

CE, KL, JS = softcurve.linear_cross_entropy, softcurve.linear_kl_divergence, softcurve.linear_js_divergence
C = 11
weight, bias = torch.rand(C, dtype=f64) + 0.5, torch.randn(C, dtype=f64)


def index(x):
    return torch.arange(x.shape[0], device=x.device) % C


def ignoring(x):
    return torch.where(index(x) == 1, -100, index(x))


def listed(x, t):
    i = torch.stack([index(x), (index(x) + 2) % C], -1)
    return i, torch.log_softmax(t, -1).gather(-1, i)


module = softcurve.nn.LinearCrossEntropyLoss(3, C, bias=True, dtype=f64)

LOSSES = {
    "index": lambda x, w, t: CE(x, w, index(x)) + 0 * t.sum(),
    "weighted": lambda x, w, t: CE(x, w, ignoring(x), linear_bias=bias, weight=weight, sample_weight=t.exp().sum(-1)),
    "options": lambda x, w, t: CE(x, w, ignoring(x), label_smoothing=0.1, temperature=0.7, softcap=3.0, z_loss=0.2, base=2.0, shift=1) + 0 * t.sum(),
    "budget": lambda x, w, t: CE(x, w, index(x), memory_budget=1 << 20, reduction="none").cos().sum() + 0 * t.sum(),
    "dense": lambda x, w, t: CE(x, w, torch.softmax(t, -1)),
    "Logits": lambda x, w, t: CE(x, w, Logits(t)),
    "bucket": lambda x, w, t: CE(x, w, TopK(*listed(x, t))) + KL(x, w, TopK(*listed(x, t)), direction="reverse"),
    "renormalize": lambda x, w, t: KL(x, w, TopK(*listed(x, t), tail="renormalize")),
    "teacher": lambda x, w, t: KL(x, w, LinearTeacher(t[:, :2], w[:, :2], bias), temperature=2.0),
    "reverse": lambda x, w, t: KL(x, w, LinearTeacher(t[:, :2], w[:, :2]), direction="reverse", reduction="none").sum(),
    "js": lambda x, w, t: JS(x, w, Logits(t), beta=0.3),
    "alpha": lambda x, w, t: softcurve.linear_divergence(x, w, Logits(t), divergence=softcurve.AlphaDivergence(0.5)),
    "stats": lambda x, w, t: (lambda loss, s: loss * s.lse.mean() + s.entropy.sum() + s.log_probs.sum() * s.mean_logit.sum() + s.collision.sum() + s.correct.sum() + s.predicted.sum())(*CE(x, w, index(x), return_stats=True)) + 0 * t.sum(),
    "distillation": lambda x, w, t: (lambda loss, s: loss + (s.log_probs * s.collision).sum())(*softcurve.linear_distillation(x, w, index(x), Logits(t), alpha=0.4, temperature=2.0, weight=weight, exclude=(index(x).unsqueeze(-1) + 1) % C, return_stats=True)),
    "log_probs": lambda x, w, t: softcurve.linear_log_probs(x, w, listed(x, t)[0], exclude=(index(x).unsqueeze(-1) + 1) % C).log_probs.sum() + 0 * t.sum(),
    "module": lambda x, w, t: module(x @ w.T @ w, index(x)) + 0 * t.sum(),
}


def evaluated(f, rows):
    torch.manual_seed(rows)
    x, w, t = (torch.randn(s, dtype=f64).requires_grad_() for s in ((rows, 3), (C, 3), (rows, C)))
    value = f(x, w, t)
    return [value.detach(), *torch.autograd.grad(value, (x, w, t))]


def worst(got, expected):
    return max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(got, expected, strict=True))


def together(names):  # in one graph, for a compilation costs as much as many of its nodes
    return lambda x, w, t: sum(n * LOSSES[name](x, w, t) for n, name in enumerate(names, start=1))
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
for names in (("index", "budget"), ("reverse", "bucket")):
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
    assert_small(compiled(run_forked, "import torch._dynamo.testing\n" + body), 2)


@pytest.mark.slow
def test_compiled_func_and_evaluation(run_forked: Callable[[str], object]) -> None:
    """``torch.func.grad`` inside the graph, and losses without gradients."""
    body = """
def of(f):
    g = torch.Generator().manual_seed(3)
    return f(*(torch.randn(s, dtype=f64, generator=g) for s in ((6, 3), (C, 3), (6, C))))

found = {}
for name in ("index", "dense", "reverse"):
    torch._dynamo.reset()
    gradient = torch.func.grad(LOSSES[name], (0, 1, 2))
    found[name] = worst(of(torch.compile(gradient, fullgraph=True, backend="aot_eager")), of(gradient))
with torch.no_grad():
    f = together(("index", "dense", "reverse"))
    found["no_grad"] = worst([of(torch.compile(f, fullgraph=True, backend="aot_eager"))], [of(f)])
print(json.dumps(found))
"""
    assert_small(compiled(run_forked, body), 4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(run_forked: Callable[[str], object]) -> None:
    """The default backend, with a model around the head, in autocast as well."""
    body = """
f = lambda x, w, t: LOSSES["index"]((x @ w.T).tanh() @ w, w, t) + LOSSES["reverse"](x, w, t)
found = {"both": worst(evaluated(torch.compile(f, fullgraph=True), 6), evaluated(f, 6))}

def cast(x, w, t):
    with torch.autocast("cpu", torch.bfloat16):
        return CE((x.float() @ w.float().T).tanh() @ w.float(), w.float(), index(x)) + 0 * t.sum()

torch._dynamo.reset()
got, plain = evaluated(torch.compile(cast, fullgraph=True), 6), evaluated(cast, 6)
found["autocast"] = 0.0 if worst(got, plain) < 2e-2 else worst(got, plain)
print(json.dumps(found))
"""
    assert_small(compiled(run_forked, body), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_in_half_precision(dtype: torch.dtype) -> None:
    """What is not asked for, and gradients before they are rounded, have the dtypes that the fake says."""
    x, w = torch.randn(6, 3, dtype=dtype).requires_grad_(), torch.randn(11, 3, dtype=dtype).requires_grad_()
    with Recorded() as recorded:
        first = torch.autograd.grad(softcurve.linear_cross_entropy(x, w, torch.arange(6)), (x, w), create_graph=True)
        torch.autograd.grad(along(first), (x, w))
    for calls in recorded.calls.values():
        for func, args, kwargs in calls:
            torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("wrong", [-1, 301, 306])
@pytest.mark.parametrize("budget", [None, 16000], ids=["whole", "cut"])
def test_a_class_out_of_range_inside_a_transform(budget: int | None, wrong: int) -> None:
    """Where the public door cannot look, the operator does: never a plausible number."""
    x, w = torch.randn(4, 3), torch.randn(301, 3)

    def loss(target: Tensor) -> Tensor:
        return softcurve.linear_cross_entropy(x, w, target, memory_budget=budget)

    with pytest.raises(IndexError, match=f"from 0 to 300, got {wrong}"):
        vmap(loss)(torch.tensor([[0, wrong, 2, 3]]))
