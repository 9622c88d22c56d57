"""Which experts of later layers are hinted at, and what became of each hint.

A hint goes out as soon as the gates of later layers have spoken, behind what the present layer demands: the layer that
comes next before the one behind it, in a layer the likeliest expert first; the further ahead, the fewer. With each
message the daemon forgets the hints before it that it does not name: the truth about a layer cancels what was guessed
wrong for it. Knows no messages.
"""

from collections.abc import Collection, Iterable

from torch import Tensor

from protocol.handles import ExpertKey
from runner.experts.counters import Tally
from runner.experts.prefetch import Guard
from runner.experts.presence import Presence
from runner.experts.source import Guess


class Foreseen:
    """The hints of one session; without a guard all go out."""

    def __init__(self, presence: Presence, tally: Tally, guard: Guard | None) -> None:
        self._presence = presence
        self._tally = tally
        self._guard = guard
        self._guesses: list[tuple[int, Guess]] = []
        self._open: dict[ExpertKey, None] = {}  # hinted at, and neither chosen nor given up
        self._is_stale = False  # the daemon may still wait for something that was given up

    def note(self, layer: int, guess: Guess) -> None:
        """Keep a guess until `hints` is asked."""
        self._guesses.append((layer, guess))

    def judge(self, layer: int, chosen: Collection[int], absent: Collection[int]) -> None:
        """Count the uses of a layer's experts, and what became of the hints for it."""
        tally = self._tally
        for expert in chosen:
            key = ExpertKey(layer, expert)
            if self._open.pop(key, _NOTHING) is None:
                tally.misses += 1
                tally.prefetches_used += 1
                if expert in absent:
                    tally.prefetches_late += 1
                else:
                    tally.copied_nbytes += self._presence.nbytes(key)
            elif expert in absent:
                tally.misses += 1
            else:
                tally.hits += 1
        # All other hints for layers up to this one came to nothing.
        for key in [key for key in self._open if key.layer <= layer]:
            self._forget(key)

    def hints(self, n_most: int) -> tuple[ExpertKey, ...] | None:
        """Return what is to be hinted at now; None if there is nothing to say."""
        guesses, self._guesses = self._guesses, []
        if self._guard is not None and not self._guard.is_on:
            guesses = []
        named = (
            ExpertKey(layer, expert)
            for distance, (layer, guess) in enumerate(guesses)
            for expert in likeliest_first(guess(), distance)
        )
        keys = dict.fromkeys(key for key in named if self._presence.find(key) is None)
        hinted = tuple(keys)[:n_most]
        for key in [key for key in self._open if key not in keys and self._presence.find(key) is None]:
            self._forget(key)
        self._tally.prefetches_issued += sum(key not in self._open for key in hinted)
        self._open.update(dict.fromkeys(hinted))
        if not hinted and not self._is_stale:
            return None
        self._is_stale = False
        return hinted

    def _forget(self, key: ExpertKey) -> None:
        del self._open[key]
        if self._presence.find(key) is not None:
            self._tally.prefetches_wasted += 1
            self._tally.copied_nbytes += self._presence.nbytes(key)
        else:
            self._tally.prefetches_cancelled += 1
            self._is_stale = True


_NOTHING = object()


def likeliest_first(guessed: Tensor, distance: int = 0) -> Iterable[int]:
    """Return the ids of a guess, int64 [n] or [T, n_guessed]: every token's likeliest before any token's second.

    Of a guess for a layer that is `distance` layers behind the next one only the likeliest part, half of it each time:
    the others are wrong too often for what reading them takes.
    """
    rows = guessed.tolist()
    if not rows or not isinstance(rows[0], list):
        return rows
    n_kept = max(1, len(rows[0]) >> distance)
    return [expert for rank in list(zip(*rows, strict=True))[:n_kept] for expert in rank]
