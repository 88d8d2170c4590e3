"""Safetensors files with metadata: equal content makes equal bytes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from softcurve.fit.atomic import replacing

__all__ = ["read_tensors", "write_tensors"]

LENGTH = 8  # bytes, of the header's length


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write all, with the metadata in order; what stood at ``path`` before stays there unless all is written."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = json.loads(content[LENGTH:end])  # of metadata in random order
    header["__metadata__"] = dict(sorted(metadata.items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % LENGTH)
    with replacing(path) as file:
        file.write(len(encoded).to_bytes(LENGTH, "little") + encoded)
        file.write(memoryview(content)[end:])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises ValueError that says what is wrong with the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type, OSError or ValueError, by the damage
        raise ValueError(f"it is no safetensors file ({str(error).splitlines()[0]})") from error
