"""Whether what a fit holds at least can fit into the memory of this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from softcurve.fit import DataError

__all__ = ["available_memory", "require_head", "require_rows"]

# The parameters, their gradient, and the vectors of conjugate gradients (iterate, residual, direction, product).
ARRAYS_OF_A_HEAD = 6
NAME = 44  # bytes of an integer in a tuple: what a class without a name is called
ROW = 8  # bytes: the index of a label, or of a row in the draw of the hold-out
CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int | None:
    """The bytes that this process may use at most, where the system says so."""
    limits = []
    with suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ImportError, OSError):
        import resource

        limits += [
            limit for limit in resource.getrlimit(resource.RLIMIT_AS)[:1] if limit >= 0
        ]  # -1 where there is none
    with suppress(ValueError, OSError):
        limits.append(int(CONTROL_GROUP.read_text()))  # "max" where there is none
    return min(limits, default=None)


def require_rows(rows: int, name: str) -> None:
    """Raise DataError where an integer for each row is more than the memory: the header of a sparse file may say so."""
    memory = available_memory()
    if memory is not None and rows * ROW > memory:
        raise DataError(
            f"{name} has {rows} rows; an integer for each takes {_size(rows * ROW)}, and there are {_size(memory)} of "
            "memory: correct its shape, or give fewer rows"
        )


def require_head(classes: int, width: int, origin: str) -> None:
    """Raise DataError where a fit to so many classes, which a single index may name, cannot fit into the memory.

    ``origin`` says where the number comes from.
    """
    memory, needed = available_memory(), classes * (ARRAYS_OF_A_HEAD * 8 * (width + 1) + NAME)
    if memory is not None and needed > memory:
        raise DataError(
            f"{origin} makes {classes} classes; with {width} features a fit to them takes {_size(needed)} or more, and "
            f"there are {_size(memory)} of memory: correct the largest class or the shape, or give fewer classes"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
