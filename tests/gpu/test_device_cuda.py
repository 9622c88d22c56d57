"""A GPU as a device, and a model on it. The same rules hold without one on the stand-in accelerator, in
tests/unit/runner/devices and tests/integration/test_device_model.py."""

import os
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.segment import SegmentBuilder, map_segment
from runner.config import RunnerConfig
from runner.devices.cuda import CudaDevice
from runner.devices.cuda_registration import HostRange, LibCuda, Refused, register
from runner.devices.cuda_runtime import TorchRuntime
from runner.engine import Engine
from runner.errors import OutOfMemory
from runner.experts.counters import Tally
from runner.experts.slots import SlotTable
from runner.experts.transfer import CopyEngine, new_slots
from tests.support.local_store import LocalStore
from tests.support.reference import relative_difference
from tests.support.small_stores import SmallStore, make_small_store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch.cuda finds none")

MIB = 1 << 20
FP32_TOLERANCE = 1e-4
FP16_TOLERANCE = 5e-3
PROMPT = [5 + 7 * place % 80 for place in range(60)]


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice(TorchRuntime(0))
    yield device
    device.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_small_store(tmp_path_factory.mktemp("gpu"), n_experts=8, n_layers=3)


def record_of(seed: int, nbytes: int) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def engine_on_gpu(store: SmallStore, **options: Any) -> Engine:  # noqa: ANN401  # RunnerConfig's, which checks them
    defaults: dict[str, Any] = {"device": "cuda:0", "threads": 1, "context": 256}
    return Engine(LocalStore(store.path), RunnerConfig(**(defaults | options)))


@pytest.mark.parametrize("n_stagers", [1, 4])
@pytest.mark.parametrize("nbytes", [4096, 9 * MIB + 4096])
def test_records_lie_in_their_slots_byte_for_byte(device: CudaDevice, nbytes: int, n_stagers: int) -> None:
    slots, tally = new_slots(device, 4, nbytes), Tally()
    table = SlotTable((4,), 0, tally)

    with CopyEngine(device, slots, table, tally, chunk_nbytes=2 * MIB, n_stagers=n_stagers) as engine:
        claims = []
        with engine.condition:
            for expert in range(4):
                claim = table.claim(0, expert)
                assert claim is not None
                engine.submit(claim.slot, record_of(expert, nbytes), is_demand=True)
                claims.append(claim)
            while not all(table.is_ready(claim.slot) for claim in claims):
                engine.wait()
        device.drain()

        for expert, claim in enumerate(claims):
            assert torch.equal(slots[claim.slot].buffer.tensor.cpu(), record_of(expert, nbytes))


def test_memory_that_the_gpu_does_not_have_is_refused_in_one_line(device: CudaDevice) -> None:
    with pytest.raises(OutOfMemory, match=r"^cuda:0: slot 0 of \d+ bytes: ") as refused:
        device.new_slot("slot 0", 1 << 45)

    assert "\n" not in str(refused.value)


def test_a_sealed_mapping_is_page_locked_or_refused_with_a_reason(device: CudaDevice) -> None:
    device.new_slot("slot", 4096)  # so that the thread has a context
    with SegmentBuilder("gpu-test", 4 * MIB) as builder:
        builder.populate(0, 4 * MIB, collapse_until=monotonic())
        fd = builder.seal()
    memory = torch.frombuffer(map_segment(fd, 4 * MIB), dtype=torch.uint8)
    os.close(fd)

    outcome = register(LibCuda(), [HostRange(memory.data_ptr(), 4 * MIB)], is_read_only=True)

    if isinstance(outcome, Refused):
        assert outcome.reason.startswith("CUDA_ERROR_")
    else:
        assert outcome.nbytes == 4 * MIB
        outcome.close()


def test_logits_are_the_cpus(store: SmallStore) -> None:
    with store.engine() as engine:
        expected = engine.logits(PROMPT)

    with engine_on_gpu(store, exact=True, cache_experts=2) as engine:
        logits = engine.logits(PROMPT)

    assert relative_difference(logits, expected) < FP32_TOLERANCE


def test_logits_in_fp16_are_near_the_cpus(tmp_path_factory: pytest.TempPathFactory) -> None:
    # All experts are chosen: where two are nearly as good, rounding would choose another one.
    store = make_small_store(tmp_path_factory.mktemp("all"), n_experts=2, top_k=2)
    with store.engine() as engine:
        expected = engine.logits(PROMPT)

    with engine_on_gpu(store, cache_experts=2) as engine:
        logits = engine.logits(PROMPT)

    assert relative_difference(logits, expected) < FP16_TOLERANCE


@pytest.mark.parametrize("k", range(2, 8))
def test_logits_and_tokens_have_the_same_bits_whatever_is_cached(store: SmallStore, k: int) -> None:
    with engine_on_gpu(store, cache_experts=8, prefetch_depth=0) as engine:
        expected = engine.logits(PROMPT), list(engine.generate(PROMPT, max_new_tokens=40))

    with engine_on_gpu(store, cache_experts=k) as engine:
        logits, token_ids = engine.logits(PROMPT), list(engine.generate(PROMPT, max_new_tokens=40))

    assert torch.equal(logits, expected[0])
    assert token_ids == expected[1]


def test_no_more_memory_is_used_than_was_planned(store: SmallStore) -> None:
    torch.cuda.reset_peak_memory_stats(0)

    with engine_on_gpu(store, cache_experts=4) as engine:
        engine.logits(PROMPT)
        planned_nbytes = engine.planned_nbytes

    assert planned_nbytes is not None
    assert torch.cuda.max_memory_reserved(0) <= planned_nbytes


def test_a_closed_engine_gives_the_gpus_memory_back(store: SmallStore) -> None:
    with engine_on_gpu(store, cache_experts=8) as engine:
        engine.logits(PROMPT)
        held_nbytes = torch.cuda.memory_allocated(0)

    assert torch.cuda.memory_allocated(0) < held_nbytes
