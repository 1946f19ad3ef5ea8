"""Scoring with a model: a corpus and a model in, a score set out.

scorer.py      the protocol that a scorer implements
engine.py      the loop: reads, packs, runs the model, writes the score set
batches.py     corpus shards to packed batches, answers to rows
device.py      the compiled program on the mesh
estimate.py    the cost, before the run
"""
