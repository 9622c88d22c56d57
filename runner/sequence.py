"""One sequence of tokens being computed: its kv_cache and the tokens that no step has taken yet."""

from collections.abc import Iterable

from runner.kv_cache import KVCache


class Sequence:
    """Tokens in order. `append` adds tokens, a step computes them; the kv_cache's length is the next position."""

    def __init__(self, kv_cache: KVCache) -> None:
        self.kv_cache = kv_cache
        self.pending: list[int] = []

    def append(self, token_ids: Iterable[int]) -> None:
        """Add tokens for the next step; raise ContextFull if the kv_cache has no room for them."""
        added = list(token_ids)
        self.kv_cache.check_room(len(self.pending) + len(added))
        self.pending += added
