"""Metadata of fields of settings. It imports nothing, because the command line reads it."""

ADDRESS = "address"  # a field that holds the URL of a server, not a place of files
