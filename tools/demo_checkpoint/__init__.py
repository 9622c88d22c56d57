"""A real Mixtral-architecture checkpoint without a hub: eight near copies of a small dense model's feed-forwards."""
