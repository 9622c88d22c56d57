"""Experts computed in slots by a device's products: whatever is computed apart, the bits are the same."""

import pytest
import torch
from torch import Tensor

from protocol.handles import ExpertKey
from quant.torch_products import TorchProducts
from quant.workspace import Workspace
from runner.experts.compute import CExperts, ExpertCall
from runner.experts.device_compute import DeviceExperts
from tests.unit.runner.experts.rehearsal import Step, random_steps
from tests.unit.runner.experts.tiny_store import N_EXPERTS, TinyStore

# Where each expert of a layer lies.
SLOTS = {expert: (3 * expert + 1) % N_EXPERTS for expert in range(N_EXPERTS)}


def slots_of(layer: int) -> list[Tensor]:
    store = TinyStore()
    slots = [torch.empty(0, dtype=torch.uint8)] * N_EXPERTS
    for expert, slot in SLOTS.items():
        slots[slot] = torch.frombuffer(store.expert_record(ExpertKey(layer, expert)), dtype=torch.uint8)
    return slots


def device_experts(layer: int, dtype: torch.dtype = torch.float32) -> DeviceExperts:
    experts = DeviceExperts(TinyStore().manifest, TorchProducts(torch.device("cpu"), dtype))
    experts.use_slots(slots_of(layer))
    return experts


def call_of(step: Step) -> ExpertCall:
    out = torch.full_like(step.hidden_states, torch.nan)
    return ExpertCall(step.layer, step.hidden_states, step.expert_ids, step.weights, out)


@pytest.fixture(params=[1, 2, 12])
def step(request: pytest.FixtureRequest) -> Step:
    steps = (step for seed in range(20) for step in random_steps(seed))
    return next(step for step in steps if len(step.expert_ids) == request.param)


def test_the_result_is_the_c_librarys_in_float(step: Step) -> None:
    of_library, of_device = call_of(step), call_of(step)
    slots = {expert: SLOTS[expert] for expert in step.experts}
    with Workspace() as workspace:
        library = CExperts(TinyStore().manifest, workspace, exact=True)
        library.use_slots(slots_of(step.layer))
        library.forward(of_library, slots)

    device_experts(step.layer).forward(of_device, slots)

    torch.testing.assert_close(of_device.out, of_library.out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_one_by_one_in_any_order_give_the_bits_of_all_at_once(step: Step, dtype: torch.dtype) -> None:
    at_once, one_by_one = call_of(step), call_of(step)
    experts = device_experts(step.layer, dtype)
    experts.forward(at_once, {expert: SLOTS[expert] for expert in step.experts})

    contributions = torch.full((*step.expert_ids.shape, step.hidden_states.shape[1]), torch.nan)
    for expert in reversed(step.experts):
        experts.contribute(one_by_one, {expert: SLOTS[expert]}, contributions)
    experts.finish(one_by_one, {}, contributions)

    assert torch.equal(one_by_one.out, at_once.out)


def test_slots_that_hold_other_experts_now_are_computed_with_as_they_are(step: Step) -> None:
    swapped, expected = call_of(step), call_of(step)
    experts = device_experts(step.layer)
    slots = {expert: SLOTS[expert] for expert in step.experts}
    experts.forward(expected, slots)
    memory = slots_of(step.layer)

    # The same memory, each slot holding what its neighbour held.
    experts.use_slots([memory[-1], *memory[:-1]])
    experts.forward(swapped, {expert: (slot + 1) % N_EXPERTS for expert, slot in slots.items()})

    assert torch.equal(swapped.out, expected.out)
