"""Parts of the rows of a source: the two sides of a hold-out, or the share of a process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from softcurve.array_types import Bool, Int64
from softcurve.fit import DataError
from softcurve.fit.data.row_source import RowSource, own_share, require_same_rows
from softcurve.fit.data.source import RowBlock, Share, Source, is_sparse, row_entries, share_of
from softcurve.fit.data.sparse_features import SparseFeatures
from softcurve.fit.group import Group
from softcurve.losses.topk import TopK


class Subset:
    """The rows of ``source`` at which ``mask`` is true, in their order; all the classes.

    Where the source is a share, ``mask`` is of the rows of all processes, and the subset has those that are in both.
    """

    def __init__(self, source: Source, mask: Bool[np.ndarray, " rows"]) -> None:
        whole = share_of(source)
        if len(mask) != whole.total:
            raise DataError(f"mask must have an entry for each of the {whole.total} rows; got {len(mask)}")
        self.source, self.mask = source, mask
        self.width, self.classes, self.kind = source.width, source.classes, source.kind
        self.double, self.in_memory = source.double, source.in_memory
        self.row_entries = row_entries(source) if is_sparse(source) else None
        self._chosen = mask[whole.first : whole.first + source.rows]
        self.rows = int(np.count_nonzero(self._chosen))
        before, total = (int(np.count_nonzero(mask[:end])) for end in (whole.first, None))
        self.share = Share(before, self.rows, total, whole.group)

    @property
    def fingerprint(self) -> str:
        """The digest of the source's fingerprint and of the mask."""
        return hashlib.sha256(self.source.fingerprint.encode() + np.packbits(self.mask).tobytes()).hexdigest()

    def blocks(self, at_most: int) -> Iterator[RowBlock]:
        """Yield the rows in order; a block is what is left of one of the source's.

        The rows of files are copied to one buffer, because freed blocks would stay resident in the heap.
        """
        blocks = self.source.blocks(at_most)
        dtype = torch.float64 if self.double else torch.float32
        held = self.in_memory or is_sparse(self)
        buffer = None if held else torch.empty(min(at_most, self.rows), self.width, dtype=dtype)
        start = 0
        for block in blocks:
            index = torch.from_numpy(np.flatnonzero(self._chosen[block.start : block.start + len(block)]))
            if len(index):
                features = block.features
                if isinstance(features, SparseFeatures):
                    features = features[index]
                elif len(index) < len(block):
                    out = None if buffer is None else buffer[: len(index)]
                    features = torch.index_select(features, 0, index, out=out)
                numbers = index + block.start if block.numbers is None else block.numbers[index]
                yield RowBlock(start, features, rows_of(block.target, index), numbers)
                start += len(index)


def split_source(source: Source, holdout: float, seed: int) -> tuple[Subset, Subset]:
    """Divide rows at random into those to fit and those held out, in order. Raises DataError for an empty side."""
    held = holdout_mask(share_of(source).total, holdout, seed)
    return Subset(source, ~held), Subset(source, held)


def holdout_mask(rows: int, holdout: float, seed: int) -> Bool[np.ndarray, " rows"]:
    """Draw the rows that are held out. Raises DataError where either side would be empty."""
    held = round(holdout * rows) if 0.0 < holdout < 1.0 else 0
    if not 0 < held < rows:
        raise DataError(
            f"holdout {holdout:g} of {rows} rows must leave rows on both sides; "
            "give a share between 0 and 1, such as 0.2, or more rows"
        )
    mask = np.zeros(rows, dtype=np.bool_)
    mask[np.random.default_rng(seed).permutation(rows)[:held]] = True
    return mask


def shared(source: Source, group: Group) -> Source:
    """Return the part of a source's rows that this process has; it reads no others. All give the same source.

    Raises DataError for a source of another kind than those of this library, one that is a part already, or one that
    has other entries in another process.
    """
    if isinstance(source, Subset):
        return Subset(shared(source.source, group), source.mask)
    if not isinstance(source, RowSource) or source.share.group.size > 1:
        raise DataError(
            "source must be made by to_source or open_source, and be no part of one, to be shared among processes; "
            "leave the group out where it is a part already"
        )
    require_same_rows(source.data, group)
    share = own_share(source.rows, group)
    index = None if source.index is None else source.index[share.first : share.first + share.rows]
    return RowSource(source.data, source.classes, index, share)


def rows_of(target: Tensor | TopK | None, index: Int64[Tensor, " chosen"]) -> Tensor | TopK | None:
    """Return the target of some of the rows."""
    return None if target is None else target[index]
