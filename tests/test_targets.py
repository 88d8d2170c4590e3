"""What each kind of target means: how it meets the logits, and what a mean divides by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import softcurve
from softcurve import LinearTeacher, Logits, Probabilities, TopK
from softcurve.losses.targets import Target

F64 = torch.float64
Z = torch.tensor([[0.2, -1.0, 1.5, 0.4], [2.0, 0.1, -0.3, 0.0], [0.0, 0.0, 3.0, -2.0]], dtype=F64)
Y = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=F64)
CE, KL, JS = softcurve.cross_entropy, softcurve.kl_divergence, softcurve.js_divergence


def assert_close(got: torch.Tensor, expected: torch.Tensor | float) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=F64), rtol=1e-13, atol=1e-14)


def test_every_kind_says_the_same() -> None:
    """One distribution, in every words there are for it."""
    e, w = torch.randn(3, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    teacher = LinearTeacher(e, w, torch.arange(4, dtype=F64))
    t = e @ w.T + torch.arange(4, dtype=F64)
    log_p, order = torch.log_softmax(t, -1), torch.tensor([2, 0, 3, 1]).expand(3, 4)
    kinds = [
        teacher,
        Logits(t),
        Logits(log_p),
        Logits(t - 5.0),
        Probabilities(log_p.exp()),
        TopK(order, log_p.gather(-1, order), tail="renormalize"),
    ]
    for kind in kinds:
        assert_close(CE(Z, kind, reduction="none"), -(log_p.exp() * Z.log_softmax(-1)).sum(-1))
        assert_close(KL(kind, Z, reduction="none"), (log_p.exp() * (log_p - Z.log_softmax(-1))).sum(-1))
    assert_close(CE(Z, log_p.exp(), reduction="none"), CE(Z, teacher, reduction="none"))


def test_zeros_of_probabilities_have_no_part() -> None:
    """Neither where the model has mass nor where it has none, in value and in gradient."""
    y = Y.clone().requires_grad_()
    z = Z.clone().index_fill(1, torch.tensor([0]), -math.inf).requires_grad_()
    loss = CE(z[1:], y[1:], reduction="none")
    p = torch.softmax(Z[1:, 1:], -1)
    assert_close(loss, torch.stack([-(p[0, 0].log() + p[0, 1].log()) / 2, -p[1, 2].log()]))
    in_z, in_y = torch.autograd.grad(loss.sum(), (z, y))
    assert (in_z[:, 0] == 0).all()
    assert in_y.isfinite().all()
    assert_close(in_z[1:, 1:], p - Y[1:, 1:])
    assert_close(KL(Probabilities(Y), Probabilities(Y), reduction="none"), torch.zeros(3))


def test_bucket() -> None:
    """Two classes by name and the rest in one: by hand."""
    indices, y = torch.tensor([[2, 0], [0, 3], [1, 2]]), torch.tensor([[0.5, 0.2], [0.6, 0.3], [0.25, 0.25]], dtype=F64)
    p = torch.softmax(Z, -1)
    listed = p.gather(-1, indices)
    model = torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], -1)
    target = torch.cat([y, 1 - y.sum(-1, keepdim=True)], -1)
    bucket = TopK(indices, y.log())
    assert_close(CE(Z, bucket, reduction="none"), -(target * model.log()).sum(-1))
    assert_close(KL(bucket, Z, reduction="none"), (target * (target / model).log()).sum(-1))
    assert_close(KL(Z, bucket, reduction="none"), (model * (model / target).log()).sum(-1))
    mixture = (0.3 * target + 0.7 * model).log()
    js = (0.3 * target * (target.log() - mixture) + 0.7 * model * (model.log() - mixture)).sum(-1)
    assert_close(JS(bucket, Z, beta=0.3, reduction="none"), js)
    assert_close(JS(Z, bucket, beta=0.7, reduction="none"), js)
    smooth = 0.8 * target + 0.2 * torch.tensor([0.25, 0.25, 0.5], dtype=F64)
    assert_close(CE(Z, bucket, label_smoothing=0.2, reduction="none"), -(smooth * model.log()).sum(-1))


@pytest.mark.parametrize("full", [0.0, 1e-9, -1e-9])
def test_bucket_without_a_tail(full: float) -> None:
    """A list whose mass is 1, or rounds to a hair beyond it, leaves an empty bucket; no NaN comes of it."""
    indices = torch.tensor([[0, 1], [2, 3], [1, 3]])
    log_probs = (torch.tensor([[0.5, 0.5]], dtype=F64).log() + full).expand(3, 2).clone().requires_grad_()
    z = Z.clone().requires_grad_()
    for loss in (CE(z, TopK(indices, log_probs)), KL(TopK(indices, log_probs), z), JS(TopK(indices, log_probs), z)):
        assert loss.isfinite()
        in_z, in_list = torch.autograd.grad(loss, (z, log_probs))
        assert in_z.isfinite().all()
        assert not in_list.isnan().any()
    listed = torch.softmax(Z, -1).gather(-1, indices)
    torch.testing.assert_close(
        KL(TopK(indices, log_probs), z), (0.5 * (0.5 / listed).log()).sum(-1).mean(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("surprise", [1e-2, 1e-4, 1e-6])
def test_bucket_of_a_confident_teacher(surprise: float) -> None:
    """The tail of a list with one near-certain class holds ``1 − e^l``, of which float32 must not lose the digits."""
    log_probs, z = torch.tensor([-surprise]), torch.tensor([6.0, -1.0, 0.5])
    y = -math.expm1(float(log_probs[0]))
    p = torch.softmax(z.double(), -1)
    p_tail = float(p[1] + p[2])
    truth = (1 - y) * (math.log1p(-y) - math.log1p(-p_tail)) + y * math.log(y / p_tail)
    kl = KL(TopK(torch.tensor([0]), log_probs), z)
    assert kl.item() == pytest.approx(truth, rel=2e-6)


def test_renormalize() -> None:
    """The list becomes a distribution of its own, zero elsewhere; temperature acts on it as on logits."""
    indices, y = torch.tensor([[2, 0], [0, 3], [1, 2]]), torch.tensor([[0.5, 0.2], [0.6, 0.3], [0.25, 0.25]], dtype=F64)
    renormalized = TopK(indices, y.log(), tail="renormalize")
    log_p = torch.log_softmax(Z, -1).gather(-1, indices)
    own = y / y.sum(-1, keepdim=True)
    assert_close(CE(Z, renormalized, reduction="none"), -(own * log_p).sum(-1))
    assert_close(KL(renormalized, Z, reduction="none"), (own * (own.log() - log_p)).sum(-1))
    tempered, log_p = torch.softmax(y.log() / 2, -1), torch.log_softmax(Z / 2, -1).gather(-1, indices)
    assert_close(KL(renormalized, Z, temperature=2.0, reduction="none"), (tempered * (tempered.log() - log_p)).sum(-1))


def test_temperature_acts_on_the_model_alone_in_cross_entropy() -> None:
    t = torch.randn(3, 4, dtype=F64)
    assert_close(
        CE(Z, Logits(t), temperature=3.0, reduction="none"), -(t.softmax(-1) * (Z / 3).log_softmax(-1)).sum(-1)
    )


# --- what a mean divides by ---------------------------------------------------------------------------------------------

INDEX = torch.tensor([0, -100, 2])
WEIGHT = torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=F64)
SAMPLE = torch.tensor([2.0, 5.0, 0.25], dtype=F64)
ROWS = torch.nn.functional.cross_entropy(Z, INDEX, reduction="none")
DENSE = torch.nn.functional.cross_entropy(Z, Y, reduction="none")


@pytest.mark.parametrize(
    ("target", "options", "numerator", "mean", "batchmean"),
    [
        (INDEX, {}, ROWS.sum(), 2, 3),
        (INDEX, {"weight": WEIGHT}, 0.5 * ROWS[0] + 3 * ROWS[2], 3.5, 3),
        (INDEX, {"sample_weight": SAMPLE}, 2 * ROWS[0] + 0.25 * ROWS[2], 2.25, 3),
        (INDEX, {"weight": WEIGHT, "sample_weight": SAMPLE}, ROWS[0] + 0.75 * ROWS[2], 1.75, 3),
        (Y, {}, DENSE.sum(), 3, 3),
        (Y, {"sample_weight": SAMPLE}, (DENSE * SAMPLE).sum(), 7.25, 3),
        (Y, {"weight": WEIGHT}, -(Y * WEIGHT * Z.log_softmax(-1)).sum(), 3, 3),
    ],
)
def test_divisors(target, options, numerator, mean, batchmean) -> None:
    assert_close(CE(Z, target, reduction="sum", **options), numerator)
    assert_close(CE(Z, target, reduction="mean", **options), numerator / mean)
    assert_close(CE(Z, target, reduction="batchmean", **options), numerator / batchmean)
    assert_close(CE(Z, target, reduction="none", **options).sum(), numerator)


def test_means_over_several_leading_dimensions() -> None:
    """A mean counts every row once, whichever dimension it lies in; ``batchmean`` divides by the first, as in torch."""
    z, t = torch.randn(2, 2, 3, 4, dtype=F64)
    rows = KL(t, z, reduction="none")
    assert rows.shape == (2, 3)
    assert_close(KL(t, z), rows.sum() / 6)
    assert_close(KL(t, z, reduction="mean"), rows.sum() / 6)
    assert_close(KL(t, z, reduction="batchmean"), rows.sum() / 2)


def test_z_loss_stays_in_squared_nats() -> None:
    lse = torch.logsumexp(Z, -1)
    assert_close(CE(Z, Y, z_loss=0.5, base=2.0, reduction="none"), DENSE / math.log(2) + 0.5 * lse.square())
    assert_close(CE(Z, INDEX, z_loss=0.5, reduction="none")[[0, 2]], (ROWS + 0.5 * lse.square())[[0, 2]])
    assert CE(Z, INDEX, z_loss=0.5, reduction="none")[1] == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.int64])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    indices = torch.tensor([0, 3, 2]).to(dtype)
    assert torch.equal(CE(Z, indices), CE(Z, indices.long()))


@dataclass(frozen=True, eq=False, repr=False)
class Halved(Target):
    """A kind of target of a user's own: logits at twice the temperature."""

    values: torch.Tensor

    def malformed(self, classes):
        return ~self.values.isfinite().all(-1)

    def logits(self, dtype):
        return self.values.to(dtype) / 2


def test_a_kind_of_ones_own_is_taken_by_its_logits():
    x, w, t = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5, requires_grad=True)
    for loss in (softcurve.linear_cross_entropy, softcurve.linear_kl_divergence):
        found, expected = loss(x, w, Halved(t)), loss(x, w, Logits(t / 2))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(each, t)[0] for each in (found, expected)))
    torch.testing.assert_close(
        softcurve.cross_entropy(x @ w.T, Halved(t)), softcurve.cross_entropy(x @ w.T, Logits(t / 2))
    )
