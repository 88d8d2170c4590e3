"""The choice of the kernels that serve a device, dtype and loss."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from softcurve.head.half import shared_half
from softcurve.losses.divergences import ForwardKL, JensenShannon, ReverseKL
from softcurve.losses.spec import LossSpec

MEMBERS = {ForwardKL: "FORWARD", ReverseKL: "REVERSE", JensenShannon: "JENSEN_SHANNON"}


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def serves(loss: LossSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether tiles of this loss have Triton kernels here; on the CPU only in Triton's interpreter.

    float64 stays with ATen, because the hardware's exponentials are of single precision. So do losses of pairs,
    statistics, classes merged into groups, and a divergence whose terms are not written in Triton, unless the target is
    sparse: then the divergence is evaluated on the few listed classes alone, which the Triton kernels leave to
    :mod:`softcurve.losses.rows`. The soft cap of a teacher is applied in ATen too, whose temporaries the plan of a
    Triton pass leaves out.
    """
    in_aten = loss.pairs or loss.groups > 0 or loss.target == "statistics" or loss.teacher_softcap is not None
    if dtype != torch.float32 or in_aten or not _has_triton():
        return False
    if device.type != "cuda" and (device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
        return False
    return loss.is_cross_entropy or loss.target == "sparse" or type(loss.divergence) in MEMBERS


def residual_dtype(
    loss: LossSpec, input: Tensor | None, weight: Tensor | None, dtype: torch.dtype
) -> torch.dtype | None:
    """Return the half precision of the residuals for products with these; ``None`` if they replace the logits.

    float16 lacks float32's range: a class's probability over the number of rows is below it. Those products widen.
    """
    if weight is None or shared_half(input, weight) != torch.bfloat16 or loss.beside is not None:
        return None  # to the residuals beside a divergence others are added
    return torch.bfloat16 if serves(loss, weight.device, dtype) else None


def kernels(name: str, backend: str = "triton") -> Any:
    """Import a module of kernels when it is first wanted, because those of Triton take Triton with them."""
    return importlib.import_module(f"softcurve.head.{backend}.{name}")


def tile_functions(spec: LossSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the module of functions that work on the tiles of this loss: in Triton where it serves, else in ATen."""
    kind = spec.target if spec.lists_classes else "dense"
    return kernels(kind, "triton" if serves(spec, device, dtype) else "aten")
