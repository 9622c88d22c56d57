"""The proof of the method: code that orders its accesses runs, and no wait and no record in it can be left out."""

from contextlib import closing

import pytest
import torch

from runner.devices.errors import UnorderedAccess, UnrecordedEvent
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.devices.link_stepped import RandomScheduler
from tests.unit.runner.devices.double_buffer import NBYTES, WAITS_AND_RECORDS, DoubleBuffer, Omission

SPEED = LinkSpeed(1e12)
SEEDS = range(300)
N_STEPS = 8
RECORDS = [torch.full((NBYTES,), step + 1, dtype=torch.uint8) for step in range(N_STEPS)]
SUMS = [NBYTES * (step + 1) for step in range(N_STEPS)]
OMISSIONS = [Omission(what, step) for what in WAITS_AND_RECORDS for step in (None, 3)]


def sums_of(seed: int | None, omission: Omission | None = None, *, strict: bool) -> list[int]:
    """Return the sums that the double buffer gets in the order of that seed, or in real time."""
    scheduler = None if seed is None else RandomScheduler(seed)
    with closing(LinkDevice(SPEED, strict=strict, scheduler=scheduler)) as device:
        return DoubleBuffer(device, omission).run(RECORDS)


def misused_buffer(omission: Omission) -> str:
    """Return how an error begins that names the buffer, or its event, which the omitted call was for."""
    kind = next(kind for kind in ("chunk", "slot", "sum") if f"{kind}." in omission.what)
    return rf"^{kind} \d"


def test_accesses_that_events_order_are_accepted_in_every_order_and_right() -> None:
    for seed in SEEDS:
        assert sums_of(seed, strict=True) == SUMS


def test_accesses_that_events_order_are_accepted_in_real_time() -> None:
    for _ in range(10):
        assert sums_of(None, strict=True) == SUMS


@pytest.mark.parametrize("omission", OMISSIONS, ids=str)
def test_leaving_out_a_wait_or_a_record_is_caught_in_every_order(omission: Omission) -> None:
    for seed in SEEDS:
        with pytest.raises((UnorderedAccess, UnrecordedEvent), match=misused_buffer(omission)):
            sums_of(seed, omission, strict=True)


@pytest.mark.parametrize("omission", OMISSIONS, ids=str)
def test_leaving_out_a_wait_or_a_record_is_caught_in_real_time(omission: Omission) -> None:
    with pytest.raises((UnorderedAccess, UnrecordedEvent), match=misused_buffer(omission)):
        sums_of(None, omission, strict=True)


@pytest.mark.parametrize("what", WAITS_AND_RECORDS)
def test_what_is_left_out_makes_wrong_sums_in_some_of_the_orders(what: str) -> None:
    """Without checks: the schedules are hostile enough to need each event."""
    wrong = [seed for seed in SEEDS if sums_of(seed, Omission(what), strict=False) != SUMS]

    assert 0 < len(wrong) < len(SEEDS)
