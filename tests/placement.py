"""The device that the head's tests run on: the CPU, or the one that SOFTCURVE_TEST_DEVICE names.

Every tensor that a file of tests makes is made on the CPU, from the same random numbers on every device, and then moved.
Tensors that the library makes are left alone: one that it makes without saying where fails as it would for a user, which
``torch.set_default_device`` would hide.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device(os.environ.get("SOFTCURVE_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"

MAKERS = frozenset(
    getattr(torch, name)
    for name in (
        *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"),
        *("randperm", "tensor", "tril_indices", "triu_indices", "zeros"),
    )
)
# Such code makes its tensors on the device too, once it has begun with this; see the fixture run_python.
PLACED = "import sys; sys.path.insert(0, 'tests'); import placement; placement.place_tensors()\n"
# Files of tests, and the code that they run in a Python of its own.
HERE = (str(Path(__file__).resolve().parent), "<string>")


class _Moving(TorchFunctionMode):
    """What a maker returns to a file of tests is on the device, unless the call says where."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        result = function(*arguments, **named)
        if function not in MAKERS or named.get("device") is not None:
            return result
        if not sys._getframe(1).f_code.co_filename.startswith(HERE):
            return result
        return on_device(result)


def on_device(tensor: Tensor) -> Tensor:
    """As much a leaf as it was; inside a transform of functions nothing can become one, and nothing that is made is one."""
    return tensor.detach().to(DEVICE).requires_grad_() if tensor.requires_grad else tensor.to(DEVICE)


def place_tensors() -> None:
    """From here on, for good."""
    if not ON_CPU:
        _Moving().__enter__()
