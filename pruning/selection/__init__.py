"""Selections: scores, a strategy and a budget make a set of documents."""
