"""Which of the named arrays of a file are features, and which the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from softcurve.fit import DataError
from softcurve.fit.data.columns import Column, Part

__all__ = ["FEATURES", "LISTS", "listed", "named_part", "pick", "target_names", "target_of"]

FEATURES = ("features", "X")
TARGET = ("target", "y")
OTHER_TARGET = ("labels",)  # where neither of those is there
LISTS = ("indices", "log_probs")


def named_part(path: Path, what: str, names: Sequence[str], column: Callable[[str], Column], with_target: bool) -> Part:
    """The part that arrays, tensors or columns (``what``) of these names are; ``column`` gives one by its name."""
    features = pick(path, what, names, FEATURES)
    if features is None:
        raise DataError(f"data: {path} has no {what} named {' or '.join(FEATURES)}; it has {listed(names)}: rename one")
    target, lists, absent = target_of(path, what, names, column, with_target)
    return Part(column(features), target, lists, absent)


def target_of(
    path: Path, what: str, names: Sequence[str], column: Callable[[str], Column], with_target: bool
) -> tuple[Column | None, tuple[Column, Column] | None, str]:
    """The target or the two of a teacher's lists, or why there is neither."""
    target = pick(path, what, names, target_names(names))
    found = [name for name in LISTS if name in names]
    if not with_target:
        return None, None, "another is given"
    if target is not None and len(found) == len(LISTS):
        raise DataError(f"data: {path} has both {target!r} and {' and '.join(LISTS)}; keep one kind of target")
    if target is not None:
        return column(target), None, ""
    if len(found) == len(LISTS):
        return None, (column(LISTS[0]), column(LISTS[1])), ""
    absent = f"no {what} named {', '.join(TARGET)} or {', '.join(OTHER_TARGET)}"
    if found:
        other = LISTS[1 - LISTS.index(found[0])]
        absent += f", and {found[0]} without {other}"
    return None, None, absent


def target_names(names: Sequence[str]) -> tuple[str, ...]:
    """What the target may be called in a file that holds these names."""
    return TARGET if any(name in names for name in TARGET) else OTHER_TARGET


def pick(path: Path, what: str, names: Sequence[str], wanted: tuple[str, ...]) -> str | None:
    """The one of the wanted names that is there. Raises DataError where several are."""
    found = [name for name in wanted if name in names]
    if len(found) > 1:
        raise DataError(f"data: {path} has both {found[0]!r} and {found[1]!r}; keep one {what} of them")
    return found[0] if found else None


def listed(names: Sequence[str]) -> str:
    """Some names, for people."""
    shown = ", ".join(repr(name) for name in names[:10])
    return (shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "none at all"
