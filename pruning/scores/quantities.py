"""Quantities as text."""

from __future__ import annotations


def bytes_in_words(count: float) -> str:
    """Return a number of bytes as text: 512 B, 1.5 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
