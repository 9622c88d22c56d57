"""Experts of a store larger than memory return the bits of experts in place, whatever happens to the slots."""

import weakref
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from protocol.bell import Bell
from protocol.handles import ExpertKey
from protocol.messages import Acquire, Message, Prefetch, Release
from quant.library import has_c_library
from quant.workspace import Workspace
from runner.errors import CorruptExpert, ReadFailed, StoreUnavailable
from runner.experts.compute import CExperts
from runner.experts.counters import Counters
from runner.experts.foreseen import likeliest_first
from runner.experts.tiered import TieredExperts
from tests.support.slot_store import Faults, SlotStore
from tests.support.watched_compute import WatchedCompute
from tests.unit.runner.experts.rehearsal import GUESSES, Step, computed_in_place, random_steps
from tests.unit.runner.experts.tiny_store import N_EXPERTS, N_LAYERS, RECORD_NBYTES, TOP_K, TinyStore

_Kind = TypeVar("_Kind", bound=Message)

N_KEYS = N_LAYERS * N_EXPERTS
LEAST = 2 * TOP_K


def rehearse(store: SlotStore, steps: list[Step], guess: str = "none") -> tuple[list[Tensor], Counters]:
    """Return what the experts return for the steps, and what they counted."""
    with Workspace() as workspace:
        compute = WatchedCompute(CExperts(store.manifest, workspace), store.while_computing)
        experts = TieredExperts(store, store, compute)
        outputs = []
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if following is not None:
                guessed = torch.tensor(GUESSES[guess](store.random, following.experts), dtype=torch.int64)
                experts.prefetch(following.layer, partial(torch.clone, guessed))
            outputs.append(experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights))
        return outputs, experts.counters


def assert_same_bits(outputs: list[Tensor], steps: list[Step]) -> None:
    for output, expected in zip(outputs, computed_in_place(steps), strict=True):
        # torch, which computes without the library, groups tokens and rounds otherwise.
        assert torch.allclose(output, expected, rtol=0, atol=0 if has_c_library() else 1e-5)


def sent(store: SlotStore, kind: type[_Kind]) -> list[_Kind]:
    return [message for message in store.received if isinstance(message, kind)]


def layer_step(layer: int, *experts: int) -> Step:
    """Return a call of one token that chooses these two experts."""
    generator = torch.Generator().manual_seed(sum(experts))
    return Step(layer, torch.randn(1, 64, generator=generator), torch.tensor([experts]), torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("n_slots", [LEAST, 5, 8, 12, N_KEYS])
@pytest.mark.parametrize("guess", GUESSES)
def test_any_number_of_slots_and_any_hint_give_the_same_bits(n_slots: int, guess: str) -> None:
    for seed in range(100 * n_slots, 100 * n_slots + 4):
        steps = random_steps(seed)

        outputs, _ = rehearse(SlotStore(TinyStore(), n_slots, seed=seed), steps, guess)

        assert_same_bits(outputs, steps)


@pytest.mark.parametrize("n_slots", [LEAST, 7, N_KEYS])
@pytest.mark.parametrize(
    "faults",
    [
        Faults(evicts=0.4),
        Faults(reclaims=0.3),
        Faults(loses=0.3),
        Faults(evicts=0.2, reclaims=0.1, loses=0.2),
        Faults(session_ends_after=9),
        Faults(unreadable={ExpertKey(layer, expert): 2 for layer in range(N_LAYERS) for expert in range(N_EXPERTS)}),
    ],
    ids=["evictions", "reclaimed leases", "lost messages", "all of these", "sessions that end", "failing reads"],
)
def test_whatever_goes_wrong_meanwhile_the_bits_are_the_same(n_slots: int, faults: Faults) -> None:
    for seed in range(100 * n_slots, 100 * n_slots + 4):
        steps = random_steps(seed)

        outputs, _ = rehearse(SlotStore(TinyStore(), n_slots, faults=faults, seed=seed), steps, "random")

        assert_same_bits(outputs, steps)


def test_an_expert_that_is_evicted_while_it_is_computed_is_computed_anew() -> None:
    store = SlotStore(TinyStore(), LEAST)
    for expert in (1, 2):
        store.read(ExpertKey(0, expert))
    step = layer_step(0, 1, 2)
    with Workspace() as workspace:
        compute = WatchedCompute(CExperts(store.manifest, workspace), lambda: None)
        experts = TieredExperts(store, store, compute)

        def evict_once() -> None:
            compute.meanwhile = lambda: None
            store.evict(ExpertKey(0, 2))

        compute.meanwhile = evict_once
        output = experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights)

    assert_same_bits([output], [step])
    assert [message.keys[0] for message in sent(store, Acquire)] == [ExpertKey(0, 2)]


def test_what_is_there_costs_one_message_a_token() -> None:
    store = SlotStore(TinyStore(), N_KEYS)
    for layer in range(N_LAYERS):
        for expert in range(N_EXPERTS):
            store.read(ExpertKey(layer, expert))
    steps = random_steps(0, 6, prefills=False)

    outputs, counters = rehearse(store, steps, "random")

    assert_same_bits(outputs, steps)
    assert [type(message) for message in store.received] == [Release] * 6
    assert set(sent(store, Release)[0].keys) == {ExpertKey(s.layer, e) for s in steps[:N_LAYERS] for e in s.experts}
    assert (counters.hits, counters.misses) == (len(steps) * TOP_K, 0)


def test_resident_experts_are_computed_where_they_lie() -> None:
    resident = [ExpertKey(0, expert) for expert in range(N_EXPERTS)]
    store = SlotStore(TinyStore(), LEAST, resident=resident)
    steps = random_steps(5)

    outputs, _ = rehearse(store, steps, "random")

    assert_same_bits(outputs, steps)
    asked = {key for message in sent(store, Acquire) for key in message.keys}
    assert asked
    assert not asked & set(resident)


def test_what_is_there_is_leased_while_the_rest_is_waited_for() -> None:
    store = SlotStore(TinyStore(), 8)
    store.read(ExpertKey(0, 1))
    store.read(ExpertKey(1, 1))

    rehearse(store, [layer_step(0, 1, 2), layer_step(1, 1, 2)])

    assert [message.keys for message in sent(store, Acquire)] == [
        (ExpertKey(0, 2), ExpertKey(0, 1)),
        (ExpertKey(1, 2), ExpertKey(1, 1)),
    ]


def test_what_was_used_is_told_before_anything_is_demanded_or_hinted_at() -> None:
    store = SlotStore(TinyStore(), 8)
    for expert in (1, 2):
        store.read(ExpertKey(0, expert))
    with Workspace() as workspace:
        experts = TieredExperts(store, store, CExperts(store.manifest, workspace))
        experts.prefetch(1, lambda: torch.tensor([[3]]))
        for step in (layer_step(0, 1, 2), layer_step(1, 3, 4)):
            experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights)

    before = [type(message) for message in store.received[:2]]
    assert before == [Release, Prefetch]
    assert sent(store, Release)[0].keys == (ExpertKey(0, 1), ExpertKey(0, 2))


def test_no_lease_is_kept_while_another_expert_is_waited_for() -> None:
    store = SlotStore(TinyStore(), N_KEYS, seed=1)
    held: list[int] = []
    wait = store.wait

    def wait_and_note(bell: Bell, n_rings: int, timeout_s: float) -> bool:
        held.append(len(store.leases - store.on_their_way))
        return wait(bell, n_rings, timeout_s)

    store.wait = wait_and_note  # type: ignore[method-assign]

    rehearse(store, random_steps(3, 4))

    assert held
    assert set(held) == {0}


def test_after_a_token_nothing_is_leased() -> None:
    store = SlotStore(TinyStore(), LEAST, seed=4)

    rehearse(store, random_steps(4, 3))

    assert not store.leases


def test_right_hints_are_read_ahead_and_used() -> None:
    store = SlotStore(TinyStore(), 12, seed=2)
    steps = random_steps(2, 12, prefills=False)

    outputs, counters = rehearse(store, steps, "right")

    assert_same_bits(outputs, steps)
    assert counters.prefetches_used == counters.prefetches_issued > counters.prefetches_late
    assert counters.prefetches_wasted == counters.prefetches_cancelled == 0


def test_what_was_hinted_at_and_not_chosen_is_taken_back() -> None:
    store = SlotStore(TinyStore(), 8, seed=3)
    store.work = lambda: None  # type: ignore[method-assign]  # nothing is read ahead
    for layer, expert in ((0, 1), (0, 2), (1, 1), (1, 2)):
        store.read(ExpertKey(layer, expert))
    with Workspace() as workspace:
        experts = TieredExperts(store, store, CExperts(store.manifest, workspace))
        experts.prefetch(1, lambda: torch.tensor([[3, 4]]))
        for step in (layer_step(0, 1, 2), layer_step(1, 1, 2)):
            experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights)

    assert [message.keys for message in sent(store, Prefetch)] == [(ExpertKey(1, 3), ExpertKey(1, 4)), ()]
    assert experts.counters.prefetches_cancelled == 2


def test_hints_leave_the_slots_alone_that_the_present_layer_needs() -> None:
    store = SlotStore(TinyStore(), LEAST)
    with Workspace() as workspace:
        experts = TieredExperts(store, store, CExperts(store.manifest, workspace))
        experts.prefetch(1, lambda: torch.arange(N_EXPERTS))
        step = layer_step(0, 1, 2)
        experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights)

    assert [message.keys for message in sent(store, Prefetch)] == [(ExpertKey(1, 0), ExpertKey(1, 1))]


def test_every_tokens_likeliest_expert_goes_first_and_of_layers_further_ahead_nothing_else() -> None:
    guessed = torch.tensor([[1, 2, 3, 4], [5, 2, 6, 7]])

    assert likeliest_first(guessed) == [1, 5, 2, 2, 3, 6, 4, 7]
    assert likeliest_first(guessed, 1) == [1, 5, 2, 2]
    assert likeliest_first(guessed, 4) == [1, 5]


def test_a_miss_is_counted_with_the_bytes_that_were_read() -> None:
    store = SlotStore(TinyStore(), N_KEYS)
    steps = [layer_step(0, 1, 2), layer_step(1, 1, 2), layer_step(0, 2, 3), layer_step(1, 2, 1)]

    _, counters = rehearse(store, steps)

    assert (counters.hits, counters.misses) == (3, 5)
    assert counters.copied_nbytes == 5 * RECORD_NBYTES == store.n_reads * RECORD_NBYTES


def test_a_corrupt_expert_is_named_and_the_others_go_on() -> None:
    corrupt = ExpertKey(0, 2)
    store = SlotStore(TinyStore(), LEAST, faults=Faults(corrupt=[corrupt]))
    bad, good = layer_step(0, 1, 2), layer_step(0, 1, 3)
    with Workspace() as workspace:
        experts = TieredExperts(store, store, CExperts(store.manifest, workspace))
        with pytest.raises(CorruptExpert, match=r"^layers\.0\.experts\.2 is corrupt"):
            experts.forward(bad.layer, bad.hidden_states, bad.expert_ids, bad.weights)

        output = experts.forward(good.layer, good.hidden_states, good.expert_ids, good.weights)

    assert_same_bits([output], [good])


def test_an_expert_that_cannot_be_read_is_named_after_three_attempts() -> None:
    key = ExpertKey(0, 2)
    store = SlotStore(TinyStore(), LEAST, faults=Faults(unreadable={key: 3}))

    with pytest.raises(ReadFailed, match=r"^layers\.0\.experts\.2 cannot be read: Input/output error"):
        rehearse(store, [layer_step(0, 1, 2)])


def test_a_daemon_that_is_gone_is_an_error_of_one_line() -> None:
    store = SlotStore(TinyStore(), LEAST, faults=Faults(session_ends_after=2, is_gone_for_good=True))

    with pytest.raises(StoreUnavailable, match="no expertd runs"):
        rehearse(store, random_steps(1))


def test_nothing_holds_the_slots_of_a_session_that_is_gone() -> None:
    store = SlotStore(TinyStore(), LEAST)
    step = layer_step(0, 1, 2)
    with Workspace() as workspace:
        compute = CExperts(store.manifest, workspace)
        experts = TieredExperts(store, store, compute)
        for _ in range(2):  # as they come, then at once
            experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights)
        record = weakref.ref(experts._presence.records[0])
        assert record() is not None

        compute.use_slots(())
        experts._presence.records.clear()

        assert all(not table.has(expert) for table in compute._all for expert in range(N_EXPERTS))
        assert record() is None


def test_a_daemon_that_is_silent_is_given_up_after_a_while() -> None:
    store = SlotStore(TinyStore(), LEAST, faults=Faults(is_silent=True))
    began_s = store.now_s

    with pytest.raises(
        StoreUnavailable, match=r"asked 30 times for layers\.0\.experts\.\d and others, has not answered"
    ):
        rehearse(store, [layer_step(0, 1, 2)])

    assert 30 <= store.now_s - began_s <= 31


def test_the_slots_of_these_tests_are_evicted_and_their_messages_lost() -> None:
    store = SlotStore(TinyStore(), LEAST, faults=Faults(evicts=0.4, reclaims=0.3, loses=0.3), seed=1)

    _, counters = rehearse(store, random_steps(1, 12), "random")

    n_asked = sum(len(message.keys) for message in sent(store, Acquire))
    assert n_asked > counters.misses
    assert counters.evictions > 0
