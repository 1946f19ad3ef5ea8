"""Errors of evaluations that a user can cause: their messages say what, where, and what to do."""

from __future__ import annotations


class EvaluationError(ValueError):
    """An evaluation, a study or a report cannot be made as it is configured, or of this input."""
