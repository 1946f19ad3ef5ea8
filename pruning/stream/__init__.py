"""The stream: training examples as a pure function of (corpus, selection, seed, i)."""
