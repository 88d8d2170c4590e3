"""Which heads answer with unmade logits, with adapters, in compiled code and in several processes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import softcurve
from softcurve import lazy_logits
from softcurve.lazy import LazyLogits

from . import process_cases
from .lazy_cases import (
    CONSUMED,
    INDEX,
    C,
    Y,
    check,
    features,
    model,
    numbers,
    same,
)

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
        ((model(),), ValueError, r"head must be given for a Sequential, which has no get_.*such as head="),
        ((model(), "3"), ValueError, r"must be the name of one module .* got '3', which names none; .* \['0', '2'\]"),
        ((nn.Sequential(model(), model()), "2"), ValueError, r"names \['0\.2', '1\.2'\]"),
        (
            (model(), nn.Linear(2, 3)),
            ValueError,
            "head must be a module of the model or its name, got a Linear outside",
        ),
        ((model(), "1"), TypeError, r"head must be a torch\.nn\.Linear, .* got .*Tanh; pass the linear layer itself"),
        ((nn.Sequential(Renamed(4, 2)), "0"), TypeError, r"got .*\.Renamed"),
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


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_steps_of_optimizers_are_changes(options):
    net, x = model(dtype=torch.float32), features(3, dtype=torch.float32)
    with lazy_logits(net, "2"):
        z = net(x)
        F.cross_entropy(z, Y[0]).backward()
        torch.optim.AdamW(net[0].parameters(), **options).step()
        assert z.argmax(-1).shape == (3,)  # the head has not been changed
        optimizer = torch.optim.AdamW(net.parameters(), **options)
        optimizer.step()
        for use in (lambda: z.argmax(-1), lambda: F.cross_entropy(z, Y[0]), z.materialize):
            with pytest.raises(RuntimeError, match="as by an optimizer step"):
                use()
        made = net(x)
        expected = made.materialize().clone()
        optimizer.step()
        assert made.argmax(-1).equal(expected.argmax(-1))
        assert not net(x).materialize().equal(expected)


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
    capped = torch.tanh(z[:-1].contiguous().double() / 2) * 2
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
