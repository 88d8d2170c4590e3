"""Rows of any source as arrays, and their two sides of a hold-out: what tests compute expected figures from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from softcurve.fit.data.opening import open_source, open_source_for
from softcurve.fit.data.row_source import to_source
from softcurve.fit.data.source import gather
from softcurve.fit.data.subset import holdout_mask


@dataclass(frozen=True, eq=False)
class GatheredRows:
    features: np.ndarray
    target: np.ndarray
    classes: tuple[int | str, ...]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def soft(self) -> bool:
        return self.target.ndim == 2


def gathered(source, name) -> GatheredRows:
    features, target = gather(source, name, torch.float64)
    return GatheredRows(features.numpy(), target.numpy(), source.classes)


def load_rows(data, target=None) -> GatheredRows:
    return gathered(open_source(data, target), data)


def load_rows_for(data, classes, width, target=None) -> GatheredRows:
    return gathered(open_source_for(data, classes, width, target), data)


def make_rows(features, target, **names) -> GatheredRows:
    return gathered(to_source(features, target, **names), "target")


def split(rows: GatheredRows, holdout: float, seed: int) -> tuple[GatheredRows, GatheredRows]:
    held = holdout_mask(len(rows), holdout, seed)
    return take(rows, np.flatnonzero(~held)), take(rows, np.flatnonzero(held))


def take(rows: GatheredRows, index) -> GatheredRows:
    return replace(rows, features=rows.features[index], target=rows.target[index])
