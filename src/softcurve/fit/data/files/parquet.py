"""The columns of a .parquet table, read by row groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.data.columns import Column, Fill, Part
from softcurve.fit.data.files.decoding import check_file, decoding
from softcurve.fit.data.files.naming import FEATURES, LISTS, listed, named_part, target_names, target_of
from softcurve.fit.data.files.stamp import Stamp

__all__ = ["parquet_part"]

KIND = "a .parquet table"
LABELS = 1 << 16  # labels that are read at a time
BUFFER = 1 << 20  # bytes of a column that are read ahead: without one, all that a row group has of it


def parquet_part(path: Path, with_target: bool) -> Part:
    """The rows of a table: a list column ``features`` or ``X``, or else every column that is no target."""
    import pyarrow.parquet  # noqa: F401  (a missing package is no damage of the file)

    check_file(path, "data")
    with decoding(path, "data", KIND), _table(path) as table:
        stamp, rows, kinds = Stamp.of(path), table.metadata.num_rows, table.schema_arrow
        names = list(kinds.names)
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"data: {path} has more than one column {doubled[0]!r}; rename one")

        def column(name: str) -> ParquetColumn:
            kind, named = kinds.field(name).type, f"column {name!r} of {path}"
            entry = _entry(kind)
            shape = (rows, _list_width(table, name, named)) if _is_list(kind) else (rows,)
            return ParquetColumn(named, stamp, (name,), shape, _dtype(entry))

        if any(name in names for name in FEATURES):
            return named_part(path, "column", names, column, with_target)
        lists = tuple(name for name in LISTS if name in names and _is_list(kinds.field(name).type))
        targets = [name for name in names if name in (*target_names(names), *lists)]
        plain = [name for name in names if name not in targets]
        if not plain:
            raise DataError(f"data: {path} has no feature columns; its columns are {listed(names)}")
        columns = [_numeric(column(name), name, path) for name in plain]
        features = ParquetColumn(
            f"columns of {path}", stamp, tuple(plain), (rows, len(plain)), np.result_type(*(c.dtype for c in columns))
        )
        return Part(features, *target_of(path, "column", targets, column, with_target))


@dataclass(frozen=True, eq=False)
class ParquetColumn:
    """A column of numbers, of text or of lists of one length; or several columns of numbers, side by side."""

    name: str
    stamp: Stamp
    columns: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @contextmanager
    def opened(self) -> Iterator[Fill]:
        """Rows in their order, from any one on: the row groups before it are not read."""
        self.stamp.check()
        with decoding(self.stamp.path, "data", KIND):
            table = _table(self.stamp.path, BUFFER)
        with table:
            yield _Sequence(self, table)
        self.stamp.check()

    def labels(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """The entries, some at a time."""
        path = self.stamp.path
        self.stamp.check()
        with decoding(path, "data", KIND), _table(path, BUFFER) as table:
            groups, first = _groups(table, start, stop)
            for batch in table.iter_batches(LABELS, row_groups=groups, columns=list(self.columns)):
                values = _values(batch.column(batch.schema.get_field_index(self.columns[0])), self.name, first)
                yield values[max(start - first, 0) : stop - first]
                first += len(batch)

    def digest(self, most: int) -> bytes:
        """Of the bytes of the file, whichever columns they are of."""
        return self.stamp.digest(most) + repr(self.columns).encode()


class _Sequence:
    """A fill that goes through the row groups once, from that of the first row that is asked for."""

    def __init__(self, column: ParquetColumn, table: Any) -> None:
        self.column, self.table = column, table
        self.position = -1  # of the next row
        self.batches: Iterator[Any] | None = None
        self.pending: NDArray[Any] = np.empty((0, *column.shape[1:]))

    def __call__(self, start: int, out: NDArray[Any]) -> None:
        if self.batches is None:
            groups, self.position = _groups(self.table, start, self.column.shape[0])
            self.batches = self.table.iter_batches(len(out), row_groups=groups, columns=list(self.column.columns))
            while self.position < start:
                batch = self._next(self.batches, self.position)
                self.pending = batch[start - self.position :]
                self.position += len(batch) - len(self.pending)
        assert start == self.position, "rows are read in their order"
        filled = 0
        while filled < len(out):
            if not len(self.pending):
                self.pending = self._next(self.batches, start + filled)
            taken = self.pending[: len(out) - filled]
            out[filled : filled + len(taken)] = taken
            self.pending = self.pending[len(taken) :]
            filled += len(taken)
        self.position += filled

    def _next(self, batches: Iterator[Any], first: int) -> NDArray[Any]:
        column, path = self.column, self.column.stamp.path
        with decoding(path, "data", KIND):
            batch = next(batches, None)
            if batch is None:
                raise EOFError(f"it ends after {first} of {column.shape[0]} rows")
            found = [batch.column(batch.schema.get_field_index(name)) for name in column.columns]
            if len(found) == 1 and _is_list(found[0].type):
                return _lists(found[0], column.name, first, column.shape[1])
            side_by_side = np.empty((len(batch), len(found)), column.dtype)
            for place, (values, name) in enumerate(zip(found, column.columns, strict=True)):
                side_by_side[:, place] = _values(values, f"column {name!r} of {path}", first)
            return side_by_side


def _table(path: Path, buffer: int = 0) -> Any:
    """The table, opened; the checksums of its pages, where they were written, are verified as they are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pa.OSFile(os.fsencode(path))  # a name that is not UTF-8 can only be given as bytes
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer, page_checksum_verification=True)


def _groups(table: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that have rows from ``start`` to ``stop``, and the number of the first row in them."""
    lengths = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    ends = list(accumulate(lengths))
    groups = [group for group, end in enumerate(ends) if end > start and end - lengths[group] < stop]
    return groups, ends[groups[0]] - lengths[groups[0]] if groups else start


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _entry(kind: Any) -> Any:
    """The type of a single entry of a column."""
    import pyarrow as pa

    kind = kind.value_type if _is_list(kind) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _dtype(kind: Any) -> np.dtype[Any]:
    """What numpy makes of an entry of this type."""
    import pyarrow as pa

    if _is_text(kind):
        return np.dtype(np.str_)
    if pa.types.is_decimal(kind):
        return np.dtype(np.float64)
    return np.asarray(pa.array([], kind).to_numpy(zero_copy_only=False)).dtype


def _list_width(table: Any, name: str, named: str) -> int:
    """How long the lists are: the first tells."""
    import pyarrow as pa

    kind = table.schema_arrow.field(name).type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    batch = next(table.iter_batches(1, columns=[name]), None)
    if batch is None or not len(batch):
        return 0
    first = batch.column(batch.schema.get_field_index(name))[0]
    if not first.is_valid:
        raise DataError(f"data: {named} has no list in row 0; fill it or drop the row")
    return len(first)


def _lists(array: Any, named: str, first: int, width: int) -> NDArray[Any]:
    import pyarrow.compute as pc

    _refuse_nulls(array, named, first)
    lengths = pc.min_max(pc.list_value_length(array)).as_py()
    least, most = min(width, lengths["min"]), max(width, lengths["max"])
    if least != most:
        raise DataError(f"data: {named} has lists of {least} to {most} entries; give one length")
    return _values(array.flatten(), f"the lists in {named}", first).reshape(len(array), width)


def _values(array: Any, named: str, first: int) -> NDArray[Any]:
    import pyarrow as pa

    _refuse_nulls(array, named, first)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _is_text(array.type):
        return np.array(array.to_pylist(), dtype=np.str_)
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _refuse_nulls(array: Any, named: str, first: int) -> None:
    if array.null_count:
        raise DataError(f"data: {named} has {array.null_count} nulls from row {first} on; fill them or drop the rows")


def _numeric(column: Column, name: str, path: Path) -> Column:
    if len(column.shape) != 1 or column.dtype.kind not in "iufb":
        what = "lists" if len(column.shape) != 1 else "text" if column.dtype.kind == "U" else str(column.dtype)
        raise DataError(
            f"data: column {name!r} of {path} holds {what}; a feature column must be numeric: drop it, "
            "encode it as numbers, or put all features into one list column named features"
        )
    return column
