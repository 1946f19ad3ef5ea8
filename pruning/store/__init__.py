"""Artifacts on disk: writing, reading, verification, status and parallel construction."""
