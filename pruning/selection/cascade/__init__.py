"""Cascades: a cheap score of everything, a costly judge where it matters, and a promise."""
