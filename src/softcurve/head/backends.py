"""Which kernels serve which device, dtype and loss."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from softcurve.head import products
from softcurve.losses.divergences import ForwardKL, JensenShannon, ReverseKL
from softcurve.losses.spec import LossSpec


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


MEMBERS = {ForwardKL: "FORWARD", ReverseKL: "REVERSE", JensenShannon: "JENSEN_SHANNON"}


def serves(loss: LossSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tiles of this loss have Triton kernels on this device; on the CPU only in Triton's interpreter.

    float64 stays with ATen: who asks for it wants its digits, not the hardware's single-precision exponentials. So
    does a divergence whose terms are not written in Triton, unless the target is sparse: then the divergence is
    evaluated on the few listed classes alone, which the Triton kernels leave to :mod:`softcurve.losses.rows`.
    """
    if dtype != torch.float32 or not _has_triton():
        return False
    if not (loss.is_cross_entropy or loss.target == "sparse" or type(loss.divergence) in MEMBERS):
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def residual_dtype(
    loss: LossSpec, input: Tensor | None, weight: Tensor | None, dtype: torch.dtype
) -> torch.dtype | None:
    """The half precision that residuals are left in for the products with these; ``None``: in the logits' place."""
    if input is None or weight is None or not serves(loss, weight.device, dtype):
        return None
    return products.narrow_residuals(products.shared_half(input, weight))


def kernels(name: str) -> Any:
    """``softcurve.head.triton.…``, imported when first wanted: it takes Triton with it."""
    return importlib.import_module(f"softcurve.head.triton.{name}")


def tile_functions(spec: LossSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the module of functions that work on the tiles of this loss: in Triton where it serves, else in ATen."""
    kind = "sparse" if spec.target == "sparse" else "dense"
    backend = "triton" if serves(spec, device, dtype) else "aten"
    return importlib.import_module(f"softcurve.head.{backend}.{kind}")
