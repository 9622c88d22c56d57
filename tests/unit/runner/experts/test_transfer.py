"""The copy engine: what reaches a slot, in which pieces, and how its thread ends."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
import torch
from torch import Tensor

from runner.devices.device import Buffer, Device
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.devices.link_stepped import RandomScheduler
from runner.errors import OutOfMemory, RunnerError
from runner.experts.counters import Tally
from runner.experts.errors import CopyFailed
from runner.experts.slots import SlotTable
from runner.experts.transfer import CopyEngine, DeviceSlot, new_slots, staging_nbytes
from tests.support.waiting import wait_until
from tests.unit.runner.experts.watched_device import WatchedDevice, Watcher

CHUNK_NBYTES = 64
FAST = LinkSpeed(1e12)


class Rig:
    """An engine over one layer's slots."""

    def __init__(self, device: Device, n_slots: int = 4, *, is_stepped: bool = True, is_direct: bool = False) -> None:
        self.tally = Tally()
        self.table = SlotTable((n_slots - 2,), 2, self.tally)
        self.slots: list[DeviceSlot] = new_slots(device, n_slots, 1024)
        self.engine = CopyEngine(
            device,
            self.slots,
            self.table,
            self.tally,
            chunk_nbytes=CHUNK_NBYTES,
            is_direct=is_direct,
            stepped_by=CopyEngine.step if is_stepped else None,
        )

    def demand(self, expert: int, source: Tensor) -> int:
        with self.engine.condition:
            claim = self.table.claim(0, expert)
            assert claim is not None
            self.engine.submit(claim.slot, source, is_demand=True)
            return claim.slot

    def prefetch(self, expert: int, source: Tensor) -> int:
        with self.engine.condition:
            slot = self.table.guess(0, expert)
            assert slot is not None
            self.engine.submit(slot, source, is_demand=False)
            return slot

    def wait_for(self, slot: int) -> None:
        with self.engine.condition:
            while not self.table.is_ready(slot):
                self.engine.wait()


def record_of(expert: int, nbytes: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(expert)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@contextmanager
def strict_device(seed: int = 0) -> Iterator[LinkDevice]:
    device = LinkDevice(FAST, strict=True, scheduler=RandomScheduler(seed))
    yield device
    device.close()


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("nbytes", [1, 63, 64, 65, 192, 1000, 1024])
def test_a_record_lies_in_its_slot_byte_for_byte(nbytes: int, *, is_direct: bool) -> None:
    for seed in range(5):
        with strict_device(seed) as device:
            rig = Rig(device, is_direct=is_direct)

            slots = [rig.demand(expert, record_of(expert, nbytes)) for expert in range(3)]
            for slot in slots:
                rig.wait_for(slot)
            rig.engine.close()

            for expert, slot in enumerate(slots):
                assert torch.equal(rig.slots[slot].buffer.tensor[:nbytes], record_of(expert, nbytes))
            assert rig.tally.copied_nbytes == 3 * nbytes


def test_staging_takes_as_many_chunks_as_are_allocated() -> None:
    allocated: list[str] = []

    class Counting(WatchedDevice):
        def new_chunk(self, name: str, nbytes: int) -> Buffer:
            allocated.append(name)
            return self._device.new_chunk(name, nbytes)

    with strict_device() as device:
        Rig(Counting(device, lambda _call, _name: True))

    assert staging_nbytes(CHUNK_NBYTES) == len(allocated) * CHUNK_NBYTES


def test_no_more_than_two_copies_lie_in_the_copy_queue() -> None:
    queued: list[int] = []
    n_queued = 0

    def watch(call: str, _name: str) -> bool:
        nonlocal n_queued
        # Each synchronization is with the oldest copy that is queued.
        n_queued += (call == "copy_in") - (call == "synchronize")
        queued.append(n_queued)
        return True

    with strict_device() as device:
        rig = Rig(WatchedDevice(device, watch))

        rig.wait_for(rig.demand(0, record_of(0)))

    assert max(queued) == 2


def test_what_is_waited_for_overtakes_a_prefetch_between_two_pieces() -> None:
    copied: list[str] = []

    with strict_device() as device:
        rig = Rig(WatchedDevice(device, noting_copies(copied)))
        guessed = rig.prefetch(5, record_of(5, 4 * CHUNK_NBYTES))
        rig.engine.step()
        demanded = rig.demand(0, record_of(0, 2 * CHUNK_NBYTES))
        rig.wait_for(guessed)

    assert copied == [f"slot {slot}" for slot in (guessed, demanded, demanded, guessed, guessed, guessed)]


def noting_copies(copied: list[str]) -> Watcher:
    def watch(call: str, name: str) -> bool:
        if call == "copy_in":
            copied.append(name)
        return True

    return watch


@contextmanager
def busy_copies(device: LinkDevice) -> Iterator[None]:
    """Let no copy be made inside the `with`."""
    gate = threading.Event()
    computed = device.new_event("computed")
    device.launch(lambda: assert_set(gate))
    device.compute.record(computed)
    device.copies.wait(computed)
    try:
        yield
    finally:
        gate.set()


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(30.0)


def test_a_slot_is_refilled_rightly_behind_a_cancelled_copy() -> None:
    for seed in range(20):
        with strict_device(seed) as device:
            rig = Rig(device)
            guessed = rig.prefetch(5, record_of(5))
            for _ in range(random.Random(seed).randrange(1, 10)):
                rig.engine.step()

            with rig.engine.condition:
                rig.table.begin(0, [[1, 2, 3, 4]])
                rig.engine.cancel(rig.table.take_dropped())
            slots = [rig.demand(expert, record_of(expert)) for expert in (1, 2, 3, 4)]
            for slot in slots:
                rig.wait_for(slot)
            rig.engine.close()

            assert slots[-1] == guessed
            for expert, slot in zip((1, 2, 3, 4), slots, strict=True):
                assert torch.equal(rig.slots[slot].buffer.tensor[:1000], record_of(expert))


def test_waiting_for_what_nobody_copies_is_an_error_not_a_hang() -> None:
    with strict_device() as device:
        rig = Rig(device)

        with rig.engine.condition, pytest.raises(CopyFailed, match="nobody copies"):
            rig.engine.wait()


def failing(call: str, error: Exception) -> Watcher:
    def watch(made: str, _name: str) -> bool:
        if made == call:
            raise error
        return True

    return watch


@contextmanager
def threaded_device() -> Iterator[LinkDevice]:
    device = LinkDevice(FAST, strict=True)
    yield device
    device.close()


def test_the_engines_thread_copies_what_it_is_asked_for() -> None:
    with threaded_device() as device:
        rig = Rig(device, is_stepped=False)
        with rig.engine:
            slots = [rig.demand(expert, record_of(expert)) for expert in range(4)]
            for slot in slots:
                rig.wait_for(slot)

        for expert, slot in enumerate(slots):
            assert torch.equal(rig.slots[slot].buffer.tensor[:1000], record_of(expert))


def test_an_error_in_the_engines_thread_is_raised_where_the_model_waits_and_ever_after() -> None:
    with threaded_device() as device:
        rig = Rig(WatchedDevice(device, failing("copy_in", ValueError("no such queue"))), is_stepped=False)
        with rig.engine:
            slot = rig.demand(0, record_of(0))

            with pytest.raises(CopyFailed, match="no such queue"):
                rig.wait_for(slot)
            with rig.engine.condition, pytest.raises(CopyFailed, match="no such queue"):
                rig.engine.check()


def test_an_error_with_a_line_of_its_own_is_raised_as_it_is() -> None:
    with threaded_device() as device:
        rig = Rig(WatchedDevice(device, failing("copy_in", OutOfMemory("the device is full"))), is_stepped=False)
        with rig.engine:
            slot = rig.demand(0, record_of(0))

            with pytest.raises(OutOfMemory, match="the device is full"):
                rig.wait_for(slot)


def test_a_closed_engine_has_copied_what_it_submitted_and_refuses_more() -> None:
    with threaded_device() as device:
        rig = Rig(device, is_stepped=False)
        with rig.engine:
            for expert in range(4):
                rig.demand(expert, record_of(expert))

        with rig.engine.condition, pytest.raises(RunnerError, match="closed"):
            rig.engine.check()


def test_closing_twice_is_closing_once() -> None:
    with threaded_device() as device:
        rig = Rig(device, is_stepped=False)
        with rig.engine:
            rig.engine.close()


def test_who_demands_submits_the_whole_record_where_nothing_is_staged() -> None:
    copied: list[str] = []

    with strict_device() as device:
        rig = Rig(WatchedDevice(device, noting_copies(copied)), is_direct=True)
        slots = [rig.demand(expert, record_of(expert)) for expert in (0, 1)]
        rig.engine.go_on()

        assert copied == [f"slot {slot}" for slot in slots]
        assert all(rig.table.is_ready(slot) for slot in slots)


def test_who_foresees_submits_no_more_than_there_is_room_for() -> None:
    copied: list[str] = []

    with closing(LinkDevice(FAST)) as device:
        rig = Rig(WatchedDevice(device, noting_copies(copied)), is_direct=True)
        with busy_copies(device):
            slot = rig.prefetch(5, record_of(5, 4 * CHUNK_NBYTES))
            rig.engine.go_on()
            copied_while_busy = list(copied)
        device.drain()
        rig.engine.go_on()

    assert copied_while_busy == [f"slot {slot}"] * 2
    assert copied == [f"slot {slot}"] * 4


def test_nothing_is_submitted_by_who_asks_where_it_is_staged() -> None:
    copied: list[str] = []

    with strict_device() as device:
        rig = Rig(WatchedDevice(device, noting_copies(copied)))
        rig.demand(0, record_of(0))
        rig.engine.go_on()

        assert copied == []


def test_one_thread_submits_at_a_time() -> None:
    others: list[bool] = []
    engines: list[CopyEngine] = []

    def watch(call: str, _name: str) -> bool:
        if call == "copy_in" and not others:
            with ThreadPoolExecutor(1) as pool:
                others.append(pool.submit(engines[0].step).result())
        return True

    with strict_device() as device:
        rig = Rig(WatchedDevice(device, watch), is_direct=True)
        engines.append(rig.engine)
        rig.demand(0, record_of(0))
        rig.demand(1, record_of(1))
        rig.engine.go_on()

        assert others == [False]
        assert rig.tally.copied_nbytes == 2000


def test_a_thread_that_left_a_step_by_an_exception_begins_it_again() -> None:
    interrupts = [KeyboardInterrupt()]

    def watch(call: str, _name: str) -> bool:
        if call == "copy_in" and interrupts:
            raise interrupts.pop()
        return True

    with strict_device() as device:
        rig = Rig(WatchedDevice(device, watch), is_direct=True)
        slot = rig.demand(0, record_of(0))
        with pytest.raises(KeyboardInterrupt):
            rig.engine.go_on()
        rig.engine.go_on()
        rig.engine.close()

        assert torch.equal(rig.slots[slot].buffer.tensor[:1000], record_of(0))


def test_the_thread_is_called_for_a_prefetch_once_the_copies_were_over_before_somebody_came_by() -> None:
    with threaded_device() as device:
        rig = Rig(device, is_stepped=False, is_direct=True)
        with rig.engine:
            slot = rig.prefetch(5, record_of(5))
            with busy_copies(device):
                rig.engine.go_on()
            device.drain()
            with rig.engine.condition:
                rig.engine.come_by()
            with busy_copies(device):
                rig.engine.go_on()

            wait_until(lambda: rig.table.is_ready(slot), "the rest of the prefetch")
