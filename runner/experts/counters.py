"""What the expert cache counts. Knows not who counts; whoever does holds the cache's lock, or is the only one to."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class Counters:
    """What happened since the cache was made; the difference of two is what happened between them.

    A use is an expert of a layer in one call, for however many tokens. It is a hit if the expert was in the cache, a
    miss if not, also where a prefetch had it on its way: hits and misses do not depend on prefetching. A prefetch that
    was issued is used in the end, cancelled while it was copied, or wasted, copied and not used; or still open. Of
    those used, the late ones were still being copied when they were asked for.
    """

    hits: int
    misses: int
    evictions: int
    prefetches_issued: int
    prefetches_used: int
    prefetches_late: int
    prefetches_cancelled: int
    prefetches_wasted: int
    copied_nbytes: int
    waited_s: float  # in which the host waited for a copy; what was computed meanwhile is not taken off

    @property
    def hit_ratio(self) -> float | None:
        """Return hits of uses; None if there were none."""
        n_uses = self.hits + self.misses
        return self.hits / n_uses if n_uses else None

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


@dataclass(slots=True)
class Tally:
    """The counters while they count: Counters' fields, in its order."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    prefetches_issued: int = 0
    prefetches_used: int = 0
    prefetches_late: int = 0
    prefetches_cancelled: int = 0
    prefetches_wasted: int = 0
    copied_nbytes: int = 0
    waited_s: float = 0.0

    def snapshot(self) -> Counters:
        """Return the counters as they stand."""
        return Counters(*astuple(self))


def counted_since(before: Counters | None, now: Counters | None) -> Counters | None:
    """Return what was counted between the two; None without a cache."""
    return None if before is None or now is None else now - before
