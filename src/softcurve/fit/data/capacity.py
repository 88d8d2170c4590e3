"""Checks that the arrays which a fit must hold can fit into the memory of this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from softcurve.fit import DataError

# The parameters, their gradient, and the vectors of conjugate gradients (iterate, residual, direction, product).
ARRAYS_OF_A_HEAD = 6
NAME = 44  # bytes of an integer in a tuple: the name of a class that has no other


def available_memory() -> int | None:
    """Return the bytes that this process may use at most, where the system says so."""
    limits = []
    with suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ImportError, OSError):
        import resource

        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    with suppress(ValueError, OSError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" where there is none
    return min((limit for limit in limits if limit >= 0), default=None)  # -1 where there is none


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise DataError if ``what`` needs more bytes than the memory has."""
    memory = available_memory()
    if memory is not None and needed > memory:
        needs, has = (f"{count / 2**30:.3g} GiB" for count in (needed, memory))
        raise DataError(f"{what} takes {needs} or more, and there are {has} of memory: {remedy}")


def require_head(classes: int, width: int, origin: str) -> None:
    """Raise DataError if a fit needs more than the memory; ``origin`` is where the number of classes comes from."""
    what = f"{origin} makes {classes} classes; with {width} features a fit to them"
    remedy = "correct the largest class or the shape, or give fewer classes"
    require_memory(classes * (ARRAYS_OF_A_HEAD * 8 * (width + 1) + NAME), what, remedy)
