"""Scores from words alone: hashed n-grams and the samplers that need nothing else.

hashing.py     text to hashed n-grams, a batch of documents at a time
linear.py      a linear model over them: fitted once, then one table look-up per n-gram
dsir.py        importance weights towards a target (Xie et al. 2023)
classifier.py  good against random documents: the cheap baseline to beat
entropy.py     surprisal of the tokens
"""
