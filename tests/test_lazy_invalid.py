"""Unmade logits leave NaN, infinities and targets that a loss on a head refuses to torch, and the logits are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softcurve import lazy_logits

from .lazy_cases import INDEX, PROBABILITIES, WEIGHT, Y, features, model, numbers, same

VALUES: dict[str, Callable[[Tensor], Any]] = {
    "cross-entropy": lambda z: F.cross_entropy(z, Y[0]),
    "smoothed": lambda z: F.cross_entropy(z, Y[0], label_smoothing=0.1, reduction="none"),
    "probabilities": lambda z: F.cross_entropy(z, PROBABILITIES[0]),
    "probabilities below 0": lambda z: F.cross_entropy(z, PROBABILITIES[0] - 0.05),
    "probabilities of NaN": lambda z: F.cross_entropy(z, PROBABILITIES[0] * torch.nan),
    "negative weights": lambda z: F.cross_entropy(z, Y[0], weight=WEIGHT - 4),
    "nll": lambda z: F.nll_loss(z.log_softmax(-1), Y[0], reduction="none"),
    "log-probabilities": lambda z: z.log_softmax(-1).gather(-1, INDEX[0]),
    "log-sum-exp": lambda z: z.logsumexp(-1),
    "mean": lambda z: z.log_softmax(-1).mean(-1),
    "cap": lambda z: F.cross_entropy(torch.tanh(z / 2) * 2, Y[0]),
    "largest": lambda z: (z.argmax(-1), *z.max(-1), *z.topk(3)),
    "divergence": lambda z: F.kl_div(z.log_softmax(-1), (z.detach() * 2).softmax(-1), reduction="batchmean"),
    "distilled": lambda z: F.cross_entropy(z, z.detach().softmax(-1)),
}  # fmt: skip
REFUSED = {"probabilities below 0", "probabilities of NaN", "negative weights"}
SIDES = {"divergence": 2, "distilled": 2}  # logits that a loss compares
FAULTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "none": lambda net, x: None,
    "a row of NaN": lambda net, x: x[1].fill_(torch.nan),
    "a row with +inf": lambda net, x: x[1, 0].fill_(torch.inf),
    "a row with -inf": lambda net, x: x[1, 0].fill_(-torch.inf),
    "NaN in the weight": lambda net, x: net.weight.data[4, 2].fill_(torch.nan),
    "an infinite weight": lambda net, x: net.weight.data[4, 2].fill_(torch.inf),
    "infinite bias": lambda net, x: net.bias.data[4].fill_(torch.inf),
    "no class": lambda net, x: net.bias.data.fill_(-torch.inf),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch on its kl_div
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("fault", FAULTS)
def test_invalid_entries_give_what_torch_gives(fault, value):
    net, x = model()[2], torch.randn(3, 8, dtype=torch.float64)
    FAULTS[fault](net, x)
    expected = numbers(VALUES[value], net, x)
    with lazy_logits(net, net) as lazy:
        got = numbers(VALUES[value], net, x)
    assert all(map(same, got, expected)), (got, expected)
    assert lazy.materialized == (SIDES.get(value, 1) if fault != "none" or value in REFUSED else 0)


def test_a_scaler_leaves_out_a_step_with_nan():
    net, x = model(dtype=torch.float32), features(3, dtype=torch.float32)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]

    def step(batch: Tensor) -> bool:
        """Return whether the weights have changed."""
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(net(batch), Y[0])).backward()
        scaler.step(optimizer)
        scaler.update()
        return not all(map(torch.equal, before, net.parameters()))

    with lazy_logits(net, "2", on_materialize="warn") as lazy:
        with pytest.warns(
            UserWarning, match=r"cross_entropy \(input must hold numbers, got NaN; .*\) needs the entries"
        ):
            assert not step(x * torch.nan)
        assert step(x)
    assert lazy.materialized == 1
    assert scaler.get_scale() == 2.0**15
