"""The columns of a .csv file, which is read into memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softcurve.files.tensors import FileState
from softcurve.fit import DataError
from softcurve.fit.data.dataset import ArrayRows, Dataset, Keys
from softcurve.fit.data.files.parquet import column_rows, column_types, table_dataset


def csv_dataset(path: Path, with_target: bool, keys: Keys) -> Dataset:
    """Open a comma-separated file in UTF-8 with a header row; every column that is no target is a feature."""
    import pyarrow as pa
    import pyarrow.csv as pc

    if keys.features is not None:
        raise DataError(
            f"--features-key: the features of {path} are all of its columns except the target; leave "
            f"{keys.features!r} out"
        )
    state = FileState.of(path, "a .csv table")
    with state.decoding(), path.open("rb") as file:
        table: Any = pc.read_csv(file, parse_options=pc.ParseOptions(newlines_in_values=True))
    kinds = column_types(path, table.schema)
    _check_header(path, list(kinds), keys)
    if table.num_rows == 0:
        raise DataError(f"data: {path} has a header row and no other rows; give at least one sample")
    for name, kind in kinds.items():
        if pa.types.is_binary(kind):
            raise DataError(f"data: column {name!r} of {path} is not UTF-8 text; convert the file to UTF-8")

    def columns(named: str, chosen: Sequence[str], width: tuple[int, ...]) -> ArrayRows:
        return ArrayRows(column_rows(table, path, chosen, width, 0), named)

    return table_dataset(
        path, kinds, columns, lambda name: columns(f"column {name!r} of {path}", [name], ()), with_target, keys
    )


def _check_header(path: Path, names: list[str], keys: Keys) -> None:
    """Raise DataError for a first row that cannot be a header, as it would be lost without a word."""
    if "" in names:
        raise DataError(
            f"data: column {names.index('') + 1} of {path} has no name in the header row; name it, or write the file "
            "without an index (index=False in pandas)"
        )
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        raise DataError(f"data: the values in {path} must be separated by commas; its first row is {names[0]!r}")
    # pandas names columns without names 0, 1, 2, ...
    if all(map(_is_number, names)) and names != [str(k) for k in range(len(names))] and keys.target not in names:
        raise DataError(
            f"data: the first row of {path} must be a header with the names of the columns; it holds only numbers: add "
            "a header row"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
