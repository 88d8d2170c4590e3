"""The command ``softcurve predict``: predict and score in one pass, and write the predictions block by block."""

from __future__ import annotations

import csv
import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray

import softcurve
from softcurve.array_types import Float64, Int64
from softcurve.cli.interrupt import stop_if_interrupted
from softcurve.cli.options import PredictOptions, check_suffix, keys_of
from softcurve.cli.printing import TextRows, print_results, print_table, score_figures, score_rows
from softcurve.cli.streams import encodable, shortened
from softcurve.files.atomic import replacing
from softcurve.files.errors import refuse_pickle
from softcurve.fit import DataError
from softcurve.fit.data.opening import open_source_for
from softcurve.fit.data.source import Label, Source, block_rows
from softcurve.fit.data.sparse_features import linear
from softcurve.fit.diagnostics import ScoreSums
from softcurve.fit.outputs import check_outputs
from softcurve.fit.saved_head import SavedHead

# Takes the probabilities of the next rows, and the indices of the predicted classes.
Write = Callable[[Float64[np.ndarray, "rows classes"], Int64[np.ndarray, " rows"]], None]
MOST_SHOWN = 10  # classes
SAVING = (
    "write its content as .safetensors: "
    "softcurve.fit.saved_head.SavedHead(weight, bias, classes, loss, C).save('head.safetensors')"
)
BLOCK = 16_000_000  # bytes of what is computed of a block; the heap keeps several times the largest freed tensor


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
    """Return the names of the classes; numpy alone turns integers from 2**63 on into floats beside smaller ones."""
    array = np.array(classes)
    if array.dtype.kind != "f":
        return array
    return np.array(classes, dtype=np.uint64 if min(map(int, classes)) >= 0 else np.str_)


Writer = Callable[[BinaryIO, int, tuple[Label, ...]], AbstractContextManager[Write]]
WRITERS: dict[str, Writer] = {".npz": _npz, ".npy": _npy, ".csv": _csv, ".parquet": _parquet}


def predict_command(options: PredictOptions, *, as_json: bool | None = None) -> None:
    """Predict, write the predictions, and print the table or the JSON line. Raises DataError.

    On an error the file that was at ``options.out`` remains.
    """
    data, out = options.data, options.out
    if out is not None:
        check_suffix("--out", out, *WRITERS)
        if out.suffix.lower() == ".parquet":
            import pyarrow.parquet  # noqa: F401
        inputs: dict[str, Any] = {"HEAD": options.head, "DATA": data, "--target": options.target}
        check_outputs({"--out": out}, inputs, overwrite=options.overwrite)
    refuse_pickle("head", options.head, SAVING)
    head = SavedHead.load(options.head)
    source = open_source_for(data, head.classes, head.weight.shape[1], options.target, keys=keys_of(options))
    start = time.perf_counter()
    with ExitStack() as outputs:
        write = None
        if out is not None:
            file = outputs.enter_context(replacing(out, "--out"))
            write = outputs.enter_context(WRITERS[out.suffix.lower()](file, source.rows, head.classes))
        results = _predict(head, source, data, write)
    record: dict[str, Any] = {
        "command": "predict", "head": str(options.head), "data": data, "rows": source.rows, "features": source.width,
        "classes": len(head.classes), **results, "seconds": time.perf_counter() - start,
        "predictions": None if out is None else str(out),
    }  # fmt: skip
    written = () if out is None else (out,)
    print_results(record, lambda: print_table("softcurve predict", _rows(record)), as_json=as_json, written=written)


@torch.no_grad()
def _predict(head: SavedHead, source: Source, data: str, write: Write | None) -> dict[str, Any]:
    """Predict block by block; return the most predicted classes, the mean entropy, and the scores against targets."""
    weight, bias = head.weight.double(), head.bias.double()
    counts, entropy = np.zeros(len(bias), dtype=np.int64), 0.0
    # The reverse KL of a label is infinite, its cross-entropy is not.
    loss = "cross_entropy" if source.kind == "labels" else head.loss
    sums = ScoreSums(loss)
    for block in source.blocks(block_rows(source, len(weight), BLOCK)):
        stop_if_interrupted()
        logits = linear(block.features, weight, bias)
        if not logits.isfinite().all():
            raise DataError(f"data: the logits of {data} overflow; scale its features as for the fit")
        predicted = logits.argmax(dim=1).numpy()
        counts += np.bincount(predicted, minlength=len(counts))
        entropy += softcurve.entropy(logits).sum().item()
        if block.target is not None:
            sums.add(logits, block.target)
        if write is not None:
            write(torch.softmax(logits, dim=1).numpy(), predicted)
    order = np.argsort(-counts, kind="stable")[:MOST_SHOWN]
    entropy /= source.rows
    return {
        "most_predicted": [{"class": head.classes[index], "rows": int(counts[index])} for index in order.tolist()],
        "entropy_nats": entropy,
        "entropy_bits": entropy / math.log(2.0),
        **({"loss": loss} | score_figures("", sums.means()) if sums.rows else {}),
    }


def _rows(record: dict[str, Any]) -> TextRows:
    classes = [(shortened(str(entry["class"])), entry["rows"]) for entry in record["most_predicted"]]
    more = record["classes"] - len(classes)
    counts = ", ".join(f"{name if name.isprintable() else repr(name)}: {rows}" for name, rows in classes)
    rows = [
        ("samples", str(record["rows"])),
        ("features", str(record["features"])),
        ("predicted", counts + (f", and {more} other classes" if more else "")),
        ("mean entropy", f"{record['entropy_nats']:.6f} nats = {record['entropy_bits']:.6f} bits"),
    ]
    if "loss" in record:
        rows += [("loss used", record["loss"]), *score_rows("", "", record)]
    return rows
