"""Files of a teacher's lists: packed indices and log-probabilities in safetensors, read row by row from a memory map.

The indices are uint16 for up to 2^16 classes, three bytes for up to 2^24, and int32 for more; fillers are stored as
class 0. The metadata hold the format, the treatment of the tail, the number of classes, and in a directory of shards
the number of the shard's first row, by which a shard of another cache or a missing one is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softcurve import checks
from softcurve.files import DataError
from softcurve.files.atomic import replacing
from softcurve.files.errors import unusable
from softcurve.files.tensors import FileState, encode_tensors, opened_tensors

FORMAT, VERSION = "softcurve.topk", "1"
NAME = re.compile(r"topk-\d{6}\.safetensors")
ARGUMENT = "cache"


@dataclass(frozen=True)
class Shard:
    """One file of lists, checked as far as its header tells."""

    state: FileState
    tail: str
    classes: int
    first_row: int
    shape: tuple[int, ...]  # of the log-probabilities, (rows, ..., k)
    dtype: torch.dtype  # of the log-probabilities

    @staticmethod
    def of(path: Path) -> Shard:
        """Open a file. Raises DataError if it is no file of lists, or a damaged one."""
        state = FileState.of(path, "a file of top-k lists", ARGUMENT)
        with state.decoding(), opened_tensors(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("format_version") != VERSION:
                said = metadata.get("format"), metadata.get("format_version")
                raise DataError(
                    f"{ARGUMENT}: {path} is no file of top-k lists: its metadata must say the format {FORMAT!r} and "
                    f"the version {VERSION!r}, and say {said[0]!r} and {said[1]!r}; give what TopK.save or TopKWriter "
                    "wrote"
                )
            names = sorted(file.keys())
            if names != ["indices", "log_probs"]:
                raise ValueError(f"it must hold the tensors 'indices' and 'log_probs', and holds {names}")
            indices, log_probs = file.get_tensor("indices"), file.get_tensor("log_probs")  # maps; nothing is read
            return _checked(state, metadata, indices, log_probs)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices as int32 and log-probabilities of some rows. The file is opened for each reading.

        It is checked before, because reading beyond the end of a mapped file would end the process, and after.
        """
        with self.state.decoding():
            self.state.check()
            with opened_tensors(self.state.path) as file:
                indices, log_probs = (file.get_tensor(name)[rows] for name in ("indices", "log_probs"))
            self.state.check()
        listed = _unpacked(indices)
        # No checksum: one of a whole file would have to read it whole.
        if not (((listed >= 0) & (listed < self.classes)).all() and (log_probs <= checks.SUM_TOLERANCE_HALF).all()):
            raise DataError(
                f"{ARGUMENT}: {self.state.path} holds classes outside 0 … {self.classes - 1}, or log-probabilities "
                "that are NaN or above 0: it is damaged; write it again"
            )
        return listed, log_probs


def write_shard(
    path: Path, indices: Tensor, log_probs: Tensor, *, tail: str, classes: int, first_row: int = 0
) -> None:  # fmt: skip
    """Write lists to a file, which is replaced only when all is written. Raises DataError if that fails."""
    packed = _packed(torch.where(log_probs == -torch.inf, 0, indices.long()), classes)
    metadata = {
        "format": FORMAT, "format_version": VERSION, "tail": tail, "classes": str(classes), "first_row": str(first_row)
    }  # fmt: skip
    with replacing(path, ARGUMENT) as file:
        file.writelines(encode_tensors({"indices": packed, "log_probs": log_probs}, metadata))


def open_shards(path: Path) -> list[Shard]:
    """Return the file at a path, or the shards in a directory. Raises DataError that names what is wrong."""
    if not path.is_dir():
        return [Shard.of(path)]
    try:
        names = sorted(each.name for each in path.iterdir() if NAME.fullmatch(each.name))
    except OSError as error:
        raise unusable(ARGUMENT, path, "read", error) from error
    if not names:
        raise DataError(f"{ARGUMENT}: {path} has no {shard_name(0)}; give a directory that TopKWriter wrote")
    for number, name in enumerate(names):
        if name != shard_name(number):
            raise DataError(
                f"{ARGUMENT}: {path / shard_name(number)} is missing, and {name} is there; restore it, or write the "
                "cache again"
            )
    shards = [Shard.of(path / name) for name in names]
    _require_one_cache(shards)
    return shards


def shard_name(number: int) -> str:
    """Return the name of a shard in its directory."""
    return f"topk-{number:06d}.safetensors"


def _require_one_cache(shards: Sequence[Shard]) -> None:
    first, row = shards[0], 0
    for shard in shards:
        for what, value, expected in (
            ("classes", shard.classes, first.classes), ("tail", shard.tail, first.tail),
            ("log-probabilities", shard.dtype, first.dtype), ("shape of a row", shard.shape[1:-1], first.shape[1:-1]),
            ("number of its first row", shard.first_row, row),
        ):  # fmt: skip
            if value != expected:
                raise DataError(
                    f"{ARGUMENT}: {shard.state.path} belongs to another cache than the shards before it: its {what} "
                    f"must be {expected}, got {value}; move it elsewhere, or write the cache again"
                )
        row += shard.shape[0]


def _checked(state: FileState, metadata: dict[str, str], indices: Tensor, log_probs: Tensor) -> Shard:
    numbers = []
    for name in ("classes", "first_row"):
        number = -1
        with suppress(ValueError):
            number = int(metadata.get(name, ""))
        if number < (name == "classes"):
            raise ValueError(f"its metadata {name!r} must be a whole number, and is {metadata.get(name)!r}")
        numbers.append(number)
    tail, (classes, first_row) = metadata.get("tail", ""), numbers
    if tail not in ("bucket", "renormalize"):
        raise ValueError(f"its metadata 'tail' must be 'bucket' or 'renormalize', and is {tail!r}")
    empty = _packed(torch.zeros((*log_probs.shape[:-1], 0), dtype=torch.int64), classes)
    shape = (*log_probs.shape, *empty.shape[log_probs.ndim :])
    good = log_probs.ndim > 1 and log_probs.is_floating_point()
    if not good or indices.dtype != empty.dtype or tuple(indices.shape) != shape:
        raise ValueError(
            f"its tensors must be log-probabilities (rows, ..., k) and indices {shape} of {empty.dtype}, and are "
            f"{tuple(log_probs.shape)} of {log_probs.dtype} and {tuple(indices.shape)} of {indices.dtype}"
        )
    return Shard(state, tail, classes, first_row, tuple(log_probs.shape), log_probs.dtype)


def _packed(indices: Tensor, classes: int) -> Tensor:
    """Return class indices in two bytes, three (a last dimension more), or four."""
    if classes <= 2**16:
        return indices.to(torch.uint16)
    if classes <= 2**24:
        return torch.stack([indices >> shift & 255 for shift in (0, 8, 16)], -1).to(torch.uint8)
    return indices.to(torch.int32)


def _unpacked(packed: Tensor) -> Tensor:
    if packed.dtype != torch.uint8:
        return packed.to(torch.int32)
    low, middle, high = packed.int().unbind(-1)
    return low | middle << 8 | high << 16
