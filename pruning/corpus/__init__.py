"""The corpus: documents with their text, tokens and metadata, and the readers of both."""
