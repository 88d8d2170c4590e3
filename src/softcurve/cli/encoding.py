"""Text that may hold lone surrogates, as Python has them for the bytes of file names that are not UTF-8."""

from __future__ import annotations

__all__ = ["encodable", "encoded"]


def encoded(text: str) -> bytes:
    r"""The text in UTF-8; a lone surrogate, which UTF-8 does not have, becomes its escape ``\udcff``."""
    return text.encode("utf-8", "backslashreplace")


def encodable(text: str) -> str:
    """The same text with escapes in the place of lone surrogates."""
    return encoded(text).decode()
