"""What a step on a device asks for beside what is planned, as torch's own profiler counts it on the CPU.

The device is a GPU's code over a runtime that does all at once, in the calling thread, as the profiler needs it. What
the step asks of the host is counted with it.
"""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from expertd.convert.config import QuantizeConfig
from quant.device_parts import DeviceExpert
from quant.torch_products import TorchProducts
from runner.devices.cuda import CudaDevice
from runner.engine import Engine
from runner.models.device_memory import step_nbytes
from tests.support.device_models import engine_on, link
from tests.support.small_stores import SmallStore, make_small_store
from tests.unit.runner.devices.fake_cuda import FakeRuntime

CONTEXT = 1024
CHUNK = 128


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    folder: Path = tmp_path_factory.mktemp("memory")
    return make_small_store(folder, QuantizeConfig(), hidden=256, intermediate=512, n_heads=8, n_experts=4)


class OneStrip(TorchProducts):
    """Says what products of small parts take: one strip, where torch's products say what a whole one takes at most."""

    def workspace_nbytes(self, n_tokens: int, expert: DeviceExpert) -> int:
        rows, cols = expert.gate.part.rows, expert.gate.part.cols
        return rows * cols * 16 + n_tokens * (cols * 4 + rows * 14)


def peak_nbytes(engine: Engine, n_tokens: int, n_before: int) -> int:
    """Return the most memory that is held at once in a step of so many tokens behind others."""
    sequence = engine.new_sequence()
    sequence.append([3 + place % 90 for place in range(n_before)])
    engine.step([sequence])
    sequence.append([5 + place % 80 for place in range(n_tokens)])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine.step([sequence])
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda change: change.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("n_tokens", "n_before"), [(1, 10), (1, 1000), (15, 200), (16, 900), (CHUNK, 1), (CHUNK, 890)])
def test_a_step_asks_for_no_more_memory_than_is_planned(
    store: SmallStore, n_tokens: int, n_before: int, *, exact: bool
) -> None:
    device = CudaDevice(FakeRuntime())

    with engine_on(store, device, exact=exact, cache_experts=4, prefill_chunk=CHUNK, context=CONTEXT) as engine:
        peak = peak_nbytes(engine, n_tokens, n_before)
        planned = step_nbytes(
            engine.store,
            engine.config,
            OneStrip(torch.device("cpu"), torch.float32 if exact else torch.float16),
            n_tokens=n_tokens,
            context=CONTEXT,
            kv_dtype=torch.float32 if exact else torch.float16,
        )

    # What is planned has to suffice, and not for something else.
    assert planned / 4 < peak <= planned


def test_the_model_computes_on_a_gpus_streams_what_it_computes_on_the_stand_in(store: SmallStore) -> None:
    prompt = [7 + place % 80 for place in range(40)]
    with engine_on(store, link(), cache_experts=2) as engine:
        expected = engine.logits(prompt)

    with engine_on(store, CudaDevice(FakeRuntime()), cache_experts=2) as engine:
        logits = engine.logits(prompt)

    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
