"""chain_rule against autograd, on scikit-learn's digits in float64: every gradient within 1e-12."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import softcurve

F64 = torch.float64
DIGITS = load_digits()
LOSSES = ("cross_entropy", "forward_kl", "reverse_kl")
ROWS = 37
IMAGES = torch.tensor(DIGITS.data[:ROWS] / 16, dtype=F64)
LABELS = torch.tensor(DIGITS.target[:ROWS])
TOKENS = torch.tensor(DIGITS.data[:ROWS], dtype=torch.int64)  # the grey levels, 0 … 16


class Unused(nn.Module):
    """Features with a frozen layer, a parameter that nothing uses, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 12).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.shared = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(self.frozen(x))))


class Sequence(nn.Module):
    """Eight steps of eight pixels, each with features of its own: ``(B, T, d)``."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x.reshape(-1, 8, 8))[0]


FEATURES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "Linear": (lambda: nn.Linear(64, 11), IMAGES, 11),
    "MLP": (lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 9), nn.GELU()), IMAGES, 9),
    "Conv2d": (
        lambda: nn.Sequential(nn.Unflatten(-1, (1, 8, 8)), nn.Conv2d(1, 3, 3, stride=2), nn.SiLU(), nn.Flatten()),
        IMAGES,
        27,
    ),
    "Embedding": (lambda: nn.Sequential(nn.EmbeddingBag(17, 6, mode="mean"), nn.Tanh()), TOKENS, 6),
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10), nn.ReLU()), IMAGES, 10),
    "unused": (Unused, IMAGES, 12),
    "Identity": (nn.Identity, IMAGES, 64),
    "Sequence": (Sequence, IMAGES, 7),
}


def soft(rows: torch.Size) -> Tensor:
    return torch.softmax(torch.randn(*rows, 10, dtype=F64, generator=torch.Generator().manual_seed(5)), -1)


def by_autograd(loss: str, p: Tensor, y: Tensor) -> Tensor:
    if loss == "reverse_kl":
        return (p * torch.log(p / y)).sum(-1)
    cross_entropy = -torch.xlogy(y, p).sum(-1)
    return cross_entropy if loss == "cross_entropy" else cross_entropy + torch.xlogy(y, y).sum(-1)


def assert_exact(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def assert_equals_autograd(
    found: softcurve.ChainRule, features: nn.Module, head: nn.Linear, x: Tensor, y: Tensor, loss: str
) -> None:
    """Row gradients are those of the sum of the losses, parameter gradients those of their mean."""
    for parameter in features.parameters():
        parameter.requires_grad_()
    x = x.clone().requires_grad_(x.is_floating_point())
    e = features(x)
    z = head(e)
    p = torch.softmax(z, -1)
    rows = by_autograd(loss, p, y)
    inputs = {"dL_dp": p, "dL_dz": z, "dL_de": e} | ({"dL_dx": x} if x.requires_grad else {})
    row_gradients = torch.autograd.grad(rows.sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
    for name, expected in zip(inputs, row_gradients, strict=True):
        assert_exact(getattr(found, name), expected)
    for name, expected in {"e": e, "z": z, "p": p, "loss": rows}.items():
        assert_exact(getattr(found, name), expected.detach())
        assert not getattr(found, name).requires_grad
    theta = dict(features.named_parameters())
    means = torch.autograd.grad(
        rows.mean(),
        [head.weight, *([] if head.bias is None else [head.bias]), *theta.values()],
        allow_unused=True,
        materialize_grads=True,
    )
    assert_exact(found.dL_dW, means[0])
    if head.bias is None:
        assert found.dL_db is None
    else:
        assert found.dL_db is not None
        assert_exact(found.dL_db, means[1])
    assert found.dL_dtheta.keys() == theta.keys()
    for (name, got), expected in zip(found.dL_dtheta.items(), means[len(means) - len(theta) :], strict=True):
        assert got.shape == theta[name].shape
        assert_exact(got, expected)


# Reverse KL against a hard target is infinite: test_hard_reverse_kl_is_refused.
PAIRS = [(t, loss) for loss in LOSSES for t in ("hard", "soft") if (t, loss) != ("hard", "reverse_kl")]


@pytest.mark.parametrize(("target", "loss"), PAIRS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FEATURES)
def test_against_autograd(name: str, bias: bool, target: str, loss: str) -> None:
    make, x, width = FEATURES[name]
    features, head = make().double(), nn.Linear(width, 10, bias=bias).double()
    rows = (ROWS, 8) if name == "Sequence" else (ROWS,)
    labels = LABELS[:, None].expand(rows) if name == "Sequence" else LABELS
    y = soft(rows) if target == "soft" else torch.eye(10, dtype=F64)[labels]
    before = {
        key: value.clone()
        for key, value in features.state_dict().items()
        if "running" not in key and "num_batches" not in key
    }
    found = softcurve.chain_rule(features, head, x, y if target == "soft" else labels, loss=loss)
    assert all(torch.equal(features.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in [*features.parameters(), *head.parameters()])
    assert (found.dL_dx is None) == (name == "Embedding")
    assert_equals_autograd(found, features, head, x, y, loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_closed_forms_of_the_seed(loss: str) -> None:
    """``∂L/∂z`` of cross-entropy is ``p − y``, and the later links follow from it by the chain rule's products."""
    features, head, y = nn.Linear(64, 11).double(), nn.Linear(11, 10).double(), soft(torch.Size([ROWS]))
    found = softcurve.chain_rule(features, head, IMAGES, y, loss=loss)
    if loss != "reverse_kl":
        assert_exact(found.dL_dz, found.p - y)
        assert_exact(found.dL_dp, -y / found.p)
    assert_exact(found.dL_de, found.dL_dz @ head.weight.detach())
    assert_exact(found.dL_dW, found.dL_dz.T @ found.e / ROWS)
    assert_exact(found.dL_dx, found.dL_de @ features.weight.detach())
    assert_exact(found.dL_dtheta["bias"], found.dL_de.mean(0))


def test_kinds_of_target_agree() -> None:
    features, head, t = nn.Linear(64, 11).double(), nn.Linear(11, 10).double(), torch.randn(ROWS, 10, dtype=F64)
    y = torch.softmax(t, -1)
    order = torch.arange(10).expand(ROWS, 10)
    kinds = [
        softcurve.Probabilities(y),
        softcurve.Logits(t),
        softcurve.TopK(order, y.log(), tail="renormalize"),
        softcurve.LinearTeacher(t, torch.eye(10, dtype=F64)),
    ]
    for loss in LOSSES:
        expected = softcurve.chain_rule(features, head, IMAGES, y, loss=loss)
        for kind in kinds:
            found = softcurve.chain_rule(features, head, IMAGES, kind, loss=loss)
            for name in ("loss", "dL_dp", "dL_dz", "dL_dx", "dL_dW"):
                assert_exact(getattr(found, name), getattr(expected, name))


def test_no_grad_around_it_changes_nothing() -> None:
    features, head = nn.Linear(64, 11).double(), nn.Linear(11, 10).double()
    expected = softcurve.chain_rule(features, head, IMAGES, LABELS)
    with torch.no_grad():
        found = softcurve.chain_rule(features, head, IMAGES, LABELS)
    assert torch.equal(found.dL_dx, expected.dL_dx)
    assert torch.equal(found.dL_dtheta["weight"], expected.dL_dtheta["weight"])


def test_single_precision() -> None:
    """In the dtype of the model, as right as that dtype can be."""
    features, head = nn.Linear(64, 11), nn.Linear(11, 10)
    found = softcurve.chain_rule(features, head, IMAGES.float(), LABELS)
    double = softcurve.chain_rule(features.double(), head.double(), IMAGES.float().double(), LABELS)
    for name in ("loss", "dL_dz", "dL_de", "dL_dx", "dL_dW", "dL_db"):
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name).double(), getattr(double, name), rtol=1e-4, atol=1e-6)


def test_hard_reverse_kl_is_refused() -> None:
    features, head = nn.Linear(64, 11).double(), nn.Linear(11, 10).double()
    with pytest.raises(ValueError, match=r"target must be above 0 .*reverse_kl"):
        softcurve.chain_rule(features, head, IMAGES, LABELS, loss="reverse_kl")


WRONG = {
    "loss": (lambda f, h, x, y: softcurve.chain_rule(f, h, x, y, loss="mse"), ValueError, "loss must be one of"),
    "width": (lambda f, h, x, y: softcurve.chain_rule(nn.Identity(), h, x, y), ValueError, "features must map x"),
    "rows": (
        lambda f, h, x, y: softcurve.chain_rule(f, h, x, y[:-1]),
        ValueError,
        "target must have one entry per row",
    ),
    "class": (lambda f, h, x, y: softcurve.chain_rule(f, h, x, y + 1), ValueError, "target must hold classes in 0 … 9"),
    "ignored": (lambda f, h, x, y: softcurve.chain_rule(f, h, x, y - 100), ValueError, "target must hold classes"),
    "bucket": (
        lambda f, h, x, y: softcurve.chain_rule(f, h, x, softcurve.TopK(y[:, None], torch.full((ROWS, 1), -0.1))),
        ValueError,
        "bucket",
    ),
}


@pytest.mark.usefixtures("without_shape_checks")  # which know the names of the losses too
@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name: str) -> None:
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match=message):
        call(nn.Linear(64, 11).double(), nn.Linear(11, 10).double(), IMAGES, LABELS)


def test_head_that_is_no_linear(run_python: Callable[[str], object]) -> None:
    code = """
import torch, softcurve
try:
    softcurve.chain_rule(torch.nn.Identity(), torch.nn.Identity(), torch.ones(2, 3), torch.tensor([0, 1]))
except TypeError as error:
    print(error)
"""
    shown = run_python(code).stdout  # type: ignore[attr-defined]
    assert "head must be a torch.nn.Linear, got Identity" in shown
