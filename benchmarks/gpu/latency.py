"""How long an expert that is needed now takes to be there: with an idle link, and behind a prefetch under way."""

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.gpu.figures import MIB, open_gpu
from benchmarks.gpu.steps import StepInput
from runner.devices.device import Device
from runner.experts.counters import Tally
from runner.experts.slots import SlotTable
from runner.experts.transfer import CHUNK_NBYTES, CopyEngine, DeviceSlot, new_slots

# About one of Mixtral's experts at 4 bits.
_RECORD_NBYTES = 94 * MIB
_N_TRIALS = 5
_N_STAGERS = 4
_POLL_S = 1e-4


def measure(_: StepInput) -> dict[str, object]:
    """Return both times for chunks of some sizes."""
    device = open_gpu()
    try:
        return {
            f"{chunk // MIB} MiB": demand_ms(device, _RECORD_NBYTES, chunk)
            for chunk in (2 * MIB, CHUNK_NBYTES, 32 * MIB)
        }
    finally:
        device.close()


def demand_ms(device: Device, record_nbytes: int, chunk_nbytes: int) -> dict[str, float]:
    """Return milliseconds from asking for a record to its being there, alone and while another is prefetched."""
    source = torch.zeros(record_nbytes, dtype=torch.uint8)
    slots = new_slots(device, 4, record_nbytes)
    alone = [_demand_s(device, slots, source, chunk_nbytes) for _ in range(_N_TRIALS)]
    behind = [_demand_s(device, slots, source, chunk_nbytes, prefetches=True) for _ in range(_N_TRIALS)]
    return {"alone": round(median(alone) * 1e3, 3), "behind a prefetch": round(median(behind) * 1e3, 3)}


def _demand_s(
    device: Device, slots: Sequence[DeviceSlot], source: Tensor, chunk_nbytes: int, *, prefetches: bool = False
) -> float:
    tally = Tally()
    table = SlotTable((2,), 2, tally)
    with CopyEngine(device, slots, table, tally, chunk_nbytes=chunk_nbytes, n_stagers=_N_STAGERS) as engine:
        if prefetches:
            with engine.condition:
                guessed = table.guess(0, 1)
                assert guessed is not None  # noqa: S101 - all slots are spare
                engine.submit(guessed, source, is_demand=False)
            engine.go_on()
            with engine.condition:
                while not tally.copied_nbytes:
                    engine.condition.wait(_POLL_S)
        began_s = perf_counter()
        with engine.condition:
            claim = table.claim(0, 0)
            assert claim is not None  # noqa: S101 - all slots but one are spare
            engine.submit(claim.slot, source, is_demand=True)
        engine.go_on()
        with engine.condition:
            while not table.is_ready(claim.slot):
                engine.wait()
        device.synchronize(slots[claim.slot].ready)
        return perf_counter() - began_s
