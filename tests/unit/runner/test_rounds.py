from hypothesis import given
from hypothesis import strategies as st

from runner.rounds import Take, plan_rounds


def test_a_prompt_longer_than_the_chunk_takes_several_rounds() -> None:
    assert plan_rounds([5], 2) == [
        [Take(0, 2, is_last=False)],
        [Take(0, 2, is_last=False)],
        [Take(0, 1, is_last=True)],
    ]


def test_sequences_with_one_token_each_share_a_round() -> None:
    assert plan_rounds([1, 1, 1], 512) == [[Take(index, 1, is_last=True) for index in range(3)]]


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 12))
def test_every_pending_token_is_taken_once_in_bounded_rounds(n_pending: list[int], chunk: int) -> None:
    rounds = plan_rounds(n_pending, chunk)

    taken = [0] * len(n_pending)
    for takes in rounds:
        assert 0 < sum(take.n_tokens for take in takes) <= chunk
        assert len({take.sequence for take in takes}) == len(takes)
        for take in takes:
            taken[take.sequence] += take.n_tokens
            assert take.is_last == (taken[take.sequence] == n_pending[take.sequence])
    assert taken == n_pending
