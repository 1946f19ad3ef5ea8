"""Tasks for lm-evaluation-harness that read local files: see README.md. This imports nothing."""
