import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch

from quant.timed_copies import start_copies
from quant.timed_copies_reference import ThreadCopies
from runner.devices.device import Buffer
from runner.devices.errors import UnorderedAccess, UnrecordedEvent
from runner.devices.link import LinkDevice, LinkEvent
from runner.devices.link_speed import LinkSpeed
from runner.devices.link_stepped import RandomScheduler
from runner.devices.vector_clocks import Clock

SPEED = LinkSpeed(1e12)
NBYTES = 8
SEEDS = [None, *range(300)]  # None: in real time
WAIT_S = 30.0  # for what comes at once; a test that waits so long has failed


@pytest.fixture(params=["threads", "interpreter's threads", "stepped"])
def device(request: pytest.FixtureRequest) -> Iterator[LinkDevice]:
    scheduler = RandomScheduler(0) if request.param == "stepped" else None
    new_copies = ThreadCopies if request.param == "interpreter's threads" else start_copies
    with closing(LinkDevice(SPEED, strict=True, scheduler=scheduler, new_copies=new_copies)) as device:
        yield device


def strict_device(seed: int | None) -> LinkDevice:
    scheduler = None if seed is None else RandomScheduler(seed)
    return LinkDevice(SPEED, strict=True, scheduler=scheduler)


def new_buffers(device: LinkDevice) -> tuple[Buffer, Buffer]:
    """Return a slot and a chunk that the calling thread has filled."""
    slot, chunk = device.new_slot("slot 3", NBYTES), device.new_chunk("chunk 1", NBYTES)
    fill(device, chunk)
    return slot, chunk


def fill(device: LinkDevice, chunk: Buffer, value: int = 1) -> None:
    with device.host_write(chunk) as tensor:
        tensor.fill_(value)


def nothing() -> None:
    """Stand for a kernel: what it touches is said at the launch."""


def _wait(gate: threading.Event) -> None:
    assert gate.wait(WAIT_S)


def in_thread(call: Callable[[], None]) -> None:
    """Call it in a thread of its own; raise what it raises."""
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            call()
        except UnorderedAccess as error:
            errors.put(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    thread.join(WAIT_S)
    if not errors.empty():
        raise errors.get()


def read_slot_without_waiting_for_ready(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    ready = device.new_event("ready")
    device.copy_in(chunk, slot, 0, NBYTES)
    device.copies.record(ready)
    device.launch(nothing, reads=[slot])


def refill_without_waiting_for_last_use(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    ready, last_use = device.new_event("ready"), device.new_event("last_use")
    device.copy_in(chunk, slot, 0, NBYTES)
    device.copies.record(ready)
    device.compute.wait(ready)
    device.launch(nothing, reads=[slot])
    device.compute.record(last_use)
    device.copy_in(chunk, slot, 0, NBYTES)


def fill_chunk_before_its_copy_is_done(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    copied = device.new_event("copied")
    device.copy_in(chunk, slot, 0, NBYTES)
    device.copies.record(copied)
    fill(device, chunk)


def read_ids_without_synchronizing(device: LinkDevice) -> None:
    ids = device.new_host_buffer("ids", torch.zeros(2, dtype=torch.int64))
    written = device.new_event("written")
    device.launch(nothing, writes=[ids])
    device.compute.record(written)
    with device.host_read(ids):
        pass


def record_ready_before_the_last_copy(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    ready = device.new_event("ready")
    device.copy_in(chunk, slot, 0, NBYTES // 2)
    device.copies.record(ready)
    device.copy_in(chunk, slot, NBYTES // 2, NBYTES // 2)
    device.compute.wait(ready)
    device.launch(nothing, reads=[slot])


def write_ids_while_the_host_reads_them(device: LinkDevice) -> None:
    ids = device.new_host_buffer("ids", torch.zeros(2, dtype=torch.int64))
    with device.host_read(ids):
        device.launch(nothing, writes=[ids])


def release_chunk_before_its_copy_is_done(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    device.copy_in(chunk, slot, 0, NBYTES)
    device.release_chunk(chunk)


def all_in_the_right_order(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    ids = device.new_host_buffer("ids", torch.zeros(2, dtype=torch.int64))
    ready, last_use, copied, written = (device.new_event(name) for name in ("ready", "last_use", "copied", "written"))
    for turn in range(4):
        if turn > 0:
            device.synchronize(copied)
            device.release_chunk(chunk)
            fill(device, chunk, turn)
            device.copies.wait(last_use)
        device.poison_slot(slot)
        device.copy_in(chunk, slot, 0, NBYTES)
        device.copies.record(copied)
        device.copies.record(ready)
        device.compute.wait(ready)
        device.launch(nothing, reads=[slot], writes=[ids])
        device.compute.record(last_use)
        device.compute.record(written)
        device.synchronize(written)
        with device.host_read(ids):
            pass


@pytest.mark.parametrize(
    ("mistake", "story"),
    [
        (
            read_slot_without_waiting_for_ready,
            r"slot 3: no event orders launch \(no. 2\) of the compute queue, which reads it,"
            r" after the copy of chunk 1 into slot 3\[0:8\] \(no. 1\) of the copy queue, which writes it",
        ),
        (
            refill_without_waiting_for_last_use,
            r"slot 3: no event orders the copy of chunk 1 into slot 3\[0:8\] \(no. 3\) of the copy queue,"
            r" which writes it, after launch \(no. 2\) of the compute queue, which reads it",
        ),
        (
            fill_chunk_before_its_copy_is_done,
            r"chunk 1: no event orders host_write of the host thread 1 \(MainThread\), which writes it,"
            r" after the copy of chunk 1 into slot 3\[0:8\] \(no. 1\) of the copy queue, which reads it",
        ),
        (
            read_ids_without_synchronizing,
            r"ids: no event orders host_read of the host thread 1 \(MainThread\), which reads it,"
            r" after launch \(no. 1\) of the compute queue, which writes it",
        ),
        (record_ready_before_the_last_copy, r"slot 3: .* after the copy of chunk 1 into slot 3\[4:8\] \(no. 2\)"),
        (write_ids_while_the_host_reads_them, r"ids: launch \(no. 1\) .* which writes it, during host_read"),
        (release_chunk_before_its_copy_is_done, r"chunk 1: no event orders release_chunk"),
    ],
)
def test_an_access_that_no_event_orders_is_refused_in_every_order(
    mistake: Callable[[LinkDevice], None], story: str
) -> None:
    for seed in SEEDS:
        with closing(strict_device(seed)) as device, pytest.raises(UnorderedAccess, match=f"^{story}"):
            mistake(device)


def test_accesses_that_events_order_are_accepted_in_every_order() -> None:
    for seed in SEEDS:
        with closing(strict_device(seed)) as device:
            all_in_the_right_order(device)


def test_an_access_is_refused_even_if_the_earlier_one_was_over_long_ago(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    ready, other = device.new_event("ready"), device.new_event("other")
    device.copy_in(chunk, slot, 0, NBYTES)
    device.copies.record(ready)
    device.compute.record(other)
    assert isinstance(ready, LinkEvent)
    assert ready.latest is not None
    while not ready.latest.is_reached:
        device.has_happened(other)

    with pytest.raises(UnorderedAccess):
        device.launch(nothing, reads=[slot])


def test_a_host_thread_that_saw_an_event_happen_is_ordered_after_it(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    copied = device.new_event("copied")
    device.copy_in(chunk, slot, 0, NBYTES)
    device.copies.record(copied)
    while not device.has_happened(copied):
        pass

    fill(device, chunk)


def test_asking_for_an_event_that_has_not_happened_orders_nothing() -> None:
    gate = threading.Event()
    with closing(strict_device(None)) as device:
        ids = device.new_host_buffer("ids", torch.zeros(2, dtype=torch.int64))
        written = device.new_event("written")
        device.launch(lambda: _wait(gate), writes=[ids])
        device.compute.record(written)
        has_happened = device.has_happened(written)
        try:
            with pytest.raises(UnorderedAccess), device.host_read(ids):
                pass
        finally:
            gate.set()

    assert not has_happened


def test_a_host_thread_that_drained_the_device_is_ordered_after_both_queues(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    ids = device.new_host_buffer("ids", torch.zeros(2, dtype=torch.int64))
    device.copy_in(chunk, slot, 0, NBYTES)
    device.launch(nothing, writes=[ids])
    device.drain()

    fill(device, chunk)
    with device.host_read(ids):
        pass


def test_what_the_host_synchronized_for_is_before_all_it_submits(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    copied = device.new_event("copied")
    device.copy_in(chunk, slot, 0, NBYTES)
    device.copies.record(copied)
    device.synchronize(copied)

    device.launch(nothing, reads=[slot])


@pytest.mark.parametrize("asks", ["wait", "synchronize", "has_happened"])
def test_waiting_for_an_event_that_was_never_recorded_is_refused(device: LinkDevice, asks: str) -> None:
    ready = device.new_event("slot 3 ready")
    calls: dict[str, Callable[[], object]] = {
        "wait": lambda: device.compute.wait(ready),
        "synchronize": lambda: device.synchronize(ready),
        "has_happened": lambda: device.has_happened(ready),
    }

    with pytest.raises(UnrecordedEvent, match="slot 3 ready is waited for and was never recorded"):
        calls[asks]()


def test_a_thread_that_was_told_nothing_may_not_touch_what_another_one_wrote(device: LinkDevice) -> None:
    _, chunk = new_buffers(device)

    with pytest.raises(UnorderedAccess, match=r"host_write of the host thread 2 \(other\)"):
        in_thread(lambda: fill(device, chunk))


def test_a_thread_may_touch_what_was_published_and_observed(device: LinkDevice) -> None:
    _, chunk = new_buffers(device)
    clock = device.publish()

    def refill() -> None:
        device.observe(clock)
        fill(device, chunk)

    in_thread(refill)


def test_what_a_thread_does_after_it_published_is_not_known_to_who_observes(device: LinkDevice) -> None:
    _, chunk = new_buffers(device)
    clock = device.publish()
    fill(device, chunk)

    def refill() -> None:
        device.observe(clock)
        fill(device, chunk)

    with pytest.raises(UnorderedAccess):
        in_thread(refill)


def test_what_a_thread_knows_of_a_queue_is_published_too(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    device.copy_in(chunk, slot, 0, NBYTES)
    device.drain()
    clock = device.publish()

    def launch() -> None:
        device.observe(clock)
        device.launch(nothing, reads=[slot])

    in_thread(launch)


def test_a_thread_may_submit_for_another_one_that_recorded(device: LinkDevice) -> None:
    """The event alone orders the kernel after the copy, whichever threads called."""
    slot, chunk = new_buffers(device)
    ready = device.new_event("ready")
    device.copy_in(chunk, slot, 0, NBYTES)
    device.copies.record(ready)

    def launch() -> None:
        device.compute.wait(ready)
        device.launch(nothing, reads=[slot])

    in_thread(launch)


def test_a_filling_thread_and_a_computing_thread_hand_slots_over_through_a_lock() -> None:
    with closing(strict_device(None)) as device:
        slot, chunk = new_buffers(device)
        ready, last_use, copied = (device.new_event(name) for name in ("ready", "last_use", "copied"))
        to_fill: queue.SimpleQueue[Clock] = queue.SimpleQueue()
        to_use: queue.SimpleQueue[Clock] = queue.SimpleQueue()
        initial = device.publish()

        def fill_slots() -> None:
            device.observe(initial)
            for turn in range(50):
                if turn > 0:
                    device.observe(to_fill.get(timeout=WAIT_S))
                    device.synchronize(copied)
                    device.copies.wait(last_use)
                fill(device, chunk, turn)
                device.poison_slot(slot)
                device.copy_in(chunk, slot, 0, NBYTES)
                device.copies.record(copied)
                device.copies.record(ready)
                to_use.put(device.publish())

        seen: list[int] = []
        filling = threading.Thread(target=fill_slots)
        filling.start()
        for _ in range(50):
            device.observe(to_use.get(timeout=WAIT_S))
            device.compute.wait(ready)
            device.launch(lambda: seen.append(int(slot.tensor.max())), reads=[slot])
            device.compute.record(last_use)
            to_fill.put(device.publish())
        filling.join(WAIT_S)
        device.drain()

    assert seen == list(range(50))


def test_memory_that_nobody_wrote_is_poison(device: LinkDevice) -> None:
    slot, chunk = device.new_slot("slot", NBYTES), device.new_chunk("chunk", NBYTES)

    assert slot.tensor.tolist() == chunk.tensor.tolist() == [0xFF] * NBYTES


def test_a_slot_is_poisoned_in_its_turn_on_the_copy_queue(device: LinkDevice) -> None:
    slot, chunk = new_buffers(device)
    device.copy_in(chunk, slot, 0, NBYTES)
    device.poison_slot(slot)
    device.copy_in(chunk, slot, 0, NBYTES // 2)
    device.drain()

    assert slot.tensor.tolist() == [1] * 4 + [0xFF] * 4


def test_a_chunk_is_poisoned_when_it_is_released(device: LinkDevice) -> None:
    _, chunk = new_buffers(device)

    device.release_chunk(chunk)

    assert chunk.tensor.tolist() == [0xFF] * NBYTES


def test_a_device_that_is_not_strict_poisons_nothing_and_refuses_nothing() -> None:
    with closing(LinkDevice(SPEED)) as device:
        slot, chunk = new_buffers(device)
        device.release_chunk(chunk)
        device.copy_in(chunk, slot, 0, NBYTES)
        device.launch(nothing, reads=[slot])
        device.drain()

        assert slot.tensor.tolist() == [1] * NBYTES
