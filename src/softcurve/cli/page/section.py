"""A section of a page, and the checks that it reports."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Check:
    """A measured number and the bound that it must keep."""

    name: str
    measured: float
    relation: Literal["≤", "≥", "="]
    bound: float

    @property
    def held(self) -> bool:
        """Whether the bound is kept; NaN keeps none."""
        compare = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}[self.relation]
        return bool(compare(self.measured, self.bound))


@dataclass(frozen=True)
class Section:
    """A section of a page, filled into the template ``<key>.html.j2``.

    The template sees the entries of ``values`` and of ``figures`` by their names. ``figures`` and ``checks`` are also
    part of the JSON record.
    """

    key: str
    title: str
    values: Mapping[str, object] = field(default_factory=dict)
    figures: Mapping[str, object] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
