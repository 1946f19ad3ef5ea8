"""Imported by the server of processes: what stages import late, and tables that they compute once.

A process of a trial is forked from the server, and starts with all of it.
"""

import pyarrow as pa
import pyarrow.dataset

import models.weights.hub  # noqa: F401
from pruning.scores.text.hashing import ngram_hashes

ngram_hashes(pa.array(["a text"]), 1)
