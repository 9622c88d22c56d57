"""Which tokens of which sequence a forward pass takes: pending tokens in chunks of bounded size. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Take:
    """The next `n_tokens` of one sequence; `is_last` when none of its tokens are pending behind them."""

    sequence: int
    n_tokens: int
    is_last: bool


def plan_rounds(n_pending: Sequence[int], chunk: int) -> list[list[Take]]:
    """Return, a round after another, what to take of each sequence so that no round has more than `chunk` tokens.

    A sequence has at most one piece a round; sequences are finished in their order.
    """
    rounds: list[list[Take]] = [[]]
    room = chunk
    for sequence, pending in enumerate(n_pending):
        left = pending
        while left:
            n_tokens = min(left, room)
            left -= n_tokens
            room -= n_tokens
            rounds[-1].append(Take(sequence, n_tokens, is_last=not left))
            if not room:
                rounds.append([])
                room = chunk
    return [takes for takes in rounds if takes]
