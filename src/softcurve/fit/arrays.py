"""The arrays in a file, as they stand there: .npz, .npy, .safetensors, .parquet, and the embedded digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcurve.fit import DataError

__all__ = ["Arrays", "read_arrays"]

FEATURES = ("features", "X")
TARGET = ("target", "y")


@dataclass(frozen=True, eq=False)
class Arrays:
    """Features and, where there is one, the target, unchecked; with the names that an error gives them."""

    features: NDArray[Any]
    features_name: str
    target: NDArray[Any] | None
    target_name: str


def read_arrays(data: str, target: Path | None = None) -> Arrays:
    """Read ``data``: the word ``digits`` or a file whose suffix tells its format.

    ``target``, an .npy file, takes the place of the target in ``data``. Raises DataError.
    """
    arrays = _digits() if data == "digits" else _read_file(Path(data), with_target=target is None)
    if target is None:
        return arrays
    if target.suffix.lower() != ".npy":
        raise DataError(f"target: {target} must be an .npy file (numpy.save); put other formats into data")
    return Arrays(arrays.features, arrays.features_name, _npy(target, "target"), f"target {target}")


def _read_file(path: Path, *, with_target: bool) -> Arrays:
    readers: dict[str, Callable[[Path, bool], Arrays]] = {
        ".npz": _npz,
        ".npy": lambda path, _: Arrays(_npy(path, "data"), str(path), None, "it is one array"),
        ".safetensors": _safetensors,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        kind = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise DataError(
            f"data: {path} has {kind}; it must be the word digits or a file that ends in {', '.join(readers)}"
        )
    return reader(path, with_target)


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Arrays(digits.data / 16.0, "features of digits", digits.target, "target of digits")


def _npy(path: Path, argument: str) -> NDArray[Any]:
    # numpy leaves a damaged archive open that it has opened itself.
    with _decoding(path, argument, "an .npy array (numpy.save)"), path.open("rb") as file:
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise DataError(f"{argument}: {path} is an archive of several arrays; rename it to .npz")
        return array


def _npz(path: Path, with_target: bool) -> Arrays:
    with _decoding(path, "data", "an .npz archive (numpy.savez)"), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"data: {path} is a single array, not an archive; rename it to .npy")
        return _named(path, "array", archive.files, archive.__getitem__, with_target)


def _safetensors(path: Path, with_target: bool) -> Arrays:
    from safetensors import safe_open

    with _decoding(path, "data", "a .safetensors file"), safe_open(path, framework="pt") as file:

        def read(name: str) -> NDArray[Any]:
            tensor = file.get_tensor(name)
            # numpy knows neither bfloat16 nor the float8 formats.
            return np.asarray((tensor.double() if tensor.is_floating_point() else tensor).numpy())

        return _named(path, "tensor", list(file.keys()), read, with_target)


def _parquet(path: Path, with_target: bool) -> Arrays:
    import pyarrow.parquet as pq

    with _decoding(path, "data", "a .parquet table"):
        table = pq.ParquetFile(path).read()
        names = list(table.column_names)
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"data: {path} has more than one column {doubled[0]!r}; rename one")

        def read(name: str) -> NDArray[Any]:
            return _column(table.column(name), f"column {name!r} of {path}")

        if any(name in names for name in FEATURES):
            return _named(path, "column", names, read, with_target)
        target = _pick(path, "column", names, TARGET)
        features = [name for name in names if name not in TARGET]
        if not features:
            raise DataError(f"data: {path} has no feature columns; its columns are {_listed(names)}")
        columns = [_numeric(read(name), name, path) for name in features]
        return Arrays(
            np.column_stack(columns),
            f"columns of {path}",
            read(target) if target is not None and with_target else None,
            _target_name(path, "column", target),
        )


def _numeric(column: NDArray[Any], name: str, path: Path) -> NDArray[Any]:
    if column.ndim != 1 or column.dtype.kind not in "iufb":
        what = "lists" if column.ndim != 1 else "text" if column.dtype.kind == "U" else str(column.dtype)
        raise DataError(
            f"data: column {name!r} of {path} holds {what}; a feature column must be numeric: drop it, "
            "encode it as numbers, or put all features into one list column named features"
        )
    return column


def _column(column: Any, name: str) -> NDArray[Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    kind = array.type
    if array.null_count:
        raise DataError(f"data: {name} has {array.null_count} nulls; fill them or drop the rows")
    if pa.types.is_dictionary(kind):
        return _column(pa.chunked_array([array.cast(kind.value_type)]), name)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        widths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(widths) > 1:
            raise DataError(f"data: {name} has lists of {min(widths)} to {max(widths)} entries; give one length")
        values = _column(pa.chunked_array([array.flatten()]), f"the lists in {name}")
        return values.reshape(len(array), widths[0] if widths else 0)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.array(array.to_pylist(), dtype=np.str_)
    if pa.types.is_decimal(kind):
        array = array.cast(pa.float64())
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _named(
    path: Path, what: str, names: Sequence[str], read: Callable[[str], NDArray[Any]], with_target: bool
) -> Arrays:
    features = _pick(path, what, names, FEATURES)
    if features is None:
        raise DataError(
            f"data: {path} has no {what} named {' or '.join(FEATURES)}; it has {_listed(names)}: rename one"
        )
    target = _pick(path, what, names, TARGET)
    return Arrays(
        read(features),
        f"{what} {features!r} of {path}",
        read(target) if target is not None and with_target else None,
        _target_name(path, what, target),
    )


def _target_name(path: Path, what: str, target: str | None) -> str:
    return f"no {what} named {' or '.join(TARGET)}" if target is None else f"{what} {target!r} of {path}"


def _pick(path: Path, what: str, names: Sequence[str], wanted: tuple[str, ...]) -> str | None:
    found = [name for name in wanted if name in names]
    if len(found) > 1:
        raise DataError(f"data: {path} has both {found[0]!r} and {found[1]!r}; keep one {what} of them")
    return found[0] if found else None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return (shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "none at all"


@contextmanager
def _decoding(path: Path, argument: str, kind: str) -> Iterator[None]:
    if not path.exists():
        raise DataError(f"{argument}: there is no file {path}; check the path")
    if not path.is_file():
        raise DataError(f"{argument}: {path} is not a file; give the path of a file")
    if path.stat().st_size == 0:
        raise DataError(f"{argument}: {path} is empty (0 bytes); write it again")
    try:
        yield
    except (DataError, ImportError):
        raise
    except PermissionError as error:
        raise DataError(f"{argument}: {path} may not be read; change its permissions") from error
    except Exception as error:  # the decoders raise what they like on a damaged file
        if "allow_pickle" in str(error) or "pickled" in str(error):
            reason = "it is none, or holds pickled objects, which are never loaded; save numbers or text"
        else:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = f"{first.rstrip('.')}; write it again"
        raise DataError(f"{argument}: {path} cannot be read as {kind}: {reason}") from error
