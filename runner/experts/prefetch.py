"""Whether prefetching pays: measured, not assumed. Pure: knows no clock and no expert.

A trial computes steps by turns with and without prefetching; as the cache holds the same experts either way, they
differ in nothing else but how many of their experts are missing, which is most of the difference between two steps
where copies are slow. So what a miss more takes is measured too, and taken off. The medians of what is left decide, and
what was decided stands until the next trial. Not to prefetch costs what it would have won, so trials are rare and
short: as long as it pays, one step in thirty-five goes without; as long as it does not pay, the time between two trials
doubles, so that what they cost becomes as small as one likes.

To be switched on, prefetching has to win more than it is enough to win to stay on: noise does not switch it to and fro.
"""

from collections.abc import Sequence
from statistics import fmean, median

# Steps of up to so many tokens are decoding, which the guard measures.
DECODE_TOKENS_MAX = 8

_WIN_TO_START = 0.02
_WIN_TO_STAY = 0.005

_Step = tuple[float, int]  # seconds, misses


class Guard:
    """Says for each step whether to prefetch. Told how long each took, by the one thread that computes the model."""

    def __init__(self, *, n_trial: int = 48, n_between: int = 800, n_between_max: int = 25_600) -> None:
        """Begin with a trial of n_trial steps, an even number; between trials are n_between steps, later more."""
        self._n_trial = n_trial
        self._n_between_min = self._n_between = n_between
        self._n_between_max = n_between_max
        self._pays = False
        self._is_trial = True
        self._n_steps = 0  # of this trial, or since it
        self._without: list[_Step] = []
        self._with: list[_Step] = []
        self._n_tokens = 0

    @property
    def is_on(self) -> bool:
        """Return whether to prefetch in the present step."""
        return self._n_steps % 2 == 0 if self._is_trial else self._pays

    def observe(self, step_s: float, n_tokens: int, n_misses: int = 0) -> None:
        """Note how long the present step took, and how many experts it missed, foreseen or not; the next one begins.

        Steps of other numbers of tokens start afresh.
        """
        if n_tokens != self._n_tokens:
            self._n_tokens = n_tokens
            self._begin(is_trial=True)
            return
        if self._is_trial:
            (self._with if self.is_on else self._without).append((step_s, n_misses))
        self._n_steps += 1
        if self._is_trial and self._n_steps == self._n_trial:
            self._decide()
            self._begin(is_trial=False)
        elif not self._is_trial and self._n_steps == self._n_between:
            self._begin(is_trial=True)

    def _begin(self, *, is_trial: bool) -> None:
        self._is_trial = is_trial
        self._n_steps = 0
        self._without, self._with = [], []

    def _decide(self) -> None:
        groups = (self._without, self._with)
        slope_s = _seconds_a_miss(*groups)
        n_misses = fmean(n_misses for steps in groups for _, n_misses in steps)
        without_s, with_s = (median(_with_equal_misses(steps, n_misses, slope_s)) for steps in groups)
        needed = _WIN_TO_STAY if self._pays else _WIN_TO_START
        self._pays = with_s <= without_s * (1 - needed)
        if self._pays:
            self._n_between = self._n_between_min
        else:
            self._n_between = min(2 * self._n_between, self._n_between_max)


def _seconds_a_miss(*groups: Sequence[_Step]) -> float:
    """Return the slope of seconds over misses that all groups share, each around its own means, by least squares."""
    products, squares = 0.0, 0.0
    for steps in groups:
        mean_s, mean_misses = (fmean(values) for values in zip(*steps, strict=True))
        products += sum((n_misses - mean_misses) * (step_s - mean_s) for step_s, n_misses in steps)
        squares += sum((n_misses - mean_misses) ** 2 for _, n_misses in steps)
    return max(0.0, products / squares) if squares else 0.0


def _with_equal_misses(steps: Sequence[_Step], n_misses: float, slope_s: float) -> list[float]:
    """Return what each step would have taken with that many misses."""
    return [step_s + slope_s * (n_misses - n_missed) for step_s, n_missed in steps]
