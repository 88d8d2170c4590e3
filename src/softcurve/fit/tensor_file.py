"""Safetensors files with metadata in which equal content makes equal bytes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from softcurve.fit.data.files.arrays import opened_tensors
from softcurve.fit.system_errors import out_of_memory

LENGTH = 8  # bytes that hold the length of the header


def encode_tensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, memoryview]:
    """Return the bytes of the file in two pieces. The metadata, which safetensors orders at random, are sorted."""
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
