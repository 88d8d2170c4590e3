"""A section of the report, and how a class is called in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from softcurve.cli.encoding import encodable
from softcurve.fit.data.source import Label

LONGEST_NAME = 48


@dataclass(frozen=True)
class Section:
    """``key`` names the anchor and the template, which sees ``values`` and the report."""

    key: str
    title: str
    values: Mapping[str, object]


def class_name(label: Label) -> str:
    """A class on one line, short enough for a table."""
    name = encodable(" ".join(str(label).split())) or "(no name)"
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
