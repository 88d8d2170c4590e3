"""The tiles of dense targets, in ATen and in Triton alike; the terms of both distributions on a tile, in ATen.

``torch.where`` costs as much as five exponentials on the CPU, so rare entries (masked classes, classes without mass)
are handled only where a look at the rows shows that there are some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from softcurve.head.kernel import row_groups
from softcurve.losses.divergences import Divergence, Pair
from softcurve.losses.softmax import may_be_masked, term_of, unless_masked
from softcurve.losses.spec import LossSpec

MODEL, TARGET = range(2)

# Rows of ``DenseTile.numbers``: eight of the model's softmax, the same eight of the target's, and four of the loss.
# With S the sum of the scores and u = v − p·v, the entries of a class with more than half of the mass (the "top") are
# differences that cancel, so the residual and u at the top are sums over the other classes instead.
OFFSET, LOG_REST, UNIT, SCORE, TOP_RESIDUAL, MEAN_V, TOP_U, CHANGE = range(8)
SIDE_NUMBERS = 8
LOG_RATIO, LSE, WEIGHT, SHARE_SURPLUS = range(2 * SIDE_NUMBERS, 2 * SIDE_NUMBERS + 4)


class DenseTile(NamedTuple):
    """The tensors of a block, ``(rows, classes)`` each, and what its elementwise work depends on."""

    loss: LossSpec
    class_count: int  # C, of which the block holds some
    cached: int  # entries that stay in the cache
    wants_target: bool  # whether the derivatives with respect to the target are wanted
    knows_scores: bool  # whether sums and numbers have scores; if not, ATen sums them up over whole rows in residuals
    z: Tensor
    target: Tensor  # probabilities or logits, as the caller gave them
    v: Tensor | None = None  # the changes of z and target along a direction
    target_v: Tensor | None = None
    out: Tensor | None = None  # for residuals: ``z`` and ``v`` themselves, or buffers in half precision
    v_out: Tensor | None = None
    target_out: Tensor | None = None
    target_v_out: Tensor | None = None
    seen: Tensor | None = None  # where ATen keeps what the softmax sees, if there is a soft cap and no cut of classes
    raw: Tensor | None = None  # second order: buffers for the logits before their soft cap, q, and the residual
    q: Tensor | None = None
    residual: Tensor | None = None
    class_weight: Tensor | None = None  # (classes,): the factors of the target's mass, and of label smoothing
    class_share: Tensor | None = None
    masks_share: bool = False  # whether rows exclude classes of the smoothing: see RowData.share_surplus
    top: Tensor | None = None  # (2, rows): each softmax's class above one half as a column; elsewhere if there is none
    numbers: Tensor | None = None  # (20, rows, 1), in the dtype of ``z``

    @property
    def is_by_logits(self) -> bool:
        """Whether a softmax makes the target, so that its derivatives pass through one."""
        return self.loss.target != "probabilities" or not self.loss.is_cross_entropy

    @property
    def takes_logarithm(self) -> bool:
        """Whether the target's logits are the logarithm of what the caller gave."""
        return self.is_by_logits and self.loss.target == "probabilities"

    @property
    def target_scale(self) -> float:
        """The factor of the target's logits, where no matrix product has applied it."""
        return 1.0 if self.loss.target == "teacher" else self.loss.target_scale

    def number(self, which: int, side: int = MODEL) -> Tensor:
        """Return one number of each row, ``(rows, 1)``; ``side`` for those that each softmax has."""
        assert self.numbers is not None
        return self.numbers[which + SIDE_NUMBERS * side]

    def row_groups(self) -> Iterator[tuple[slice, DenseTile]]:
        """Yield groups of rows that are small enough to stay in the cache, with the target in the dtype of ``z``."""
        parts = {name: value for name, value in self._asdict().items() if name in _BY_ROWS and value is not None}
        for group in row_groups(self.z, self.cached):
            part = self._replace(**{name: value[group] for name, value in parts.items()})
            top = None if self.top is None else self.top[:, group]
            numbers = None if self.numbers is None else self.numbers[:, group]
            yield group, part._replace(target=part.target.to(self.z.dtype), top=top, numbers=numbers)

    def top_entries(self, side: int) -> tuple[Tensor, Tensor]:
        """Return the row and column of each class above one half in the tile."""
        assert self.top is not None
        column = self.top[side]
        row = ((column >= 0) & (column < self.z.shape[1])).nonzero().squeeze(-1)
        return row, column[row]


_BY_ROWS = frozenset(
    ("z", "target", "v", "target_v", "out", "v_out", "target_out", "target_v_out", "seen", "raw", "q", "residual")
)


class DenseSums(NamedTuple):
    """What the tile function ``sums`` adds up over a block's classes, ``(rows, 1)`` each; 0 where it is not wanted."""

    score: Tensor  # S, and the same sum without the top
    score_rest: Tensor
    target_score: Tensor
    target_score_rest: Tensor
    value: Tensor
    surplus: Tensor  # Σ (p − y)
    curve: Tensor
    mean_v: Tensor  # Σ p v without the top, and v at the top
    top_v: Tensor
    target_mean_v: Tensor
    target_top_v: Tensor
    entropy: Tensor
    square: Tensor  # Σ p² without the top
    best: Tensor  # the target's largest entry


# --- terms ------------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """The probabilities of one side and the terms of the loss seen from it, each computed when it is first called.

    :mod:`softcurve.losses.divergences` defines score, curve and cross term; a curve or cross term of 0 is ``None``.
    """

    p: Callable[[], Tensor]
    score: Callable[[], Tensor]
    curve: Callable[[], Tensor | None]
    cross: Callable[[], Tensor | None]


class Terms(NamedTuple):
    """The terms that compare the distributions of the model and of the target."""

    pair: Pair | None  # None for a cross-entropy
    log_p: Tensor
    y: Tensor  # the target as a cross-entropy weighs its classes, or the target's softmax
    model: Side
    target: Side


def terms_of(tile: DenseTile) -> Terms:
    """Compare two distributions: a cross-entropy is the member ``φ = −y log p`` with ``s = −y``, ``c = 0``, ``x = −y``.

    Seen from the logits of its target, a cross-entropy has ``s = c = −y log p``.
    """
    # A soft cap is slow, so what the softmax sees is kept where there is a buffer for it.
    z, y = map_logits(tile) if tile.seen is None else tile.seen, tile.target
    log_p = (z - tile.number(OFFSET)).sub_(tile.number(LOG_REST))
    if tile.is_by_logits:
        logits = target_logits(tile)
        log_y = (logits - tile.number(OFFSET, TARGET)).sub_(tile.number(LOG_REST, TARGET))
        y = log_y.exp()
    if tile.loss.is_cross_entropy:
        return _cross_entropy_terms(tile, log_p, y)
    pair, divergence = _pair(tile, log_p, log_y, z, logits, y), tile.loss.divergence
    return Terms(pair, log_p, y, _side_of(divergence, pair), _side_of(divergence.exchanged(), pair.exchanged()))


def _side_of(divergence: Divergence, pair: Pair) -> Side:
    score, curve, cross = (cache(partial(term_of, divergence, name, pair)) for name in ("score", "curve", "cross"))
    return Side(lambda: pair.p, score, curve, cross)


def _pair(tile: DenseTile, log_p: Tensor, log_y: Tensor, z: Tensor, logits: Tensor, y: Tensor) -> Pair:
    """Return both distributions and their log-ratio, right relatively even where the two nearly agree.

    There the difference of the logits is exact, as that of two log-probabilities is not. Where the offsets of the rows
    differ, it is rounded at the size of the offsets.
    """
    p = log_p.exp()
    ratio = (z - logits).sub_(tile.number(LOG_RATIO))
    apart = ((tile.number(OFFSET) - tile.number(OFFSET, TARGET)).abs() >= 1).squeeze(-1)
    if apart.any():
        ratio[apart] = log_p[apart] - log_y[apart]
    if may_be_masked(z) and may_be_masked(logits):
        ratio = torch.where((z == -math.inf) & (logits == -math.inf), 0.0, ratio)
    # p − y, where the two are near as y (p/y − 1); lerp selects one of two finite numbers at a tenth of where's time.
    near = torch.clamp(ratio, -0.5, 0.5)
    is_near = torch.eq(ratio, near, out=torch.empty_like(p))
    difference = torch.lerp(p - y, near.expm1_().mul_(y), is_near)
    return Pair(p, y, ratio, difference)


def _cross_entropy_terms(tile: DenseTile, log_p: Tensor, y: Tensor) -> Terms:
    loss, weight, p = tile.loss, tile.class_weight, cache(log_p.exp)
    own, whole = masses(y, loss, tile.class_count, weight, tile.class_share)
    if tile.masks_share:
        uniform = masses(torch.zeros_like(y), loss, tile.class_count, weight, tile.class_share)[1]
        whole = own + torch.where(log_p == -math.inf, 0.0, uniform.mul_(1 + tile.number(SHARE_SURPLUS)))
    model = partial(Side, p, cache(whole.neg), _nothing)
    if tile.is_by_logits:
        score, cross = cache(lambda: -weighted(own, log_p)), cache(own.neg)
        return Terms(None, log_p, whole, model(cross), Side(lambda: y, score, score, cross))
    # The cross term is with respect to probabilities that no softmax has made.
    factor = torch.full_like(y[:1], 1 - loss.smoothing) if weight is None else (1 - loss.smoothing) * weight

    @cache
    def nothing() -> Tensor | None:
        """Return which classes have no derivative of any order: those that are masked and have no mass."""
        return (log_p == -math.inf) & (y == 0) if may_be_masked(log_p) else None

    def score_of_probabilities() -> Tensor:
        score = -factor * log_p
        return score if (none := nothing()) is None else torch.where(none | (factor == 0), 0.0, score)

    def cross_with_probabilities() -> Tensor:
        return -factor if (none := nothing()) is None else torch.where(none, 0.0, -factor)

    cross = cache(cross_with_probabilities)
    target = Side(lambda: y, cache(score_of_probabilities), _nothing, cross)
    return Terms(None, log_p, whole, model(cross), target)


def _nothing() -> None:
    """Return the curve of a loss that is linear in ``log p``."""


def masses(
    y: Tensor, loss: LossSpec, class_count: int, weight: Tensor | None, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``w (1 − ε) y`` and a cross-entropy's whole target ``w (1 − ε) y + w′ ε / C``, with label smoothing."""
    own = y * (1 - loss.smoothing) if loss.smoothing else y
    own = own if weight is None else own * weight
    if not loss.smoothing:
        return own, own
    each = loss.smoothing / class_count
    return own, own + (each if share is None else each * share)


def map_logits(tile: DenseTile) -> Tensor:
    """Return ``m(z)``, in the buffer for it if the tile has one."""
    loss = tile.loss
    if loss.softcap is None or may_be_masked(tile.z):
        seen = loss.logit_map.value(tile.z)
    else:
        seen = torch.tanh(tile.z / loss.softcap).mul_(loss.softcap / loss.temperature)
    return seen if tile.seen is None else tile.seen.copy_(seen)


def target_logits(tile: DenseTile) -> Tensor:
    """Return the logits whose softmax is the target."""
    logits = torch.log(tile.target) if tile.takes_logarithm else tile.target
    return logits if tile.target_scale == 1 else logits * tile.target_scale


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Return ``weights ⊙ values``, where a class of weight 0 has no part, also beside an infinite value."""
    products = weights * values
    return torch.where(weights == 0, 0.0, products) if products.sum().isnan() else products


def sum_and_rest(tile: DenseTile, side: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over all classes, and over all but the top."""
    total = values.sum(-1, keepdim=True)
    row, column = tile.top_entries(side)
    rest = total
    if len(row):
        rest = total.clone()
        rest[row] = values[row].scatter_(-1, column.unsqueeze(-1), 0.0).sum(-1, keepdim=True)
    return total, rest


def slope_of(tile: DenseTile, raw: Tensor | None = None) -> Tensor | None:
    """Return ``m′`` of the soft cap at the logits before it."""
    return None if tile.loss.softcap is None else tile.loss.logit_map.slope(tile.z if raw is None else raw)


def gradient_of(tile: DenseTile, terms: Terms) -> Tensor:
    """Return ∂L/∂z for what the softmax sees."""
    gradient = pulled_back(tile, MODEL, terms.model)
    if tile.loss.z_loss:
        gradient.addcmul_(terms.model.p(), tile.number(LSE), value=2 * tile.loss.z_loss)
    return unless_masked(tile.z, gradient)


def pulled_back(tile: DenseTile, side: int, of: Side) -> Tensor:
    """Return ``s − p S``, at the top as minus the sum of all others, and its limit where ``S`` is infinite."""
    if tile.knows_scores:
        total, at_top = tile.number(SCORE, side), tile.number(TOP_RESIDUAL, side)
    else:
        total, rest = sum_and_rest(tile, side, of.score())
        at_top = -torch.expm1(-tile.number(LOG_REST, side)) * total - rest
    gradient = torch.addcmul(of.score(), of.p(), total, value=-1)
    row, column = tile.top_entries(side)
    if len(row):
        gradient[row, column] = at_top[row, 0]
    infinite = total.isinf().squeeze(-1).nonzero().squeeze(-1)
    if len(infinite):  # as in softmax.divergence_gradient
        score, p = of.score()[infinite], of.p()[infinite]
        gradient[infinite] = torch.where(score.isinf(), score, torch.where(p > 0, -total[infinite], 0.0))
    return gradient


def without_mean(v: Tensor, mean: Tensor, tile: DenseTile, side: int, at_top: Tensor) -> Tensor:
    """Return ``v − mean``, but at the top the number that each row has for it."""
    u = v - mean
    row, column = tile.top_entries(side)
    if len(row):
        u[row, column] = at_top[row, 0]
    return u
