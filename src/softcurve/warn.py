"""Warnings that point to the line of user code that called the package."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

# torch calls the forward methods of modules, and jaxtyping wraps functions to check the shapes of arguments.
PASSED_OVER = ("softcurve", "torch", "jaxtyping")


def warn_caller(message: str) -> None:
    """Issue a ``UserWarning`` that points to the first frame outside the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_globals.get("__name__", "").partition(".")[0] in PASSED_OVER and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
