"""Warnings that point at the line of the user's code which called the package."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

# Modules are called by way of torch; the other one is where the shapes of arguments are checked.
PASSED_OVER = ("softcurve", "torch", "jaxtyping")


def warn_caller(message: str) -> None:
    """Warn (``UserWarning``) at the first frame outside the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_globals.get("__name__", "").partition(".")[0] in PASSED_OVER and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
