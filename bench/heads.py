"""The cases of the benchmark of losses on features and a head.

A target is a tuple of tensors, so that all losses have the signature ``loss(input, linear_weight, *target)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

import softcurve as sc
from bench import measure, peers
from bench.peers import Loss

Tensors = tuple[Tensor, ...]
Run = Callable[[], Tensors]


class Shape(NamedTuple):
    """The numbers of rows and classes, and the width of the features."""

    rows: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"({self.rows}, {self.width}, {self.classes})"


@dataclass(frozen=True)
class Inputs:
    """The tensors to differentiate (features and weight), the target, and the direction of an HVP."""

    wanted: tuple[Tensor, Tensor]
    target: Tensors
    direction: Tensors = ()

    def in_float64(self) -> Inputs:
        """Return the same inputs in float64."""
        e, w = self.wanted
        target = tuple(t.double() if t.is_floating_point() else t for t in self.target)
        wanted = e.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        return Inputs(wanted, target, tuple(t.double() for t in self.direction))


# --- targets ----------------------------------------------------------------------------------------------------------

TOP_K = 64


def class_indices(shape: Shape, generator: Generator) -> Tensors:
    """Return one class per row."""
    return (torch.randint(shape.classes, (shape.rows,), generator=generator),)


def teacher(shape: Shape, generator: Generator) -> Tensors:
    """Return features and weight of a teacher that is 1.5 times as wide as the student."""
    return _features_and_weight(shape._replace(width=shape.width * 3 // 2), generator)


def probabilities(shape: Shape, generator: Generator) -> Tensors:
    """Return the dense probabilities of a teacher."""
    return (torch.nn.functional.linear(*teacher(shape, generator)).softmax(-1),)


def top_k(shape: Shape, generator: Generator) -> Tensors:
    """Return the classes and values of a teacher's largest log-probabilities."""
    logits = torch.nn.functional.linear(*teacher(shape, generator))
    log_probs, indices = logits.log_softmax(-1).topk(min(TOP_K, shape.classes))
    return indices, log_probs


def actions(shape: Shape, generator: Generator) -> Tensors:
    """Return one sampled token per row and its advantage."""
    return *class_indices(shape, generator), torch.randn(shape.rows, generator=generator)


def nothing(shape: Shape, generator: Generator) -> Tensors:
    """Return no target, for what is taken from a head alone."""
    return ()


def _features_and_weight(shape: Shape, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return random features and weights whose logits have standard deviation 2."""
    features = torch.randn(shape.rows, shape.width, generator=generator)
    weight = torch.randn(shape.classes, shape.width, generator=generator).mul_(2 / math.sqrt(shape.width))
    return features, weight


# --- softcurve --------------------------------------------------------------------------------------------------------


def _kl(e: Tensor, w: Tensor, te: Tensor, tw: Tensor, *, memory_budget: int | None) -> Tensor:
    return sc.linear_kl_divergence(e, w, sc.LinearTeacher(te, tw), memory_budget=memory_budget)


def _reverse_kl(e: Tensor, w: Tensor, te: Tensor, tw: Tensor, *, memory_budget: int | None) -> Tensor:
    target = sc.LinearTeacher(te, tw)
    return sc.linear_kl_divergence(e, w, target, direction="reverse", memory_budget=memory_budget)


def _js(e: Tensor, w: Tensor, te: Tensor, tw: Tensor, *, memory_budget: int | None) -> Tensor:
    return sc.linear_js_divergence(e, w, sc.LinearTeacher(te, tw), memory_budget=memory_budget)


def _top_k(e: Tensor, w: Tensor, indices: Tensor, log_probs: Tensor, *, memory_budget: int | None) -> Tensor:
    return sc.linear_kl_divergence(e, w, sc.TopK(indices, log_probs), memory_budget=memory_budget)


def _log_probs(e: Tensor, w: Tensor, index: Tensor, advantage: Tensor, *, memory_budget: int | None) -> Tensor:
    found = sc.linear_log_probs(e, w, index, memory_budget=memory_budget)
    assert found.log_probs is not None
    return torch.stack([found.log_probs, found.entropy])


def _list_of(k: int) -> Loss:
    """Return the log-probabilities of the ``k`` most probable classes of each row."""
    return lambda e, w, *, memory_budget: sc.linear_topk(e, w, k, memory_budget=memory_budget).log_probs


# --- runs -------------------------------------------------------------------------------------------------------------


def gradients(loss: Loss, given: Inputs) -> Run:
    """Return a function that computes the loss and its gradients."""
    return lambda: torch.autograd.grad(loss(*given.wanted, *given.target), given.wanted)


def values(loss: Loss, given: Inputs) -> Run:
    """Return a function that computes the loss without a graph."""
    return torch.no_grad()(lambda: (loss(*given.wanted, *given.target),))


def hessian(loss: Loss, given: Inputs) -> Run:
    """Return a function that computes the loss, its gradients and an HVP without a prepared graph."""
    return lambda: hessian_product(loss, given)()


def hessian_product(loss: Loss, given: Inputs) -> Run:
    """Return a function that computes only the HVP; the graph of the gradients is created here."""
    first = torch.autograd.grad(loss(*given.wanted, *given.target), given.wanted, create_graph=True)
    return lambda: first + torch.autograd.grad(first, given.wanted, given.direction, retain_graph=True)


def compiled_gradients(loss: Loss, given: Inputs) -> Run:
    """Return :func:`gradients` of the loss compiled for this shape."""
    return gradients(torch.compile(loss, dynamic=False), given)


def compiled_hessian(loss: Loss, given: Inputs) -> Run:
    """Return :func:`hessian` in compiled form, forward over reverse.

    A compiled loss does not support double backward.
    """

    def products(e: Tensor, w: Tensor, de: Tensor, dw: Tensor, *target: Tensor) -> Tensors:
        slope = torch.func.grad(lambda e, w: loss(e, w, *target), argnums=(0, 1))
        (of_e, of_w), product = torch.func.jvp(slope, (e, w), (de, dw))[:2]
        return of_e, of_w, *product

    compiled = torch.compile(products, dynamic=False)
    e, w = given.wanted
    return lambda: compiled(e.detach(), w.detach(), *given.direction, *given.target)


Products = list[tuple[Tensor, Tensor, Tensor]]  # left factor, right factor, output


def gradient_products(given: Inputs) -> Products:
    """Return the products ``z = e Wᵀ``, ``g W`` and ``gᵀ e``; the residual ``g`` overwrites ``z``."""
    (e, w), z = given.wanted, _logits(given)
    return [(e, w.T, z), (z, w, torch.empty_like(e)), (z.T, e, torch.empty_like(w))]


def logits_product(given: Inputs) -> Products:
    """Return the product ``z = e Wᵀ``."""
    return gradient_products(given)[:1]


def recomputed_products(given: Inputs) -> Products:
    """Return the products of the gradients and that of the logits again, which the forward pass has not kept."""
    return [*logits_product(given), *gradient_products(given)]


def teacher_products(given: Inputs) -> Products:
    """Return the products of the gradients and that of the teacher's logits."""
    te, tw = given.target
    return [*gradient_products(given), (te, tw.T, _logits(given))]


def hessian_products(given: Inputs) -> Products:
    """Return the products of ``z = e Wᵀ``, ``ż = ė Wᵀ + e Ẇᵀ``, ``ġ W + g Ẇ`` and ``ġᵀ e + gᵀ ė``.

    The products of the gradients themselves are those of :func:`gradient_products`.
    """
    (e, w), (de, dw), z, dz = given.wanted, given.direction, _logits(given), _logits(given)
    of_e, of_w = torch.empty_like(e), torch.empty_like(w)
    forward = [(e, w.T, z), (de, w.T, dz), (e, dw.T, dz)]
    return [*forward, (dz, w, of_e), (z, dw, of_e), (dz.T, e, of_w), (z.T, de, of_w)]


def hessian_flow_products(given: Inputs) -> Products:
    """Return the products of the gradients and those of the HVP, which computes the logits again."""
    return gradient_products(given) + hessian_products(given)


def _logits(given: Inputs) -> Tensor:
    e, w = given.wanted
    return e.new_empty(e.shape[0], w.shape[0])


@torch.no_grad()
def multiply(products: Products) -> None:
    """Compute only the matrix products, which are a lower bound of the time of every implementation."""
    for left, right, out in products:
        torch.mm(left, right, out=out)


def calls_of(shape: Shape) -> int:
    """Return the number of calls in a row that make the time of a small head measurable."""
    return max(1, min(200, 2**22 // (shape.rows * shape.classes)))


def repeated(run: Callable[[], object], calls: int) -> None:
    """Call a function some times."""
    for _ in range(calls):
        run()


# --- cases ------------------------------------------------------------------------------------------------------------

BASE = Shape(1024, 256, 32_000)
LISTED = (32, 1024)
# Heads of small classifiers, whose calls of operations take longer than the products.
FEW_LOGITS = (Shape(8, 32, 100), Shape(64, 64, 1000))
POLICY_SHAPES = (BASE, Shape(1024, 768, 50_257), Shape(2048, 128, 50_257), Shape(256, 64, 1_000_000))


@dataclass(frozen=True)
class Case:
    """One loss in softcurve, and the dense implementation that it must equal."""

    target: Callable[[Shape, Generator], Tensors]
    ours: Loss
    dense: Loss
    shapes: tuple[Shape, ...] = (BASE,)
    floor: Callable[[Inputs], Products] = gradient_products
    run: Callable[[Loss, Inputs], Run] = gradients
    compiled: Callable[[Loss, Inputs], Run] | None = compiled_gradients
    dtype: torch.dtype = torch.float32  # of features and weight

    def inputs(self, shape: Shape) -> Inputs:
        """Return the same inputs for all implementations."""
        generator = torch.Generator().manual_seed(0)
        e, w = _features_and_weight(shape, generator)
        direction = torch.randn(e.shape, generator=generator), torch.randn(w.shape, generator=generator)
        e, w = (tensor.to(self.dtype).requires_grad_() for tensor in (e, w))
        return Inputs((e, w), self.target(shape, generator), direction)


CASES: Mapping[str, Case] = {
    "cross-entropy": Case(
        class_indices,
        sc.linear_cross_entropy,
        peers.dense_cross_entropy,
        shapes=(BASE, Shape(1024, 768, 50_257), Shape(4096, 256, 10_000), Shape(512, 2048, 32_000), *FEW_LOGITS),
    ),
    "cross-entropy, bfloat16": Case(
        class_indices,
        sc.linear_cross_entropy,
        peers.dense_cross_entropy,
        shapes=(
            *(BASE, Shape(1024, 768, 50_257), Shape(4096, 256, 10_000)),
            *(Shape(512, 2048, 32_000), Shape(2048, 2048, 32_000)),
        ),
        compiled=None,
        dtype=torch.bfloat16,
    ),
    "soft-targets": Case(probabilities, sc.linear_cross_entropy, peers.dense_cross_entropy),
    "forward-kl": Case(teacher, _kl, peers.dense_kl, floor=teacher_products),
    "reverse-kl": Case(teacher, _reverse_kl, peers.dense_reverse_kl, floor=teacher_products),
    "js": Case(teacher, _js, peers.dense_js, floor=teacher_products),
    "top-k": Case(top_k, _top_k, peers.dense_top_k),
    "hessian": Case(
        class_indices,
        sc.linear_cross_entropy,
        peers.dense_cross_entropy,
        shapes=(BASE, Shape(1024, 256, 50_257)),
        floor=hessian_flow_products,
        run=hessian,
        compiled=compiled_hessian,
    ),
    "hessian-product": Case(
        class_indices,
        sc.linear_cross_entropy,
        peers.dense_cross_entropy,
        floor=hessian_products,
        run=hessian_product,
        compiled=None,
    ),
    "log-probs": Case(
        actions,
        _log_probs,
        peers.dense_log_probs,
        shapes=POLICY_SHAPES,
        floor=logits_product,
        run=values,
        compiled=None,
    ),
    "policy-gradient": Case(
        actions,
        peers.policy_gradient_of(_log_probs),
        peers.policy_gradient_of(peers.dense_log_probs),
        shapes=POLICY_SHAPES,
        floor=recomputed_products,
        compiled=None,
    ),
} | {
    f"top-k list, k = {k}": Case(
        nothing,
        _list_of(k),
        peers.dense_list_of(k),
        shapes=(BASE, *POLICY_SHAPES[2:]),
        floor=logits_product,
        run=values,
        compiled=None,
    )
    for k in LISTED
}
# The cases of the table log_probs; the table heads has the others.
LOG_PROBS = (
    "log-probs",
    "policy-gradient",
    *(f"top-k list, k = {k}" for k in LISTED),
)

BUDGET = 64 * 2**20
BUDGETED: Mapping[str, tuple[Shape, ...]] = {
    "cross-entropy": (Shape(2048, 128, 50_257), Shape(8192, 128, 50_257), Shape(256, 64, 1_000_000)),
    "reverse-kl": (Shape(2048, 128, 50_257),),
    **dict.fromkeys(LOG_PROBS, POLICY_SHAPES[2:]),
}

OURS, COMPILED = "ours", "torch.compile"


def contestants(name: str, budget: int | None = None) -> dict[str, Callable[[Inputs], Run]]:
    """Return the implementations of a case, with softcurve first."""
    case = CASES[name]
    found: dict[str, Callable[[Inputs], Run]] = {
        OURS: partial(case.run, partial(case.ours, memory_budget=budget)),
        "torch eager": partial(case.run, case.dense),
    }
    if case.compiled is not None:
        found[COMPILED] = partial(case.compiled, case.dense)
    return found | {peer: partial(case.run, loss) for peer, loss in peers.LOSSES.get(name, {}).items()}


def prepared(who: str, prepare: Callable[[Inputs], Run], given: Inputs) -> Run | str:
    """Return the run after trying it once, or a note if another implementation fails."""
    try:
        run = prepare(given)
        run()
    except Exception as failure:
        if who == OURS:
            raise
        return peers.reason(failure)
    return run


def print_memory(name: str, who: str, shape: Shape, budget: int | None) -> None:
    """Print one line of JSON: the extra peak memory beyond inputs and results, and the size of the results, in MB.

    This is intended for a fresh process. Implementations that compile are warmed up at the full shape, all others at a
    small one.
    """
    case, prepare = CASES[name], contestants(name, budget)[who]
    given = case.inputs(shape)
    warm = prepared(who, prepare, given if who in peers.COMPILING else case.inputs(Shape(4, 8, 100)))
    if isinstance(warm, str):
        print(json.dumps({"note": warm}))
        return
    del warm
    results: list[Tensor] = []
    peak = measure.extra_peak_of(lambda: results.extend(prepare(given)()))
    size = sum(result.nbytes for result in results) / 2**20
    print(json.dumps({"extra_mb": peak - size, "results_mb": size}))
