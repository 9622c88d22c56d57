"""Which experts a model's tokens chose: recorded, kept in files, replayed. Nothing here computes a model."""
