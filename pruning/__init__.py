"""What decides: from sources to a corpus, to scores, to a selection, to a stream of examples.

This file imports nothing, so that `python -m pruning --help` answers at once.
"""
