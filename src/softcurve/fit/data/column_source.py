"""Rows whose columns are read block by block: the one implementation of a source, for files and for memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softcurve.array_types import Int64
from softcurve.fit import DataError
from softcurve.fit.data.capacity import require_head, require_rows
from softcurve.fit.data.columns import ArrayColumn, Column, Fill, Part
from softcurve.fit.data.features import check_features, double_needed, refuse_not_finite
from softcurve.fit.data.identity import column_digests, require_same_rows
from softcurve.fit.data.labels import index_labels
from softcurve.fit.data.read_ahead import read_ahead
from softcurve.fit.data.soft_targets import check_distributions, check_lists, rescale, to_top_k
from softcurve.fit.data.source import Block, BlockTarget, Label, Share, TargetKind
from softcurve.fit.group import ALONE
from softcurve.fit.group import Group as Together

__all__ = ["ColumnSource", "assemble", "own_span"]

BLOCK = 65536  # entries of a list at a time, where its classes are counted


@dataclass(frozen=True, eq=False)
class ColumnSource:
    """The rows of all parts, one after the other, or a share of them. A block ends where a part does.

    Labels are held as indices; features, distributions and lists are read in each walk, those of files by a thread,
    one block ahead, so that two blocks are in memory at a time. Distributions come in float64, rescaled to sum to one.
    """

    parts: tuple[Part, ...]
    kind: TargetKind | None
    classes: tuple[Label, ...]
    index: Int64[np.ndarray, " rows"] | None  # the labels
    in_memory: bool
    span: tuple[int, int] | None = None  # the rows from one to another, where these are not all
    together: Together = ALONE

    @cached_property
    def rows(self) -> int:
        """How many, over all parts."""
        first, end = self.span or (0, sum(part.rows for part in self.parts))
        return end - first

    @cached_property
    def share(self) -> Share:
        """Which rows of all parts these are."""
        return Share(self.span[0] if self.span else 0, sum(part.rows for part in self.parts), self.together)

    @property
    def width(self) -> int:
        """The number of features."""
        return self.parts[0].features.shape[1]

    @cached_property
    def double(self) -> bool:
        """Whether the features of any part need float64."""
        return any(double_needed(part.features.dtype) for part in self.parts)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the features, as they are given out."""
        return np.dtype(np.float64 if self.double else np.float32)

    @cached_property
    def fingerprint(self) -> str:
        """Of the labels, and of what is stored of everything else; see :func:`column_digests`.

        It is that of the rows of all processes, which must ask for it at the same time.
        """
        state = hashlib.sha256(repr((self.share.total, self.kind, self.classes)).encode())
        if self.index is not None:
            for piece in self.together.in_order(torch.from_numpy(self.index)):
                state.update(piece.numpy().tobytes())
        with self.together.agreed():
            for _, each in column_digests(self.parts, labels=False):
                state.update(each)
        return state.hexdigest()

    def blocks(self, at_most: int) -> Iterator[Block]:
        """All rows in order, ``at_most`` a block. Raises DataError that names the file and the place of damage."""
        if at_most < 1:
            raise DataError(f"at_most must be 1 row or more; got {at_most}")
        return self.walk(at_most) if self.in_memory else read_ahead(self.walk(at_most))

    def walk(self, at_most: int) -> Iterator[Block]:
        """As ``blocks``, without a thread."""
        size = min(at_most, max(part.rows for part in self.parts))
        buffers = _Buffers(size), _Buffers(size)
        turn = 0
        for part, begin, end, own in _within(self.parts, self.share.first, self.share.first + self.rows):
            with ExitStack() as stack:
                reading = _Reading(self, part, stack)
                for start in range(begin, end, at_most):
                    stop = min(start + at_most, end)
                    features = reading.features(buffers[turn], start, stop)
                    place = own + start - begin
                    target = reading.target(buffers[turn], start, stop, place)
                    number = self.share.first + place
                    yield Block(
                        place,
                        features,
                        target,
                        torch.arange(number, number + stop - start) if number != place else None,
                    )
                    turn = 1 - turn


@dataclass(frozen=True, eq=False)
class _Buffers:
    """Memory for one block, taken when it is first needed."""

    rows: int
    taken: dict[str, NDArray[Any]] = field(default_factory=dict)

    def take(self, use: str, rows: int, width: int, dtype: np.dtype[Any] | type[np.generic]) -> NDArray[Any]:
        if use not in self.taken:
            self.taken[use] = np.empty((self.rows, width), dtype)
        return self.taken[use][:rows]


class _Reading:
    """One walk through one part."""

    def __init__(self, source: ColumnSource, part: Part, stack: ExitStack) -> None:
        self.source, self.part = source, part
        self.view = part.features.view(source.dtype) if isinstance(part.features, ArrayColumn) else None
        self.fill: dict[str, Fill] = {}
        if self.view is None:
            self.fill["features"] = stack.enter_context(part.features.opened())
        if source.kind == "distributions" and part.target is not None:
            self.fill["distributions"] = stack.enter_context(part.target.opened())
        elif source.kind == "top_k" and part.lists is not None:
            self.fill["indices"], self.fill["log_probs"] = map(stack.enter_context, (c.opened() for c in part.lists))

    def features(self, buffers: _Buffers, start: int, stop: int) -> torch.Tensor:
        if self.view is not None:
            return torch.from_numpy(self.view[start:stop])
        rows = buffers.take("features", stop - start, self.source.width, self.source.dtype)
        self.fill["features"](start, rows)
        refuse_not_finite(rows, self.part.features.name, start, "drop or fill such rows")
        return torch.from_numpy(rows)

    def target(self, buffers: _Buffers, start: int, stop: int, own: int) -> BlockTarget | None:
        count, place = stop - start, (self.part.first or 0) + start
        if self.source.index is not None:
            return torch.from_numpy(self.source.index[own : own + count])
        if self.source.kind == "distributions" and self.part.target is not None:
            rows = buffers.take("distributions", count, len(self.source.classes), np.float64)
            self.fill["distributions"](place, rows)
            rescale(rows, self.part.target.name, place)
            return torch.from_numpy(rows)
        if self.part.lists is not None and self.source.kind == "top_k":
            columns = self.part.lists
            wide = double_needed(columns[1].dtype)
            indices = buffers.take("indices", count, columns[0].shape[1], np.int64)
            log_probs = buffers.take("log_probs", count, columns[0].shape[1], np.float64 if wide else np.float32)
            self.fill["indices"](place, indices)
            self.fill["log_probs"](place, log_probs)
            names = columns[0].name, columns[1].name
            return to_top_k(indices, log_probs, len(self.source.classes), names, place)
        return None


def assemble(
    parts: Sequence[Part],
    *,
    classes: tuple[Label, ...] | None = None,
    class_count: int | None = None,
    in_memory: bool = False,
    together: Together = ALONE,
) -> ColumnSource:
    """Check what can be seen without reading all, read the labels, and make the parts one source.

    Targets are in terms of ``classes`` where they are given. ``class_count`` is that of a teacher's lists, by default
    the largest index and one. Of several processes, each has a share. Raises DataError that names the part.
    """
    with together.agreed():
        kinds = [_checked_kind(part) for part in parts]
        for part, kind in zip(parts, kinds, strict=True):
            _refuse_other(parts[0], kinds[0], part, kind)
        kind = kinds[0]
        if class_count is not None and (class_count < 2 or kind == "labels"):
            what = f"got {class_count}" if class_count < 2 else "these targets are labels: leave it out"
            raise DataError(f"class_count must be the number of classes, 2 or more, of a teacher's lists; {what}")
        rows = sum(part.rows for part in parts)
        if kind is not None:
            require_rows(rows, parts[0].features.name)
    require_same_rows(parts, kind, together)
    first, end = own_span(rows, together)
    index = None
    if kind == "labels":
        fitted = classes is None
        classes, index = index_labels(_label_spans(parts, first, end), classes, together)
        if fitted:
            _require_head(parts, len(classes), None, together)
    elif kind is not None:
        given = class_count if classes is None else len(classes)
        said = "the head has" if classes is not None else "class_count is"
        found = 0
        with together.agreed():
            found = _class_count(parts, kind, given, said, first, end)
        if classes is None:
            count = int(together.largest(found)[0])
            _require_head(parts, count, class_count, together)
            classes = tuple(range(count))
    named = classes if classes is not None and kind else ()
    source = ColumnSource(tuple(parts), kind, named, index, in_memory, (first, end), together)
    if in_memory:
        with together.agreed():
            _check_entries(source)
    return source


def own_span(rows: int, together: Together) -> tuple[int, int]:
    """From which of so many rows to which are this process's."""
    return rows * together.rank // together.size, rows * (together.rank + 1) // together.size


def _within(parts: Sequence[Part], first: int, end: int) -> Iterator[tuple[Part, int, int, int]]:
    """The parts that have some of the rows from ``first`` to ``end``: from which to which, and how many came before."""
    of_part = 0
    for part in parts:
        begin, stop = max(first - of_part, 0), min(end - of_part, part.rows)
        if begin < stop:
            yield part, begin, stop, of_part + begin - first
        of_part += part.rows


def _label_spans(parts: Sequence[Part], first: int, end: int) -> list[tuple[Column, int, int]]:
    """Each column of labels that has some of the rows, and which: one file may be for all parts."""
    spans: dict[int, tuple[Column, int, int]] = {}
    for part, begin, stop, _ in _within(parts, first, end):
        assert part.target is not None
        begin, stop = ((part.first or 0) + row for row in (begin, stop))
        begin = spans.get(id(part.target), (part.target, begin, stop))[1]
        spans[id(part.target)] = part.target, begin, stop
    return list(spans.values())


def _checked_kind(part: Part) -> TargetKind | None:
    check_features(part.features)
    if part.lists is not None:
        for column in part.lists:
            _same_length(part.features, column)
        check_lists(*part.lists)
        return "top_k"
    if part.target is None:
        return None
    if part.first is None:
        _same_length(part.features, part.target)
    if len(part.target.shape) == 1:
        return "labels"
    check_distributions(part.target)
    return "distributions"


def _same_length(features: Column, target: Column) -> None:
    if not target.shape or target.shape[0] != features.shape[0]:
        shape = f"{target.shape[0]} rows" if target.shape else "a single value"
        raise DataError(
            f"{features.name} has {features.shape[0]} rows but {target.name} has {shape}; give one target a row"
        )


def _refuse_other(first: Part, first_kind: TargetKind | None, part: Part, kind: TargetKind | None) -> None:
    """Raise DataError for a part that does not go with the first one."""
    if part.features.shape[1] != first.features.shape[1]:
        raise DataError(
            f"{part.features.name} must have {first.features.shape[1]} columns, as {first.features.name}; got "
            f"{part.features.shape[1]}: all shards need the same features"
        )
    words = {"labels": "labels", "distributions": "distributions", "top_k": "a teacher's lists"}
    if kind != first_kind:
        got = words[kind] if kind is not None else f"no targets ({part.absent})"
        wanted = words[first_kind] if first_kind is not None else f"no targets ({first.absent})"
        raise DataError(
            f"{part.features.name} comes with {got}, and {first.features.name} with {wanted}; "
            "all shards need the same kind of target"
        )
    ours, theirs = part.lists[0] if part.lists else part.target, first.lists[0] if first.lists else first.target
    if ours is not None and theirs is not None and ours.shape[1:] != theirs.shape[1:]:
        raise DataError(
            f"{ours.name} must have {theirs.shape[1]} columns, as {theirs.name}; got {ours.shape[1]}: all shards need "
            "targets over the same classes"
        )


def _require_head(parts: Sequence[Part], classes: int, class_count: int | None, together: Together) -> None:
    targets = [column for column in (parts[0].target, *(parts[0].lists or ())) if column is not None]
    with together.agreed():
        require_head(classes, parts[0].features.shape[1], targets[0].name if class_count is None else "class_count")


def _class_count(parts: Sequence[Part], kind: TargetKind, given: int | None, says: str, first: int, end: int) -> int:
    target = parts[0].target
    if kind == "distributions" and target is not None:
        if given is not None and target.shape[1] != given:
            raise DataError(
                f"{target.name} has distributions over {target.shape[1]} classes, {says} "
                f"{given}: give targets over these classes, in their order"
            )
        return target.shape[1]
    return _largest_index(parts, first, end) + 1 if given is None else given


def _largest_index(parts: Sequence[Part], first: int, end: int) -> int:
    largest = 1  # a head has two classes or more
    for part, begin, stop, _ in _within(parts, first, end):
        if part.lists is None:
            continue
        column = part.lists[0]
        piece = np.empty((max(1, min(BLOCK // column.shape[1], stop - begin)), column.shape[1]), np.int64)
        with column.opened() as fill:
            for start in range(begin, stop, len(piece)):
                rows = piece[: stop - start]
                fill(start, rows)
                largest = max(largest, int(rows.max()))
    return largest


def _check_entries(source: ColumnSource) -> None:
    """Check features that are views here, once, and by a walk all else that it checks, so that it is known at once."""
    for part, begin, stop, _ in _within(source.parts, source.share.first, source.share.first + source.rows):
        view = part.features.view(source.dtype) if isinstance(part.features, ArrayColumn) else None
        if view is not None:
            refuse_not_finite(view[begin:stop], part.features.name, begin, "drop or fill such rows")
    for _ in source.walk(max(1, (1 << 20) // max(source.width, len(source.classes)))):
        pass
