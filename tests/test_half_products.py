"""Products of bfloat16 matrices into float32 on the CPU, by MKL's function or oneDNN's where torch's library exports it.

Which is used depends on the processor, so the tests ask for each, and skip one that cannot be called here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import softcurve
from softcurve.head import brgemm, half

AVAILABLE: dict[str, Callable[[], object]] = {"MKL": half._mkl_product, "oneDNN": brgemm.available}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda matrix: matrix,
    "columns": lambda matrix: matrix.T.contiguous().T,
    "a part of a wider one": lambda matrix: torch.cat([matrix, matrix], 1)[:, : matrix.shape[1]],
    "every other column": lambda matrix: matrix.repeat_interleave(2, dim=1)[:, ::2],
}
needs_brgemm = pytest.mark.skipif(not brgemm.available(), reason="the product of oneDNN cannot be called here")


@pytest.fixture(params=AVAILABLE)
def in_use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One of the products is used whatever the processor; a list of the numbers of their rows."""
    if not AVAILABLE[request.param]():
        pytest.skip(f"the product of {request.param} cannot be called here")
    rows: list[int] = []
    product: half.Product = half._multiply_by_mkl if request.param == "MKL" else brgemm.multiply

    def counted(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
        rows.append(len(out))
        product(out, a, b, beta, alpha)

    monkeypatch.setattr(half, "_cpu_product", lambda: counted)
    yield rows
    assert rows


@pytest.mark.parametrize(
    ("has_tiles", "has_instructions", "torch_multiplies", "expected"),
    [
        (False, False, True, None),
        (False, True, False, brgemm.multiply),
        (True, True, False, half._multiply_by_mkl),
        (False, True, True, half._multiply_by_torch),
        (True, True, True, half._multiply_by_torch),
    ],
)
def test_choice(
    has_tiles: bool, has_instructions: bool, torch_multiplies: bool, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in (
        (half, "_has_tiles", has_tiles),
        (brgemm, "has_instructions", has_instructions),
        (half, "_multiplies_into_float32", torch_multiplies),
        (half, "_mkl_product", print),
        (brgemm, "available", True),
    ):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    assert half._cpu_product() is expected


@needs_brgemm
def test_product_of_onednn_needs_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN is switched off or limited to older instructions, its function would end the process."""
    torch._C._set_mkldnn_enabled(False)
    try:
        assert not brgemm.available()
    finally:
        torch._C._set_mkldnn_enabled(True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not brgemm.available()


@needs_brgemm
@pytest.mark.parametrize("left", [0, 1])
def test_product_while_onednn_is_switched_off(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may do that between two blocks: the rest is computed without it."""
    states = iter([True] * left)
    monkeypatch.setattr(brgemm, "_is_enabled", lambda: next(states, False))
    a, b, out = torch.randn(259, 33).bfloat16(), torch.randn(33, 261).bfloat16(), torch.randn(259, 261)
    expected = out.double() + 0.5 * (a.double() @ b.double())
    with torch.inference_mode():
        brgemm.multiply(out, a, b, 1.0, 0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-5)


def test_product_after_onednn_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may do that between the choice of the factors and their product."""
    monkeypatch.setattr(half, "_cpu_product", lambda: None)
    a, b, out = torch.randn(5, 3).bfloat16(), torch.randn(3, 4).bfloat16(), torch.full((5, 4), torch.nan)
    half.half_product(out, a, b, beta=0.0, alpha=0.5)
    torch.testing.assert_close(out, 0.5 * (a.float() @ b.float()))


@needs_brgemm
def test_product_needs_a_verified_release_and_right_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0+cpu")
    assert brgemm._functions.__wrapped__() is None
    monkeypatch.undo()
    assert brgemm._is_right.__wrapped__()
    monkeypatch.setattr(brgemm, "_multiply_part", lambda *_, **__: None)
    assert not brgemm._is_right.__wrapped__()


@needs_brgemm
def test_product_without_new_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """None can be started when the interpreter ends."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    a, b, out = torch.randn(300, 8).bfloat16(), torch.randn(8, 3).bfloat16(), torch.empty(300, 3)
    brgemm.multiply(out, a, b, 0.0, 1.0)
    torch.testing.assert_close(out, a.float() @ b.float())


@needs_brgemm
def test_no_thread_outlives_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write to memory that may belong to another tensor by then."""
    ended, begun = [], threading.Event()

    def work() -> None:
        begun.wait()
        ended.append(True)

    def interrupt(thread: threading.Thread, join: Callable[[threading.Thread], None] = threading.Thread.join) -> None:
        if not begun.is_set():
            begun.set()
            raise KeyboardInterrupt
        join(thread)

    monkeypatch.setattr(threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        brgemm._run(work, 2, deque())
    assert len(ended) == 2


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "beta", "alpha"),
    [((5, 7, 3), 0.0, 1.0), ((1, 4, 1), 1.0, 0.5), ((6, 1, 9), 0.5, 1.0), ((3, 2, 5), 1.0, 0.0)],
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


@pytest.mark.parametrize("right", ["rows", "columns"])
def test_product_of_several_blocks(right: str, in_use: list[int]) -> None:
    """There is more than one block in each dimension, and a rest."""
    a, b, out = torch.randn(259, 4099).bfloat16(), torch.randn(4099, 261).bfloat16(), torch.randn(259, 261)
    expected = out.double() + a.double() @ b.double()
    half.half_product(out, a, LAYOUTS[right](b), beta=1.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=5e-4)


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


def test_hessian_products_are_no_worse_than_dense(in_use: list[int]) -> None:
    x, w, t = torch.randn(96, 256).bfloat16(), (torch.randn(4100, 256) / 8).bfloat16(), torch.randint(4100, (96,))
    v = [torch.randn_like(tensor) for tensor in (x, w)]

    def products(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        gradients = torch.autograd.grad(loss(*tensors, t), tensors, create_graph=True)
        return torch.autograd.grad(gradients, tensors, [d.to(tensors[0].dtype) for d in v])

    def dense(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(_at_least_float32(F.linear(x, w)), t)

    exact = products(dense, [x.double(), w.double()])
    ours, theirs = products(softcurve.linear_cross_entropy, [x, w]), products(dense, [x, w])
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert (one - true).norm() <= 1.01 * (other - true).norm()


def test_distillation_and_log_probs_are_no_worse_than_dense(in_use: list[int]) -> None:
    x, w, tx, tw = (torch.randn(size) for size in ((130, 256), (4100, 256), (130, 300), (4100, 300)))
    given = [tensor.bfloat16().requires_grad_() for tensor in (x, w / 8, tx, tw / 8)]
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    index = torch.randint(4100, (130,))

    def compare(ours: Callable[..., Tensor], dense: Callable[..., Tensor]) -> None:
        truth, loss = dense(*wide), ours(*given)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
        results = [torch.autograd.grad(each.sum(), tensors, allow_unused=True) for each, tensors in (
            (truth, wide), (loss, given), (dense(*given), given)
        )]  # fmt: skip
        for true, one, other in zip(*results, strict=True):
            if true is not None:
                assert (one - true).norm() <= 1.01 * (other - true).norm()

    def distilled(x: Tensor, w: Tensor, tx: Tensor, tw: Tensor) -> Tensor:
        p, q = (_at_least_float32(F.linear(*each)).log_softmax(-1) for each in ((x, w), (tx, tw)))
        return F.kl_div(p, q, reduction="batchmean", log_target=True)

    def chosen(x: Tensor, w: Tensor, *_: Tensor) -> Tensor:
        return _at_least_float32(F.linear(x, w)).log_softmax(-1)[torch.arange(130), index]

    compare(lambda x, w, tx, tw: softcurve.linear_kl_divergence(x, w, softcurve.LinearTeacher(tx, tw)), distilled)
    compare(lambda x, w, *_: softcurve.linear_log_probs(x, w, index).log_probs, chosen)


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def test_other_threads_are_not_disturbed(in_use: list[int]) -> None:
    """Float32 products of one thread are the same bits while others compute losses in bfloat16."""
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    alone = a @ b
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(4100, 256).bfloat16()
    target, stop, failures = torch.randint(4100, (64,)), threading.Event(), []

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
