"""What stands around the operators: a head inside a model, the preconditioner of a solve, and memory as classes grow."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

from softcurve.curvature import GGN, Hessian, split_head


class Tied(nn.Module):
    """A language model of sorts, its head tied to the embedding and deep inside; what follows the head must not run."""

    def __init__(self, vocabulary: int = 11, width: int = 4, *, tied: bool = True) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "embedding": nn.Embedding(vocabulary, width),
                "mixer": nn.Sequential(nn.Linear(width, width), nn.Tanh()),
                "output": nn.ModuleDict({"lm_head": nn.Linear(width, vocabulary, bias=False)}),
            }
        )
        if tied:
            self.body["output"]["lm_head"].weight = self.body["embedding"].weight

    def forward(self, tokens: torch.Tensor, *, strict: bool = False) -> torch.Tensor:
        logits = self.body["output"]["lm_head"](self.body["mixer"](self.body["embedding"](tokens)))
        if strict:
            raise AssertionError("this stands behind the head")
        return logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_cut_at_its_head(tied):
    model, tokens = Tied(tied=tied).double(), torch.randint(11, (3, 5))
    features, head = split_head(model, "body.output.lm_head")
    torch.testing.assert_close(head(features(tokens, strict=True)), model(tokens), rtol=0, atol=0)
    assert head is model.body["output"]["lm_head"]
    names = [name for name, _ in features.named_parameters()]
    assert "model.body.embedding.weight" in names
    assert not any("lm_head" in name for name in names)
    data = [({"tokens": tokens, "strict": True}, tokens)]
    operator = Hessian(features, head, data, shift=1)
    size = sum(p.numel() for p in model.parameters())  # a tied weight once
    assert operator.shape == (size, size)
    assert operator.layout.names[-1] == ("features.model.body.mixer.0.bias" if tied else "head.weight")

    # The dense Hessian of the model's own loss, over the same parameters.
    places = {id(p): i for i, p in enumerate(operator.layout.tensors)}
    own = dict(model.named_parameters())

    def loss(*values: torch.Tensor) -> torch.Tensor:
        z = torch.func.functional_call(
            model, {name: values[places[id(p)]] for name, p in own.items()}, (tokens,), tie_weights=True
        )
        return nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    values = tuple(p.detach() for p in operator.layout.tensors)
    rows = torch.autograd.functional.hessian(loss, values)
    dense = torch.cat([torch.cat([b.reshape(v.numel(), -1) for b in r], 1) for r, v in zip(rows, values, strict=True)])
    torch.testing.assert_close(operator.to_dense(), dense, rtol=1e-9, atol=1e-12)


def test_a_head_that_is_not_there_is_named():
    model = Tied()
    with pytest.raises(ValueError, match=r"head must be the name of a Linear of the model, one of \['body.mixer.0'"):
        split_head(model, "lm_head")
    with pytest.raises(TypeError, match=r"head must name a torch\.nn\.Linear, got Embedding at 'body\.embedding'"):
        split_head(model, "body.embedding")


def test_a_head_that_is_not_called_is_an_error():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    features, head = split_head(Idle(), "head")
    with pytest.raises(ValueError, match="model must call its head"):
        GGN(features, head, [(torch.randn(4, 3), torch.zeros(4).long())]) @ torch.randn(8)


# --- solving ---------------------------------------------------------------------------------------------------------


def network(classes: int = 9) -> tuple[nn.Module, nn.Linear, list[tuple[torch.Tensor, torch.Tensor]]]:
    features, head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double(), nn.Linear(5, classes).double()
    x, y = torch.randn(40, 4).double(), torch.randint(classes, (40,))
    return features, head, [(x[:7], y[:7]), (x[7:], y[7:])]


def test_the_preconditioners_spare_iterations():
    operator = GGN(*network())
    b = torch.randn(operator.shape[0]).double()
    expected = torch.linalg.solve(operator.to_dense() + 1e-4 * torch.eye(len(b)).double(), b)

    def iterations(preconditioner: Callable[[torch.Tensor], torch.Tensor] | None) -> int:
        found = operator.solve(b, damping=1e-4, tol=1e-9, max_iterations=2000, preconditioner=preconditioner)
        assert found.converged.all()
        torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        return found.iterations

    plain = iterations(None)
    for options, share in (
        ({"kind": "kronecker", "form": "dense"}, 0.7),
        ({"kind": "kronecker", "form": "low_rank"}, 0.7),
        ({"kind": "nystrom", "products": 30}, 0.6),
        ({}, 0.8),
    ):
        assert iterations(operator.preconditioner(1e-4, **options)) < share * plain, options


@pytest.mark.parametrize("kind", ["kronecker", "nystrom"])
def test_the_preconditioner_is_symmetric_and_positive(kind):
    operator = GGN(*network())
    dense = operator.preconditioner(1e-3, kind=kind)(torch.eye(operator.shape[0]).double())
    torch.testing.assert_close(dense, dense.T, rtol=1e-9, atol=1e-9)
    assert torch.linalg.eigvalsh(dense)[0] > 0


def test_a_nystrom_preconditioner_of_full_rank_is_the_inverse():
    operator = GGN(*network())
    n = operator.shape[0]
    whole = operator.preconditioner(0.1, kind="nystrom", products=n)(torch.eye(n).double())
    inverse = torch.linalg.inv(operator.to_dense() + 0.1 * torch.eye(n).double())
    torch.testing.assert_close(
        whole / whole.diagonal().mean(), inverse / inverse.diagonal().mean(), rtol=1e-7, atol=1e-8
    )


def test_a_preconditioner_of_digits_spares_iterations():
    """Of a head alone by Kronecker's factors, of a network by Nyström's method, without being told."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16)[:300], torch.tensor(digits.target)[:300]
    cases = [
        (nn.Identity(), nn.Linear(64, 10).double(), 0.4),
        (nn.Sequential(nn.Linear(64, 16), nn.Tanh()).double(), nn.Linear(16, 10).double(), 0.75),
    ]
    for features, head, share in cases:
        operator = GGN(features, head, [(x, y)])
        b = torch.randn(operator.shape[0]).double()
        plain = operator.solve(b, damping=1e-3)
        helped = operator.solve(b, damping=1e-3, preconditioner=operator.preconditioner(1e-3))
        assert helped.converged
        assert helped.iterations < share * plain.iterations


def test_the_factors_are_of_all_batches():
    features, head, data = network()
    factors = GGN(features, head, data).kfac(form="dense")
    e = features(torch.cat([x for x, _ in data])).detach()
    p = torch.softmax(head(e), -1).detach()
    torch.testing.assert_close(
        factors.classes.to_dense(), (torch.diag(p.sum(0)) - p.T @ p) / 40, rtol=1e-10, atol=1e-14
    )


def test_a_preconditioner_needs_a_head_of_its_own():
    features, head, data = network()
    head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="head must have a weight of its own that is trained"):
        GGN(features, head, data).preconditioner(0.1, kind="kronecker")
    head.weight.requires_grad_(True)
    head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="head must be trained whole"):
        GGN(features, head, data).preconditioner(0.1, kind="kronecker")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_head_that_computes_its_weight_is_refused():
    features, head, data = network()
    with pytest.raises(TypeError, match="head must hold its weight and bias as parameters"):
        GGN(features, nn.utils.parametrizations.weight_norm(head), data)


def test_a_head_with_a_forward_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.1 * super().forward(x)

    features, _, data = network()
    with pytest.raises(TypeError, match=r"head must compute W e \+ b as torch.nn.Linear does, got a Scaled"):
        GGN(features, Scaled(5, 9).double(), data)


def test_reentrant_checkpoints_are_refused():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = nn.Linear(4, 5).double(), reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x.clone().requires_grad_(), use_reentrant=self.reentrant).tanh()

    _, head, data = network()
    features = Checkpointed(True)
    operator = GGN(features, head, data)
    with pytest.raises(ValueError, match="features must not use reentrant checkpoints"):
        operator.to_dense()
    features.reentrant = False
    plain = GGN(nn.Sequential(features.inner, nn.Tanh()), head, data)
    torch.testing.assert_close(operator.to_dense(), plain.to_dense(), rtol=1e-12, atol=1e-14)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
@pytest.mark.parametrize("matrix", ["Gauss-Newton", "Hessian"])
@pytest.mark.parametrize("classes", [50_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_memory_stays_flat_as_classes_grow(run_python, matrix, classes):
    code = (
        "from bench import curvature\n"
        f"curvature.print_memory({matrix!r}, curvature.OURS, 1, curvature.Shape(256, 64, {classes}), curvature.BUDGET)"
    )
    found = json.loads(run_python(code).stdout.splitlines()[-1])
    assert found["extra_mb"] - found["vector_mb"] < 96
