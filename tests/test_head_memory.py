"""The head's extra memory stays within its budget, whatever N and C: measured in processes of their own.

On the CPU it is the resident set, on a CUDA device what torch's allocator gave out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch

import softcurve

from .placement import DEVICE, PLACED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")

BUDGET, MOST = 64, 96  # MB: what is asked for, and what a process may show

MEASURES = {
    "cpu": """
def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024


def begin():
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    return status("VmRSS")


def highest():
    return status("VmHWM")
""",
    "cuda": """
def begin():
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def highest():
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20
""",
}

PREAMBLE = f"""{PLACED}
import json, torch, softcurve
from pathlib import Path
torch.set_num_threads(1)
torch.manual_seed(0)
BUDGET = {BUDGET} << 20
{MEASURES[DEVICE.type]}

def tensors(rows, features, classes):
    x, w = torch.randn(rows, features), torch.randn(classes, features) / features**0.5
    return x.requires_grad_(), w.requires_grad_()


def extra(work, given):
    '''Megabytes at the highest, beyond what was there and the results, which are kept.'''
    before = begin()
    results = work(*given)
    return highest() - before - sum(r.nbytes for r in results) / 2**20


def warm_and_extra(work, rows, features, classes, more=lambda *shape: ()):
    '''Libraries, threads and code are loaded by a small problem first.'''
    for shape in ((64, features, 1000), (rows, features, classes)):
        given = tensors(*shape) + tuple(more(*shape))
        found = extra(work, given)
    print(json.dumps(found))


def index_loss(x, w, **options):
    return softcurve.linear_cross_entropy(x, w, torch.arange(len(x)) % len(w), memory_budget=BUDGET, **options)


def gradients(x, w):
    return torch.autograd.grad(index_loss(x, w), (x, w))
"""

SHAPES = [
    (2048, 128, 50257),
    pytest.param((8192, 128, 50257), marks=pytest.mark.slow),
    pytest.param((256, 64, 1000000), marks=pytest.mark.slow),
]


def extra(run_python: Callable[[str], object], body: str) -> float:
    done = run_python(PREAMBLE + body)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[attr-defined]


def test_what_is_measured(run_python: Callable[[str], object]) -> None:
    """The dense loss, by the same ruler: logits, log-probabilities and their gradients of 98 MB each."""
    body = """
def dense(x, w):
    return torch.autograd.grad(torch.nn.functional.cross_entropy(x @ w.T, torch.arange(len(x))), (x, w))

warm_and_extra(dense, 512, 128, 50257)
"""
    found = extra(run_python, body)
    assert 2.5 * 98 < found < 4.5 * 98


def test_bfloat16(run_python: Callable[[str], object]) -> None:
    """The gradients are summed in float32, beside the budget, before they are rounded."""
    body = """
def half(rows, features, classes):
    return [torch.randn(size, features).bfloat16().requires_grad_() for size in (rows, classes)]

warm_and_extra(lambda x, w, half_x, half_w: gradients(half_x, half_w), 2048, 128, 50257, half)
"""
    sums = 4 * 128 * (2048 + 50257) / 2**20
    assert extra(run_python, body) < MOST + sums


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(shape: tuple[int, int, int], run_python: Callable[[str], object]) -> None:
    assert extra(run_python, f"warm_and_extra(gradients, *{shape})") <= MOST


def test_loss_alone(run_python: Callable[[str], object]) -> None:
    body = """
def alone(x, w):
    with torch.no_grad():
        return (index_loss(x, w, reduction="none"), index_loss(x, w, return_stats=True)[1].entropy)

warm_and_extra(alone, 2048, 128, 50257)
"""
    assert extra(run_python, body) <= MOST


TEACHER = """
def teacher(rows, features, classes):
    return torch.randn(rows, 96), torch.randn(classes, 96) / 96**0.5

def distilled(x, w, t, h):
    target = softcurve.LinearTeacher(t, h)
    loss = softcurve.{loss}(x, w, target, {options}memory_budget=BUDGET)
    return torch.autograd.grad(loss, (x, w))

warm_and_extra(distilled, 2048, 128, 50257, teacher)
"""


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("linear_kl_divergence", "direction='reverse', "),
        pytest.param("linear_kl_divergence", "", marks=pytest.mark.slow),
        pytest.param("linear_js_divergence", "", marks=pytest.mark.slow),
    ],
    ids=["reverse", "forward", "js"],
)
def test_linear_teacher(loss: str, options: str, run_python: Callable[[str], object]) -> None:
    """Neither the student's nor the teacher's logits are held."""
    assert extra(run_python, TEACHER.format(loss=loss, options=options)) <= MOST


@pytest.mark.slow
def test_top_k(run_python: Callable[[str], object]) -> None:
    """A list of 32 classes is never made dense; its own gradient is no temporary."""
    body = """
def listed(rows, features, classes):
    i = torch.rand(rows, classes // 10).topk(32).indices
    return i, torch.full(i.shape, -4.0)

def distilled(x, w, i, l):
    loss = softcurve.linear_kl_divergence(x, w, softcurve.TopK(i, l), memory_budget=BUDGET)
    return torch.autograd.grad(loss, (x, w))

warm_and_extra(distilled, 2048, 128, 50257, listed)
"""
    assert extra(run_python, body) <= MOST


def test_list_of_a_head(run_python: Callable[[str], object]) -> None:
    """Neither all logits nor all candidates of all rows are held."""
    body = """
def listed(x, w):
    made = softcurve.linear_topk(x, w, 64, memory_budget=BUDGET)
    return made.indices, made.log_probs

warm_and_extra(listed, 2048, 128, 50257)
"""
    assert extra(run_python, body) <= MOST


@pytest.mark.slow
def test_soft_labels_beside_a_teacher(run_python: Callable[[str], object]) -> None:
    """Copies of the logits for labels and an entropy, excluded classes among them; soft labels are the caller's."""
    body = """
def targets(rows, features, classes):
    return torch.randn(rows, 96), torch.randn(classes, 96) / 96**0.5, torch.randn(rows, classes)

def distilled(x, w, t, h, y):
    options = {"alpha": 0.5, "entropy_bonus": 0.1, "softcap": 30.0, "exclude": torch.zeros(len(x), 2, dtype=torch.int64)}
    loss = softcurve.linear_distillation(
        x, w, softcurve.Logits(y), softcurve.LinearTeacher(t, h), memory_budget=BUDGET, **options
    )
    return torch.autograd.grad(loss, (x, w))

warm_and_extra(distilled, 512, 128, 50257, targets)
"""
    assert extra(run_python, body) <= MOST


@pytest.mark.slow
def test_hessian_product(run_python: Callable[[str], object]) -> None:
    """The graph of the gradient keeps gradients, not logits; its backward is another pass over tiles."""
    body = """
def product(x, w, v, u):
    first = torch.autograd.grad(index_loss(x, w), (x, w), create_graph=True)
    return (*first, *torch.autograd.grad(first, (x, w), (v, u)))

warm_and_extra(product, 2048, 128, 50257, lambda *shape: [t.detach() for t in tensors(*shape)])
"""
    # Beyond the budget, the gradients that the graph saved are also scaled: one more of each.
    assert extra(run_python, body) <= MOST + (2048 + 50257) * 128 * 4 / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(20000, 2048, 64), (100000, 64, 4)], ids=str)
def test_rows_that_are_long_for_their_classes(shape: tuple[int, int, int], run_python: Callable[[str], object]) -> None:
    """What a tile copies of its features counts as well."""
    assert extra(run_python, f"warm_and_extra(gradients, *{shape})") <= MOST


def test_where_nobody_looks_at_values_gradients_are_scaled_into_their_own_dtypes(monkeypatch):
    """As on CUDA: the same gradients, and no second one in single precision on the way."""
    x, w, y = torch.randn(6, 4).bfloat16(), torch.randn(9, 4).bfloat16(), torch.arange(6)
    found, made = [], []
    empty_like = torch.empty_like
    for visible in (True, False):
        given = [t.clone().requires_grad_() for t in (x, w)]
        loss = 3 * softcurve.linear_cross_entropy(*given, y)
        with monkeypatch.context() as patch:
            if not visible:
                patch.setattr("softcurve.head.autograd.values_visible", lambda *_: False)
                patch.setattr(
                    torch, "empty_like", lambda t, **named: made.append(named.get("dtype")) or empty_like(t, **named)
                )
            loss.backward()
        found.append([t.grad for t in given])
    for seen, unseen in zip(*found, strict=True):
        assert seen.dtype == unseen.dtype == torch.bfloat16
        assert torch.equal(seen, unseen)
    assert made == [torch.bfloat16, torch.bfloat16]
