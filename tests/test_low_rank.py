"""A weight of low rank equals the dense weight that it stands for, which it never forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import softcurve
from softcurve import LinearTeacher, LowRankWeight
from softcurve.curvature import Direction, HeadCurvature

from .cases import BY_NAME, Problem, assert_same, derivatives, everything, least_of, problem
from .pairwise import pairwise
from .placement import DEVICE
from .test_head_conformance import products_of
from .test_head_memory import PREAMBLE

F64 = torch.float64
RANK = 2
TILINGS = {"one row": ((), 5, 7), "one class": ((3,), 5, 1), "whole": ((2, 6), 5, 23), "cut": ((12,), 5, 601)}
NAMES = [
    *(f"cross_entropy-{kind}" for kind in ("indices", "float", "bucket", "LinearTeacher")),
    *("forward-bucket", "forward-renormalize", "forward-LinearTeacher of other classes", "reverse-Logits"),
    *("reverse-LinearTeacher", "js0.3-Logits", "js0.3-Probabilities"),
]
SETTINGS = pairwise(
    {
        "name": NAMES,
        "options": ("none", "everything"),
        "reduction": ("none", "mean", "batchmean"),
        "tiling": tuple(TILINGS),
        "wanted": ("all", "adapter"),
    },
    lambda name, level, other, value: (
        not (value in ("one row", "one class") and name == "name" and BY_NAME[level].kind.listed)
    ),
)


def factors(posed: Problem) -> tuple[Tensor, Tensor, Tensor]:
    x, w, *_ = posed.arguments
    a, b = torch.randn(len(w), RANK, dtype=F64), torch.randn(RANK, x.shape[-1], dtype=F64) / 2
    return a.requires_grad_(), b.requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_equals_the_dense_weight(setting: dict[str, Any]) -> None:
    """Value, gradients and Hessian product in features, all factors, the scale, bias, target and sample weights."""
    case = BY_NAME[setting["name"]]
    options = everything(case, "shift", "ignore_index", "weight") if setting["options"] == "everything" else {}
    rows, features, classes = TILINGS[setting["tiling"]]
    posed = problem(case, options, setting["reduction"], rows, features, classes)
    (x, w, *rest), low = posed.arguments, factors(posed)
    if setting["wanted"] == "adapter":
        x, w = x.detach(), w.detach()
    wanted = tuple(t for t in (x, w, *low, *rest) if t.requires_grad)
    budget = None
    if setting["tiling"] == "cut":
        with pytest.raises(ValueError, match="memory_budget") as refused:
            posed.ours(x, LowRankWeight(w, *low), *rest, memory_budget=1)
        budget = max(least_of(str(refused.value)), posed.budget("tiles"))
    value = posed.ours(x, LowRankWeight(w, *low), *rest, memory_budget=budget)
    truth = posed.dense(x, w + low[2] * low[0] @ low[1], *rest)
    assert_same(value, truth, "value")
    for n, (got, right) in enumerate(zip(derivatives(value, wanted), derivatives(truth, wanted), strict=True)):
        assert_same(got, right, f"derivative {n}")


# torch's own doing when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("without_shape_checks")
def test_second_derivatives_by_forward_and_reverse_mode() -> None:
    x, w, a, b = (torch.randn(shape, dtype=F64, requires_grad=True) for shape in ((3, 2), (4, 2), (4, 1), (1, 2)))
    y, scale = torch.tensor([0, 3, 1]), torch.tensor(0.7, dtype=F64, requires_grad=True)

    def loss(*given: Tensor) -> Tensor:
        x, *factors = given
        return softcurve.linear_cross_entropy(x, LowRankWeight(*factors), y, reduction="none", temperature=0.7)

    given = (x, w, a, b, scale)
    assert torch.autograd.gradgradcheck(loss, given, check_fwd_over_rev=True, fast_mode=True)
    tangents = tuple(torch.randn_like(t) for t in given)

    def twice(f: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(lambda *p: torch.func.jvp(f, p, tangents)[1], tuple(t.detach() for t in given), tangents)

    def dense(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(x @ (w + scale * a @ b).T / 0.7, y, reduction="none")

    for got, truth in zip(twice(loss), twice(dense), strict=True):
        assert_same(got, truth)


@pytest.mark.parametrize("options", [{}, {"memory_budget": 20_000}], ids=["whole", "cut"])
def test_as_a_teacher(options: dict[str, int]) -> None:
    """Of another width and rank, with the model's weight of low rank too; all classes and chosen ones."""
    x, w, a, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((7, 4), (60, 4), (60, 2), (2, 4)))
    t, u, c, d = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((7, 3), (70, 3), (70, 1), (1, 3)))
    chosen, leaves = torch.randperm(70)[:60], (x, w, a, b, t, u, c, d)
    for classes in (slice(5, 65), chosen):
        teacher = LinearTeacher(t, LowRankWeight(u, c, d, -0.4), classes=classes, scale=0.7)
        ours = softcurve.linear_js_divergence(x, LowRankWeight(w, a, b), teacher, beta=0.3, **options)
        logits = (0.7 * t @ (u - 0.4 * c @ d).T)[:, classes]
        truth = softcurve.js_divergence(logits, x @ (w + a @ b).T, beta=0.3)
        for got, right in zip((ours, *derivatives(ours, leaves)), (truth, *derivatives(truth, leaves)), strict=True):
            assert_same(got, right)
        on_logits = softcurve.js_divergence(teacher, x @ (w + a @ b).T, beta=0.3)
        assert_same(on_logits, truth)


def test_edges() -> None:
    """No rows; a masked class; a common offset of 1e4, which a temperature must not round."""
    w, a, b = torch.randn(9, 4, dtype=F64), torch.randn(9, 2, dtype=F64), torch.randn(2, 4, dtype=F64)
    low, dense, x = LowRankWeight(w, a, b, 0.5), w + 0.5 * a @ b, torch.randn(5, 4, dtype=F64)
    assert softcurve.linear_cross_entropy(x[:0], low, torch.zeros(0).long(), reduction="sum") == 0
    for bias in (
        torch.randn(9, dtype=F64).index_fill(0, torch.tensor([2]), -torch.inf),
        torch.full((9,), 1e4).double(),
    ):
        for options in ({}, {"temperature": 0.7}, {"softcap": 3.0, "label_smoothing": 0.1}):
            got = softcurve.linear_cross_entropy(x, low, torch.arange(5) + 3, linear_bias=bias, **options)
            truth = softcurve.cross_entropy(x @ dense.T + bias, torch.arange(5) + 3, **options)
            assert_same(got, truth, bound=1e-9 if bias[0] == 1e4 else 1e-12)
    with pytest.raises(ValueError, match="linear_weight b must hold numbers"):
        softcurve.linear_cross_entropy(x, LowRankWeight(w, a, b * torch.nan), torch.arange(5))
    with pytest.raises(ValueError, match="linear_weight a must hold numbers"):
        softcurve.linear_cross_entropy(x, LowRankWeight(w, a * torch.nan, b), torch.arange(5))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision(adapter: torch.dtype) -> None:
    """A frozen bfloat16 head with a float32 or bfloat16 adapter: no further from float64 than the dense computation."""
    x, w = torch.randn(40, 32).bfloat16().requires_grad_(), torch.randn(203, 32).bfloat16()
    a, b = ((torch.randn(shape) / 4).to(adapter).requires_grad_() for shape in ((203, 3), (3, 32)))
    y, leaves = torch.randint(203, (40,)), (x, a, b)

    def dense(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = F.linear(F.linear(x.to(a.dtype), b), a)
        return F.cross_entropy(F.linear(x, w.to(x.dtype)) + 0.5 * low.to(x.dtype), y, reduction="sum")

    value = softcurve.linear_cross_entropy(x, LowRankWeight(w, a, b, 0.5), y, reduction="sum")
    assert value.dtype == torch.float32
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    plain, truth = dense(*leaves), dense(*exact)
    found = [(v.detach(), *torch.autograd.grad(v, of)) for v, of in ((value, leaves), (plain, leaves), (truth, exact))]
    for got, other, right in zip(*found, strict=True):
        assert (got.double() - right).norm() <= (other.double() - right).norm() + 1e-6 * right.norm()
    assert [t.dtype for t in found[0][1:]] == [t.dtype for t in leaves]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        under = softcurve.linear_cross_entropy(x, LowRankWeight(w, a, b, 0.5), y, reduction="sum")
    assert under.dtype == torch.float32
    assert abs(under / truth - 1) < 1e-2


def test_a_frozen_weight_costs_no_gradient_product() -> None:
    x, w, a, b = torch.randn(64, 32), torch.randn(512, 32), torch.randn(512, 4), torch.randn(4, 32)
    target, one = torch.arange(64), 64 * 512

    def columns(*frozen: Tensor) -> float:
        for t in (x, w, a, b):
            t.requires_grad_(all(t is not each for each in frozen))
        shapes = products_of(lambda: softcurve.linear_cross_entropy(x, LowRankWeight(w, a, b), target).backward())
        return sum(m * k * n for m, k, n in shapes) / one

    small = 4 * 64 * 32 * 4 / one  # the products with b
    assert columns(x, w) <= 1 * 32 + 3 * 4 + 32 + small  # logits; features of the adapter's input; a
    assert columns() <= 3 * 36 + small


def test_curvature() -> None:
    """The derivatives with respect to the sum, and the numbers that closed forms give."""
    x, w, a, b = (torch.randn(s, dtype=F64) for s in ((9, 4), (33, 4), (33, 2), (2, 4)))
    bias, y, low = torch.randn(33, dtype=F64), torch.randint(33, (9,)), LowRankWeight(w, a, b, -0.7)
    direction = Direction(torch.randn_like(x), torch.randn_like(w), torch.randn_like(bias))
    dense = HeadCurvature(x, w - 0.7 * a @ b, y, linear_bias=bias, temperature=0.7)
    for options in ({}, {"memory_budget": 20_000}):
        head = HeadCurvature(x, low, y, linear_bias=bias, temperature=0.7, **options)
        assert repr(head) == repr(dense)
        for name in ("hvp", "ggnvp"):
            for got, truth in zip(getattr(head, name)(direction), getattr(dense, name)(direction), strict=True):
                assert_same(got, truth, name)
        assert_same(head.diagonal().weight, dense.diagonal().weight)
        assert_same(head.gradient_norms(), dense.gradient_norms())
        assert_same(head.kfac().product(w, bias)[0], dense.kfac().product(w, bias)[0])
        assert head.trace() == pytest.approx(dense.trace(), rel=1e-12)
        assert head.largest_eigenvalue_bound() == pytest.approx(dense.largest_eigenvalue_bound(), rel=1e-12)


# --- from peft ---------------------------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """The attributes of a LoRA ``Linear`` of peft, and its forward pass without dropout."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 11)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 3, bias=False), "other": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 11, bias=False), "other": nn.Linear(2, 11, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity(), "other": nn.Dropout(0.1)})
        self.scaling = {"default": 0.5, "other": 2.0}
        self.active_adapters, self.merged, self.disable_adapters = ["default"], False, False
        self.use_dora, self.lora_magnitude_vector = {"default": False}, nn.ModuleDict()
        for name, value in changes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        name = self.active_adapters[0]
        return self.base_layer(x) + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))


@pytest.mark.parametrize("name", ["default", "other"])
def test_from_peft(name: str) -> None:
    module = LoraLinear(active_adapters=[name, "of another layer"]).eval()
    weight = LowRankWeight.from_peft(module)
    assert weight.a is module.lora_B[name].weight
    x, y = torch.randn(5, 6), torch.arange(5)
    loss = softcurve.linear_cross_entropy(x, weight, y, linear_bias=module.base_layer.bias)
    truth = F.cross_entropy(module(x), y)
    parameters = (module.lora_A[name].weight, module.lora_B[name].weight, module.base_layer.weight)
    for got, right in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(truth, parameters), strict=True):
        assert_same(got, right, bound=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"active_adapters": ["default", "other"]}, "one active adapter, got .*default.*other"),
        ({"active_adapters": []}, "one active adapter, got none"),
        ({"active_adapters": "other"}, r"no dropout in training mode, got p=0\.1"),
        ({"merged": True}, "not be merged"),
        ({"disable_adapters": True}, "adapters enabled"),
        ({"use_dora": {"default": True}}, "not use DoRA"),
        ({"lora_magnitude_vector": nn.ModuleDict({"default": nn.Identity()})}, "not use DoRA"),
        ({"lora_variant": {"default": object()}}, "not use DoRA or another variant"),
        ({"lora_B": nn.ModuleDict({"default": nn.Linear(3, 11)})}, "without a bias"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_from_peft_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"module must .*{words}"):
        LowRankWeight.from_peft(LoraLinear(**changes))


@pytest.mark.parametrize("module", [nn.Linear(2, 3), LoraLinear(base_layer=nn.Embedding(3, 2)), nn.Identity()])
def test_from_peft_of_another_module(module: Any) -> None:
    with pytest.raises(TypeError, match=r"module must be a LoRA layer of peft around a torch\.nn\.Linear, .* got"):
        LowRankWeight.from_peft(module)


# --- errors, compilation, memory ---------------------------------------------------------------------------------------

BAD = {
    "LowRankWeight(w, a.long(), b)": ("TypeError", "LowRankWeight a must be a floating-point tensor"),
    "LowRankWeight([1.0], a, b)": ("TypeError", "LowRankWeight weight must be"),
    "LowRankWeight(w, b, a)": ("ValueError", "LowRankWeight a must be of shape (5, 3)"),
    "LowRankWeight(w, a, b.T)": ("ValueError", "LowRankWeight b must be of shape (2, 3)"),
    "LowRankWeight(w[0], a, b)": ("ValueError", "LowRankWeight a must be of shape"),
    "LowRankWeight(w, a, b, scale='1')": ("ValueError", "LowRankWeight scale must be a finite number"),
    "LowRankWeight(w, a, b, scale=torch.ones(1))": ("ValueError", "0-d floating-point tensor"),
    "loss(x[:, :2], LowRankWeight(w, a, b), y)": ("ValueError", "linear_weight must be of shape (C, 2)"),
}


def test_errors_and_compiled_calls(run_python: Callable[[str], object]) -> None:
    """In a process without the checks of shapes, which break graphs and come before our errors."""
    body = f"""
import json, torch, softcurve
from softcurve import LinearTeacher, LowRankWeight
x, w, a, b = (torch.randn(shape) for shape in ((4, 3), (5, 3), (5, 2), (2, 3)))
y, loss, found = torch.arange(4), softcurve.linear_cross_entropy, []
for code in {list(BAD)!r}:
    try:
        found.append(["returned", str(eval(code))])
    except Exception as error:
        found.append([type(error).__name__, str(error)])

def both(x, w, a, b):
    teacher = LinearTeacher(x.detach(), LowRankWeight(w, a, b), softcap=2.0, classes=torch.tensor([4, -1, 2, 2, 0]))
    return loss(x, LowRankWeight(w, a, b, 0.5), y) + softcurve.linear_kl_divergence(x, w, teacher)

given = [t.requires_grad_() for t in (x, w, a, b)]
results = []
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
    assert same == [True] * 5


def test_the_sum_is_never_there(run_python: Callable[[str], object]) -> None:
    """A weight of 196 MB: neither the sum nor its gradient is formed, which would be as large."""
    body = """
BUDGET = 32 << 20

def adapter(x, w):
    low = [t.requires_grad_() for t in (torch.randn(len(w), 4), torch.randn(4, x.shape[1]))]
    weight = softcurve.LowRankWeight(w.detach(), *low, 0.5)
    loss = softcurve.linear_cross_entropy(x, weight, torch.arange(len(x)) % len(w), memory_budget=BUDGET)
    return torch.autograd.grad(loss, (x, *low))

def dense(x, w):
    a, b = (t.requires_grad_() for t in (torch.randn(len(w), 4), torch.randn(4, x.shape[1])))
    loss = softcurve.linear_cross_entropy(
        x, w.detach() + 0.5 * a @ b, torch.arange(len(x)) % len(w), memory_budget=BUDGET
    )
    return torch.autograd.grad(loss, (x, a, b))

for work in (adapter, dense):
    warm_and_extra(work, 64, 1024, 50257)
"""
    done = run_python(PREAMBLE + body).stdout.splitlines()[-2:]  # type: ignore[attr-defined]
    ours, dense = map(json.loads, done)
    assert ours <= 64 < 196 < dense
