"""A source's rows, divided among processes."""

from __future__ import annotations

from dataclasses import replace

from softcurve.fit import DataError
from softcurve.fit.data.column_source import ColumnSource, own_span
from softcurve.fit.data.identity import require_same_rows
from softcurve.fit.data.source import Source
from softcurve.fit.data.subset import Subset
from softcurve.fit.group import Group as Together

__all__ = ["shared"]


def shared(source: Source, together: Together) -> Source:
    """The part of a source's rows that this process has; it reads no others. All processes give the same source.

    Raises DataError for a source of another kind than those of this library, one that is a part already, or one that
    has other entries in another process.
    """
    if isinstance(source, Subset):
        return Subset(shared(source.source, together), source.mask)
    if not isinstance(source, ColumnSource) or source.together.size > 1:
        raise DataError(
            "source must be made by to_source or open_source, and be no part of one, to be shared among processes; "
            "leave the group out where it is a part already"
        )
    require_same_rows(source.parts, source.kind, together)
    first, end = own_span(source.rows, together)
    index = None if source.index is None else source.index[first:end]
    return replace(source, index=index, span=(first, end), together=together)
