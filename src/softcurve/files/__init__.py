"""Files that are written whole or not at all, and tensors in them; errors that name the file and a remedy."""

__all__ = ["DataError"]


class DataError(ValueError):
    """The data, a file or an option cannot be used; the message names it and says what would help."""
