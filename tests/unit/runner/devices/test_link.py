import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import torch

from quant.timed_copies import Copies, start_copies
from quant.timed_copies_reference import ThreadCopies
from runner.devices.device import Buffer
from runner.devices.errors import Deadlock, ForeignBuffer, OutOfBounds
from runner.devices.link import LinkDevice
from runner.devices.link_queue import Failure, Mark, OperationQueue, Wait
from runner.devices.link_speed import LinkSpeed, parse_link
from runner.devices.link_stepped import RandomScheduler, SteppedExecutor
from runner.errors import OutOfMemory

FAST = LinkSpeed(1e12)
SEEDS = range(300)
NEW_COPIES: dict[str, Callable[[], Copies]] = {
    "threads": start_copies,
    "interpreter's threads": ThreadCopies,
    "stepped": start_copies,
}
WAIT_S = 30.0  # for what comes at once; a test that waits so long has failed


class BrokenKernel(Exception):
    """An error of work that is submitted."""


@pytest.fixture(params=["threads", "interpreter's threads", "stepped"])
def device(request: pytest.FixtureRequest) -> Iterator[LinkDevice]:
    scheduler = RandomScheduler(0) if request.param == "stepped" else None
    with closing(LinkDevice(FAST, scheduler=scheduler, new_copies=NEW_COPIES[request.param])) as device:
        yield device


@pytest.fixture(params=["threads", "interpreter's threads"])
def threaded(request: pytest.FixtureRequest) -> Iterator[LinkDevice]:
    with closing(LinkDevice(FAST, new_copies=NEW_COPIES[request.param])) as device:
        yield device


@contextmanager
def busy_compute(device: LinkDevice) -> Iterator[None]:
    """Keep the compute queue busy with one piece of work inside the `with`."""
    gate = threading.Event()
    device.launch(lambda: _wait(gate))
    try:
        yield
    finally:
        gate.set()


def _wait(gate: threading.Event) -> None:
    assert gate.wait(WAIT_S)


def raise_broken_kernel() -> None:
    raise BrokenKernel("a kernel failed")


def filled_chunk(device: LinkDevice, value: int, nbytes: int = 8) -> Buffer:
    chunk = device.new_chunk("chunk", nbytes)
    with device.host_write(chunk) as tensor:
        tensor.fill_(value)
    return chunk


def test_a_copy_writes_the_bytes_asked_for_and_no_others(device: LinkDevice) -> None:
    chunk = filled_chunk(device, 7)
    slot = device.new_slot("slot", 8)

    device.copy_in(chunk, slot, offset=2, nbytes=3)
    device.drain()

    assert slot.tensor.tolist() == [0, 0, 7, 7, 7, 0, 0, 0]


def test_a_copy_reads_plain_host_memory_too(device: LinkDevice) -> None:
    slot = device.new_slot("slot", 4)

    device.copy_in(torch.arange(6, dtype=torch.uint8), slot, offset=0, nbytes=4)
    device.drain()

    assert slot.tensor.tolist() == [0, 1, 2, 3]


def test_a_queue_runs_its_work_in_the_order_of_submission(device: LinkDevice) -> None:
    ran: list[int] = []
    for number in range(100):
        device.launch(lambda number=number: ran.append(number))  # type: ignore[misc]

    device.drain()

    assert ran == list(range(100))


def test_the_copy_queue_goes_on_while_the_compute_queue_is_busy(threaded: LinkDevice) -> None:
    slot = threaded.new_slot("slot", 8)
    copied = threaded.new_event("copied")
    with busy_compute(threaded):
        threaded.copy_in(filled_chunk(threaded, 7), slot, 0, 8)
        threaded.copies.record(copied)
        threaded.synchronize(copied)

        assert slot.tensor.tolist() == [7] * 8


def test_a_source_is_read_when_the_copy_runs(threaded: LinkDevice) -> None:
    source = torch.zeros(8, dtype=torch.uint8)
    slot = threaded.new_slot("slot", 8)
    computed = threaded.new_event("computed")
    with busy_compute(threaded):
        threaded.compute.record(computed)
        threaded.copies.wait(computed)
        threaded.copy_in(source, slot, 0, 8)
        source.fill_(9)
    threaded.drain()

    assert slot.tensor.tolist() == [9] * 8


def test_a_queue_waits_for_the_record_that_was_the_latest_at_the_call(threaded: LinkDevice) -> None:
    slot = threaded.new_slot("slot", 8)
    computed, copied = threaded.new_event("computed"), threaded.new_event("copied")
    threaded.compute.record(computed)
    threaded.copies.wait(computed)
    with busy_compute(threaded):
        threaded.compute.record(computed)
        threaded.copy_in(filled_chunk(threaded, 7), slot, 0, 8)
        threaded.copies.record(copied)
        threaded.synchronize(copied)

        assert slot.tensor.tolist() == [7] * 8


def test_recording_again_replaces_what_the_event_stood_for(threaded: LinkDevice) -> None:
    computed = threaded.new_event("computed")
    threaded.compute.record(computed)
    threaded.synchronize(computed)
    happened_first = threaded.has_happened(computed)
    with busy_compute(threaded):
        threaded.compute.record(computed)
        happened_again = threaded.has_happened(computed)

    assert (happened_first, happened_again) == (True, False)


def test_a_record_stands_for_all_before_it_and_nothing_behind_it(threaded: LinkDevice) -> None:
    ran: list[str] = []
    computed = threaded.new_event("computed")
    threaded.launch(lambda: ran.append("before"))
    threaded.compute.record(computed)
    with busy_compute(threaded):
        threaded.launch(lambda: ran.append("behind"))
        threaded.synchronize(computed)

        assert ran == ["before"]


def test_waiting_for_an_event_that_was_never_recorded_does_nothing(device: LinkDevice) -> None:
    event = device.new_event("event")

    device.compute.wait(event)
    device.synchronize(event)
    device.drain()

    assert device.has_happened(event)


def test_an_event_happens_sooner_or_later_if_one_asks_only(device: LinkDevice) -> None:
    event = device.new_event("event")
    device.launch(lambda: None)
    device.compute.record(event)
    deadline_s = time.monotonic() + WAIT_S

    while not device.has_happened(event):
        assert time.monotonic() < deadline_s


@pytest.mark.parametrize("call", ["synchronize", "drain", "launch", "record", "wait", "copy_in"])
def test_an_error_of_work_comes_up_at_the_next_call_as_it_is(device: LinkDevice, call: str) -> None:
    computed = device.new_event("computed")
    slot = device.new_slot("slot", 8)
    calls: dict[str, Callable[[], None]] = {
        "synchronize": lambda: device.synchronize(computed),
        "drain": device.drain,
        "launch": lambda: device.launch(lambda: None),
        "record": lambda: device.copies.record(computed),
        "wait": lambda: device.copies.wait(computed),
        "copy_in": lambda: device.copy_in(slot.tensor, slot, 0, 8),
    }
    device.launch(lambda: None)
    device.compute.record(computed)
    device.launch(raise_broken_kernel)
    with pytest.raises(BrokenKernel):
        device.drain()

    with pytest.raises(BrokenKernel, match="a kernel failed") as caught:
        calls[call]()

    assert caught.value.__notes__ == ["raised by launch (no. 2) of the compute queue"]


def test_work_behind_an_error_is_skipped_in_both_queues(threaded: LinkDevice) -> None:
    ran: list[str] = []
    slot = threaded.new_slot("slot", 8)
    computed = threaded.new_event("computed")
    with busy_compute(threaded):
        threaded.launch(raise_broken_kernel)
        threaded.launch(lambda: ran.append("behind"))
        threaded.compute.record(computed)
        threaded.copies.wait(computed)
        threaded.copy_in(torch.ones(8, dtype=torch.uint8), slot, 0, 8)
    with pytest.raises(BrokenKernel):
        threaded.drain()

    assert (ran, slot.tensor.sum().item()) == ([], 0)


def test_a_copy_behind_what_the_waiting_thread_is_to_compute_is_reached(device: LinkDevice) -> None:
    ran: list[str] = []
    slot = device.new_slot("slot", 8)
    first, computed, second = (device.new_event(name) for name in ("first", "computed", "second"))
    device.copy_in(torch.ones(8, dtype=torch.uint8), slot, 0, 8)
    device.copies.record(first)
    device.compute.wait(first)
    device.launch(lambda: ran.append("computed"), is_awaited=True)
    device.compute.record(computed)
    device.copies.wait(computed)
    device.copy_in(torch.full((8,), 2, dtype=torch.uint8), slot, 0, 8)
    device.copies.record(second)

    device.synchronize(second)

    assert ran == ["computed"]
    assert slot.tensor.tolist() == [2] * 8


def test_closing_raises_an_error_that_nobody_was_told_of() -> None:
    device = LinkDevice(FAST)
    device.launch(raise_broken_kernel)

    with pytest.raises(BrokenKernel):
        device.close()


def test_closing_does_not_repeat_an_error() -> None:
    device = LinkDevice(FAST)
    device.launch(raise_broken_kernel)
    with pytest.raises(BrokenKernel):
        device.drain()

    device.close()


@pytest.mark.parametrize("scheduler", [None, RandomScheduler(0)])
def test_closing_runs_what_was_submitted_and_leaves_no_thread(scheduler: RandomScheduler | None) -> None:
    threads_before = set(threading.enumerate())
    ran: list[int] = []
    device = LinkDevice(FAST, scheduler=scheduler)
    for number in range(10):
        device.launch(lambda number=number: ran.append(number))  # type: ignore[misc]

    device.close()

    assert ran == list(range(10))
    assert set(threading.enumerate()) == threads_before


def test_several_host_threads_may_call_at_once(device: LinkDevice) -> None:
    counts = [0] * 4
    failures: list[BaseException] = []

    def add(number: int) -> None:
        counts[number] += 1

    def call(number: int) -> None:
        event = device.new_event(f"event {number}")
        for expected in range(1, 101):
            device.launch(lambda: add(number))
            device.compute.record(event)
            device.copies.wait(event)
            device.synchronize(event)
            if counts[number] != expected:
                failures.append(AssertionError(f"{counts[number]} instead of {expected}"))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)

    assert (counts, failures) == ([100] * 4, [])


def test_copies_take_what_they_take_on_the_link() -> None:
    source = torch.zeros(1000, dtype=torch.uint8)
    with closing(LinkDevice(parse_link("link:1MB/s,500us"))) as device:
        slot = device.new_slot("slot", 1000)
        started_s = time.monotonic()
        for _ in range(20):
            device.copy_in(source, slot, 0, 1000)
        device.drain()
        took_s = time.monotonic() - started_s

    assert took_s >= 20 * 1.5e-3


def test_the_host_goes_on_while_a_copy_takes_its_time() -> None:
    with closing(LinkDevice(parse_link("link:1MB/s"))) as device:
        slot, copied = device.new_slot("slot", 100_000), device.new_event("copied")
        device.copy_in(torch.zeros(100_000, dtype=torch.uint8), slot, 0, 100_000)
        device.copies.record(copied)
        n_asked = 0
        while not device.has_happened(copied):
            n_asked += 1

    assert n_asked > 100  # in 100 ms; a handful if the waiting thread held the interpreter's lock


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 9), (8, 1), (-1, 2), (0, 0), (4, -1)])
def test_a_copy_outside_of_a_slot_is_refused(device: LinkDevice, offset: int, nbytes: int) -> None:
    slot = device.new_slot("slot 3", 8)

    with pytest.raises(OutOfBounds, match=rf"slot 3 has 8 bytes; \[{offset}:{offset + nbytes}\] asked|host memory"):
        device.copy_in(torch.zeros(64, dtype=torch.uint8), slot, offset, nbytes)


def test_a_copy_of_more_bytes_than_its_source_has_is_refused(device: LinkDevice) -> None:
    slot = device.new_slot("slot", 8)

    with pytest.raises(OutOfBounds, match=r"host memory has 4 bytes; \[0:8\] asked"):
        device.copy_in(torch.zeros(4, dtype=torch.uint8), slot, 0, 8)


def test_a_source_of_other_than_bytes_is_refused(device: LinkDevice) -> None:
    slot = device.new_slot("slot", 8)

    with pytest.raises(OutOfBounds, match="host memory is not a row of bytes"):
        device.copy_in(torch.zeros(8), slot, 0, 8)


def test_what_belongs_to_another_device_is_refused(device: LinkDevice) -> None:
    with closing(LinkDevice(FAST, scheduler=RandomScheduler(0))) as other:
        slot, event = other.new_slot("slot", 8), other.new_event("ready")

        with pytest.raises(ForeignBuffer, match="slot is no buffer of this device"):
            device.launch(lambda: None, reads=[slot])
        with pytest.raises(ForeignBuffer, match="ready is no event of this device"):
            device.compute.wait(event)


def test_memory_that_cannot_be_had_is_out_of_memory(device: LinkDevice) -> None:
    with pytest.raises(OutOfMemory, match="slot: 1152921504606846976 bytes cannot be had"):
        device.new_slot("slot", 1 << 60)


def test_queues_that_wait_for_what_nobody_records_are_a_deadlock() -> None:
    queues = (OperationQueue("copy queue"), OperationQueue("compute queue"))
    executor = SteppedExecutor(queues, Failure(), RandomScheduler(0))
    executor.submit(queues[0], Wait(Mark("slot 3 ready")))

    with pytest.raises(
        Deadlock, match="nothing can run: the copy queue waits for slot 3 ready; the compute queue is empty"
    ):
        executor.reach(Mark("chunk 1 copied"))


def order_of(seed: int, *, waits: bool) -> str:
    """Return the order in which two copies, c and d, and two launches, x and y, ran; with `waits`, x after d."""
    ran: list[str] = []
    with closing(LinkDevice(FAST, scheduler=RandomScheduler(seed))) as device:
        slots = [device.new_slot(name, 1) for name in "cd"]
        copied = device.new_event("copied")

        def note(name: str) -> None:
            ran.extend(slot.name for slot in slots if slot.tensor.item() == 1 and slot.name not in ran)
            ran.append(name)

        for slot in slots:
            device.copy_in(torch.ones(1, dtype=torch.uint8), slot, 0, 1)
        device.copies.record(copied)
        if waits:
            device.compute.wait(copied)
        for name in "xy":
            device.launch(lambda name=name: note(name))  # type: ignore[misc]
    return "".join(ran)


def test_one_seed_is_one_order() -> None:
    assert [order_of(seed, waits=False) for seed in SEEDS] == [order_of(seed, waits=False) for seed in SEEDS]


def test_many_seeds_are_all_orders() -> None:
    orders = {order_of(seed, waits=False) for seed in SEEDS}

    # Copies that run behind the last launch are not noted.
    assert orders == {"cdxy", "cxdy", "cxy", "xcdy", "xcy", "xy"}


def test_no_seed_runs_what_waits_before_its_event() -> None:
    assert {order_of(seed, waits=True) for seed in SEEDS} == {"cdxy"}


def test_the_host_is_far_ahead_of_the_queues_with_some_seeds_and_not_at_all_with_others() -> None:
    ran_at_the_last_call = set()
    for seed in SEEDS:
        ran: list[int] = []
        with closing(LinkDevice(FAST, scheduler=RandomScheduler(seed))) as device:
            for number in range(4):
                device.launch(lambda number=number, ran=ran: ran.append(number))  # type: ignore[misc]
            ran_at_the_last_call.add(len(ran))

    assert ran_at_the_last_call == {0, 1, 2, 3}
