"""What the tests of unmade logits share: a model, its oracle, and what a loss does with logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcurve import lazy_logits

C = 11
Y = torch.tensor([[3, 0, 10], [7, -100, 2]])
INDEX = Y.clamp(min=0).unsqueeze(-1)
MASK = Y > 1
BIAS = torch.linspace(-1, 1, C, dtype=torch.float64)
MASKED = torch.where(torch.arange(C) == 5, -torch.inf, 0.0).double()
ROWS = torch.tensor([[[0.5], [2.0], [-1.0]], [[1.0], [3.0], [0.25]]], dtype=torch.float64)
PROBABILITIES = torch.softmax(torch.arange(66.0, dtype=torch.float64).view(2, 3, C) % 5, -1)
WEIGHT = torch.arange(1.0, C + 1, dtype=torch.float64)


def model(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, C, bias=bias)).to(dtype)


def features(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*leading, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def numbers(function: Callable[[Tensor], Any], net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results of a function of the logits, and the gradients of a weighted sum of them in every parameter."""
    results = function(net(x))
    results = list(results) if isinstance(results, tuple) else [results]
    total = sum(((each * torch.linspace(1, 2, each.numel()).view(each.shape)).sum() for each in results if
                 each.is_floating_point() and each.requires_grad), torch.zeros(()))  # fmt: skip
    if not total.requires_grad:
        return results, []
    return results, list(torch.autograd.grad(total, list(net.parameters()), materialize_grads=True))


def same(got: Sequence[Tensor], expected: Sequence[Tensor], bound: float = 1e-11) -> bool:
    return len(got) == len(expected) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=bound, atol=bound,
                                                                     equal_nan=True)
        for a, b in zip(got, expected, strict=True)
    )  # fmt: skip


def check(
    function: Callable[[Tensor], Any], made: int = 0, *, net: nn.Module | None = None, x: Tensor | None = None,
    head: str = "2",
) -> None:  # fmt: skip
    net, x = net or model(), features(2, 3) if x is None else x
    expected = numbers(function, net, x)
    with lazy_logits(net, head) as lazy:
        got = numbers(function, net, x)
    assert lazy.materialized == made
    assert all(map(same, got, expected)), (got, expected)


# --- what needs no logits ---


def smoothed(z: Tensor) -> Tensor:
    """The label smoother of transformers."""
    log_probs = -F.log_softmax(z, dim=-1)
    nll, uniform = log_probs.gather(dim=-1, index=INDEX), log_probs.sum(dim=-1, keepdim=True, dtype=torch.float64)
    padding = Y.unsqueeze(-1).eq(-100)
    nll.masked_fill_(padding, 0.0)
    uniform.masked_fill_(padding, 0.0)
    return 0.9 * nll.sum() + 0.1 / C * uniform.sum()


def selected(z: Tensor) -> Tensor:
    """The log-probabilities of TRL."""
    chosen = torch.gather(z, dim=-1, index=INDEX).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in z])


CONSUMED = {
    "cross-entropy": lambda z: F.cross_entropy(z.view(-1, C), Y.view(-1)),
    "by its module": lambda z: nn.CrossEntropyLoss()(z.flatten(0, 1), Y.flatten()),
    "by keywords": lambda z: F.cross_entropy(input=z[0], target=Y[0]),
    "shifted": lambda z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, C), Y[..., 1:].reshape(-1)),
    "options": lambda z: F.cross_entropy(z.view(-1, C), INDEX.view(-1), WEIGHT, None, 7, None, "sum", 0.2),
    "smoothed and weighted": lambda z: F.cross_entropy(
        z.reshape(6, -1), Y.view(-1), weight=WEIGHT, label_smoothing=0.1, reduction="none"
    ),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), Y, reduction="none"),
    "classes second, moved": lambda z: F.cross_entropy(z.movedim(-1, 1), PROBABILITIES.movedim(-1, 1)),
    "classes second, permuted": lambda z: F.cross_entropy(z.permute(1, 2, 0), Y.T),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, C), PROBABILITIES.view(-1, C), label_smoothing=0.3),
    "one row": lambda z: F.cross_entropy(z[1, 0], Y[1, 0]),
    "rows of a mask": lambda z: F.cross_entropy(z[MASK], Y[MASK]),
    "rows of an index": lambda z: F.cross_entropy(z[:, [2, 0]].view(-1, C), Y[:, [2, 0]].view(-1)),
    "parts": lambda z: torch.stack([F.cross_entropy(a, b) for a, b in zip(z, Y, strict=True)]),
    "split": lambda z: F.cross_entropy(z.split([1, 2], dim=1)[1][0], Y[0, 1:]) + F.cross_entropy(
        z.chunk(2)[1].squeeze(0), Y[1]
    ) + F.cross_entropy(z.unbind(1)[2].narrow(0, 0, 1).unsqueeze(0)[0], Y[:1, 2]),
    "vocabulary without padding": lambda z: F.cross_entropy(z[..., :7].reshape(-1, 7), INDEX.view(-1) % 7),
    "scaled": lambda z: F.cross_entropy((z * 0.3 / 2)[0], Y[0]),
    "twice negative": lambda z: F.cross_entropy((-(-2.0 * z))[0], Y[0]),
    "negative tensor": lambda z: F.cross_entropy((z * torch.tensor(-0.7))[0], Y[0]),
    "zero tensor": lambda z: F.cross_entropy((torch.zeros((), dtype=torch.float64) * z)[0], Y[0]),
    "cap": lambda z: F.cross_entropy((torch.tanh(z / 0.4) * 0.4 / 2).view(-1, C), Y.view(-1)),
    "added bias": lambda z: F.cross_entropy((BIAS + z.mul(2) + MASKED)[0], Y[0]),
    "twice a log-softmax": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, C), Y.view(-1), reduction="sum"),
    "nll of classes second": lambda z: F.nll_loss(z.log_softmax(-1).transpose(1, 2), Y, weight=WEIGHT),
    "gather": lambda z: torch.gather(F.log_softmax(z, -1), -1, INDEX).squeeze(-1),
    "gather of a softmax": lambda z: 3 * z.softmax(-1).gather(2, INDEX.expand(2, 3, 4)),
    "take along": lambda z: torch.take_along_dim(torch.log_softmax(z, dim=-1), INDEX, dim=-1),
    "gather of many logits": lambda z: z.gather(-1, torch.arange(C).expand(2, 3, C)),
    "gather of capped logits": lambda z: ((z / 3).tanh() * 3).gather(-1, INDEX),
    # Without gradients: that of a log-probability of −inf is 0 here, and in torch that of another class beside it.
    "gather of masked logits": lambda z: F.log_softmax(z.detach() + MASKED, -1).gather(-1, INDEX * 0 + 5),
    "log-probabilities": selected,
    "log-sum-exp": lambda z: (z / 2 + MASKED).logsumexp((-1,), keepdim=True),
    "label smoother": smoothed,
    "mean of masked log-probabilities": lambda z: F.log_softmax(z.detach() + MASKED, -1).mean(-1),
    "scaled log-softmax": lambda z: (-2 * F.log_softmax(z, -1) / 4).mean(dim=-1),
    "exp of a log-softmax": lambda z: F.log_softmax(z, -1).exp().gather(-1, INDEX),
    "argmax": lambda z: (z.argmax(-1), (z * 2).softmax(-1).argmax(dim=2, keepdim=True)),
    "max": lambda z: z.max(-1),
    "topk": lambda z: (torch.tanh(z) * 5).topk(3),
    "topk of many": lambda z: z.double().topk(C, -1),
    "divergence": lambda z: F.kl_div(F.log_softmax(z / 2, -1), F.softmax(z[[1, 0]] / 2, -1), reduction="batchmean"),
    "divergence of detached": lambda z: F.kl_div(
        F.log_softmax((z / 0.3).tanh() * 0.3, -1), F.log_softmax((z.detach() / 9).tanh() * 1.5, -1), reduction="sum",
        log_target=True,
    ),
    "distilled cross-entropy": lambda z: F.cross_entropy(z[0], F.softmax(z[1] * 2, -1)),
    "casts": lambda z: F.cross_entropy(z.double().to(z.dtype).to(z.device, copy=True)[0], Y[0]),
    "clone": lambda z: F.cross_entropy(z.clone()[0], Y[0]),
    "masked class of a bias": lambda z: F.cross_entropy((z + MASKED)[0], Y[0], label_smoothing=0.0),
    "shape": lambda z: torch.tensor([*z.shape, z.numel(), z.ndim, len(z), *z.stride(), *z.transpose(0, 2).stride()]),
}  # fmt: skip
