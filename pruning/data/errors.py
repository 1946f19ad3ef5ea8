"""Errors of training data that a user can cause."""

from __future__ import annotations


class DataError(ValueError):
    """Training data cannot be opened as it is configured."""
