"""Training data: the stream of examples, supervised examples, seqio, exported datasets."""
