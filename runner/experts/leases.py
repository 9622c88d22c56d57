"""What a runner asks expertd for and gives back: experts of a store larger than memory, demanded, held, released.

Owns the account of one session's demands. Knows no slots' contents and no computation. Whoever waits is the model's
thread; nothing waits for it: an expert that was computed is given back before another one is waited for, so that
runners that share few slots never wait for each other in a circle.

What was demanded has come as soon as the slots say so (`found`), which is sooner than the daemon's answer. Every
message may be lost, and is asked again then; an answer that nobody waits for any more is given back.
"""

from collections.abc import Callable, Iterable, Sequence

from protocol.bell import Bell
from protocol.fault_points import FaultPoint, reached
from protocol.handles import ExpertHandle, ExpertKey
from protocol.messages import Acquire, Code, GetStats, Granted, Message, Prefetch, Refused, Release, RequestRefusal
from protocol.schema import KEYS_MAX
from runner.errors import CorruptExpert, ReadFailed, SessionGone, StoreUnavailable
from runner.store_view import RequestChannel

# An answer that did not come by then was lost, or is slow: asking again does no harm.
_ASK_AGAIN_S = 1.0
# A daemon that was asked so often and said nothing at all is not there any more.
_ASKS_MAX = 30
# An expert that cannot be read is asked for so many times.
_READS_MAX = 3


class Leases:
    """The demands of one session. Called from the model's one thread."""

    def __init__(self, requests: RequestChannel, n_slots: int, clock: Callable[[], float]) -> None:
        self._requests = requests
        self._clock = clock
        # Others want slots too, and what this runner has in others is to stay there.
        self._n_awaited_max = max(1, min(n_slots // 2, KEYS_MAX // 2))
        self._request_id = 0
        self._to_ask: dict[ExpertKey, None] = {}
        self._awaited: dict[ExpertKey, None] = {}
        self._held: set[ExpertKey] = set()
        self._found: set[ExpertKey] = set()  # before the daemon said so
        self._lent: set[ExpertKey] = set()  # asked for though it is there: it is to stay
        self._used: dict[ExpertKey, None] = {}  # since the last release, the latest last
        self._n_refused: dict[ExpertKey, int] = {}
        self._n_unanswered = 0
        self._ask_again_at = 0.0

    @property
    def are_all_there(self) -> bool:
        """Return whether nothing is waited for."""
        return not self._awaited and not self._to_ask

    @property
    def awaited(self) -> tuple[ExpertKey, ...]:
        """What was asked for and has not come in."""
        return tuple(self._awaited)

    def use(self, keys: Iterable[ExpertKey]) -> None:
        """Note that these are used now: the daemon hears of it with the next release."""
        for key in keys:
            self._used.pop(key, None)
            self._used[key] = None

    def demand(self, keys: Iterable[ExpertKey], present: Iterable[ExpertKey] = ()) -> None:
        """Ask for these, as many at once as slots allow; what was used until now is told before.

        What is `present` is computed too: a lease keeps it from making room for the others.
        """
        self._to_ask.update(dict.fromkeys(keys))
        if self._to_ask:
            self.tell_uses()
            self._lent = set(present)
            self._ask()

    def tell_uses(self) -> None:
        """Say what was used without a lease; what is leased makes room for nothing and is given back another time."""
        if not self._held.issuperset(self._used):
            self.release()

    def release(self) -> None:
        """Give back all that was used, and say that it was."""
        keys = list(self._used)
        self._used.clear()
        self._held.difference_update(keys)
        for first in range(0, len(keys), KEYS_MAX):
            self._send(Release(self._next_id(), tuple(keys[first : first + KEYS_MAX])))
            reached(FaultPoint.RUNNER_EXPERTS_RELEASED)

    def give_up(self) -> None:
        """Wait for nothing any more and give back everything: a call ended with an exception."""
        self.use([*self._awaited, *self._held, *self._lent])
        self._awaited.clear()
        self._to_ask.clear()
        self.release()

    def prefetch(self, keys: Sequence[ExpertKey], deadline_ms: int) -> None:
        """Hint at what is likely to be demanded, the most urgent first; that takes back the hints before."""
        self._send(Prefetch(self._next_id(), tuple(keys[:KEYS_MAX]), deadline_ms))

    def found(self, key: ExpertKey) -> None:
        """Note that one that is awaited has been found in a slot: the daemon leases it, and will say so."""
        self._found.add(key)
        self._note_answer()
        self._has_come(key)

    def collect(self) -> list[ExpertHandle]:
        """Return what has come in by messages of what is awaited; raise CorruptExpert, ReadFailed or SessionGone."""
        handles: list[ExpertHandle] = []
        while (message := self._requests.receive()) is not None:
            self._note_answer()
            handles += self._take(message)
        return handles

    def wait(self, bell: Bell, n_rings: int) -> None:
        """Wait until something may have come in since the bell was rung so often; ask again if nothing does.

        Raise SessionGone or StoreUnavailable.
        """
        left_s = self._ask_again_at - self._clock()
        if not self._requests.wait(bell, n_rings, max(0.0, left_s)) or left_s <= 0.0:
            self._ask_again()

    def ask_for_more(self) -> None:
        """Ask for what there was no room to ask for, as far as there is by now."""
        if self._to_ask:
            self._ask()

    def _ask(self) -> None:
        """Ask for as much as may be waited for at once."""
        n_more = self._n_awaited_max - len(self._awaited)
        keys = list(self._to_ask)[: max(n_more, 0)]
        if not keys:
            return
        for key in keys:
            del self._to_ask[key]
            self._awaited[key] = None
            self._found.discard(key)
        self._acquire([*keys, *self._lent])
        reached(FaultPoint.RUNNER_EXPERTS_DEMANDED)

    def _acquire(self, keys: Sequence[ExpertKey]) -> None:
        keys = keys[:KEYS_MAX]
        self._ask_again_at = self._clock() + _ASK_AGAIN_S
        self._send(Acquire(self._next_id(), tuple(keys)))

    def _note_answer(self) -> None:
        self._n_unanswered = 0
        self._ask_again_at = self._clock() + _ASK_AGAIN_S

    def _ask_again(self) -> None:
        """Ask anew for all that is waited for; raise StoreUnavailable if that was done too often."""
        self._n_unanswered += 1
        if self._n_unanswered > _ASKS_MAX:
            self._n_unanswered = 0
            raise StoreUnavailable(
                f"expertd, asked {_ASKS_MAX} times for {next(iter(self._awaited))} and others, has not answered"
            )
        self._acquire(list(self._awaited))
        # This one is answered at once, however long the disk takes.
        self._send(GetStats(self._next_id()))

    def _take(self, message: Message) -> list[ExpertHandle]:
        if isinstance(message, RequestRefusal):
            _raise_refusal(message.reason)
        if not isinstance(message, Granted):
            return []
        for refusal in message.refusals:
            self._refused(refusal.key, refusal.reason)
        wanted = [handle for handle in message.handles if handle.key in self._awaited]
        # Those that nobody waits for were asked for twice, or by a call that was given up.
        known = self._found | self._held | self._lent | self._awaited.keys()
        self.use(handle.key for handle in message.handles if handle.key not in known)
        self._found.difference_update(handle.key for handle in message.handles)
        for handle in wanted:
            self._has_come(handle.key)
        return wanted

    def _has_come(self, key: ExpertKey) -> None:
        del self._awaited[key]
        self._held.add(key)
        self._n_refused.pop(key, None)
        reached(FaultPoint.RUNNER_EXPERTS_GRANTED)

    def _refused(self, key: ExpertKey, reason: Refused) -> None:
        """Ask once more for what could not be read; raise CorruptExpert or ReadFailed."""
        if key not in self._awaited:
            return
        del self._awaited[key]
        if reason.code == Code.CORRUPT:
            raise CorruptExpert(f"{key} is corrupt: {reason.detail}")
        n_refused = self._n_refused[key] = self._n_refused.get(key, 0) + 1
        if n_refused >= _READS_MAX:
            del self._n_refused[key]
            raise ReadFailed(f"{key} cannot be read: {reason.detail} ({reason.code}, {n_refused} times)")
        self._to_ask[key] = None
        self._ask()

    def _send(self, message: Message) -> None:
        self._requests.send(message)

    def _next_id(self) -> int:
        self._request_id += 1
        return self._request_id


def _raise_refusal(reason: Refused) -> None:
    if reason.code in {Code.DRAINING, Code.NOT_ATTACHED}:
        raise SessionGone(f"expertd serves this session no more: {reason.detail}")
    raise StoreUnavailable(f"expertd refused a request: {reason.detail} ({reason.code})")
