"""Products with second-order matrices of a network with two layers and a head, compared with curvlinops.

A case is identified by its name, so that a fresh process can construct the same run with :func:`prepared`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import softcurve as sc
from bench import measure, peers
from softcurve import curvature

Run = Callable[[], object]

OURS, PEER = "softcurve", "curvlinops"
MATRICES = {"Gauss-Newton": curvature.GGN, "Hessian": curvature.Hessian}
THEIRS = {"Gauss-Newton": "GGNLinearOperator", "Hessian": "HessianLinearOperator"}


class Shape(NamedTuple):
    """The shape of the head."""

    rows: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"({self.rows}, {self.width}, {self.classes})"


SHAPE = Shape(1024, 256, 50257)
GROWING = [Shape(256, 64, classes) for classes in (10_000, 50_000, 500_000)]
BUDGET = 64 * 2**20


class Network(NamedTuple):
    """Features, a head, one batch of data, and the number of parameters."""

    features: nn.Sequential
    head: nn.Linear
    data: list[tuple[Tensor, Tensor]]
    size: int

    @staticmethod
    def of(shape: Shape) -> Network:
        """Create a network with fixed random numbers."""
        torch.manual_seed(0)
        features = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, shape.width), nn.ReLU())
        head = nn.Linear(shape.width, shape.classes)
        data = [(torch.randn(shape.rows, 64), torch.randint(shape.classes, (shape.rows,)))]
        size = sum(p.numel() for module in (features, head) for p in module.parameters())
        return Network(features, head, data, size)


def prepared(matrix: str, who: str, columns: int, shape: Shape, budget: int | None = None) -> Run:
    """Return a function that computes a product with ``columns`` fixed random columns."""
    network = Network.of(shape)
    vectors = torch.randn(network.size, columns)
    if who == OURS:
        operator = MATRICES[matrix](network.features, network.head, network.data, memory_budget=budget)
        return lambda: operator @ vectors
    theirs = _curvlinops(matrix, network)
    return lambda: theirs @ vectors


def _curvlinops(matrix: str, network: Network) -> torch.Tensor:
    import curvlinops

    model = nn.Sequential(network.features, network.head)
    make = getattr(curvlinops, THEIRS[matrix])
    operator: torch.Tensor = make(
        model, nn.CrossEntropyLoss(), list(model.parameters()), network.data, check_deterministic=False
    )
    return operator


def floor(shape: Shape, products: int) -> Run:
    """Return a function that computes this number of matrix products: the logits and the two gradients in turn."""
    e, weight = torch.randn(shape.rows, shape.width), torch.randn(shape.classes, shape.width)
    logits, back, gradient = torch.empty(shape.rows, shape.classes), torch.empty_like(e), torch.empty_like(weight)
    kinds: tuple[Run, ...] = (
        lambda: torch.mm(e, weight.T, out=logits),
        lambda: torch.mm(logits, weight, out=back),
        lambda: torch.mm(logits.T, e, out=gradient),
    )

    def run() -> None:
        for number in range(products):
            kinds[number % 3]()

    return run


# --- the head alone ---------------------------------------------------------------------------------------------------


def head_runs(shape: Shape) -> dict[str, Run]:
    """Return functions that compute the closed forms of a head, and its loss with gradients."""
    network = Network.of(shape)
    e = network.features(network.data[0][0]).detach().requires_grad_()
    weight, bias, target = network.head.weight, network.head.bias, network.data[0][1]

    def gradients() -> object:
        return torch.autograd.grad(sc.linear_cross_entropy(e, weight, target, linear_bias=bias), (e, weight, bias))

    of_head = curvature.HeadCurvature(e.detach(), weight, target, linear_bias=bias)
    return {"loss + gradients": gradients, "diagonal": of_head.diagonal, "trace": of_head.trace}


# --- eigenvalues ------------------------------------------------------------------------------------------------------

TOKENS, WIDTH, VOCABULARY, EIGENVALUES = (8, 64), 128, 8192, 3


class Transformer(nn.Module):
    """Token embeddings and two layers with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        e: Tensor = self.layers(self.embedding(tokens), mask=mask, is_causal=True)
        return e


def eigenvalue_runs() -> dict[str, Run]:
    """Return functions that compute the largest eigenvalues of a Gauss-Newton matrix, and as many single products."""
    torch.manual_seed(0)
    data = [(torch.randint(VOCABULARY, TOKENS), torch.randint(VOCABULARY, TOKENS))]
    operator = curvature.GGN(Transformer(), nn.Linear(WIDTH, VOCABULARY), data)
    vector, count = torch.randn(operator.shape[0]), operator.eigsh(EIGENVALUES).products

    def products() -> None:
        for _ in range(count):
            operator @ vector

    return {OURS: lambda: operator.eigsh(EIGENVALUES), f"{count} products": products}


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(matrix: str, who: str, columns: int, shape: Shape, budget: int | None = None) -> dict[str, float | str]:
    """Measure the extra peak memory of a product in a fresh process, and the size of a parameter vector, in MB."""
    call = f"curvature.print_memory({matrix!r}, {who!r}, {columns}, curvature.Shape(*{tuple(shape)}), {budget})"
    found: dict[str, float | str] = json.loads(
        measure.in_fresh_process(f"from bench import curvature\n{call}\n").splitlines()[-1]
    )
    return found


def print_memory(matrix: str, who: str, columns: int, shape: Shape, budget: int | None) -> None:
    """Measure and print the memory of a product; intended for a fresh process."""
    try:
        prepared(matrix, who, columns, Shape(8, 16, 50))()  # loads everything that the first use loads
        run = prepared(matrix, who, columns, shape, budget)
        figures: dict[str, float | str] = {"extra_mb": measure.extra_peak_of(run)}
    except Exception as error:
        figures = {"note": peers.reason(error)}
    figures["vector_mb"] = Network.of(shape).size * 4 / 2**20
    print(json.dumps(figures))
