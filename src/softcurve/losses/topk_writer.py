"""A directory of shards to which a teacher appends its lists while it runs."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from softcurve import checks
from softcurve.extras import needed
from softcurve.losses.topk import TopK, TopKCache, require_cached_classes


class TopKWriter:
    """A cache of a teacher's lists that grows by whole files, ``topk-000000.safetensors`` and so on, in a directory.

    Each shard is written to a temporary name and renamed, so that at any time every file is complete. A directory with
    shards is continued: ``len(writer)`` is the number of rows that it has, from which a teacher that was stopped goes
    on. Leaving the ``with`` block writes the last shard, also after an error in the block.

    Args:
        directory: Created if it does not exist.
        classes: ``C``, the number of classes that the indices are of; it decides how many bytes an index takes: 2 for
            up to 2^16, 3 for up to 2^24, otherwise 4.
        dtype: Of the log-probabilities in the files. ``torch.float16`` rounds each by up to 0.05 %, and the mass that a
            list leaves to its bucket with it.
        shard_rows: A shard is written as soon as so many rows have been appended.

    Raises:
        TypeError, ValueError: If an argument, or a list that is appended, is of a wrong kind, shape or value.
        DataError: A ``ValueError``, if a file cannot be written, or the directory holds another cache.

    Example:
        >>> weight = torch.randn(50257, 16)
        >>> with softcurve.TopKWriter("lists", classes=50257) as writer:
        ...     for features in torch.randn(3, 4, 16):  # three batches of the teacher
        ...         writer.append(softcurve.linear_topk(features, weight, 32))
        >>> cache = softcurve.TopK.load("lists")
        >>> loss = softcurve.linear_kl_divergence(torch.randn(8, 5), torch.randn(50257, 5), cache[:8])
    """

    def __init__(
        self, directory: str | Path, *, classes: int, dtype: torch.dtype = torch.float32, shard_rows: int = 65536
    ) -> None:
        require_cached_classes(classes)
        checks.require_count("shard_rows", shard_rows, 1)
        self.directory, self.classes, self.dtype, self.shard_rows = Path(directory), int(classes), dtype, shard_rows
        with needed("softcurve.TopKWriter", "fit"):
            from softcurve.files.errors import unusable
            from softcurve.losses.topk_shards import ARGUMENT, NAME, shard_name
        try:
            self.directory.mkdir(exist_ok=True)
        except OSError as error:
            raise unusable(ARGUMENT, self.directory, "written", error) from error
        self._name, self._pending = shard_name, list[TopK]()
        self._kind: tuple[str, tuple[int, ...]] | None = None  # the tail, and the shape of a row
        self._rows, self._shards = 0, 0
        if any(NAME.fullmatch(each.name) for each in self.directory.iterdir()):
            self._continue()

    def __len__(self) -> int:
        return self._rows + sum(map(len, self._pending))

    def append(self, lists: TopK) -> None:
        """Add rows of lists, ``(rows, ..., k)``, to the cache; the values are checked."""
        if not isinstance(lists, TopK):
            raise TypeError(
                f"lists must be a TopK of rows, got {checks.describe(lists)}; softcurve.linear_topk makes one of "
                "features, TopK(indices, log_probs) of tensors"
            )
        if not lists.leading:
            raise TypeError(
                f"lists must be a TopK of rows (rows, ..., k), got {lists!r}; add a dimension by topk[None]"
            )
        kind = lists.tail, tuple(lists.leading[1:])
        self._kind = self._kind or kind
        if kind != self._kind:
            raise ValueError(
                f"lists must have the tail {self._kind[0]!r} and rows of shape {self._kind[1]}, as those before them, "
                f"got {lists!r}; flatten the rows by a mask, or write another cache"
            )
        self._pending.append(lists.to_cache(self.classes, self.dtype))
        if sum(map(len, self._pending)) >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write what has been appended since the last shard as one more, if there are rows."""
        rows = TopK.cat(self._pending) if self._pending else None
        if rows is not None and len(rows):
            rows._write(self.directory / self._name(self._shards), self.classes, self._rows)
            self._rows, self._shards = self._rows + len(rows), self._shards + 1
        self._pending.clear()

    def __enter__(self) -> TopKWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()

    def _continue(self) -> None:
        cache = TopKCache.open(self.directory)
        if (cache.classes, cache.dtype) != (self.classes, self.dtype):
            raise ValueError(
                f"classes and dtype must be {cache.classes} and {cache.dtype}, as of the shards in {self.directory}, "
                f"got {self.classes} and {self.dtype}; give another directory, or remove them"
            )
        self._kind = cache.tail, cache.shards[0].shape[1:-1]
        self._rows, self._shards = len(cache), len(cache.shards)
