"""Predictions as a file: .npz, .npy, .csv or .parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.atomic import replacing
from softcurve.fit.rows import Label

Array = NDArray[Any]

__all__ = ["check_predictions_path", "write_predictions"]


def check_predictions_path(path: Path) -> None:
    """Raise DataError for a suffix that is not known, ImportError where its package is missing."""
    if path.suffix.lower() not in WRITERS:
        kind = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise DataError(f"--out: {path} has {kind}; it must end in {', '.join(WRITERS)}")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet  # noqa: F401


def write_predictions(
    path: Path,
    probabilities: Float64[np.ndarray, "rows classes"],
    predicted: Int64[np.ndarray, " rows"],
    classes: tuple[Label, ...],
) -> None:
    """Write each row's label and probabilities in row order; ``predicted`` indexes ``classes``."""
    with replacing(path) as file:
        WRITERS[path.suffix.lower()](file, probabilities, np.array(classes)[predicted], classes)


def _npz(file: BinaryIO, probabilities: Array, labels: Array, classes: tuple[Label, ...]) -> None:
    np.savez(file, allow_pickle=False, probabilities=probabilities, label=labels, classes=np.array(classes))


def _npy(file: BinaryIO, probabilities: Array, labels: Array, classes: tuple[Label, ...]) -> None:
    np.save(file, probabilities)


def _csv(file: BinaryIO, probabilities: Array, labels: Array, classes: tuple[Label, ...]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(["label", *(f"p({label})" for label in classes)])
    for label, row in zip(labels.tolist(), probabilities.tolist(), strict=True):
        writer.writerow([label, *row])
    text.detach()


def _parquet(file: BinaryIO, probabilities: Array, labels: Array, classes: tuple[Label, ...]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = pa.FixedSizeListArray.from_arrays(pa.array(probabilities.ravel()), probabilities.shape[1])
    table = pa.table({"label": pa.array(labels), "probabilities": lists})
    pq.write_table(table.replace_schema_metadata({"classes": json.dumps(classes)}), file)


Writer = Callable[[BinaryIO, Array, Array, tuple[Label, ...]], None]
WRITERS: dict[str, Writer] = {".npz": _npz, ".npy": _npy, ".csv": _csv, ".parquet": _parquet}
