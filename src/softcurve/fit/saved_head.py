"""A fitted head as a safetensors file: weight, bias and, as metadata, the names of its classes."""

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
from softcurve.fit.system_errors import unusable
from softcurve.fit.tensor_file import encode_tensors, read_tensors
from softcurve.losses.divergences import LOSS_NAMES
from softcurve.records import ShortRepr

__all__ = ["SavedHead"]

FORMAT = "softcurve.head"
VERSION = "1"


@dataclass(frozen=True, eq=False, repr=False)
class SavedHead(ShortRepr):
    """A linear softmax head with the names of its classes, and the loss and the C that it was fitted with."""

    weight: Float[Tensor, "classes d"]
    bias: Float[Tensor, " classes"]
    classes: tuple[Label, ...]
    loss: str
    C: float

    def to_linear(self) -> nn.Linear:
        """Return the head as a trainable layer with copies of its tensors."""
        classes, width = self.weight.shape
        # Initialising on "meta" draws no numbers, so the global random generator stays as it is.
        linear = nn.Linear(width, classes, device="meta")
        linear.weight = nn.Parameter(self.weight.clone())
        linear.bias = nn.Parameter(self.bias.clone())
        return linear

    def save(self, path: Path | str) -> None:
        """Write the head to a file, which is replaced only when all is written."""
        with replacing(Path(path)) as file:
            self.write(file)

    def write(self, file: BinaryIO) -> None:
        """Write the head to an open file."""
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
        """Read a head and check all of it. Raises DataError that names the damage."""
        path = Path(path)
        check_file(path, "head")
        try:
            tensors, metadata = read_tensors(path)
            format_ = metadata.get("format"), metadata.get("format_version")
            if format_ != (FORMAT, VERSION):
                raise ValueError(
                    f"its metadata must say format {FORMAT!r}, format_version {VERSION!r}, and says {format_[0]!r}, "
                    f"{format_[1]!r}"
                )
            weight, bias = _checked_tensors(tensors)
            classes = _checked_classes(metadata.get("classes", ""), len(bias))
            if (loss := metadata.get("loss", "")) not in LOSS_NAMES:
                raise ValueError(f"its metadata 'loss' must be one of {', '.join(LOSS_NAMES)}, and is {loss!r}")
            return cls(weight, bias, classes, loss, _checked_strength(metadata.get("C", "")))
        except OSError as error:
            raise unusable("head", path, "read", error) from error
        except ValueError as error:
            raise DataError(
                f"head: {path} is not a head that can be used: {error}; fit it again with softcurve fit"
            ) from error


def _checked_tensors(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if set(tensors) != {"weight", "bias"}:
        raise ValueError(f"it must hold the tensors 'bias' and 'weight', and holds {sorted(tensors)}")
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.ndim != 2 or weight.shape[0] < 2 or weight.shape[1] < 1 or bias.shape != weight.shape[:1]:
        raise ValueError(
            "'weight' must have shape (C, d) and 'bias' (C,), with C of 2 or more; they have "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != weight.dtype:
            raise ValueError(f"both tensors must be float32 or float64, alike; {name!r} is {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} has entries that are not finite")
    return weight, bias


def _is_label(value: object) -> bool:
    """Whether it is text, or an integer that an array can hold."""
    return isinstance(value, str) or (isinstance(value, int) and -(2**63) <= value < 2**64)


def _checked_classes(text: str, count: int) -> tuple[Label, ...]:
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(_is_label(label) for label in classes):
        raise ValueError(f"its metadata 'classes' must be a JSON list of labels, and is {text[:60]!r}")
    if len(classes) != count or len(set(classes)) != count:
        raise ValueError(f"its metadata 'classes' must name {count} classes, and names {len(set(classes))}")
    return tuple(classes)


def _checked_strength(text: str) -> float:
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not strength > 0:  # inf is no penalty
        raise ValueError(f"its metadata 'C' must be a positive number, and is {text!r}")
    return strength
