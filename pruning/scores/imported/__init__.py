"""External scores: read from files and joined to the documents of a corpus."""
