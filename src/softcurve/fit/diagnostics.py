"""How well a head predicts rows, from one pass over them that holds the logits of one block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit import DataError
from softcurve.fit.data.source import BlockTarget, RowBlock, Source, TargetKind, block_rows, share_of
from softcurve.fit.data.sparse_features import dense_features, linear
from softcurve.fit.group import Group
from softcurve.fit.losses import is_soft, row_losses, target_labels, target_probability, target_sums
from softcurve.fit.uncertainty import RowGroups
from softcurve.functional import entropy
from softcurve.losses.divergences import Divergence
from softcurve.losses.topk import TopK
from softcurve.records import ShortRepr

KEPT_WIDTH = 4096  # up to here the features of the hardest rows are kept
MOST_CONFUSED = 30
DENSE_CLASSES = 200  # up to here there is a confusion matrix


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(ShortRepr):
    """Rows by the probability of the predicted class, in bins of equal width that include their upper edge.

    ``confidence`` is the mean of that probability and ``accuracy`` the mean of the target's probability of the
    predicted class; both are NaN in an empty bin. For labels the accuracy is the share of rows predicted correctly; for
    distributions it is the expected share if labels were drawn from them. ``error`` is the mean over rows of
    ``|accuracy − confidence|`` of their bin (the ECE of Guo et al. 2017).
    """

    counts: Int64[Tensor, " bins"]
    confidence: Float64[Tensor, " bins"]
    accuracy: Float64[Tensor, " bins"]
    error: float


@dataclass(frozen=True)
class HardRow:
    """A row with a large error: ``el2n`` is ``‖p − y‖``, ``label`` and ``predicted`` are numbers of classes.

    ``row`` is its number in the source; for a :class:`~softcurve.fit.data.subset.Subset`, in the whole source.
    """

    row: int
    el2n: float
    label: int
    predicted: int
    probability: float  # of the label
    loss: float


@dataclass(frozen=True)
class ConfusedPair:
    """``count`` rows of the class ``label`` were predicted as ``predicted``, both given by their numbers."""

    label: int
    predicted: int
    count: int


@dataclass(frozen=True)
class Scores:
    """Means over rows, in nats; the most probable class of a target is its label.

    ``kl`` is the mean ``D(target‖model)``, ``None`` for labels; ``entropy`` is the mean entropy of the model; ``brier``
    is the mean ``‖p − y‖²``, from 0 to 2, over the outcomes of a top-k list with a bucket.
    """

    loss: float
    accuracy: float
    kl: float | None
    entropy: float
    brier: float


@dataclass(frozen=True, eq=False, repr=False)
class Diagnostics(ShortRepr, Scores):
    """The scores of a head on rows, and further figures.

    ``matrix`` is the confusion matrix (label, predicted) if there are few classes, and ``confused`` are the most
    frequent confusions. ``frequencies`` are the mean probabilities of the classes in the targets. ``groups`` are the
    sums over groups of rows (:class:`~softcurve.fit.uncertainty.RowGroups`). ``hardest`` are the rows of largest EL2N
    (Paul, Ganguli, Dziugaite 2021), in descending order.
    """

    rows: int
    kind: TargetKind
    calibration: Calibration
    support: Int64[Tensor, " classes"]
    predicted: Int64[Tensor, " classes"]
    correct: Int64[Tensor, " classes"]
    matrix: Int64[Tensor, "classes classes"] | None
    confused: tuple[ConfusedPair, ...]
    frequencies: Float64[Tensor, " classes"]
    groups: Float64[Tensor, "3 groups"]
    hardest: tuple[HardRow, ...]
    hardest_features: Float64[Tensor, "hardest d"] | None  # None where they are wide

    @property
    def balanced_accuracy(self) -> float:
        """Return the mean recall of the classes that have rows."""
        return (self.correct.double() / self.support)[self.support > 0].mean().item()


@torch.no_grad()
def diagnose(
    source: Source, weight: Float[Tensor, "classes d"], bias: Float[Tensor, " classes"], loss: str | Divergence, *,
    hardest: int = 24, bins: int = 15, rows_at_once: int | None = None,
) -> Diagnostics:  # fmt: skip
    """Return the figures of ``softmax(W e + b)`` on all rows, in float64, from one pass over the rows.

    If the source is a share of the rows, the figures are those of the rows of all processes, all of which must call
    this function. Raises DataError for rows without targets, or no rows.
    """
    share = share_of(source)
    if source.kind is None or share.total == 0:
        raise DataError("data: figures need rows with targets" + ("" if share.total else ", and there are no rows"))
    weight, bias = weight.double(), bias.double()
    sums, calibration = ScoreSums(loss), torch.zeros(3, bins, dtype=torch.float64)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    counts = csr_array((len(bias), len(bias)), dtype=np.int64)  # never more pairs of classes than rows
    hard, groups = _HardestRows(hardest, weight.shape[1]), RowGroups(share)
    frequencies = torch.zeros(len(bias), dtype=torch.float64)
    with share.group.agreed():
        for block in source.blocks(rows_at_once or block_rows(source, len(weight))):
            assert block.target is not None
            scores = sums.add(linear(block.features, weight, bias), block.target)
            ones = torch.ones_like(scores.confidence)
            pairs = scores.label.numpy(), scores.predicted.numpy()
            counts = counts + csr_array((ones.long().numpy(), pairs), shape=counts.shape)
            columns = torch.stack([ones, scores.confidence, scores.target_at_predicted])
            # An edge belongs to the bin below.
            calibration.index_add_(1, torch.bucketize(scores.confidence, edges), columns)
            hard.add(block, scores)
            groups.add(block.start, scores.loss, scores.label == scores.predicted)
            frequencies += target_sums(block.target, len(bias))
    sums.add_processes(share.group)
    with share.group.summed(calibration, frequencies, groups.sums):
        pass
    first, *others = share.group.values(counts)
    counts = sum(others, first)
    hard.add_processes(share.group)
    in_bin, confidence, accuracy = calibration
    error = (accuracy - confidence).abs().sum() / in_bin.sum()
    of_labels, of_predictions, right = map(torch.as_tensor, (counts.sum(1), counts.sum(0), counts.diagonal()))
    return Diagnostics(
        **asdict(sums.means()), rows=sums.rows, kind=source.kind,
        calibration=Calibration(in_bin.long(), confidence / in_bin, accuracy / in_bin, error.item()),  # 0/0 is NaN
        support=of_labels, predicted=of_predictions, correct=right,
        matrix=torch.as_tensor(counts.toarray()) if len(bias) <= DENSE_CLASSES else None,
        confused=_most_confused(counts), frequencies=frequencies / sums.rows, groups=groups.sums,
        hardest=tuple(hard.rows), hardest_features=hard.features,
    )  # fmt: skip


@torch.no_grad()
def baseline_scores(
    source: Source, frequencies: Float64[Tensor, " classes"], loss: str | Divergence, *, rows_at_once: int | None = None
) -> Scores:
    """Return the scores of a model that gives the classes the same probabilities, ``frequencies``, for every row.

    The loss may be infinite for a class of frequency 0. All processes that share the source must call this function.
    """
    sums, share, logits = ScoreSums(loss), share_of(source), frequencies.log()
    with share.group.agreed():
        for block in source.blocks(rows_at_once or block_rows(source, len(frequencies))):
            assert block.target is not None
            sums.add(logits.expand(len(block), -1), block.target)
    sums.add_processes(share.group)
    return sums.means()


def _most_confused(counts: csr_array) -> tuple[ConfusedPair, ...]:
    """Return the pairs of different classes that occur most often; of equals, the first in order of the classes."""
    pairs = counts.tocoo()
    wrong = np.flatnonzero(pairs.row != pairs.col)
    order = wrong[np.lexsort((pairs.col[wrong], pairs.row[wrong], -pairs.data[wrong]))][:MOST_CONFUSED]
    return tuple(ConfusedPair(int(pairs.row[i]), int(pairs.col[i]), int(pairs.data[i])) for i in order)


class RowScores(NamedTuple):
    """The scores of each row of a block; ``target_at_predicted`` is the target's probability of the predicted class."""

    loss: Float64[Tensor, " rows"]
    kl: Float64[Tensor, " rows"] | None
    entropy: Float64[Tensor, " rows"]
    squared_el2n: Float64[Tensor, " rows"]
    confidence: Float64[Tensor, " rows"]
    label_probability: Float64[Tensor, " rows"]
    label: Int64[Tensor, " rows"]
    predicted: Int64[Tensor, " rows"]
    target_at_predicted: Float64[Tensor, " rows"]


class ScoreSums:
    """Sums of the scores over the rows of all blocks so far; ``loss`` is the name of the loss."""

    def __init__(self, loss: str | Divergence) -> None:
        self.loss = loss
        self.rows = 0
        self.soft = False
        self._totals = torch.zeros(5, dtype=torch.float64)

    def add(self, logits: Float[Tensor, "rows classes"], target: BlockTarget) -> RowScores:
        """Score the rows of a block, and add their scores; the most probable class of a soft target is its label."""
        scores = _row_scores(self.loss, logits, target)
        self.rows += len(logits)
        self.soft = scores.kl is not None
        right = scores.label == scores.predicted
        columns = (scores.loss, right, scores.kl, scores.entropy, scores.squared_el2n)
        self._totals += torch.stack([torch.zeros(()) if each is None else each.double().sum() for each in columns])
        return scores

    def add_processes(self, group: Group) -> None:
        """Add the sums over the rows of all other processes."""
        rows = torch.tensor([self.rows, self.soft], dtype=torch.float64)
        with group.summed(self._totals, rows):
            pass
        self.rows, self.soft = int(rows[0]), bool(rows[1])

    def means(self) -> Scores:
        """Return the means over the rows, of which there must be one."""
        loss, accuracy, kl, mean_entropy, brier = (self._totals / self.rows).tolist()
        return Scores(loss, accuracy, kl if self.soft else None, mean_entropy, brier)


def _row_scores(loss: str | Divergence, logits: Float[Tensor, "rows classes"], target: BlockTarget) -> RowScores:
    losses, label = row_losses(loss, logits, target).double(), target_labels(target)
    kl = None
    if is_soft(target):
        kl = losses if loss == "forward_kl" else row_losses("forward_kl", logits, target).double()
    p = logits.softmax(-1)
    confidence, predicted = p.max(-1)
    label_probability = p.gather(-1, label[:, None]).squeeze(-1)
    if isinstance(target, TopK):  # the bucket of a list is one outcome
        model, teacher = target.against(logits)
        residual = model.softmax(-1).sub_(teacher.double().softmax(-1))
    elif target.is_floating_point():
        residual = p.sub_(target)
    else:
        residual = p.scatter_add_(-1, label[:, None], torch.full_like(label_probability, -1.0)[:, None])
    return RowScores(
        losses, kl, entropy(logits), residual.square_().sum(-1), confidence, label_probability, label, predicted,
        target_probability(target, predicted, logits.shape[-1]),
    )  # fmt: skip


class _HardestRows:
    """The rows of largest EL2N so far, with their features; of equals, the first."""

    def __init__(self, at_most: int, width: int) -> None:
        self.at_most = at_most
        self.rows: list[HardRow] = []
        self.features = torch.zeros(0, width, dtype=torch.float64) if width <= KEPT_WIDTH else None

    def add(self, block: RowBlock, scores: RowScores) -> None:
        el2n = scores.squared_el2n.sqrt()
        order = el2n.argsort(descending=True, stable=True)[: self.at_most]
        columns = (el2n, scores.label, scores.predicted, scores.label_probability, scores.loss)
        numbers = [block.number(row) for row in order.tolist()]
        rows = [HardRow(*row) for row in zip(numbers, *(column[order].tolist() for column in columns), strict=True)]
        kept = None if self.features is None else dense_features(block.features[order]).double()
        self._keep(self.rows + rows, [self.features, kept])

    def add_processes(self, group: Group) -> None:
        rows = [row for of_process in group.values(self.rows) for row in of_process]
        self._keep(rows, [None] if self.features is None else group.gathered(self.features))

    def _keep(self, rows: list[HardRow], features: Sequence[Tensor | None]) -> None:
        kept = sorted(range(len(rows)), key=lambda place: -rows[place].el2n)[: self.at_most]
        self.rows = [rows[place] for place in kept]
        if self.features is not None:
            self.features = torch.cat([each for each in features if each is not None])[kept]
