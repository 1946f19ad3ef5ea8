"""What judges: perplexity, agreement between scorers, studies over many selections, the report.

This file imports nothing, so that `python -m evaluation --help` answers at once.
"""
