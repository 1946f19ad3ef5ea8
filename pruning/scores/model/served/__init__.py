"""Judges behind an OpenAI-compatible endpoint: questions over HTTP, answers as score sets."""
