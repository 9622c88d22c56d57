"""Whether prefetching pays: measured, not assumed. Pure: knows no clock and no expert.

A trial computes steps by turns with and without prefetching; as the cache holds the same experts either way, they
differ in nothing else. The medians decide, and what was decided stands until the next trial. Not to prefetch costs what
it would have won, so trials are rare and short: as long as it pays, one step in thirty goes without; as long as it does
not pay, the time between two trials doubles, so that what they cost becomes as small as one likes.

To be switched on, prefetching has to win more than it is enough to win to stay on: noise does not switch it to and fro.
"""

from statistics import median

# Steps of up to so many tokens are decoding, which the guard measures.
DECODE_TOKENS_MAX = 8

_WIN_TO_START = 0.03
_WIN_TO_STAY = 0.005


class Guard:
    """Says for each step whether to prefetch. Told how long each took, by the one thread that computes the model."""

    def __init__(self, *, n_trial: int = 24, n_between: int = 400, n_between_max: int = 12_800) -> None:
        """Begin with a trial of n_trial steps, an even number; between trials are n_between steps, later more."""
        self._n_trial = n_trial
        self._n_between_min = self._n_between = n_between
        self._n_between_max = n_between_max
        self._pays = False
        self._is_trial = True
        self._n_steps = 0  # of this trial, or since it
        self._steps_s: tuple[list[float], list[float]] = ([], [])  # without, with
        self._n_tokens = 0

    @property
    def is_on(self) -> bool:
        """Return whether to prefetch in the present step."""
        return self._n_steps % 2 == 0 if self._is_trial else self._pays

    def observe(self, step_s: float, n_tokens: int) -> None:
        """Note how long the present step took; the next one begins. Steps of other numbers of tokens start afresh."""
        if n_tokens != self._n_tokens:
            self._n_tokens = n_tokens
            self._begin(is_trial=True)
            return
        if self._is_trial:
            self._steps_s[self.is_on].append(step_s)
        self._n_steps += 1
        if self._is_trial and self._n_steps == self._n_trial:
            self._decide()
            self._begin(is_trial=False)
        elif not self._is_trial and self._n_steps == self._n_between:
            self._begin(is_trial=True)

    def _begin(self, *, is_trial: bool) -> None:
        self._is_trial = is_trial
        self._n_steps = 0
        self._steps_s = ([], [])

    def _decide(self) -> None:
        without_s, with_s = (median(steps_s) for steps_s in self._steps_s)
        needed = _WIN_TO_STAY if self._pays else _WIN_TO_START
        self._pays = with_s <= without_s * (1 - needed)
        if self._pays:
            self._n_between = self._n_between_min
        else:
            self._n_between = min(2 * self._n_between, self._n_between_max)
