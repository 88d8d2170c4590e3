"""Fitting a linear softmax head to features: rows, the solver, the saved head."""

__all__ = ["DataError"]


class DataError(ValueError):
    """The data, a file or an option cannot be used; the message names it and says what would help."""
