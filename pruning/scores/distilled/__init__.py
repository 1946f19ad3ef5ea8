"""Students of expensive scorers, and training examples for judges."""
