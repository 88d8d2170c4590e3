"""Files that must not change while they are in use, and tensors in .safetensors files."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from softcurve.files import DataError
from softcurve.files.errors import out_of_memory, unusable

LENGTH = 8  # bytes that hold the length of the header of a .safetensors file


@dataclass(frozen=True)
class FileState:
    """A file of a format (``kind``), its size in bytes and its modification time; errors call it ``argument``."""

    path: Path
    kind: str
    argument: str
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path, kind: str, argument: str = "data") -> FileState:
        """Return the present state. Raises DataError unless there is a file at ``path`` with something in it."""
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{argument}: there is no file {path}; check the path") from error
        except OSError as error:
            raise unusable(argument, path, "read", error) from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{argument}: {path} is not a file; give the path of a file")
        if status.st_size == 0:
            raise DataError(f"{argument}: {path} is empty (0 bytes); write it again")
        return cls(path, kind, argument, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raise DataError if the file is no longer in this state."""
        now = FileState.of(self.path, self.kind, self.argument)
        if now != self:
            size = f"{now.size} bytes, {self.size} before" if now.size != self.size else f"still {now.size} bytes"
            what = f"{self.argument}: {self.path} has changed since it was opened"
            raise DataError(f"{what} ({size}); leave it as it is and start again")

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Turn errors of the block into a DataError, which says that the file cannot be read as its kind, and why."""
        try:
            yield
        except (DataError, ImportError):
            raise
        except Exception as error:  # the decoders raise what they like on a damaged file
            if isinstance(error, OSError) and error.errno:
                raise unusable(self.argument, self.path, "read", error) from error
            if (missing := out_of_memory(error)) is not None:
                reason = f"{missing}; store it as .npy, .safetensors or .parquet, which are read block by block"
            elif any(word in str(error) for word in ("allow_pickle", "pickled", "Python objects")):
                reason = "it is not one, or holds pickled objects, which are never loaded; save numbers or text"
            else:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                reason = f"{first.rstrip('.')}; write it again"
            raise DataError(f"{self.argument}: {self.path} cannot be read as {self.kind}: {reason}") from error


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """Open a file by ``safetensors.safe_open``.

    That reports a file without permission as absent, and cannot open a name that is not UTF-8. Here the first raises
    PermissionError, and the second is opened by its file descriptor.
    """
    with path.open("rb") as file:
        try:
            name = str(path).encode().decode()
        except UnicodeEncodeError:
            name = f"/dev/fd/{file.fileno()}"
        with safe_open(name, framework="pt") as opened:
            yield opened


def encode_tensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, memoryview]:
    """Return the bytes of a .safetensors file in two pieces. The metadata, which the library shuffles, are sorted."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = json.loads(content[LENGTH:end]) | {"__metadata__": dict(sorted(metadata.items()))}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % LENGTH)
    return len(encoded).to_bytes(LENGTH, "little") + encoded, memoryview(content)[end:]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata. Raises OSError for a file that cannot be read, ValueError for a damaged one."""
    try:
        with opened_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type, OSError or ValueError, depending on the damage
        if out_of_memory(error) is not None or (isinstance(error, OSError) and error.errno):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"it is no safetensors file ({reason})") from error


def digest_of_all(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the digest of the names, types, shapes and values of tensors, and of all metadata."""
    form = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in sorted(tensors.items())]
    state = hashlib.sha256(json.dumps([form, sorted(metadata.items())]).encode())
    for _, tensor in sorted(tensors.items()):
        state.update(bytes_of(tensor))
    return state.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of the values of a tensor on the CPU, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
