"""What a head is worth on rows: its figures, from one walk over them that never holds more than a block's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.array_types import Float, Float64, Int64
from softcurve.fit import DataError
from softcurve.fit.confusion import ConfusedPair, Confusion
from softcurve.fit.data.source import Block, BlockTarget, Source, TargetKind, rows_within, share_of
from softcurve.fit.group import Group
from softcurve.fit.losses import row_losses
from softcurve.fit.scores import target_labels, target_mass
from softcurve.functional import entropy
from softcurve.losses.targets import TopK
from softcurve.records import ShortRepr

__all__ = ["Calibration", "Diagnostics", "HardRow", "diagnose"]

KEPT_WIDTH = 4096  # up to here the features of the hardest rows are kept
MOST_CONFUSED = 30


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(ShortRepr):
    """Rows by the probability of the class that is predicted, in bins of equal width; a bin holds its upper edge.

    ``confidence`` is the mean of that probability and ``accuracy`` the mean of the target's own probability of the
    predicted class, NaN in an empty bin. For labels it is the share of rows predicted rightly; for a distribution it is
    that share's expected value, were labels drawn from it. ``error`` is the mean over rows of ``|accuracy −
    confidence|`` of their bin (the ECE of Guo et al. 2017).
    """

    counts: Int64[Tensor, " bins"]
    confidence: Float64[Tensor, " bins"]
    accuracy: Float64[Tensor, " bins"]
    error: float


@dataclass(frozen=True)
class HardRow:
    """A row that the head finds hard: ``el2n`` is ``‖p − y‖``, ``label`` and ``predicted`` are numbers of classes.

    ``row`` is its number in the source, and for a :class:`~softcurve.fit.data.subset.Subset` in what that is a part of.
    """

    row: int
    el2n: float
    label: int
    predicted: int
    probability: float  # of the label
    loss: float


@dataclass(frozen=True, eq=False, repr=False)
class Diagnostics(ShortRepr):
    """Figures of a head on rows, in nats; a target's most probable class is its label.

    ``kl`` is the mean ``D(target‖model)``, ``None`` for labels; ``entropy`` is the mean of the model's own;
    ``brier`` is the mean ``‖p − y‖²``, from 0 to 2. Of a top-k list with a bucket, the last is over its outcomes.
    ``matrix`` counts (label, predicted) where the classes are few, and ``confused`` the pairs that are confused most.
    ``hardest`` are the rows of largest EL2N (Paul, Ganguli, Dziugaite 2021), the hardest first.
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
    loss: str,
    *,
    hardest: int = 24,
    bins: int = 15,
    rows_at_once: int | None = None,
) -> Diagnostics:
    """The figures of ``softmax(W e + b)`` on all rows, in float64 and in one walk.

    Where the source is a share, they are those of the rows of all processes, which ask for them at the same time.
    Raises DataError for rows without targets, or no rows.
    """
    share = share_of(source)
    if source.kind is None or share.total == 0:
        raise DataError("data: figures need rows with targets" + ("" if share.total else ", and there are no rows"))
    weight, bias = weight.double(), bias.double()
    classes = len(bias)
    if rows_at_once is None:
        rows_at_once = rows_within(*weight.shape)
    confusion, sums = Confusion(classes), _Sums(bins)
    hard = _Hardest(hardest, weight.shape[1])
    with share.together.agreed():
        for block in source.blocks(rows_at_once):
            assert block.target is not None
            logits = torch.addmm(bias, block.features.double(), weight.T)
            found = _rows(loss, logits, block.target)
            confusion.add(found.label, found.predicted)
            sums.add(found)
            hard.add(block, found)
    for counted in (confusion, sums, hard):
        counted.add_others(share.together)
    rows, totals = sums.rows, {name: total / sums.rows for name, total in sums.totals.items()}
    return Diagnostics(
        rows=rows,
        kind=source.kind,
        accuracy=int(confusion.correct.sum()) / rows,
        loss=totals["loss"],
        kl=None if source.kind == "labels" else totals["kl"],
        entropy=totals["entropy"],
        brier=totals["brier"],
        calibration=sums.calibration(),
        support=confusion.support,
        predicted=confusion.predicted,
        correct=confusion.correct,
        matrix=confusion.matrix,
        confused=confusion.most_confused(MOST_CONFUSED),
        hardest=tuple(hard.rows),
        hardest_features=hard.features,
    )


class _Rows(NamedTuple):
    """What is known of each row of a block."""

    loss: Float64[Tensor, " rows"]
    kl: Float64[Tensor, " rows"] | None
    entropy: Float64[Tensor, " rows"]
    squared_el2n: Float64[Tensor, " rows"]
    confidence: Float64[Tensor, " rows"]
    probability: Float64[Tensor, " rows"]
    label: Int64[Tensor, " rows"]
    predicted: Int64[Tensor, " rows"]
    right: Float64[Tensor, " rows"]  # the target's probability of the predicted class


def _rows(loss: str, logits: Float64[Tensor, "rows classes"], target: BlockTarget) -> _Rows:
    losses = row_losses(loss, logits, target).double()
    label = target_labels(target)
    kl = None
    if isinstance(target, TopK) or target.is_floating_point():
        kl = losses if loss == "forward_kl" else row_losses("forward_kl", logits, target).double()
    p = logits.softmax(-1)
    confidence, predicted = p.max(-1)
    probability = p.gather(-1, label[:, None]).squeeze(-1)
    right = target_mass(target, predicted, logits.shape[-1])
    if isinstance(target, TopK):
        model, teacher = target.against(logits)
        residual = model.softmax(-1).sub_(teacher.double().softmax(-1))
    elif target.is_floating_point():
        residual = p.sub_(target)
    else:
        residual = p.scatter_add_(-1, label[:, None], torch.full_like(probability, -1.0)[:, None])
    squared = residual.square_().sum(-1)
    return _Rows(losses, kl, entropy(logits), squared, confidence, probability, label, predicted, right)


class _Sums:
    """Sums over rows, and over those of each bin of confidence."""

    def __init__(self, bins: int) -> None:
        self.rows = 0
        self.totals = dict.fromkeys(("loss", "kl", "entropy", "brier"), 0.0)
        self.edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.confidence, self.right = torch.zeros(2, bins, dtype=torch.float64)

    def add(self, rows: _Rows) -> None:
        columns = {"loss": rows.loss, "kl": rows.kl, "entropy": rows.entropy, "brier": rows.squared_el2n}
        self.rows += len(rows.loss)
        for name, column in columns.items():
            if column is not None:
                self.totals[name] += column.sum().item()
        places = torch.bucketize(rows.confidence, self.edges)  # an edge belongs to the bin below
        self.counts += torch.bincount(places, minlength=len(self.counts))
        self.confidence.index_add_(0, places, rows.confidence)
        self.right.index_add_(0, places, rows.right)

    def add_others(self, together: Group) -> None:
        """The sums over the rows of all processes."""
        totals = torch.tensor([self.rows, *self.totals.values()], dtype=torch.float64)
        counts = self.counts.double()
        with together.summed(totals, counts, self.confidence, self.right):
            pass
        self.counts, self.rows = counts.long(), int(totals[0])
        self.totals = dict(zip(self.totals, totals[1:].tolist(), strict=True))

    def calibration(self) -> Calibration:
        confidence, accuracy = self.confidence / self.counts, self.right / self.counts  # 0/0 is NaN
        error = (self.right - self.confidence).abs().sum().item() / self.rows
        return Calibration(self.counts, confidence, accuracy, error)


class _Hardest:
    """The rows of largest EL2N so far, with their features; of equals the first."""

    def __init__(self, at_most: int, width: int) -> None:
        self.at_most = at_most
        self.rows: list[HardRow] = []
        self.features = torch.zeros(0, width, dtype=torch.float64) if width <= KEPT_WIDTH else None

    def add(self, block: Block, rows: _Rows) -> None:
        el2n = rows.squared_el2n.sqrt()
        order = el2n.argsort(descending=True, stable=True)[: self.at_most]
        columns = (el2n, rows.label, rows.predicted, rows.probability, rows.loss)
        numbers = [block.number(row) for row in order.tolist()]
        found = [HardRow(*row) for row in zip(numbers, *(column[order].tolist() for column in columns), strict=True)]
        self._keep(self.rows + found, [self.features, block.features[order].double()])

    def add_others(self, together: Group) -> None:
        """The hardest of the rows of all processes."""
        if together.size == 1:
            return
        columns = torch.tensor([astuple(row) for row in self.rows], dtype=torch.float64).reshape(
            -1, len(fields(HardRow))
        )
        rows = [
            HardRow(int(row), el2n, int(label), int(predicted), probability, loss)
            for row, el2n, label, predicted, probability, loss in torch.cat(together.gathered(columns)).tolist()
        ]
        self._keep(rows, [None] if self.features is None else together.gathered(self.features))

    def _keep(self, rows: list[HardRow], features: Sequence[Tensor | None]) -> None:
        kept = sorted(range(len(rows)), key=lambda place: -rows[place].el2n)[: self.at_most]
        self.rows = [rows[place] for place in kept]
        if self.features is not None:
            self.features = torch.cat([each for each in features if each is not None])[kept]
