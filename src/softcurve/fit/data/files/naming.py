"""The names by which the arrays of a file are features and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from softcurve.fit import DataError
from softcurve.fit.data.dataset import Dataset
from softcurve.fit.data.rows import Rows

__all__ = ["FEATURES", "LISTS", "describe_names", "named_dataset", "target_names"]

FEATURES = ("features", "X")
TARGET = ("target", "y")
OTHER_TARGET = ("labels",)  # where neither of those is there
LISTS = ("indices", "log_probs")


def named_dataset(
    path: Path,
    what: str,
    names: Sequence[str],
    rows: Callable[[str], Rows],
    with_target: bool,
    features: Rows | None = None,
) -> Dataset:
    """Choose among arrays, tensors or columns (``what``) of these names; ``rows`` opens one by its name.

    Raises DataError where there are no features, or where more than one name is the same thing's.
    """
    if features is None:
        if (name := _only(path, what, names, FEATURES)) is None:
            wanted = " or ".join(FEATURES)
            raise DataError(f"data: {path} has no {what} named {wanted}; it has {describe_names(names)}: rename one")
        features = rows(name)
    target = _only(path, what, names, target_names(names))
    lists = [name for name in LISTS if name in names]
    if not with_target:
        return Dataset(features, absent="another is given")
    if len(lists) == len(LISTS):
        if target is not None:
            raise DataError(f"data: {path} has both {target!r} and {' and '.join(LISTS)}; keep one kind of target")
        return Dataset(features, tuple(map(rows, LISTS)))
    if target is not None:
        return Dataset(features, (rows(target),))
    absent = f"no {what} named {', '.join(TARGET)} or {', '.join(OTHER_TARGET)}"
    if lists:
        absent += f", and {lists[0]} without {LISTS[1 - LISTS.index(lists[0])]}"
    return Dataset(features, absent=absent)


def target_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return what the target may be called in a file that holds these names."""
    return TARGET if any(name in names for name in TARGET) else OTHER_TARGET


def describe_names(names: Sequence[str]) -> str:
    """List some names in words."""
    shown = ", ".join(repr(name) for name in names[:10])
    return (shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "none at all"


def _only(path: Path, what: str, names: Sequence[str], wanted: tuple[str, ...]) -> str | None:
    present = [name for name in wanted if name in names]
    if len(present) > 1:
        raise DataError(f"data: {path} has both {present[0]!r} and {present[1]!r}; keep one {what} of them")
    return present[0] if present else None
