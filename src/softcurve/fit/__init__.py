"""Fitting a linear softmax head to features: rows, the solver, the saved head."""

from softcurve.files import DataError

__all__ = ["DataError"]
