"""Evaluation: perplexity, tasks, agreement between scorers, studies over many selections, reports.

This file imports nothing, so that `python -m evaluation --help` answers at once.
"""
