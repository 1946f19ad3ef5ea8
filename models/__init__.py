"""Models: T5, decoder-only language models, their losses, weights, optimizers and sharding.

Knows no corpus and no gin, and imports nothing by itself: take what you need from its modules.
"""
