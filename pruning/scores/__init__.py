"""Scores: one value or vector for every document of a corpus.

model/      a model reads the documents (Ask-LLM, likelihood, embedding)
text/       hashed n-grams of the text (entropy, DSIR, classifier)
space/      stored embeddings (whitening, k-means, SemDeDup, density)
distilled/  students of costly scorers, and the examples that train a judge
"""
