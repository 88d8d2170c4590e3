"""A fitted head as a safetensors file: weight, bias and, as metadata, the names of its classes."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from softcurve.array_types import Float
from softcurve.files.atomic import replacing
from softcurve.files.errors import unusable
from softcurve.files.tensors import FileState, digest_of_all, encode_tensors, read_tensors
from softcurve.fit import DataError
from softcurve.fit.data.source import Label
from softcurve.losses.divergences import LOSS_NAMES
from softcurve.records import ShortRepr

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
        return linear_of(self.weight, self.bias)

    def save(self, path: Path | str) -> None:
        """Write the head to a file, which is replaced only when all is written."""
        with replacing(Path(path)) as file:
            self.write(file)

    def write(self, file: BinaryIO) -> None:
        """Write the head to an open file."""
        metadata = {
            "format": FORMAT, "format_version": VERSION, "classes": json.dumps(self.classes), "loss": self.loss,
            "C": repr(self.C), "softcurve_version": version("softcurve"),
        }  # fmt: skip
        tensors = {"weight": self.weight, "bias": self.bias}
        file.writelines(encode_tensors(tensors, metadata | {"digest": digest_of_all(tensors, metadata)}))

    @staticmethod
    def load(path: Path | str) -> SavedHead:
        """Read a head and check all of it. Raises DataError that names the damage."""
        path = Path(path)
        FileState.of(path, "a head", "head")
        try:
            return _checked(*read_tensors(path))
        except OSError as error:
            raise unusable("head", path, "read", error) from error
        except ValueError as error:
            raise DataError(
                f"head: {path} is not a head that can be used: {error}; fit it again with softcurve fit"
            ) from error


def linear_of(weight: Float[Tensor, "classes d"], bias: Float[Tensor, " classes"] | None) -> nn.Linear:
    """Return a trainable layer with copies of a weight and a bias."""
    classes, width = weight.shape
    # Initialising on "meta" draws no numbers, so the global random generator stays as it is.
    linear = nn.Linear(width, classes, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear


def _checked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> SavedHead:
    """Return a head from the content of its file. Raises ValueError that says what is wrong with it.

    The first version of softcurve wrote no digest.
    """
    digest = metadata.pop("digest", None)
    format_ = metadata.get("format"), metadata.get("format_version")
    _require(
        format_ == (FORMAT, VERSION),
        f"its metadata must say format {FORMAT!r}, format_version {VERSION!r}, and says {format_[0]!r}, {format_[1]!r}",
    )
    names = sorted(tensors)
    _require(names == ["bias", "weight"], f"it must hold the tensors 'bias' and 'weight', and holds {names}")
    _require(
        digest in (None, digest_of_all(tensors, metadata)),
        "its content does not agree with the digest that was written with it",
    )
    weight, bias = tensors["weight"], tensors["bias"]
    _require(
        weight.ndim == 2 and weight.shape[0] >= 2 and weight.shape[1] >= 1 and bias.shape == weight.shape[:1],
        "'weight' must have shape (C, d) and 'bias' (C,), with C of 2 or more; they have "
        f"{tuple(weight.shape)} and {tuple(bias.shape)}",
    )
    for name, tensor in tensors.items():
        alike = tensor.dtype in (torch.float32, torch.float64) and tensor.dtype == weight.dtype
        _require(alike, f"both tensors must be float32 or float64, alike; {name!r} is {tensor.dtype}")
        _require(bool(tensor.isfinite().all()), f"{name!r} has entries that are not finite")
    classes: Any = None
    text = metadata.get("classes", "")
    with suppress(ValueError, RecursionError):
        classes = json.loads(text)
    _require(
        isinstance(classes, list) and all(map(_is_label, classes)),
        f"its metadata 'classes' must be a JSON list of labels, and is {text[:60]!r}",
    )
    count, distinct = len(bias), len(set(classes))
    _require(
        len(classes) == distinct == count, f"its metadata 'classes' must name {count} classes, and names {distinct}"
    )
    loss = metadata.get("loss", "")
    _require(loss in LOSS_NAMES, f"its metadata 'loss' must be one of {', '.join(LOSS_NAMES)}, and is {loss!r}")
    text, strength = metadata.get("C", ""), math.nan
    with suppress(ValueError):
        strength = float(text)
    _require(strength > 0, f"its metadata 'C' must be a positive number, and is {text!r}")  # inf is no penalty
    return SavedHead(weight, bias, tuple(classes), loss, strength)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_label(value: object) -> bool:
    """Return whether a value is text, or an integer that an array can hold."""
    return isinstance(value, str) or (isinstance(value, int) and -(2**63) <= value < 2**64)
