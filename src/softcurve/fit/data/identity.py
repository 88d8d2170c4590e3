"""What tells the rows of one source from those of another: digests of what is stored, at a bounded cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from softcurve.fit import DataError
from softcurve.fit.data.columns import Column, Part
from softcurve.fit.data.source import TargetKind
from softcurve.fit.group import Group as Together

__all__ = ["column_digests", "require_same_rows"]

# Bytes that are hashed of the features, and of each other column of all rows. At 500 MB/s they take half a second.
MOST, LEAST = 2**28, 4096


def column_digests(parts: Sequence[Part], *, labels: bool) -> list[tuple[str, bytes]]:
    """The name and the digest of every column, with or without those of labels.

    The digest is of all that is stored of features where that is 256 MiB or less, and otherwise of so much, in pieces
    that are spread over all parts; and so it is of targets.
    """
    rows = max(sum(part.rows for part in parts), 1)
    columns: dict[int, Column] = {}  # one column of targets may be for many parts
    for part in parts:
        targets = (part.target,) if labels or part.target is None or len(part.target.shape) > 1 else ()
        of_part = (part.features, *targets, *(part.lists or ()))
        columns |= {id(column): column for column in of_part if column is not None}
    of_row = MOST / rows
    return [(column.name, column.digest(max(int(column.shape[0] * of_row), LEAST))) for column in columns.values()]


def require_same_rows(parts: Sequence[Part], kind: TargetKind | None, together: Together) -> None:
    """Raise DataError, in all processes, where one of them sees other rows than the first, as in other files."""
    if together.size == 1:
        return
    rows, width = sum(part.rows for part in parts), parts[0].features.shape[1]
    shapes = together.texts(f"{rows} rows of {width} features with {kind or 'no targets'}")
    for other, shape in enumerate(shapes):
        if shape != shapes[0]:
            _refuse(f"process 0 has {shapes[0]}, and process {other} has {shape}", together)
    with together.agreed():
        digests = [(name, digest.hex()) for name, digest in column_digests(parts, labels=True)]
    of_all = hashlib.sha256("".join(digest for _, digest in digests).encode()).hexdigest()
    if len(set(together.texts(of_all))) == 1:
        return
    said = [json.loads(text) for text in together.texts(json.dumps(digests))]
    for other, of_other in enumerate(said):
        for (name, digest), (other_name, other_digest) in zip(said[0], of_other, strict=False):
            if digest != other_digest:
                _refuse(f"{name} in process 0 and {other_name} in process {other} have other entries", together)
    _refuse("the processes have other numbers of files", together)


def _refuse(what: str, together: Together) -> None:
    with together.agreed():
        raise DataError(f"data: {what}; give all of them the same files")
