"""Products of bfloat16 matrices into float32 on the CPU, by MKL's own function where torch's library exports it.

Whether they are used depends on the processor, so the tests ask for them, and skip where there is no such function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve.head import half

pytestmark = pytest.mark.skipif(half._mkl_product() is None, reason="torch's library has no product of MKL")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda matrix: matrix,
    "columns": lambda matrix: matrix.T.contiguous().T,
    "a part of a wider one": lambda matrix: torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]],
    "every other column": lambda matrix: matrix.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The products are used whatever the processor; a list of the numbers of their rows."""
    rows: list[int] = []
    product = half._multiply_by_mkl

    def counted(out: Tensor, *others: object) -> None:
        rows.append(len(out))
        product(out, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(half, "_has_tiles", lambda: True)
    monkeypatch.setattr(half, "_multiply_by_mkl", counted)
    yield rows
    assert rows


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "beta", "alpha"), [((5, 7, 3), 0.0, 1.0), ((1, 4, 1), 1.0, 0.5), ((6, 1, 9), 0.5, 1.0)]
)
def test_product(
    left: str, right: str, shape: tuple[int, int, int], beta: float, alpha: float, in_use: list[int]
) -> None:
    rows, inner, columns = shape
    a, b = (torch.randn(size).bfloat16() for size in ((rows, inner), (inner, columns)))
    for out in (torch.randn(rows, columns), torch.randn(rows, columns + 2)[:, 1:-1], torch.randn(columns, rows).T):
        expected = beta * out.double() + alpha * (a.double() @ b.double())
        half.half_product(out, LAYOUTS[left](a), LAYOUTS[right](b), beta=beta, alpha=alpha)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_product_of_nothing(in_use: list[int]) -> None:
    for shape in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        out = torch.ones(shape[0], shape[2])
        a, b = torch.zeros(shape[:2]).bfloat16(), torch.zeros(shape[1:]).bfloat16()
        half.half_product(out, a, b, beta=0.5)
        assert (out == 0.5).all()


Loss = Callable[..., Tensor]
OURS: dict[str, Loss] = {
    "index": lambda x, w, t, budget: softcurve.linear_cross_entropy(x, w, t.argmax(-1), memory_budget=budget),
    "soft": lambda x, w, t, budget: softcurve.linear_cross_entropy(x, w, softcurve.Logits(t), memory_budget=budget),
    "reverse": lambda x, w, t, budget: softcurve.linear_kl_divergence(
        x, w, softcurve.Logits(t), direction="reverse", memory_budget=budget
    ),
}
DENSE: dict[str, Loss] = {
    "index": lambda z, t: F.cross_entropy(z, t.argmax(-1)),
    "soft": lambda z, t: F.cross_entropy(z, t.softmax(-1)),
    "reverse": lambda z, t: F.kl_div(t.log_softmax(-1), z.log_softmax(-1), reduction="batchmean", log_target=True),
}


@pytest.mark.parametrize(("name", "budget"), [*((name, None) for name in OURS), ("soft", 2**22)])
def test_losses_are_no_worse_than_dense(name: str, budget: int | None, in_use: list[int]) -> None:
    x, w, t = torch.randn(192, 256).bfloat16(), (torch.randn(4100, 256) / 8).bfloat16(), torch.randn(192, 4100)
    wide = [tensor.double().requires_grad_() for tensor in (x, w)]
    truth = DENSE[name](F.linear(*wide), t.double())
    exact = torch.autograd.grad(truth, wide)
    given = [tensor.requires_grad_() for tensor in (x, w)]
    dense = DENSE[name](F.linear(*given).float(), t)
    loss = OURS[name](*given, t, budget)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
    for ours, theirs, true in zip(
        torch.autograd.grad(loss, given), torch.autograd.grad(dense, given), exact, strict=True
    ):
        assert (ours - true).norm() <= 1.01 * (theirs - true).norm()


def test_other_threads_are_not_disturbed(in_use: list[int]) -> None:
    """Float32 products of one thread are the same bits while others compute losses in bfloat16."""
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    alone = a @ b
    x, w = torch.randn(32, 256).bfloat16(), torch.randn(4100, 256).bfloat16()
    target, stop, failures = torch.randint(4100, (32,)), threading.Event(), []

    def lose() -> None:
        expected = softcurve.linear_cross_entropy(x, w, target)
        while not stop.is_set():
            if not torch.equal(softcurve.linear_cross_entropy(x, w, target), expected):
                failures.append("loss")

    threads = [threading.Thread(target=lose) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert torch.equal(a @ b, alone)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
