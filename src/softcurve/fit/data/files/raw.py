"""Numbers that stand in a file one after the other: an .npy array, a tensor of a .safetensors file, a memory map."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from softcurve.fit import DataError
from softcurve.fit.data.columns import Fill
from softcurve.fit.data.files.stamp import Stamp
from softcurve.fit.system_errors import unusable

__all__ = ["RawColumn"]

PIECE = 1 << 17  # entries that are converted at a time
LABELS = 1 << 20  # labels that are read at a time


@dataclass(frozen=True, eq=False)
class RawColumn:
    """Equals ``numpy.fromfile(path, dtype, offset=offset).reshape(shape)``, some rows at a time.

    Plain reads, no memory map: pages of a map count among the memory of the process, and a file that shrinks under a
    map ends the process. Rows are read into where they go; those of another dtype are converted in small pieces, and
    of a Fortran-ordered array each column of a block is one read.
    """

    name: str
    format: str  # what the file is, for errors
    stamp: Stamp
    offset: int
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    as_torch: torch.dtype | None = None  # what the bytes mean, where numpy has no such dtype
    fortran: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """What is stored, or float32 for what numpy lacks."""
        return self.stored if self.as_torch is None else np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """The bytes that are stored."""
        return math.prod(self.shape) * self.stored.itemsize

    @contextmanager
    def opened(self) -> Iterator[Fill]:
        """Rows from the file, which must be as it was when the column was made."""
        with self.stamp.opened() as file:
            yield partial(self._fill, file)

    def labels(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Some entries of a column of shape (n,)."""
        with self.opened() as fill:
            for first in range(start, stop, LABELS):
                piece = np.empty(min(LABELS, stop - first), self.dtype.newbyteorder("="))
                fill(first, piece)
                yield piece

    def digest(self, most: int) -> bytes:
        """Of shape, dtype and bytes."""
        form = f"{self.shape} {self.stored.str} {self.as_torch} {self.fortran}".encode()
        return hashlib.sha256(form + self.stamp.digest(most, self.offset, self.nbytes)).digest()

    def _fill(self, file: BinaryIO, start: int, out: NDArray[Any]) -> None:
        if self.fortran and len(self.shape) == 2:
            for column in range(self.shape[1]):
                self._entries(file, column * self.shape[0] + start, out[:, column])
        else:
            self._entries(file, start * math.prod(self.shape[1:]), out.reshape(-1))

    def _entries(self, file: BinaryIO, first: int, out: NDArray[Any]) -> None:
        if out.dtype == self.stored and self.as_torch is None and out.flags.c_contiguous:
            self._bytes(file, first, out)
            return
        scratch = np.empty(min(len(out), PIECE), self.stored)
        for start in range(0, len(out), len(scratch)):
            piece = scratch[: len(out) - start]
            self._bytes(file, first + start, piece)
            if self.as_torch is None:
                out[start : start + len(piece)] = piece
            else:
                out[start : start + len(piece)] = torch.from_numpy(piece).view(self.as_torch).float().numpy()

    def _bytes(self, file: BinaryIO, first: int, out: NDArray[Any]) -> None:
        place = self.offset + first * self.stored.itemsize
        left = memoryview(out.view(np.uint8))  # type: ignore[arg-type]
        try:
            file.seek(place, os.SEEK_SET)
            while left:
                count = file.readinto(left)  # type: ignore[attr-defined]
                if not count:
                    break
                left = left[count:]
        except OSError as error:
            raise unusable(self.stamp.argument, self.stamp.path, f"read at byte {place}", error) from error
        if left:
            raise DataError(
                f"{self.stamp.argument}: {self.stamp.path} ends before the entries of {self.name} do "
                f"({len(left)} bytes are missing at byte {place}): it is no whole {self.format}; write it again"
            )
