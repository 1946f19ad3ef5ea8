"""Duplicates and near-duplicates of text: MinHash, buckets on disk, clusters.

`stage.py` is the command; `minhash.py` and `components.py` hold the mathematics, `shuffle.py` the
file format, `pairs.py` the comparison of candidate pairs.
"""
