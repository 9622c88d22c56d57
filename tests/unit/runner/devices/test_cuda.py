"""A GPU as a device, as far as that can be tried without one: over a runtime that does at once what it is told."""

import pytest
import torch

from quant.workspace import Workspace
from runner.devices.cuda import CudaDevice
from runner.devices.errors import ForeignBuffer, OutOfBounds, UnrecordedEvent
from runner.errors import DeviceFailed, OutOfMemory
from runner.experts.cache import CachedExperts, CacheSettings
from runner.experts.compute import CExperts
from tests.unit.runner.devices.fake_cuda import FakeRuntime
from tests.unit.runner.experts.rehearsal import computed_in_place, random_steps
from tests.unit.runner.experts.tiny_store import N_LAYERS, RECORD_NBYTES, TinyStore


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def device(runtime: FakeRuntime) -> CudaDevice:
    return CudaDevice(runtime)


def test_a_copy_into_a_slot_goes_to_the_copy_stream(runtime: FakeRuntime, device: CudaDevice) -> None:
    slot, chunk = device.new_slot("slot", 64), device.new_chunk("chunk", 16)
    with device.host_write(chunk) as memory:
        memory.copy_(torch.arange(16, dtype=torch.uint8))
    runtime.calls.clear()

    device.copy_in(chunk, slot, 32, 8)

    assert runtime.calls == ["urgent copies 8"]
    assert slot.tensor[32:40].tolist() == list(range(8))


def test_the_first_copy_into_a_slot_waits_for_what_its_memory_was_used_for_before(
    runtime: FakeRuntime, device: CudaDevice
) -> None:
    device.new_slot("slot", 64)

    recorded, waited = runtime.calls
    assert recorded.startswith("plain records ")
    assert waited == recorded.replace("plain records", "urgent waits for")


def test_launched_work_runs_on_the_compute_stream(runtime: FakeRuntime, device: CudaDevice) -> None:
    slot, out = device.new_slot("slot", 4), torch.zeros(4, dtype=torch.uint8)
    runtime.calls.clear()

    def work() -> None:
        out.copy_(slot.tensor)

    device.launch(work, reads=[slot])

    assert runtime.calls == ["plain copies 4"]


def test_an_event_stands_between_the_streams_it_was_recorded_and_waited_for_on(
    runtime: FakeRuntime, device: CudaDevice
) -> None:
    event = device.new_event("ready")

    device.copies.record(event)
    device.compute.wait(event)
    device.synchronize(event)

    recorded = runtime.calls[0].removeprefix("urgent records ")
    assert runtime.calls == [
        f"urgent records {recorded}",
        f"plain waits for {recorded}",
        f"event {recorded} synchronized",
    ]


@pytest.mark.parametrize("call", ["wait", "synchronize", "has_happened"])
def test_waiting_for_an_event_that_was_never_recorded_is_refused(device: CudaDevice, call: str) -> None:
    event = device.new_event("slot 3 ready")
    calls = {"wait": device.compute.wait, "synchronize": device.synchronize, "has_happened": device.has_happened}

    with pytest.raises(UnrecordedEvent, match="slot 3 ready was never recorded"):
        calls[call](event)


def test_memory_that_the_gpu_does_not_have_is_named() -> None:
    device = CudaDevice(FakeRuntime(device_nbytes=100))

    with pytest.raises(
        OutOfMemory, match=r"cpu: slot 0 of 4096 bytes: CUDA out of memory. Tried to allocate 4096 bytes.$"
    ):
        device.new_slot("slot 0", 4096)


def test_what_cuda_reports_is_one_line_of_ours(device: CudaDevice) -> None:
    def fail() -> None:
        raise torch.AcceleratorError(
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
        )

    with pytest.raises(DeviceFailed, match=r"^cpu: computing: CUDA error: an illegal memory access was encountered$"):
        device.launch(fail)


def test_a_mistake_of_ours_in_launched_work_is_raised_as_it_is(device: CudaDevice) -> None:
    def fail() -> None:
        raise ValueError("no such expert")

    with pytest.raises(ValueError, match="no such expert"):
        device.launch(fail)


def test_buffers_and_events_of_another_gpu_are_refused(device: CudaDevice) -> None:
    other = CudaDevice(FakeRuntime())

    with pytest.raises(ForeignBuffer):
        device.copy_in(other.new_chunk("chunk", 8), device.new_slot("slot", 8), 0, 8)
    with pytest.raises(ForeignBuffer):
        device.launch(lambda: None, writes=[other.new_slot("slot", 8)])
    with pytest.raises(ForeignBuffer):
        device.copies.record(other.new_event("event"))


@pytest.mark.parametrize(
    ("offset", "nbytes", "said"),
    [
        (-1, 4, r"slot has 8 bytes; \[-1:3\] asked"),
        (5, 4, r"slot has 8 bytes; \[5:9\] asked"),
        (0, 0, "the source has 16 bytes"),
        (0, 17, "the source has 16 bytes"),
    ],
)
def test_bytes_outside_of_a_buffer_are_refused(device: CudaDevice, offset: int, nbytes: int, said: str) -> None:
    slot, chunk = device.new_slot("slot", 8), device.new_chunk("chunk", 16)

    with pytest.raises(OutOfBounds, match=said):
        device.copy_in(chunk, slot, offset, nbytes)


def test_a_closed_device_has_drained_both_streams_and_gives_its_slots_back(
    runtime: FakeRuntime, device: CudaDevice
) -> None:
    slot = device.new_slot("slot", 64)
    runtime.calls.clear()

    device.close()

    assert runtime.calls == ["urgent synchronized", "plain synchronized", "gave back"]
    assert slot.tensor.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("is_direct", [False, True])
def test_the_cache_computes_over_it_what_is_computed_in_place(*, is_direct: bool) -> None:
    steps = random_steps(7, n_steps=12)
    device = CudaDevice(FakeRuntime())
    settings = CacheSettings((2,) * N_LAYERS, n_spares=2, chunk_nbytes=RECORD_NBYTES // 3, is_direct=is_direct)

    with (
        Workspace() as workspace,
        CachedExperts(TinyStore(), device, CExperts(TinyStore().manifest, workspace), settings) as experts,
    ):
        outputs = [
            experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights).clone() for step in steps
        ]
    device.close()

    assert all(torch.equal(*both) for both in zip(outputs, computed_in_place(steps), strict=True))
