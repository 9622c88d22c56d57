"""The guard: prefetching stays on where it wins, goes off where it does not, and is tried again ever more rarely."""

from collections.abc import Callable

import pytest

from runner.experts.prefetch import Guard


def simulate(guard: Guard, n_steps: int, step_s: Callable[[int, bool], float]) -> list[bool]:
    """Return for each step whether there was prefetching; a step takes what `step_s` says."""
    was_on = []
    for step in range(n_steps):
        was_on.append(guard.is_on)
        guard.observe(step_s(step, guard.is_on), n_tokens=1)
    return was_on


def test_where_prefetching_wins_nearly_all_steps_have_it() -> None:
    was_on = simulate(Guard(), 10_000, lambda _, is_on: 0.8 if is_on else 1.0)

    assert sum(was_on) / len(was_on) > 0.95


@pytest.mark.parametrize("with_prefetching_s", [1.0, 1.2, 3.0])
def test_where_prefetching_does_not_win_it_costs_nearly_nothing(with_prefetching_s: float) -> None:
    was_on = simulate(Guard(), 100_000, lambda _, is_on: with_prefetching_s if is_on else 1.0)

    assert sum(was_on) / len(was_on) < 0.003


def test_noise_does_not_switch_it_on_where_it_wins_less_than_the_noise() -> None:
    # A step in five is slow, by turns with and without.
    was_on = simulate(Guard(), 50_000, lambda step, _: 2.0 if step % 5 == 0 else 1.0)

    assert sum(was_on) / len(was_on) < 0.01


def test_a_small_win_is_enough_to_stay_on_and_not_enough_to_be_switched_on() -> None:
    small_win = [simulate(Guard(), 5_000, lambda _, is_on: 0.99 if is_on else 1.0)]
    guard = Guard()
    simulate(guard, 48, lambda _, is_on: 0.5 if is_on else 1.0)
    small_win.append(simulate(guard, 5_000, lambda _, is_on: 0.99 if is_on else 1.0))

    assert [sum(was_on) > 2_500 for was_on in small_win] == [False, True]


def test_it_is_switched_off_when_it_stops_paying_and_on_again_when_it_pays() -> None:
    guard = Guard(n_trial=8, n_between=50, n_between_max=400)
    simulate(guard, 500, lambda _, is_on: 0.5 if is_on else 1.0)

    lost = simulate(guard, 500, lambda _, is_on: 1.5 if is_on else 1.0)
    won = simulate(guard, 2_000, lambda _, is_on: 0.5 if is_on else 1.0)

    assert sum(lost) < 100
    assert sum(won[-1_000:]) > 900


def test_a_slowdown_over_time_is_not_taken_for_a_loss() -> None:
    was_on = simulate(Guard(), 5_000, lambda step, is_on: (1 + step / 500) * (0.9 if is_on else 1.0))

    assert sum(was_on) / len(was_on) > 0.9


def test_steps_of_another_number_of_tokens_are_not_compared() -> None:
    guard = Guard(n_trial=8)
    simulate(guard, 4, lambda _, is_on: 0.1 if is_on else 1.0)

    was_on = []
    for _ in range(100):
        was_on.append(guard.is_on)
        guard.observe(1.0, n_tokens=3)

    # The first of them ends the trial that was under way; the next eight are a trial of their own, which nothing wins.
    assert was_on[1:9] == [True, False] * 4
    assert not any(was_on[9:])


def test_a_small_win_is_seen_among_steps_that_miss_more_or_fewer_experts() -> None:
    # A miss takes a tenth of a step; from step to step there are 0 to 19 of them, in no order.
    guard, was_on = Guard(), []
    for step in range(5_000):
        n_misses = step * 7919 % 20
        was_on.append(guard.is_on)
        guard.observe((0.9 if guard.is_on else 1.0) + 0.1 * n_misses, n_tokens=1, n_misses=n_misses)

    assert sum(was_on) / len(was_on) > 0.9


def test_misses_alone_do_not_look_like_a_win() -> None:
    # Every other step misses more: by turns those with and without prefetching, trial by trial.
    guard, was_on = Guard(n_trial=24, n_between=25), []
    for step in range(5_000):
        n_misses = 3 * (step % 2) + step % 3
        was_on.append(guard.is_on)
        guard.observe(1.0 + 0.1 * n_misses, n_tokens=1, n_misses=n_misses)

    assert sum(was_on) / len(was_on) < 0.1
