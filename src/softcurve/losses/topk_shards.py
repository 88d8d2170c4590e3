"""Files of a teacher's lists: packed indices and log-probabilities in safetensors, read row by row from a memory map.

The indices are uint16 for up to 2^16 classes, three bytes for up to 2^24, and int32 for more; fillers are stored as
class 0. The metadata hold the format, the treatment of the tail, the number of classes, and in a directory of shards
the number of the shard's first row, by which a shard of another cache or a missing one is noticed.

Each block of some rows has a CRC-32 of its indices and log-probabilities, which is verified whenever rows of the block
are read. One checksum for a whole file would need all of it to be read for a few rows. The checksums and the metadata
have a digest of their own, which is verified when the file is opened.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcurve import checks
from softcurve.files import DataError
from softcurve.files.atomic import replacing
from softcurve.files.errors import unusable
from softcurve.files.tensors import FileState, bytes_of, digest_of_all, encode_tensors, opened_tensors

FORMAT, VERSION = "softcurve.topk", "1"
NAME = re.compile(r"topk-\d{6}\.safetensors")
ARGUMENT = "cache"
# Bytes of a block with one checksum. Reading one row checks its block: that takes 5 µs at the 1.7 GB/s of zlib.
BLOCK = 8192


@dataclass(frozen=True)
class Shard:
    """One file of lists, checked as far as its header tells."""

    state: FileState
    tail: str
    classes: int
    first_row: int
    shape: tuple[int, ...]  # of the log-probabilities, (rows, ..., k)
    dtype: torch.dtype  # of the log-probabilities
    block_rows: int  # the rows of one checksum

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
            if names != ["checksums", "indices", "log_probs"]:
                raise ValueError(f"it must hold the tensors 'checksums', 'indices' and 'log_probs', and holds {names}")
            tensors = {name: file.get_tensor(name) for name in names}  # maps; of these the checksums alone are read
            return _checked(state, metadata, **tensors)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices as int32 and log-probabilities of some rows. The file is opened for each reading.

        It is checked before, because reading beyond the end of a mapped file would end the process, and after.
        """
        with self.state.decoding():
            self.state.check()
            with opened_tensors(self.state.path) as file:
                indices, log_probs, checksums = (file.get_tensor(n) for n in ("indices", "log_probs", "checksums"))
                blocks = rows.div(self.block_rows, rounding_mode="floor").unique()
                for block, expected in zip(blocks.tolist(), checksums[blocks].tolist(), strict=True):
                    if _checksum(indices, log_probs, block, self.block_rows) != expected:
                        first = block * self.block_rows
                        last = min(first + self.block_rows, self.shape[0]) - 1
                        raise DataError(
                            f"{ARGUMENT}: {self.state.path} is damaged: its rows {first} to {last} do not agree with "
                            "the checksum that was written with them; write it again"
                        )
                chosen = _unpacked(indices[rows]), log_probs[rows]
            self.state.check()
        return chosen


def write_shard(
    path: Path, indices: Tensor, log_probs: Tensor, *, tail: str, classes: int, first_row: int = 0
) -> None:  # fmt: skip
    """Write lists to a file, which is replaced only when all is written. Raises DataError if that fails."""
    packed = _packed(torch.where(log_probs == -torch.inf, 0, indices.long()), classes)
    block_rows = max(1, BLOCK * len(packed) // max(1, packed.nbytes + log_probs.nbytes))
    blocks = range(-(-len(packed) // block_rows))
    checksums = torch.tensor([_checksum(packed, log_probs, n, block_rows) for n in blocks], dtype=torch.int64)
    metadata = {
        "format": FORMAT, "format_version": VERSION, "tail": tail, "classes": str(classes),
        "first_row": str(first_row), "block_rows": str(block_rows),
    }  # fmt: skip
    metadata["digest"] = digest_of_all({"checksums": checksums}, metadata)
    with replacing(path, ARGUMENT) as file:
        tensors = {"indices": packed, "log_probs": log_probs, "checksums": checksums}
        file.writelines(encode_tensors(tensors, metadata))


def open_shards(path: Path) -> list[Shard]:
    """Return the file at a path, or the shards in a directory. Raises DataError that names what is wrong."""
    if not path.is_dir():
        return [Shard.of(path)]
    try:
        names = sorted(each.name for each in path.iterdir() if NAME.fullmatch(each.name))
    except OSError as error:
        raise unusable(ARGUMENT, path, "read", error) from error
    if not names:
        raise DataError(
            f"{ARGUMENT}: {path} has no {shard_name(0)}; give a directory that TopKWriter wrote, whose last rows it "
            "writes at the end of its with block, or at flush()"
        )
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


def read_rows(shards: Sequence[Shard], rows: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return indices and log-probabilities of some rows, shard by shard, and the order of what was asked for."""
    stops = torch.tensor([shard.first_row - shards[0].first_row + shard.shape[0] for shard in shards])
    of_shard = torch.searchsorted(stops, rows, right=True)
    parts, places = [], []
    for number in of_shard.unique().tolist() or [0]:
        chosen = (of_shard == number).nonzero().squeeze(-1)
        parts.append(shards[number].read(rows[chosen] - (stops[number] - shards[number].shape[0])))
        places.append(chosen)
    return parts, torch.cat(places).argsort()


def chosen_rows(index: Any, count: int) -> Tensor:
    """Return the numbers, int64 on the CPU, of the rows that an index of the first of ``count`` rows stands for.

    As of a tensor: negative numbers count from the end, a mask has one entry a row, and an empty list is no row.
    """
    if isinstance(index, slice):
        if index.step is not None and index.step <= 0:
            raise ValueError(f"rows of a cache must be a slice in steps >= 1, got {index}; flip the rows once read")
        return torch.arange(*index.indices(count))
    if isinstance(index, tuple):
        raise IndexError("a cache is indexed by rows alone, got a tuple; read the rows first: cache[rows][...]")
    rows: Any = index
    with suppress(TypeError, ValueError, RuntimeError):  # for what is no number
        rows = torch.as_tensor(index).cpu()
        if not isinstance(index, Tensor) and (rows.dtype == torch.uint8 or not rows.numel()):
            rows = rows.long()  # an empty list is float32 by default, and uint8 is a mask only in torch
    if isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.shape == (count,):
        return rows.nonzero().squeeze(-1)
    if not isinstance(rows, Tensor) or rows.dtype == torch.uint8 or not checks.is_of_integers(rows):
        raise TypeError(
            f"rows of a cache must be an integer, a slice, integers, or a mask of its {count} rows, got "
            f"{checks.describe(rows)}; convert numbers with .long(), a mask with .bool()"
        )
    rows = rows.long()
    outside = (rows < -count) | (rows >= count)
    if outside.any():
        raise IndexError(f"rows of a cache must be in 0 … {count - 1}, got {int(rows[outside][0])}")
    return torch.where(rows < 0, rows + count, rows)


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


def _checked(
    state: FileState, metadata: dict[str, str], indices: Tensor, log_probs: Tensor, checksums: Tensor
) -> Shard:
    stated = {name: text for name, text in metadata.items() if name != "digest"}
    if metadata.get("digest") != digest_of_all({"checksums": checksums}, stated):
        raise ValueError("its metadata and checksums do not agree with the digest that was written with them")
    numbers = []
    for name, least, most in (("classes", 1, 2**31 - 1), ("first_row", 0, 2**63), ("block_rows", 1, 2**63)):
        number = -1
        with suppress(ValueError):
            number = int(metadata.get(name, ""))
        if not least <= number <= most:
            raise ValueError(f"its metadata {name!r} must be a whole number, and is {metadata.get(name)!r}")
        numbers.append(number)
    tail, (classes, first_row, block_rows) = metadata.get("tail", ""), numbers
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
    return Shard(state, tail, classes, first_row, tuple(log_probs.shape), log_probs.dtype, block_rows)


def _checksum(indices: Tensor, log_probs: Tensor, block: int, block_rows: int) -> int:
    """Return the CRC-32 of a block of rows."""
    rows = slice(block * block_rows, (block + 1) * block_rows)
    return zlib.crc32(bytes_of(log_probs[rows]), zlib.crc32(bytes_of(indices[rows])))


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
