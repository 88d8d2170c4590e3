"""A teacher's lists of a few classes a row, as they are made, cached and read back.

The entries of a row may be fewer than the columns: an entry whose log-probability is −inf is a filler. Its index is
ignored, whatever it is, and it is no outcome: the class that it names belongs to the bucket unless another entry lists
it. Everything that depends on the classes of a list reads :meth:`TopK.listed_classes`, where fillers are marked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from softcurve import checks
from softcurve.array_types import AnyInt, Bool, Flags, Float, Indices, Int, Rows, Values
from softcurve.extras import needed
from softcurve.losses import softmax
from softcurve.losses.divergences import Divergence
from softcurve.losses.targets import Target, uniform_over_unmasked
from softcurve.records import ShortRepr
from softcurve.typing import TopKTail

if TYPE_CHECKING:
    from softcurve.losses.topk_shards import Shard

# The class index of a filler: far below the −1 and −100 that a user's own mistakes would have.
NOT_LISTED = torch.iinfo(torch.int32).min


@dataclass(frozen=True, eq=False, repr=False)
class TopK(Target):
    """A teacher's own natural log-probabilities of up to ``k`` distinct classes a row, shapes ``(..., k)``.

    ``tail="bucket"``: all other classes are one outcome, for teacher and student alike, so that every divergence of the
    family is defined, is ≥ 0 and bounds the full one from below (data processing).
    ``tail="renormalize"``: the list is rescaled to a distribution that is zero elsewhere.

    Entries of log-probability −inf are fillers: they list nothing, whatever their index is, so that rows may list
    different numbers of classes (:meth:`ragged`). Indices may be of any integer dtype. ``topk[rows]`` selects among the
    leading dimensions, as a tensor does.

    At a temperature ``T`` other than 1 a divergence takes the mass ``τ`` of the bucket as spread evenly over its ``m``
    unmasked classes: the target is ``∝ p^{1/T}`` at listed classes and ``∝ m (τ/m)^{1/T}`` in the bucket; the student's
    side is exact. The divergence is ≥ 0 and bounds that between the tempered student and the tempered list with an even
    tail from below. For ``T > 1`` no tail of mass ``τ`` has more tempered mass than the even one.

    Raises ``TypeError`` or ``ValueError`` for indices that are no integers or of another shape. A loss raises
    ``ValueError`` for listed classes that repeat or do not exist, for a mass above 1, and for a list of no class with
    ``tail="renormalize"``, in rows of non-zero sample weight.

    Example:
        >>> log_probs, indices = torch.log_softmax(torch.randn(3, 10), -1).topk(4)
        >>> loss = softcurve.kl_divergence(softcurve.TopK(indices, log_probs), torch.randn(3, 10))
    """

    _row_field: ClassVar[str] = "log_probs"
    _class_fields: ClassVar[tuple[str, ...] | None] = ("indices", "log_probs")
    states_mass: ClassVar[bool] = True

    indices: AnyInt[Tensor, "*rows k"]
    log_probs: Float[Tensor, "*rows k"]
    tail: TopKTail = "bucket"

    def __post_init__(self) -> None:
        checks.require_choice("TopK tail", self.tail, ("bucket", "renormalize"))
        checks.require_floating("TopK log_probs", self.log_probs)
        checks.require_integers("TopK indices", self.indices)
        if self.indices.shape != self.log_probs.shape:
            raise ValueError(
                f"TopK indices must have the shape of log_probs {tuple(self.log_probs.shape)}, "
                f"got {checks.describe(self.indices)}"
            )

    # --- lists of lists ----------------------------------------------------------------------------------------------

    @staticmethod
    def ragged(
        indices: Sequence[AnyInt[Tensor, " _"]], log_probs: Sequence[Float[Tensor, " _"]], tail: TopKTail = "bucket"
    ) -> TopK:
        """Return lists of different lengths, one tensor a row, as one ``(n, k)`` with fillers behind the shorter ones.

        Raises ``ValueError`` if there is no row, or the two sequences differ in length.

        Example:
            >>> lists = [torch.tensor([4, 2]), torch.tensor([7])]
            >>> topk = softcurve.TopK.ragged(lists, [torch.tensor([-0.5, -1.5]), torch.tensor([-0.1])])
        """
        if len(indices) != len(log_probs) or not len(indices):
            raise ValueError(
                "TopK.ragged needs one tensor of indices and one of log_probs for each of one or more rows, got "
                f"{len(indices)} and {len(log_probs)}"
            )
        k = max(1, *(len(row) for row in indices))
        pairs = [_widened_to(k, *row) for row in zip(indices, log_probs, strict=True)]
        return TopK.cat([TopK(classes[None], values[None], tail) for classes, values in pairs])

    @staticmethod
    def cat(lists: Sequence[TopK], dim: int = 0) -> TopK:
        """Return the rows of several lists, joined along a leading dimension; fillers fill up the shorter lists.

        Raises ``ValueError`` if there is none, they differ in ``tail``, or ``dim`` is not a leading dimension.

        Example:
            >>> topk = softcurve.TopK(torch.tensor([[4, 2]]), torch.tensor([[-0.5, -1.5]]))
            >>> len(softcurve.TopK.cat([topk, topk]))
            2
        """
        if not lists or len({each.tail for each in lists}) > 1:
            raise ValueError(
                f"lists must be one or more TopK of the same tail, got {len(lists)} with the tails "
                f"{sorted({each.tail for each in lists})}; make them alike with TopK(indices, log_probs, tail)"
            )
        rows = len(lists[0].leading)
        if not -rows <= dim < rows:
            raise ValueError(f"dim must be one of the {rows} leading dimensions, from {-rows} to {rows - 1}, got {dim}")
        k, alike = max(each.indices.shape[-1] for each in lists), len({each.indices.dtype for each in lists}) == 1
        pairs = [_widened_to(k, each.indices if alike else each.indices.long(), each.log_probs) for each in lists]
        indices, log_probs = (torch.cat(parts, dim % rows) for parts in zip(*pairs, strict=True))
        return TopK(indices, log_probs, lists[0].tail)

    def __len__(self) -> int:
        if not self.leading:
            raise TypeError("a TopK of a single row has no length; give it a leading dimension by topk[None]")
        return self.leading[0]

    def __getitem__(self, index: Any) -> TopK:
        """Return the lists of some rows: ``index`` applies to the leading dimensions, as to a tensor's."""
        index = index if isinstance(index, tuple) else (index,)
        open_end = () if any(part is Ellipsis for part in index) else (...,)
        whole = (*index, *open_end, slice(None))
        return TopK(self.indices[whole], self.log_probs[whole], self.tail)

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """Return the lists on another device, or with the log-probabilities in another dtype, as ``Tensor.to``.

        Example:
            >>> topk = softcurve.TopK(torch.tensor([[4, 2]]), torch.tensor([[-0.5, -1.5]]))
            >>> topk.to(torch.float16).log_probs.dtype
            torch.float16
        """
        log_probs = self.log_probs.to(*args, **kwargs)
        indices = self.indices.to(log_probs.device, non_blocking=kwargs.get("non_blocking", False))
        return TopK(indices, log_probs, self.tail)

    def with_label(self, label: AnyInt[Tensor, "*rows"], log_probs: Float[Tensor, "*rows"]) -> TopK:
        """Return ``(..., k + 1)`` lists in which the class ``label`` of each row is listed, once.

        The width does not depend on the labels. If the lists name all ``C`` classes, it is ``C + 1`` with a filler,
        which the losses take as any list with fillers.

        Args:
            label: ``(...)``, such as the classes that the teacher has drawn. A negative one, as that of an ignored row,
                adds nothing.
            log_probs: ``(...)``: the teacher's log-probabilities of the labels. Where a class is listed already, its
                entry stays as it is, and a filler is added.

        Raises ``TypeError`` or ``ValueError`` if an argument is not of the kind or shape.

        Example:
            >>> topk = softcurve.TopK(torch.tensor([[4, 2]]), torch.tensor([[-0.5, -1.5]]))
            >>> topk.with_label(torch.tensor([7]), torch.tensor([-6.0])).indices
            tensor([[4, 2, 7]])
        """
        checks.require_integers("label", label)
        checks.require_floating("log_probs", log_probs.unsqueeze(-1) if isinstance(log_probs, Tensor) else log_probs)
        for name, tensor in (("label", label), ("log_probs", log_probs)):
            checks.require_rows(name, tensor, self.leading, "the TopK")
        column = label.long().unsqueeze(-1)
        known = (self.listed_classes() == column).any(-1, keepdim=True) | (column < 0)
        added = log_probs.unsqueeze(-1)
        return TopK(
            torch.cat([self.indices.long(), column], -1),
            torch.cat([self.log_probs, torch.where(known, -math.inf, added)], -1),
            self.tail,
        )

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, classes: int, dtype: torch.dtype = torch.float32) -> None:
        """Write the lists to a safetensors file, which is replaced only when all is written.

        Args:
            path: The file. To append rows while a teacher runs, use :class:`~softcurve.TopKWriter`.
            classes: ``C``, the number of classes that the indices are of; see :class:`~softcurve.TopKWriter`.
            dtype: Of the log-probabilities in the file, such as ``torch.float16``.

        Raises ``ValueError`` for lists that no loss would take, and ``DataError``, which is one, if the path cannot be
        written.

        Example:
            >>> softcurve.TopK(torch.tensor([[4, 2]]), torch.tensor([[-0.5, -1.5]])).save("lists", classes=9)
            >>> softcurve.TopK.load("lists")[:].indices
            tensor([[4, 2]], dtype=torch.int32)
        """
        require_cached_classes(classes)
        self.to_cache(classes, dtype)._write(Path(path), classes)

    @staticmethod
    def load(path: str | Path) -> TopKCache:
        """Return the lists in a file or a directory of shards, of which rows are read when they are asked for."""
        return TopKCache.open(path)

    def to_cache(self, classes: int, dtype: torch.dtype) -> TopK:
        """Return the lists on the CPU without gradients, with int32 indices, their values checked."""
        for name, tensor in (("indices", self.indices), ("log_probs", self.log_probs)):
            if type(tensor) not in (Tensor, torch.nn.Parameter):
                raise TypeError(
                    f"TopK {name} must be a plain tensor to be written, got {type(tensor).__name__}; gather a DTensor "
                    "by .full_tensor()"
                )
        lists = TopK(self.indices.detach().cpu(), self.log_probs.detach().to("cpu", dtype), self.tail)
        lists.require_values(classes, None)
        return TopK(lists.listed_classes().int(), lists.log_probs, self.tail)

    def _write(self, path: Path, classes: int, first_row: int = 0) -> None:
        len(self)  # raises for a single row
        with needed("TopK.save", "fit"):
            from softcurve.losses.topk_shards import write_shard
        write_shard(path, self.indices, self.log_probs, tail=self.tail, classes=classes, first_row=first_row)

    # --- the classes of a row ----------------------------------------------------------------------------------------

    def listed_classes(self) -> Int[Tensor, "*rows k"]:
        """Return the class of each entry as int64, and ``NOT_LISTED`` for fillers."""
        return torch.where(self.log_probs.detach() == -math.inf, NOT_LISTED, self.indices.long())

    def _places(self, rows: Rows, fill: float) -> tuple[Float[Tensor, "*rows columns"], Int[Tensor, "*rows k"]]:
        """Return rows over the classes, and where the entries of the list stand in them.

        If there are fillers, the rows have one more column, of ``fill``, in which all of them stand.
        """
        at = self.listed_classes()
        fillers = at == NOT_LISTED
        if checks.values_visible(fillers) and not fillers.any():
            return rows, at
        return F.pad(rows, (0, 1), value=fill), torch.where(fillers, rows.shape[-1], at)

    def outcome_sizes(
        self, classes: int, unmasked: Bool[Tensor, "*any classes"] | None = None
    ) -> Int[Tensor, "*rows outcomes"]:
        """Return how many ``unmasked`` classes, by default all, the entries and the bucket have, ``(..., k + 1)``."""
        at = self.listed_classes()
        listed = at != NOT_LISTED
        total = torch.full_like(at[..., :1], classes)
        if unmasked is not None:
            listed = listed & unmasked.expand(*self.leading, classes).gather(-1, at.clamp(min=0))
            total = unmasked.sum(-1, keepdim=True)
        return torch.cat([listed.long(), total - listed.sum(-1, keepdim=True)], -1)

    def require_values(self, classes: int, counted: Flags | None) -> None:  # noqa: D102
        if counted is None:
            counted = torch.ones(self.leading, dtype=torch.bool, device=self.indices.device)
        if not checks.values_visible(self.indices, self.log_probs, counted) or not self.indices.numel():
            return
        at = self.listed_classes()
        if ((at != NOT_LISTED).sum(-1).gt(classes) & counted).any():
            raise self._misfit((*self.leading, classes))
        checks.require_class_indices("TopK indices", at[counted.unsqueeze(-1) & (at != NOT_LISTED)], classes)
        if (_repeats(at) & counted).any():
            raise ValueError("TopK indices must name distinct classes in each row, got a class twice")
        mass = torch.where(counted, self._mass(), 0.0)
        if not mass.max().item() <= 1 + checks.SUM_TOLERANCE_HALF:
            raise ValueError(
                f"TopK log_probs must be natural log-probabilities with a mass of at most 1 a row, got "
                f"{mass.max().item():.6g}; take log_softmax over all classes before topk"
            )
        if (self._is_empty(at) & counted).any():
            raise ValueError(
                "TopK log_probs must have an entry above -inf in each row with tail='renormalize', got a row of "
                "fillers only; give it sample_weight 0, or use tail='bucket'"
            )

    def malformed(self, classes: int) -> Flags:
        """Return which rows list a class twice or one that does not exist, have a mass above 1 or NaN, or no entry."""
        at = self.listed_classes()
        outside = (checks.outside_classes(at, classes) & (at != NOT_LISTED)).any(-1)
        return outside | _repeats(at) | ~(self._mass() <= 1 + checks.SUM_TOLERANCE_HALF) | self._is_empty(at)

    def cleared(self, rows: Flags, classes: int) -> TopK:  # noqa: D102
        column, first = rows.unsqueeze(-1), torch.arange(self.indices.shape[-1], device=self.indices.device)
        even = torch.where(first < classes, -math.log(classes), -math.inf).to(self.log_probs.dtype)
        log_probs = torch.where(column, even, self.log_probs)
        return TopK(torch.where(column, first, self.indices.long()), log_probs, self.tail)

    def _is_empty(self, listed: Int[Tensor, "*rows k"]) -> Flags:
        """Return which rows list nothing that could be rescaled."""
        return (listed == NOT_LISTED).all(-1) & (self.tail == "renormalize")

    def _mass(self) -> Values:
        return checks.widened(self.log_probs.detach()).exp().sum(-1)

    # --- the outcomes ------------------------------------------------------------------------------------------------

    @property
    def merges_tail(self) -> bool:  # type: ignore[override]
        """Whether all classes that are not listed are one outcome."""
        return self.tail == "bucket"

    @property
    def most_probable(self) -> Indices:
        """The listed class of the largest probability; no class, a negative number, where nothing is listed."""
        return self.listed_classes().gather(-1, self.log_probs.argmax(-1, keepdim=True)).squeeze(-1)

    def logits(self, dtype: torch.dtype) -> Rows:
        """Raise ``ValueError``: a list has no logits for all classes, so it can be a target but not the model."""
        raise ValueError("a TopK can be one side of a divergence; the other must have logits for all classes")

    def against(self, z: Rows, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return logits over the listed classes and a bucket, or over all classes with −inf outside the list.

        With a bucket ``z`` are logits at ``temperature``, which the list receives; otherwise neither side has it.
        """
        self.require_fit(z.shape)
        dtype = self._common_dtype(z)
        if self.tail == "renormalize":
            log_probs = self.log_probs.to(dtype)
            rows, at = self._places(log_probs.new_full(z.shape, -math.inf), -math.inf)
            return z, rows.scatter(-1, at, log_probs)[..., : z.shape[-1]]
        # A shift of all outcomes changes nothing, and without it the bucket would be rounded at the logits' offset.
        wide = z.to(dtype)
        top = wide.detach().amax(-1, keepdim=True)
        wide, at = self._places(wide - torch.where(top == -math.inf, 0.0, top), -math.inf)
        unlisted = wide.scatter(-1, at, -math.inf)
        others = softmax.log_sum_exp(unlisted)
        present = others if temperature == 1 else unlisted
        rest = (present.detach() != -math.inf).sum(-1, keepdim=True)
        return torch.cat([wide.gather(-1, at), others], -1), self.outcome_log_probs(
            z.shape[-1], dtype, rest, temperature
        )

    def uniform_over(self, z: Rows) -> Tensor:  # noqa: D102
        if self.tail == "renormalize":
            return uniform_over_unmasked(z)
        sizes = self.outcome_sizes(z.shape[-1], z.detach() != -math.inf).to(checks.wide_dtype(z.dtype))
        return sizes / sizes.sum(-1, keepdim=True)

    def outcome_log_probs(
        self, classes: int, dtype: torch.dtype, rest: Int[Tensor, "*rows 1"], temperature: float = 1.0
    ) -> Float[Tensor, "*rows outcomes"]:
        """Return the list's logits over the entries and all other classes at a temperature, ``(..., k + 1)``.

        At temperature 1 they are log-probabilities; the last is what the list leaves over, or −inf if it is
        renormalised. ``rest`` is the number of other classes that the model does not mask. Where it is 0, or the list
        names every class, a remainder that is within the rounding of ``log_probs`` is no mass: it would make the loss
        infinite. Half an ulp of each ``log p`` moves the mass by ``½ eps Σ p |log p|``, and its sum over ``k`` classes,
        in float32 or wider, by up to ``k`` ulps.
        """
        listed = self.log_probs.to(dtype)
        if not self.merges_tail:
            return torch.cat([listed, torch.full_like(listed[..., :1], -math.inf)], -1) / temperature
        p, tail = listed.detach().exp(), softmax.log_complement(listed)
        information = torch.where(p > 0, -p * listed.detach(), 0.0).sum(-1, keepdim=True)
        eps = torch.finfo(self.dtype).eps
        rounding = 0.5 * eps * information + listed.shape[-1] * min(eps, torch.finfo(torch.float32).eps)
        names_all = (listed > -math.inf).sum(-1, keepdim=True) == classes
        tail = torch.where((names_all | (rest == 0)) & (tail.exp() < rounding), -math.inf, tail)
        if temperature != 1:
            log_rest = rest.clamp(min=1).to(dtype).log()
            listed, tail = listed / temperature, (tail - log_rest) / temperature + log_rest
        return torch.cat([listed, tail], -1)

    def require_fit(self, logits: Sequence[int], cut: str = "") -> None:
        """Raise ``ValueError`` unless the list has the rows of the ``logits``."""
        if tuple(self.leading) != tuple(logits[:-1]):
            raise self._misfit(logits)

    def _misfit(self, logits: Sequence[int]) -> ValueError:
        return ValueError(
            f"TopK indices must be of shape {tuple(logits[:-1])} + (k,) with k <= {logits[-1]} besides fillers, as the "
            f"logits that they are compared with, got {checks.describe(self.indices)}"
            + checks.layout_remedy(logits, self.leading, "logits")
        )

    def require_comparable(self, divergence: Divergence) -> None:
        """Raise ``ValueError`` unless a divergence from the list is defined."""
        if self.tail == "renormalize" and divergence.is_infinite_off_target:
            raise ValueError(
                "a TopK with tail='renormalize' is zero outside its list, so D(model‖list) is infinite; use "
                "tail='bucket', the forward direction, or a Jensen-Shannon divergence between the ends"
            )


@dataclass(frozen=True, eq=False, repr=False)
class TopKCache(ShortRepr):
    """A teacher's lists in files: ``cache[rows]`` reads some of them as a :class:`TopK`, ``cache[:]`` all.

    ``rows`` is an integer, a slice, a mask, or integers, as for the first dimension of a tensor. Other rows are not
    read, except for those that share a block of 8 KiB and its checksum: the files are mapped into memory for the time
    of a reading. ``classes`` is the number of classes, ``tail`` and ``dtype``, of the log-probabilities, are as they
    were written.

    Raises ``DataError``, a ``ValueError`` that names the file, where one is damaged, cut off, of another cache or
    format, missing, or changed since the cache was opened: of damaged rows when they are read, otherwise when the
    cache is opened. An index raises ``TypeError`` or ``IndexError`` if it is of another kind or names no row.
    """

    classes: int
    tail: TopKTail
    rows: int
    dtype: torch.dtype
    shards: Sequence[Shard] = field(repr=False)

    @staticmethod
    def open(path: str | Path) -> TopKCache:
        """Open a file or a directory of shards, of which the headers alone are read."""
        with needed("TopK.load", "fit"):
            from softcurve.losses.topk_shards import open_shards
        shards = open_shards(Path(path))
        first, rows = shards[0], sum(shard.shape[0] for shard in shards)
        return TopKCache(first.classes, cast("TopKTail", first.tail), rows, first.dtype, shards)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Any) -> TopK:
        with needed("TopK.load", "fit"):
            from softcurve.losses.topk_shards import chosen_rows, read_rows
        rows = chosen_rows(index, self.rows)
        parts, order = read_rows(self.shards, rows.flatten())
        found = TopK.cat([TopK(*part, self.tail) for part in parts])[order]
        indices, log_probs = (part.reshape(*rows.shape, *part.shape[1:]) for part in (found.indices, found.log_probs))
        return TopK(indices, log_probs, self.tail)


def require_cached_classes(classes: object) -> None:
    """Require a number of classes whose indices a cache can hold as int32."""
    checks.require_count("classes", classes, 1)
    most = torch.iinfo(torch.int32).max
    if classes > most:  # type: ignore[operator]
        raise ValueError(f"classes must be at most {most}, as a cache holds indices of at most 32 bits, got {classes}")


def _widened_to(k: int, indices: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a list with ``k`` columns, the last of them fillers."""
    columns = (0, k - indices.shape[-1])
    return F.pad(indices, columns), F.pad(log_probs, columns, value=-math.inf)


def _repeats(listed: Int[Tensor, "*rows k"]) -> Flags:
    """Return which rows list a class twice."""
    in_order = listed.sort(-1).values
    return ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] != NOT_LISTED)).any(-1)
