"""What tells the rows of one source from those of another: digests of what is stored, at a bounded cost."""

from __future__ import annotations

import hashlib
import json

from softcurve.fit import DataError
from softcurve.fit.data.dataset import Dataset
from softcurve.fit.data.rows import digests
from softcurve.fit.together import Together

__all__ = ["MOST", "require_same_rows"]

MOST = 2**28  # bytes that are hashed of the features, and of each other array. At 500 MB/s they take half a second.


def require_same_rows(data: Dataset, together: Together) -> None:
    """Raise DataError, in all processes, where one of them sees other rows than the first, as in other files."""
    if together.size == 1:
        return
    count, width = data.features.shape
    shapes = together.texts(f"{count} rows of {width} features with {data.kind or 'no targets'}")
    for other, shape in enumerate(shapes):
        if shape != shapes[0]:
            _refuse(f"process 0 has {shapes[0]}, and process {other} has {shape}", together)
    with together.agreed():
        stored = (data.features, *data.targets)
        named = [(name, digest.hex()) for rows in stored for name, digest in digests(rows, MOST)]
    of_all = hashlib.sha256("".join(digest for _, digest in named).encode()).hexdigest()
    if len(set(together.texts(of_all))) == 1:
        return
    by_process = [json.loads(text) for text in together.texts(json.dumps(named))]
    for other, of_other in enumerate(by_process):
        for (name, digest), (other_name, other_digest) in zip(by_process[0], of_other, strict=False):
            if digest != other_digest:
                _refuse(f"{name} in process 0 and {other_name} in process {other} have other entries", together)
    _refuse("the processes have other numbers of files", together)


def _refuse(what: str, together: Together) -> None:
    with together.agreed():
        raise DataError(f"data: {what}; give all of them the same files")
