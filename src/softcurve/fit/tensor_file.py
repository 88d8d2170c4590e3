"""Safetensors files with metadata: equal content makes equal bytes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from softcurve.fit.atomic import replacing
from softcurve.fit.data.files.arrays import opened_tensors
from softcurve.fit.system_errors import out_of_memory

__all__ = ["encode_tensors", "read_tensors", "write_tensors"]

LENGTH = 8  # bytes, of the header's length


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], argument: str = "checkpoint"
) -> None:
    """Write all; what stood at ``path`` before stays there unless all is written. Errors name the ``argument``."""
    with replacing(path, argument) as file:
        file.writelines(encode_tensors(tensors, metadata))


def encode_tensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, memoryview]:
    """The bytes of the file, in two pieces, with the metadata in order."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = json.loads(content[LENGTH:end])  # of metadata in random order
    header["__metadata__"] = dict(sorted(metadata.items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % LENGTH)
    return len(encoded).to_bytes(LENGTH, "little") + encoded, memoryview(content)[end:]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises OSError for a file that cannot be read, ValueError that says what else is wrong."""
    try:
        with opened_tensors(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type, OSError or ValueError, by the damage
        if out_of_memory(error) is not None or (isinstance(error, OSError) and error.errno):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"it is no safetensors file ({reason})") from error
