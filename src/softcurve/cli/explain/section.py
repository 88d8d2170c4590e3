"""A section of the page: what was measured, drawn and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from softcurve.cli.page.picture import Picture


@dataclass(frozen=True)
class Check:
    """A measured figure and the bound that it must keep."""

    name: str
    measured: float
    relation: Literal["≤", "≥", "="]
    bound: float

    @property
    def held(self) -> bool:
        """Whether the bound is kept; a NaN keeps none."""
        match self.relation:
            case "≤":
                return self.measured <= self.bound
            case "≥":
                return self.measured >= self.bound
            case "=":
                return self.measured == self.bound


@dataclass(frozen=True)
class Section:
    """One step of the walk.

    `key` names the anchor, the template and the entry of the record; `figures` go into the record as well
    as onto the page, `pictures` and `tables` onto the page alone.
    """

    key: str
    title: str
    figures: Mapping[str, object]
    checks: tuple[Check, ...]
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    tables: Mapping[str, object] = field(default_factory=dict)


def plain(figures: object) -> object:
    """The same figures as valid JSON: infinities and NaN, which JSON lacks, become strings."""
    if isinstance(figures, Mapping):
        return {str(key): plain(value) for key, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [plain(value) for value in figures]
    if isinstance(figures, float) and not math.isfinite(figures):
        return str(figures)
    return figures
