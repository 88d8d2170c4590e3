"""The figures of a head on rows, against dense numpy, scipy and scikit-learn; the spectrum against the dense matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss
from torch import Tensor

from softcurve.curvature import GGN
from softcurve.fit import DataError
from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.source import BUDGET, RowBlock
from softcurve.fit.data.subset import split_source
from softcurve.fit.diagnostics import Diagnostics, diagnose
from softcurve.fit.head_spectrum import CurvatureSpectrum, curvature_spectrum
from softcurve.losses.topk import TopK


@dataclass(eq=False)
class Held:
    """Rows in memory that remember how they were asked for; the blocks are ragged where ``ragged`` says so."""

    features: Tensor
    target: Tensor | TopK | None
    classes: tuple[int | str, ...]
    kind: str | None = "labels"
    ragged: bool = False
    asked: list[int] = field(default_factory=list)
    in_memory: bool = True
    fingerprint: str = ""

    @property
    def rows(self) -> int:
        return len(self.features)

    @property
    def width(self) -> int:
        return self.features.shape[1]

    @property
    def double(self) -> bool:
        return self.features.dtype == torch.float64

    def blocks(self, at_most: int) -> Iterator[RowBlock]:
        self.asked.append(at_most)
        start, size = 0, at_most
        while start < self.rows:
            here = slice(start, start + size)
            if isinstance(self.target, TopK):
                target = TopK(self.target.indices[here], self.target.log_probs[here], self.target.tail)
            else:
                target = None if self.target is None else self.target[here]
            yield RowBlock(start, self.features[here], target)
            start += size
            if self.ragged:
                size = 1 + (size * 7 + 3) % at_most


@dataclass
class Problem:
    features: Tensor
    weight: Tensor
    bias: Tensor
    z: np.ndarray
    p: np.ndarray


def problem(rows: int, classes: int, width: int = 5, scale: float = 2.0) -> Problem:
    features = torch.randn(rows, width, dtype=torch.float64)
    weight, bias = scale * torch.randn(classes, width, dtype=torch.float64), torch.randn(classes, dtype=torch.float64)
    z = features.numpy() @ weight.numpy().T + bias.numpy()
    return Problem(features, weight, bias, z, softmax(z, axis=1))


def labelled(at: Problem, **how: bool) -> Held:
    classes = len(at.bias)
    noisy = torch.tensor(at.z) + 2 * torch.randn(at.z.shape, dtype=torch.float64)
    return Held(at.features, noisy.argmax(1), tuple(range(classes)), **how)


@pytest.mark.parametrize("classes", [2, 10, 333])
@pytest.mark.parametrize("rows_at_once", [None, 1, 7, 101])
def test_labels_against_sklearn(classes: int, rows_at_once: int | None) -> None:
    at = problem(101, classes)
    source = labelled(at, ragged=True)
    y, found = source.target.numpy(), diagnose(source, at.weight, at.bias, "cross_entropy", rows_at_once=rows_at_once)
    predicted, numbers = at.p.argmax(1), np.arange(classes)
    assert found.rows == 101
    assert found.kl is None
    assert found.loss == pytest.approx(log_loss(y, at.p, labels=numbers), rel=1e-12)
    assert found.accuracy == accuracy_score(y, predicted)
    assert found.entropy == pytest.approx(entropy(at.p, axis=1).mean(), rel=1e-12)
    assert found.brier == pytest.approx(((at.p - np.eye(classes)[y]) ** 2).sum(1).mean(), rel=1e-12)
    matrix = confusion_matrix(y, predicted, labels=numbers)
    np.testing.assert_array_equal(found.support, matrix.sum(1))
    np.testing.assert_array_equal(found.predicted, matrix.sum(0))
    np.testing.assert_array_equal(found.correct, matrix.diagonal())
    if classes <= 200:
        np.testing.assert_array_equal(found.matrix, matrix)
    else:
        assert found.matrix is None
    off = matrix - np.diag(matrix.diagonal())
    pairs = sorted(((-off[i, j], i, j) for i, j in zip(*off.nonzero(), strict=True)))[:30]
    assert [(-pair.count, pair.label, pair.predicted) for pair in found.confused] == pairs


def test_confused_pairs_are_exact_when_they_are_merged_many_times() -> None:
    at = problem(400, 250)
    at.weight[5:] -= 3 * at.weight[:1]  # few classes are predicted, so that pairs repeat
    source = labelled(at)
    found = diagnose(source, at.weight, at.bias, "cross_entropy", rows_at_once=11)
    z = at.features @ at.weight.T + at.bias
    matrix = confusion_matrix(source.target.numpy(), z.argmax(1).numpy(), labels=np.arange(250))
    off = matrix - np.diag(matrix.diagonal())
    assert found.confused[0].count > 1
    assert [pair.count for pair in found.confused] == sorted(off[off > 0].tolist(), reverse=True)[:30]
    assert all(off[pair.label, pair.predicted] == pair.count for pair in found.confused)


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_against_sklearn(bins: int) -> None:
    at = problem(500, 4, scale=0.7)
    source = labelled(at)
    found = diagnose(source, at.weight, at.bias, "cross_entropy", bins=bins, rows_at_once=33).calibration
    confidence, correct = at.p.max(1), source.target.numpy() == at.p.argmax(1)
    shares, means = calibration_curve(correct, confidence, n_bins=bins)
    full = found.counts.numpy() > 0
    assert found.counts.sum() == 500
    np.testing.assert_allclose(found.accuracy.numpy()[full], shares, rtol=1e-12)
    np.testing.assert_allclose(found.confidence.numpy()[full], means, rtol=1e-12)
    assert found.accuracy[~torch.tensor(full)].isnan().all()
    weights = found.counts.numpy()[full] / 500
    assert found.error == pytest.approx((weights * abs(shares - means)).sum(), rel=1e-12)


def calibration_error(p: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """The mean over rows of ``|mean of right − mean of confidence|`` of their bin."""
    confidence = p.max(1)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return sum(abs((right - confidence)[place == bin_].sum()) for bin_ in range(bins)) / len(p)


@pytest.mark.parametrize("kind", ["distributions", "bucket", "renormalize"])
def test_calibration_of_soft_targets_is_measured_by_their_own_mass(kind: str) -> None:
    at = problem(400, 8, scale=0.5)
    y = torch.softmax(torch.tensor(at.z) + 0.7 * torch.randn(400, 8, dtype=torch.float64), 1)
    target: Tensor | TopK = y
    mass = y.numpy()
    if kind != "distributions":
        probs, indices = y.topk(3)
        target = TopK(indices, probs.log(), kind)
        left_over = (1.0 - probs.sum(1, keepdim=True)) / 5 if kind == "bucket" else torch.zeros(400, 1).double()
        listed = probs if kind == "bucket" else probs / probs.sum(1, keepdim=True)
        mass = left_over.expand(400, 8).scatter(1, indices, listed).numpy()
    source = Held(at.features, target, tuple(range(8)), "distributions" if kind == "distributions" else "top_k")
    found = diagnose(source, at.weight, at.bias, "cross_entropy", rows_at_once=37).calibration
    predicted = at.p.argmax(1)
    assert found.error == pytest.approx(calibration_error(at.p, mass[np.arange(400), predicted]), rel=1e-10)
    by_labels = calibration_error(at.p, (y.numpy().argmax(1) == predicted).astype(float))
    assert found.error < 0.5 * by_labels
    # The targets of a teacher are right as often as they say: labels drawn from them have that error in expectation.
    exact = diagnose(Held(at.features, torch.tensor(at.p), tuple(range(8)), "distributions"), at.weight, at.bias, "cross_entropy")  # fmt: skip
    assert exact.calibration.error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "reverse_kl", "js"])
def test_distributions_against_scipy(loss: str) -> None:
    at = problem(61, 6)
    y = torch.softmax(torch.randn(61, 6, dtype=torch.float64), 1)
    source = Held(at.features, y, tuple("abcdef"), "distributions")
    found = diagnose(source, at.weight, at.bias, loss, rows_at_once=9)
    y, log_p = y.numpy(), log_softmax(at.z, axis=1)
    middle = (y + at.p) / 2
    expected = {
        "cross_entropy": -(y * log_p).sum(1),
        "forward_kl": entropy(y, at.p, axis=1),
        "reverse_kl": entropy(at.p, y, axis=1),
        "js": (entropy(y, middle, axis=1) + entropy(at.p, middle, axis=1)) / 2,
    }
    assert found.loss == pytest.approx(expected[loss].mean(), rel=1e-12)
    assert found.kl == pytest.approx(expected["forward_kl"].mean(), rel=1e-12)
    assert found.accuracy == (y.argmax(1) == at.p.argmax(1)).mean()
    assert found.brier == pytest.approx(((at.p - y) ** 2).sum(1).mean(), rel=1e-12)
    assert found.hardest[0].el2n == pytest.approx(np.linalg.norm(at.p - y, axis=1).max(), rel=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_lists_against_their_outcomes(tail: str) -> None:
    at = problem(47, 8)
    log_y = torch.log_softmax(2 * torch.randn(47, 8, dtype=torch.float64), 1)
    listed, indices = log_y.topk(3)
    source = Held(at.features, TopK(indices, listed, tail), tuple(range(8)), "top_k", ragged=True)
    found = diagnose(source, at.weight, at.bias, "forward_kl", rows_at_once=10)
    y = np.exp(listed.numpy())
    p = np.take_along_axis(at.p, indices.numpy(), 1)
    if tail == "bucket":
        y = np.column_stack([y, 1 - y.sum(1)])
        p = np.column_stack([p, 1 - p.sum(1)])
        squared = ((p - y) ** 2).sum(1)
    else:
        y = y / y.sum(1, keepdims=True)
        others = (at.p**2).sum(1) - (p**2).sum(1)
        squared = ((p - y) ** 2).sum(1) + others
    kl = (y * np.log(y / p)).sum(1)
    assert found.loss == found.kl == pytest.approx(kl.mean(), rel=1e-10)
    assert found.brier == pytest.approx(squared.mean(), rel=1e-10)
    assert found.accuracy == (indices[:, 0].numpy() == at.p.argmax(1)).mean()


@pytest.mark.parametrize("rows_at_once", [3, 90])
def test_the_hardest_rows_come_first_with_their_features(rows_at_once: int) -> None:
    at = problem(90, 3)
    source = labelled(at)
    found = diagnose(source, at.weight, at.bias, "cross_entropy", hardest=8, rows_at_once=rows_at_once)
    y, predicted = source.target.numpy(), at.p.argmax(1)
    el2n = np.linalg.norm(at.p - np.eye(3)[y], axis=1)
    order = np.argsort(-el2n, kind="stable")[:8]
    assert [row.row for row in found.hardest] == order.tolist()
    torch.testing.assert_close(found.hardest_features, at.features[order.copy()])
    for row in found.hardest:
        assert row.el2n == pytest.approx(el2n[row.row], rel=1e-12)
        assert (row.label, row.predicted) == (y[row.row], predicted[row.row])
        assert row.probability == pytest.approx(at.p[row.row, row.label], rel=1e-12)
        assert row.loss == pytest.approx(-np.log(at.p[row.row, row.label]), rel=1e-12)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_part_of_the_rows_keeps_their_numbers() -> None:
    at = problem(90, 3)
    whole = to_source(at.features.numpy(), labelled(at).target.numpy())
    fitted, held = split_source(whole, 0.3, seed=1)
    everything = {row.row: row for row in diagnose(whole, at.weight, at.bias, "cross_entropy", hardest=90).hardest}
    parts = [diagnose(part, at.weight, at.bias, "cross_entropy", hardest=90, rows_at_once=8) for part in (fitted, held)]
    rows = [row for part in parts for row in part.hardest]
    assert sorted(row.row for row in rows) == list(range(90))
    for row in rows:
        assert row.el2n == pytest.approx(everything[row.row].el2n, rel=1e-12)
    for part in parts:
        torch.testing.assert_close(part.hardest_features, at.features[[row.row for row in part.hardest]])


def test_of_equally_hard_rows_the_first_stay() -> None:
    at = problem(1, 3)
    source = Held(at.features.expand(20, -1), torch.zeros(20, dtype=torch.int64), (0, 1, 2))
    found = diagnose(source, at.weight, at.bias, "cross_entropy", hardest=4, rows_at_once=3)
    assert [row.row for row in found.hardest] == [0, 1, 2, 3]


@pytest.mark.parametrize(("classes", "width"), [(2, 3), (10, 3000), (50_000, 4)])
def test_a_block_stays_within_its_bytes(classes: int, width: int) -> None:
    source = Held(torch.zeros(3, width), torch.tensor([0, 1, 1]), tuple(range(classes)))
    found = diagnose(source, torch.zeros(classes, width), torch.zeros(classes), "cross_entropy")
    (rows,) = source.asked
    assert rows * 64 * max(classes, width) <= BUDGET < (rows + 1) * 64 * max(classes, width)
    assert found.loss == pytest.approx(np.log(classes), rel=1e-12)


def test_a_perfect_head_has_no_error() -> None:
    features = torch.eye(3)
    source = Held(features, torch.arange(3), ("a", "b", "c"))
    found = diagnose(source, 1e3 * torch.eye(3), torch.zeros(3), "cross_entropy")
    assert (found.loss, found.accuracy, found.brier, found.entropy, found.calibration.error) == (0, 1, 0, 0, 0)
    assert found.confused == ()
    assert found.calibration.counts.tolist() == [0] * 14 + [3]


@pytest.mark.parametrize("rows", [0, 3])
def test_rows_without_targets_or_no_rows_are_refused(rows: int) -> None:
    source = Held(
        torch.zeros(rows, 2), None if rows else torch.zeros(0, dtype=torch.int64), (), None if rows else "labels"
    )
    with pytest.raises(DataError, match="need rows with targets"):
        diagnose(source, torch.zeros(2, 2), torch.zeros(2), "cross_entropy")


# --- the curvature ---------------------------------------------------------------------------------------------------


def dense(at: Problem) -> np.ndarray:
    """The mean over rows of (diag(p) − ppᵀ) ⊗ ẽẽᵀ with ẽ = [e; 1]."""
    wide = np.column_stack([at.features.numpy(), np.ones(len(at.p))])
    return sum(np.kron(np.diag(p) - np.outer(p, p), np.outer(e, e)) for p, e in zip(at.p, wide, strict=True)) / len(
        at.p
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("most", [1500, 0])
def test_the_spectrum_is_that_of_the_dense_matrix(soft: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softcurve.fit.head_spectrum.DENSE_SIZE", most)
    at = problem(80, 5, width=6)
    source = labelled(at, ragged=True)
    if soft:
        source = Held(at.features, torch.tensor(at.p[::-1].copy()), tuple("abcde"), "distributions")
    found = curvature_spectrum(source, at.weight, at.bias, loss="forward_kl", k=5)
    assert isinstance(found, CurvatureSpectrum)
    values = np.linalg.eigvalsh(dense(at))[::-1]
    np.testing.assert_allclose(found.largest, values[:5], rtol=1e-10 if most else 1e-3)
    assert found.trace == pytest.approx(values.sum(), rel=1e-10)
    assert (found.size, found.rows, found.method) == (35, 80, "dense" if most else "products")
    assert float(found.shares.sum()) == pytest.approx(1)
    assert float(found.nodes.diff().min()) >= 0
    if most:
        np.testing.assert_allclose(found.nodes, np.maximum(values[::-1], 0), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", ["dense", "products", "kronecker"])
def test_a_head_without_a_bias_has_a_spectrum_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softcurve.fit.head_spectrum.DENSE_SIZE", 1500 if method == "dense" else 0)
    monkeypatch.setattr("softcurve.fit.head_spectrum.WORK", 10 if method == "kronecker" else 5e6)
    at = problem(80, 5, width=6)
    found = curvature_spectrum(labelled(at), at.weight, None, k=3)
    assert isinstance(found, CurvatureSpectrum)
    p = torch.softmax(at.features @ at.weight.T, 1).numpy()
    e = at.features.numpy()
    matrices = np.einsum("nc,cd->ncd", p, np.eye(5)) - np.einsum("nc,nd->ncd", p, p)
    if method == "kronecker":
        matrix = np.kron(matrices.mean(0), e.T @ e / 80)
    else:
        matrix = np.einsum("ncd,ni,nj->cidj", matrices, e, e).reshape(30, 30) / 80
    np.testing.assert_allclose(
        found.largest, np.linalg.eigvalsh(matrix)[:-4:-1], rtol=1e-3 if method == "products" else 1e-9
    )
    assert (found.size, found.method) == (30, method)
    assert found.trace == pytest.approx(np.einsum("ncc,ni->", matrices, e**2) / 80, rel=1e-10)


@pytest.mark.parametrize("kind", ["labels", "distributions", "bucket", "renormalize"])
@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl", "reverse_kl", "js"])
def test_every_loss_has_the_spectrum_of_its_products(kind: str, loss: str) -> None:
    if loss == "reverse_kl" and kind in ("labels", "renormalize"):
        pytest.skip("is infinite")
    at = problem(30, 4, width=3)
    y = torch.softmax(torch.randn(30, 4, dtype=torch.float64), 1)
    if kind == "labels":
        target: Tensor | TopK = y.argmax(1)
        dense_target: Tensor | TopK = torch.nn.functional.one_hot(target, 4).double()
    elif kind == "distributions":
        target = dense_target = y
    else:
        target = dense_target = TopK(*reversed(y.log().topk(2)), kind)
    source = Held(at.features, target, (0, 1, 2, 3), "top_k" if kind in ("bucket", "renormalize") else kind)
    found = curvature_spectrum(source, at.weight, at.bias, loss=loss, k=3)
    assert isinstance(found, CurvatureSpectrum)
    head = torch.nn.Linear(3, 4, dtype=torch.float64)
    head.weight, head.bias = torch.nn.Parameter(at.weight), torch.nn.Parameter(at.bias)
    matrix = GGN(torch.nn.Identity(), head, [(at.features, dense_target)], loss=loss).to_dense()
    values = torch.linalg.eigvalsh(matrix).flip(0)
    tolerance = 1e-3 if kind == "bucket" else 1e-9
    torch.testing.assert_close(found.largest, values[:3], rtol=tolerance, atol=0)
    assert found.trace == pytest.approx(float(values.sum()), rel=1e-9)


def test_more_rows_than_wanted_are_sampled() -> None:
    at = problem(300, 3)
    found = curvature_spectrum(labelled(at, ragged=True), at.weight, at.bias, loss="js", rows=40)
    assert isinstance(found, CurvatureSpectrum)
    assert found.rows == 40


def test_a_larger_head_is_seen_through_its_kronecker_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softcurve.fit.head_spectrum.DENSE_SIZE", 0)
    monkeypatch.setattr("softcurve.fit.head_spectrum.WORK", 10)
    at = problem(80, 5, width=6)
    found = curvature_spectrum(labelled(at), at.weight, at.bias, k=4)
    assert isinstance(found, CurvatureSpectrum)
    wide = np.column_stack([at.features.numpy(), np.ones(80)])
    of_features = np.linalg.eigvalsh(wide.T @ wide / 80)
    of_classes = np.linalg.eigvalsh(np.diag(at.p.mean(0)) - at.p.T @ at.p / 80)
    values = np.sort(np.outer(of_classes, of_features).ravel())[::-1]
    assert found.method == "kronecker"
    np.testing.assert_allclose(found.largest, values[:4], rtol=1e-10)
    np.testing.assert_allclose(found.nodes, np.maximum(values[::-1], 0), rtol=1e-8, atol=1e-12)


def test_a_very_large_head_is_left_out_with_a_reason() -> None:
    source = Held(torch.zeros(500, 3000), torch.zeros(500, dtype=torch.int64), tuple(range(5000)))
    found = curvature_spectrum(source, torch.zeros(5000, 3000), torch.zeros(5000))
    assert isinstance(found, str)
    assert "5,000 classes of 3,000 features" in found
    assert source.asked == []


def test_a_curvature_of_nothing_is_found_to_be_nothing() -> None:
    source = Held(torch.eye(3), torch.arange(3), ("a", "b", "c"))
    found = curvature_spectrum(source, 1e4 * torch.eye(3), torch.zeros(3))
    assert isinstance(found, CurvatureSpectrum)
    assert found.trace == 0
    assert (found.largest.abs() < 1e-12).all()


def test_the_records_are_frozen() -> None:
    at = problem(4, 2)
    found = diagnose(labelled(at), at.weight, at.bias, "cross_entropy")
    with pytest.raises(AttributeError):
        found.loss = 0.0  # type: ignore[misc]
    assert isinstance(found, Diagnostics)
