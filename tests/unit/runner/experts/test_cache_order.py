"""Each wait and each record that orders copies, computations and the host is needed: else a strict device says so.

What is left out is left out of the cache's and the copy engine's own calls; nothing of them is changed.
"""

import re
from collections.abc import Callable

import pytest

from runner.devices.errors import DeviceMisuse
from tests.unit.runner.experts.rehearsal import random_steps, rehearse, settings_of

N_SEEDS = 60

ORDERING_CALLS = [
    ("copies.wait", r"slot \d+ last use"),
    ("compute.wait", r"slot \d+ ready"),
    ("synchronize", r"chunk \d+ copied"),
    ("synchronize", r"output written"),
    ("copies.record", r"chunk \d+ copied"),
    ("copies.record", r"slot \d+ ready"),
    ("compute.record", r"slot \d+ last use"),
    ("compute.record", r"output written"),
]


def always(call: str, name: str) -> Callable[[int], Callable[[str, str], bool]]:
    return lambda _seed: lambda made, of: made == call and re.fullmatch(name, of) is not None


def once(call: str, name: str) -> Callable[[int], Callable[[str, str], bool]]:
    """Leave out one call of those, a later one with each seed."""

    def of_seed(seed: int) -> Callable[[str, str], bool]:
        calls = iter(range(1_000_000))
        return lambda made, of: made == call and re.fullmatch(name, of) is not None and next(calls) == seed % 20

    return of_seed


def first_seed_that_shows(leaves_out: Callable[[int], Callable[[str, str], bool]]) -> int | None:
    for seed in range(N_SEEDS):
        try:
            rehearse(seed, random_steps(seed), settings_of(seed, 2 + seed % 3), "random", leaves_out(seed))
        except DeviceMisuse:
            return seed
    return None


@pytest.mark.parametrize(("call", "name"), ORDERING_CALLS)
def test_leaving_out_every_such_call_is_found(call: str, name: str) -> None:
    seed = first_seed_that_shows(always(call, name))

    assert seed is not None


@pytest.mark.parametrize(("call", "name"), ORDERING_CALLS)
def test_leaving_out_a_single_such_call_is_found(call: str, name: str) -> None:
    seed = first_seed_that_shows(once(call, name))

    assert seed is not None


def test_nothing_is_found_where_nothing_is_left_out() -> None:
    assert first_seed_that_shows(lambda _: lambda _call, _name: False) is None
