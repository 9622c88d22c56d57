"""Which record is worked on next, which shard is fetched next, which one is no longer needed. Pure: events in, answers
out; knows neither processes nor disks.

A record can be worked on when all shards that it lies in are here. With `n_ahead` at most so many shards are here and
waited for, so that a model larger than the disk goes through it; where nothing can be worked on otherwise, more. With a
`budget` the costs of what is worked on at once stay below it; where nothing is, one record may be dearer.
"""

from collections.abc import Iterator, Mapping, Sequence


class Schedule:
    """What is to be done and what is here. Records are numbers, shards are names."""

    def __init__(
        self,
        needs: Mapping[int, frozenset[str]],
        shards: Sequence[str],
        *,
        here: frozenset[str],
        n_ahead: int | None,
        costs: Mapping[int, int] | None = None,
        budget: int | None = None,
    ) -> None:
        """Take the records in the order in which they are wanted and the shards in the order in which they come."""
        self._needs = dict(needs)  # of records not yet given out
        self._unfinished = dict(needs)
        wanted = frozenset().union(*needs.values())
        self._to_fetch = [shard for shard in shards if shard in wanted and shard not in here]
        self._here = set(here & wanted)
        self._is_fetching = False
        self._n_ahead = n_ahead
        self._costs = costs or {}
        self._budget = budget
        self._spent = 0

    @property
    def is_done(self) -> bool:
        """Whether every record is finished."""
        return not self._unfinished

    def next_record(self) -> int | None:
        """Return a record to work on now, None while there is none."""
        number = next((number for number in self._ready() if self._is_affordable(number)), None)
        if number is not None:
            del self._needs[number]
            self._spent += self._costs.get(number, 0)
        return number

    def next_shard(self) -> str | None:
        """Return a shard to fetch now, None while there is none or one is being fetched."""
        if self._is_fetching or not self._to_fetch:
            return None
        has_room = self._n_ahead is None or len(self._here) < self._n_ahead
        if not has_room and next(self._ready(), None) is not None:
            return None
        if not has_room and len(self._needs) < len(self._unfinished):
            return None  # what is worked on now may make room
        self._is_fetching = True
        return self._to_fetch.pop(0)

    def take_shard(self, shard: str) -> None:
        """Take down that the shard that was being fetched is here."""
        self._is_fetching = False
        self._here.add(shard)

    def finish(self, record: int) -> list[str]:
        """Take down that a record is finished; return the shards that nothing needs any more."""
        freed = self._unfinished.pop(record)
        self._spent -= self._costs.get(record, 0)
        wanted = frozenset().union(*self._unfinished.values())
        gone = sorted(freed - wanted)
        self._here -= freed - wanted
        return gone

    def _ready(self) -> Iterator[int]:
        return (number for number, shards in self._needs.items() if shards <= self._here)

    def _is_affordable(self, number: int) -> bool:
        if self._budget is None or len(self._needs) == len(self._unfinished):
            return True
        return self._spent + self._costs.get(number, 0) <= self._budget
