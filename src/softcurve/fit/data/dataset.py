"""Stored features with the targets of the same rows, found by their names, and checks of their shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from softcurve.fit import DataError
from softcurve.fit.data.rows import ArrayRows, Rows, Shards, SparseRows
from softcurve.fit.data.source import TargetKind

FEATURES, TARGET, LISTS = ("features", "X"), ("target", "y"), ("indices", "log_probs")
OTHER_TARGET = ("labels",)  # where no array is named target or y
# The kinds of dtypes that a target's arrays may have, and what they are.
DTYPES = {
    "distributions": [("iufb", "probabilities")],
    "top_k": [("iu", "numbers of classes"), ("f", "log-probabilities")],
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows with a target of one array, of two (a teacher's indices and log-probabilities), or without a target."""

    features: Rows
    targets: tuple[Rows, ...] = ()
    absent: str = "none is given"  # why there is no target

    @property
    def kind(self) -> TargetKind | None:
        """The kind of the target, by its number of arrays and dimensions."""
        if len(self.targets) != 1:
            return "top_k" if self.targets else None
        return "labels" if len(self.targets[0].shape) == 1 else "distributions"

    @property
    def described(self) -> str:
        """The features and the target in words, without the number of rows."""
        sizes = [size for rows in self.targets for size in rows.shape[1:]]
        described = {
            None: f"no targets ({self.absent})",
            "labels": "labels",
            "distributions": "distributions over {} classes",
            "top_k": "a teacher's lists of {}",
        }
        return f"{self.features.shape[1]} features with {described[self.kind].format(*sizes)}"

    @property
    def in_memory(self) -> bool:
        """Whether nothing is read from files."""
        return all(isinstance(rows, ArrayRows | SparseRows) for rows in (self.features, *self.targets))

    def check(self) -> None:
        """Raise DataError for arrays whose shapes or dtypes cannot be those of features and targets."""
        name, shape = self.features.name, self.features.shape
        dtypes = [("iufb", "real numbers"), *DTYPES.get(self.kind or "", ())]
        for rows, (kinds, what) in zip((self.features, *self.targets), dtypes, strict=False):
            if rows.dtype.kind not in kinds:
                raise DataError(f"{rows.name} must be {what}; got dtype {rows.dtype}: convert them")
        if len(shape) != 2:
            remedy = "reshape to (n, 1)" if len(shape) == 1 else "flatten every row"
            raise DataError(f"{name} must have shape (n, d); got {shape}: {remedy}")
        if 0 in shape:
            raise DataError(f"{name} is empty, of shape {shape}; give at least one row and one column")
        for target in self.targets:
            if target.shape[:1] != shape[:1]:
                has = f"{target.shape[0]} rows" if target.shape else "a single value"
                raise DataError(f"{name} has {shape[0]} rows but {target.name} has {has}; give one target a row")
        names, shapes = [target.name for target in self.targets], [target.shape for target in self.targets]
        if self.kind == "top_k" and (shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]):
            raise DataError(
                f"{names[0]} and {names[1]} must have one shape (n, k); got {shapes[0]} and {shapes[1]}: give each "
                "listed class its log-probability"
            )
        if self.kind == "distributions" and (len(shapes[0]) != 2 or shapes[0][1] < 2):
            raise DataError(
                f"{names[0]} must be labels of shape (n,) or distributions of shape (n, C) with C of 2 or more; got "
                f"{shapes[0]}: reshape it"
            )


def join(datasets: Sequence[Dataset], name: str) -> Dataset:
    """Concatenate datasets. Raises DataError for one with other features, or another target, than the first."""
    for dataset in datasets:
        dataset.check()
        if dataset.described != datasets[0].described:
            raise DataError(
                f"{dataset.features.name} has {dataset.described}, and {datasets[0].features.name} has "
                f"{datasets[0].described}; all shards need the same features and the same kind of target"
            )
    targets = zip(*(dataset.targets for dataset in datasets), strict=True)
    features = Shards([dataset.features for dataset in datasets], name)
    return Dataset(features, tuple(Shards(shards, shards[0].name) for shards in targets), datasets[0].absent)


def named_dataset(
    path: Path, what: str, names: Sequence[str], rows: Callable[[str], Rows], with_target: bool,
    features: Rows | None = None,
) -> Dataset:  # fmt: skip
    """Choose among arrays, tensors or columns (``what``) of these names; ``rows`` opens one by its name.

    Raises DataError where there are no features, or where several names are of the features or of the target.
    """

    def only(wanted: tuple[str, ...]) -> str | None:
        present = [name for name in wanted if name in names]
        if len(present) > 1:
            raise DataError(f"data: {path} has both {present[0]!r} and {present[1]!r}; keep one {what} of them")
        return present[0] if present else None

    if features is None:
        if (name := only(FEATURES)) is None:
            wanted = " or ".join(FEATURES)
            raise DataError(f"data: {path} has no {what} named {wanted}; it has {describe_names(names)}: rename one")
        features = rows(name)
    target = only(target_names(names))
    if not with_target:
        return Dataset(features, absent="another is given")
    lists = [name for name in LISTS if name in names]
    if len(lists) == len(LISTS):
        if target is not None:
            raise DataError(f"data: {path} has both {target!r} and {' and '.join(LISTS)}; keep one kind of target")
        return Dataset(features, tuple(map(rows, LISTS)))
    if target is not None:
        return Dataset(features, (rows(target),))
    missing = "".join(f", and {name} without {LISTS[1 - LISTS.index(name)]}" for name in lists)
    return Dataset(features, absent=f"no {what} named {', '.join(TARGET)} or {OTHER_TARGET[0]}{missing}")


def target_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return what the target may be called in a file that holds these names."""
    return OTHER_TARGET if set(TARGET).isdisjoint(names) else TARGET


def describe_names(names: Sequence[str]) -> str:
    """List some names in words."""
    shown = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown or "none at all"
