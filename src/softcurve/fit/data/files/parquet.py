"""The columns of a .parquet table, which are read in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.files.tensors import FileState
from softcurve.fit import DataError
from softcurve.fit.data.dataset import (
    FEATURES,
    LISTS,
    Dataset,
    Keys,
    Rows,
    describe_names,
    named_dataset,
    require_key,
    target_names,
)
from softcurve.fit.data.files.arrays import FileRows, file_digest

BUFFER = 1 << 20  # bytes of a column that are read ahead: without one, all that a row group has of it
# Opens columns side by side, by their names, as rows of this width; errors call them by the first argument.
Columns = Callable[[str, Sequence[str], tuple[int, ...]], Rows]


def parquet_dataset(path: Path, with_target: bool, keys: Keys) -> Dataset:
    """Open a table. Its features are a list column ``features`` or ``X``, or else every column that is no target."""
    import pyarrow.parquet  # noqa: F401  (a missing package is no damage of the file)

    state = FileState.of(path, "a .parquet table")
    with state.decoding(), _table(path) as table:
        kinds = column_types(path, table.schema_arrow)

        def columns(named: str, chosen: Sequence[str], width: tuple[int, ...]) -> FileRows:
            shape, dtype = (table.metadata.num_rows, *width), np.result_type(*(_dtype(kinds[name]) for name in chosen))
            ranges = partial(_ranges, path, chosen, np.empty((0, *width), dtype))
            return FileRows(named, state, shape, dtype, ranges, partial(file_digest, state))

        def column(name: str) -> FileRows:
            named = f"column {name!r} of {path}"
            return columns(named, [name], (_list_width(table, name, named),) if _is_list(kinds[name]) else ())

        if keys.features is not None or any(name in kinds for name in FEATURES):
            return named_dataset(path, "column", list(kinds), column, with_target, keys=keys)
        return table_dataset(path, kinds, columns, column, with_target, keys)


def column_types(path: Path, schema: Any) -> dict[str, Any]:
    """Return the types of the columns of a table by their names. Raises DataError for two columns of one name."""
    names = schema.names
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"data: {path} has more than one column {doubled[0]!r}; rename one")
    return dict(zip(names, schema.types, strict=True))


def table_dataset(
    path: Path, kinds: Mapping[str, Any], columns: Columns, column: Callable[[str], Rows], with_target: bool, keys: Keys
) -> Dataset:
    """Make a dataset of a table in which every column that is no target is a feature."""
    names = list(kinds)
    require_key("--target-key", keys.target, path, "column", names)
    if keys.target is None:
        lists = [name for name in LISTS if name in names and _is_list(kinds[name])]
        targets = [name for name in names if name in (*target_names(names), *lists)]
    else:
        targets = [name for name in names if name == keys.target]
    plain = [name for name in names if name not in targets]
    if not plain:
        raise DataError(f"data: {path} has no feature columns; its columns are {describe_names(names)}")
    for name in plain:
        dtype = _dtype(kinds[name])
        if _is_list(kinds[name]) or dtype.kind not in "iufb":
            what = "lists" if _is_list(kinds[name]) else "text" if dtype.kind == "U" else dtype
            raise DataError(
                f"data: column {name!r} of {path} holds {what}; a feature column must be numeric: drop it, encode "
                "it as numbers, choose it as the target by --target-key, or put all features into one list column "
                "named features (.parquet)"
            )
    features = columns(f"columns of {path}", plain, (len(plain),))
    return named_dataset(path, "column", targets, column, with_target, features, keys)


def _ranges(path: Path, columns: Sequence[str], decoded: NDArray[Any], bounds: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Yield rows of columns from the row groups within the bounds; ``decoded`` is an empty array of their form."""
    with _table(path, BUFFER) as table:
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        edges = list(accumulate(sizes, initial=0))
        groups = [group for group, (a, b) in enumerate(pairwise(edges)) if b > bounds[0] and a < bounds[-1]]
        most = max(stop - start for start, stop in pairwise(bounds))
        batches, first = table.iter_batches(most, row_groups=groups, columns=list(columns)), edges[groups[0]]
        for start, stop in pairwise(bounds):
            while (number := first + len(decoded)) < stop:
                if (batch := next(batches, None)) is None:
                    raise EOFError(f"it ends after {number} of {edges[-1]} rows")
                unused = max(start - first, 0)
                first += min(unused, len(decoded))
                rows = column_rows(batch, path, columns, decoded.shape[1:], number)
                decoded = np.concatenate([decoded[unused:], rows])
            yield decoded[start - first : stop - first]


def column_rows(batch: Any, path: Path, columns: Sequence[str], width: tuple[int, ...], first: int) -> NDArray[Any]:
    """Decode a batch of columns side by side, or of one column of values or lists."""
    arrays = {f"column {name!r} of {path}": batch.column(name) for name in columns}
    name, array = next(iter(arrays.items()))
    if _is_list(array.type):
        return _lists(array, name, first, width[0])
    return np.stack([_values(array, name, first) for name, array in arrays.items()], 1).reshape(-1, *width)


def _table(path: Path, buffer: int = 0) -> Any:
    """Open a table; checksums of its pages, where they were written, are verified as the pages are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pa.OSFile(os.fsencode(path))  # a name that is not UTF-8 can only be given as bytes
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=buffer, page_checksum_verification=True)


def _is_list(kind: Any) -> bool:
    return hasattr(kind, "value_field")  # of lists, long lists and lists of one length


def _dtype(kind: Any) -> np.dtype[Any]:
    """Return what numpy makes of an entry of a column of this type."""
    import pyarrow as pa

    return _values(pa.nulls(0, kind.value_type if _is_list(kind) else kind), "", 0).dtype


def _list_width(table: Any, name: str, named: str) -> int:
    """Return the length of the first list."""
    batch = next(table.iter_batches(1, columns=[name]), None)
    if batch is None:
        return 0
    _refuse_nulls(batch.column(name), named, 0)
    return len(batch.column(name).flatten())


def _lists(array: Any, named: str, first: int, width: int) -> NDArray[Any]:
    import pyarrow.compute as pc

    _refuse_nulls(array, named, first)
    lengths = {width, *pc.unique(pc.list_value_length(array)).to_pylist()}
    if len(lengths) > 1:
        raise DataError(f"data: {named} has lists of {min(lengths)} to {max(lengths)} entries; give one length")
    return _values(array.flatten(), f"the lists in {named}", first).reshape(len(array), width)


def _values(array: Any, named: str, first: int) -> NDArray[Any]:
    import pyarrow as pa

    _refuse_nulls(array, named, first)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if str(array.type) in ("string", "large_string", "string_view"):
        return np.array(array.to_pylist(), dtype=np.str_)
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _refuse_nulls(array: Any, named: str, first: int) -> None:
    if array.null_count:
        nulls = "1 null" if array.null_count == 1 else f"{array.null_count} nulls"
        raise DataError(f"data: {named} has {nulls} from row {first} on; fill them or drop the rows")
