"""Files of predictions, written block by block: .npz, .npy, .csv or .parquet."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from softcurve.array_types import Float64, Int64
from softcurve.cli.streams import encodable
from softcurve.fit import DataError
from softcurve.fit.atomic import replacing
from softcurve.fit.data.source import Label

__all__ = ["Write", "check_predictions_path", "writing_predictions"]

# Takes the probabilities of the next rows, and the indices of the predicted classes.
Write = Callable[[Float64[np.ndarray, "rows classes"], Int64[np.ndarray, " rows"]], None]


def check_predictions_path(path: Path) -> None:
    """Raise DataError for an unknown suffix, and ImportError if its package is missing."""
    if path.suffix.lower() not in WRITERS:
        kind = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise DataError(f"--out: {path} has {kind}; it must end in {', '.join(WRITERS)}")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet  # noqa: F401


@contextmanager
def writing_predictions(path: Path, rows: int, classes: tuple[Label, ...]) -> Iterator[Write]:
    """Give a function that writes the labels and probabilities of the next rows, in the order of all ``rows``.

    On an error the file that was at ``path`` remains.
    """
    with replacing(path, "--out") as file, WRITERS[path.suffix.lower()](file, rows, classes) as write:
        yield write


@contextmanager
def _npz(file: BinaryIO, rows: int, classes: tuple[Label, ...]) -> Iterator[Write]:
    """Write what ``numpy.savez`` would; the labels come last and are kept as indices until then."""
    labels = _array(classes)
    indices: list[NDArray[np.int64]] = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("probabilities.npy", "w", force_zip64=True) as member, _npy(member, rows, classes) as add:

            def write(probabilities: NDArray[np.float64], predicted: NDArray[np.int64]) -> None:
                add(probabilities, predicted)
                indices.append(predicted.copy())

            yield write
        for name, array in {"label": labels[np.concatenate(indices)], "classes": labels}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy_format.write_array(member, array, allow_pickle=False)


@contextmanager
def _npy(file: Any, rows: int, classes: tuple[Label, ...]) -> Iterator[Write]:
    descr = npy_format.dtype_to_descr(np.dtype(np.float64))
    header = {"descr": descr, "fortran_order": False, "shape": (rows, len(classes))}
    npy_format.write_array_header_1_0(file, header)
    yield lambda probabilities, predicted: file.write(
        np.ascontiguousarray(probabilities).view(np.uint8).reshape(-1).data
    )


@contextmanager
def _csv(file: BinaryIO, rows: int, classes: tuple[Label, ...]) -> Iterator[Write]:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
    writer = csv.writer(text)
    writer.writerow(["label", *(f"p({label})" for label in classes)])

    def write(probabilities: NDArray[np.float64], predicted: NDArray[np.int64]) -> None:
        for index, row in zip(predicted.tolist(), probabilities, strict=True):
            writer.writerow([classes[index], *row.tolist()])

    try:
        yield write
    finally:
        text.detach()


@contextmanager
def _parquet(file: BinaryIO, rows: int, classes: tuple[Label, ...]) -> Iterator[Write]:
    """Write one row group for each block."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = _array(tuple(encodable(name) if isinstance(name, str) else name for name in classes))
    fields = {"label": pa.array(labels).type, "probabilities": pa.list_(pa.float64(), len(classes))}
    schema = pa.schema(fields, metadata={"classes": json.dumps(classes)})
    with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:

        def write(probabilities: NDArray[np.float64], predicted: NDArray[np.int64]) -> None:
            lists = pa.FixedSizeListArray.from_arrays(pa.array(probabilities.ravel()), len(classes))
            writer.write_table(pa.table([pa.array(labels[predicted]), lists], schema=schema))

        yield write


def _array(classes: tuple[Label, ...]) -> NDArray[Any]:
    """The names of the classes; numpy alone would turn integers from 2**63 on into floats beside smaller ones."""
    array = np.array(classes)
    if array.dtype.kind != "f":
        return array
    return np.array(classes, dtype=np.uint64 if min(map(int, classes)) >= 0 else np.str_)


Writer = Callable[[BinaryIO, int, tuple[Label, ...]], AbstractContextManager[Write]]
WRITERS: dict[str, Writer] = {".npz": _npz, ".npy": _npy, ".csv": _csv, ".parquet": _parquet}
