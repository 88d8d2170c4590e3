"""The numbers that the interactive parts of the page start from, as JSON."""

from __future__ import annotations

import json

from torch import Tensor

from softcurve.cli.explain.divergences import GRID, target_logits
from softcurve.cli.explain.network import Network

GREYS = "0123456789abcdefg"  # a pixel is a multiple of 1/16


def play_data(network: Network) -> str:
    """Return the trained network, the held-out digits, and the bins of the fit, without rounding."""
    digits, theta = network.held_out, dict(network.features.named_parameters())
    tensors: dict[str, Tensor] = {
        "V": theta["hidden.weight"], "a": theta["hidden.bias"], "W": network.head.weight, "b": network.head.bias,
        "labels": digits.labels, "soft": digits.soft, "grid": GRID, "target": target_logits(),
    }  # fmt: skip
    data: dict[str, object] = {name: tensor.detach().tolist() for name, tensor in tensors.items()}
    data["digits"] = ["".join(GREYS[round(16 * value)] for value in row) for row in digits.x.tolist()]
    data["start"] = network.ambiguous()
    return json.dumps(data, separators=(",", ":"))
