"""Scoring: a corpus and a model in, a score set out.

packing.py places windows of documents into rows, engine.py drives the device and writes the score
set, estimate.py says what that will cost. What is scored, and how, stands in pruning/scorers. This
file imports nothing.
"""
