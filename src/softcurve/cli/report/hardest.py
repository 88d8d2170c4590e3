"""The rows that the head finds hardest."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imsave
from torch import Tensor

from softcurve.array_types import Float64
from softcurve.cli.page.picture import DARK, LIGHT, Picture, Theme
from softcurve.cli.report.record import FitReport
from softcurve.cli.report.section import Section, class_name
from softcurve.fit.diagnostics import Diagnostics

SMALLEST_SIDE = 4


def show_hardest(report: FitReport) -> Section:
    """Tables by EL2N, with the rows as small images where they can be some."""
    tables = []
    for name, judged in report.sets.items():
        pictures = thumbnails(judged)
        rows = [
            (
                hard,
                class_name(report.classes[hard.label]),
                class_name(report.classes[hard.predicted]),
                pictures[place] if pictures else None,
            )
            for place, hard in enumerate(judged.hardest)
        ]
        tables.append((name, rows, bool(pictures)))
    return Section("hardest", "The hardest rows", {"tables": tables})


def thumbnails(judged: Diagnostics) -> list[Picture]:
    """The hardest rows as squares of shades, where their width is a square and no feature is negative; else none."""
    features = judged.hardest_features
    if features is None or not len(features):
        return []
    side = math.isqrt(features.shape[1])
    if side**2 != features.shape[1] or side < SMALLEST_SIDE or bool((features < 0).any()):
        return []
    largest = float(features.max()) or 1.0
    return [
        _thumbnail((row / largest).reshape(side, side), f"Row {hard.row} as {side} by {side} shades")
        for row, hard in zip(features, judged.hardest, strict=True)
    ]


def _thumbnail(shades: Float64[Tensor, "side side"], alt: str) -> Picture:
    return Picture(_uri(shades, LIGHT), _uri(shades, DARK), alt)


def _uri(shades: Float64[Tensor, "side side"], theme: Theme) -> str:
    """From nothing to ink, a pixel a feature."""
    pixels = np.empty((*shades.shape, 4))
    pixels[..., :3] = to_rgb(theme.ink)
    pixels[..., 3] = shades.numpy()
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png", metadata={"Software": "softcurve"})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
