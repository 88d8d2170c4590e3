"""A fitted head as a safetensors file: weight, bias and, as metadata, what its classes are called."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from softcurve.array_types import Float
from softcurve.fit import DataError
from softcurve.fit.atomic import replacing
from softcurve.fit.data.files.file_rows import check_file
from softcurve.fit.data.source import Label
from softcurve.fit.losses import LOSSES
from softcurve.fit.system_errors import unusable
from softcurve.fit.tensor_file import encode_tensors, read_tensors
from softcurve.records import ShortRepr

__all__ = ["SavedHead"]

FORMAT = "softcurve.head"
VERSION = "1"


@dataclass(frozen=True, eq=False, repr=False)
class SavedHead(ShortRepr):
    """A linear softmax head with the names of its classes and how it was fitted."""

    weight: Float[Tensor, "classes d"]
    bias: Float[Tensor, " classes"]
    classes: tuple[Label, ...]
    loss: str
    C: float

    def to_linear(self) -> nn.Linear:
        """Return the head as a trainable layer with tensors of its own."""
        classes, width = self.weight.shape
        # On "meta" nothing is drawn, so the global random generator stays as it is.
        linear = nn.Linear(width, classes, device="meta")
        linear.weight = nn.Parameter(self.weight.clone())
        linear.bias = nn.Parameter(self.bias.clone())
        return linear

    def save(self, path: Path | str) -> None:
        """Write the head; what stood at ``path`` before stays there unless all is written."""
        with replacing(Path(path)) as file:
            self.write(file)

    def write(self, file: BinaryIO) -> None:
        """Write the head to a file that is open."""
        metadata = {
            "format": FORMAT,
            "format_version": VERSION,
            "classes": json.dumps(self.classes),
            "loss": self.loss,
            "C": repr(self.C),
            "softcurve_version": version("softcurve"),
        }
        file.writelines(encode_tensors({"weight": self.weight, "bias": self.bias}, metadata))

    @classmethod
    def load(cls, path: Path | str) -> SavedHead:
        """Read a head and check it whole. Raises DataError that names what is damaged."""
        path = Path(path)
        tensors, metadata = _read(path)
        if metadata.get("format") != FORMAT or metadata.get("format_version") != VERSION:
            raise _damaged(
                path,
                f"its metadata must say format {FORMAT!r}, format_version {VERSION!r}, and says "
                f"{metadata.get('format')!r}, {metadata.get('format_version')!r}",
            )
        weight, bias = _checked_tensors(path, tensors)
        classes = _checked_classes(path, metadata.get("classes", ""), len(bias))
        if (loss := metadata.get("loss", "")) not in LOSSES:
            raise _damaged(path, f"its metadata 'loss' must be one of {', '.join(LOSSES)}, and is {loss!r}")
        return cls(weight, bias, classes, loss, _checked_strength(path, metadata.get("C", "")))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    check_file(path, "head")
    try:
        return read_tensors(path)
    except OSError as error:
        raise unusable("head", path, "read", error) from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _checked_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if set(tensors) != {"weight", "bias"}:
        raise _damaged(path, f"it must hold the tensors 'bias' and 'weight', and holds {sorted(tensors)}")
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.ndim != 2 or weight.shape[0] < 2 or weight.shape[1] < 1 or bias.shape != weight.shape[:1]:
        raise _damaged(
            path,
            "'weight' must have shape (C, d) and 'bias' (C,), with C of 2 or more; they have "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}",
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != weight.dtype:
            raise _damaged(path, f"both tensors must be float32 or float64, alike; {name!r} is {tensor.dtype}")
        if not tensor.isfinite().all():
            raise _damaged(path, f"{name!r} has entries that are not finite")
    return weight, bias


def _is_label(value: object) -> bool:
    """Text, or an integer that an array can hold."""
    return isinstance(value, str) or (isinstance(value, int) and -(2**63) <= value < 2**64)


def _checked_classes(path: Path, text: str, count: int) -> tuple[Label, ...]:
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(_is_label(label) for label in classes):
        raise _damaged(path, f"its metadata 'classes' must be a JSON list of labels, and is {text[:60]!r}")
    if len(classes) != count or len(set(classes)) != count:
        raise _damaged(path, f"its metadata 'classes' must name {count} classes, and names {len(set(classes))}")
    return tuple(classes)


def _checked_strength(path: Path, text: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not strength > 0:  # inf is no penalty
        raise _damaged(path, f"its metadata 'C' must be a positive number, and is {text!r}")
    return strength


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"head: {path} is not a head that can be used: {what}; fit it again with softcurve fit")
