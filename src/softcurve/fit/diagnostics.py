"""How well a head predicts rows, from one pass over them that holds the logits of one block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit import DataError
from softcurve.fit.confusion import ConfusedPair, Confusion
from softcurve.fit.data.source import RowBlock, Source, TargetKind, rows_within, share_of
from softcurve.fit.group import Group
from softcurve.fit.scores import RowScores, ScoreSums
from softcurve.losses.divergences import Divergence
from softcurve.records import ShortRepr

__all__ = ["Calibration", "Diagnostics", "HardRow", "diagnose"]

KEPT_WIDTH = 4096  # up to here the features of the hardest rows are kept
MOST_CONFUSED = 30


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


@dataclass(frozen=True, eq=False, repr=False)
class Diagnostics(ShortRepr):
    """Figures of a head on rows, in nats; the most probable class of a target is its label.

    ``kl`` is the mean ``D(target‖model)``, ``None`` for labels; ``entropy`` is the mean entropy of the model;
    ``brier`` is the mean ``‖p − y‖²``, from 0 to 2, over the outcomes of a top-k list with a bucket. ``matrix`` is the
    confusion matrix (label, predicted) if there are few classes, and ``confused`` are the most frequent confusions.
    ``hardest`` are the rows of largest EL2N (Paul, Ganguli, Dziugaite 2021), in descending order.
    """

    rows: int
    kind: TargetKind
    loss: float
    accuracy: float
    kl: float | None
    entropy: float
    brier: float
    calibration: Calibration
    support: Int64[Tensor, " classes"]
    predicted: Int64[Tensor, " classes"]
    correct: Int64[Tensor, " classes"]
    matrix: Int64[Tensor, "classes classes"] | None
    confused: tuple[ConfusedPair, ...]
    hardest: tuple[HardRow, ...]
    hardest_features: Float64[Tensor, "hardest d"] | None  # None where they are wide


@torch.no_grad()
def diagnose(
    source: Source,
    weight: Float[Tensor, "classes d"],
    bias: Float[Tensor, " classes"],
    loss: str | Divergence,
    *,
    hardest: int = 24,
    bins: int = 15,
    rows_at_once: int | None = None,
) -> Diagnostics:
    """Return the figures of ``softmax(W e + b)`` on all rows, in float64, from one pass over the rows.

    If the source is a share of the rows, the figures are those of the rows of all processes, all of which must call
    this function. Raises DataError for rows without targets, or no rows.
    """
    share = share_of(source)
    if source.kind is None or share.total == 0:
        raise DataError("data: figures need rows with targets" + ("" if share.total else ", and there are no rows"))
    weight, bias = weight.double(), bias.double()
    confusion, sums, calibration = Confusion(len(bias)), ScoreSums(loss), _CalibrationSums(bins)
    hard = _HardestRows(hardest, weight.shape[1])
    with share.group.agreed():
        for block in source.blocks(rows_at_once or rows_within(*weight.shape)):
            assert block.target is not None
            scores = sums.add(torch.addmm(bias, block.features.double(), weight.T), block.target)
            confusion.add(scores.label, scores.predicted)
            calibration.add(scores)
            hard.add(block, scores)
    for part in (sums, confusion, calibration, hard):
        part.add_processes(share.group)
    return Diagnostics(
        rows=sums.rows,
        kind=source.kind,
        **asdict(sums.means()),
        calibration=calibration.means(),
        support=confusion.support,
        predicted=confusion.predicted,
        correct=confusion.correct,
        matrix=confusion.matrix,
        confused=confusion.most_confused(MOST_CONFUSED),
        hardest=tuple(hard.rows),
        hardest_features=hard.features,
    )


class _CalibrationSums:
    """Sums over the rows of each bin of confidence."""

    def __init__(self, bins: int) -> None:
        self.edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
        self.counts, self.confidence, self.accuracy = torch.zeros(3, bins, dtype=torch.float64)

    def add(self, scores: RowScores) -> None:
        places = torch.bucketize(scores.confidence, self.edges)  # an edge belongs to the bin below
        self.counts.index_add_(0, places, torch.ones_like(scores.confidence))
        self.confidence.index_add_(0, places, scores.confidence)
        self.accuracy.index_add_(0, places, scores.target_at_predicted)

    def add_processes(self, group: Group) -> None:
        with group.summed(self.counts, self.confidence, self.accuracy):
            pass

    def means(self) -> Calibration:
        confidence, accuracy = self.confidence / self.counts, self.accuracy / self.counts  # 0/0 is NaN
        error = (self.accuracy - self.confidence).abs().sum() / self.counts.sum()
        return Calibration(self.counts.long(), confidence, accuracy, error.item())


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
        self._keep(self.rows + rows, [self.features, block.features[order].double()])

    def add_processes(self, group: Group) -> None:
        rows = [row for of_process in group.values(self.rows) for row in of_process]
        self._keep(rows, [None] if self.features is None else group.gathered(self.features))

    def _keep(self, rows: list[HardRow], features: Sequence[Tensor | None]) -> None:
        kept = sorted(range(len(rows)), key=lambda place: -rows[place].el2n)[: self.at_most]
        self.rows = [rows[place] for place in kept]
        if self.features is not None:
            self.features = torch.cat([each for each in features if each is not None])[kept]
