"""Whole models over a store larger than memory return what they return with all experts in memory, bit for bit."""

from collections.abc import Iterator

import pytest
import torch

from expertd.convert.config import QuantizeConfig
from protocol.handles import ExpertKey
from protocol.messages import Acquire
from quant.library import has_c_library
from runner.config import RunnerConfig
from runner.engine import Engine
from runner.errors import ConfigInvalid, CorruptExpert, StoreUnavailable
from runner.experts.counters import Counters
from runner.models.opening import CachePlan
from tests.support.local_store import LocalStore
from tests.support.slot_store import Faults, SlotStore
from tests.support.small_stores import make_small_store

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28]
N_NEW = 8
N_LAYERS, N_EXPERTS = 4, 8
N_KEYS = N_LAYERS * N_EXPERTS
LEAST = 4

# Without the library torch computes, which rounds otherwise where tokens are grouped otherwise.
pytestmark = pytest.mark.skipif(not has_c_library(), reason="bits are promised by the C library")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    config = QuantizeConfig(experts="4bit-g64", attention="4bit-g64", head="8bit-g64")
    folder = tmp_path_factory.mktemp("store")
    small = make_small_store(folder, config, n_experts=N_EXPERTS, n_layers=N_LAYERS, hidden=64, intermediate=128)
    return LocalStore(small.path)


def settings(**options: object) -> RunnerConfig:
    return RunnerConfig(**({"device": "cpu", "threads": 1, "context": 64} | options))  # type: ignore[arg-type]


def logits(store: LocalStore | SlotStore, config: RunnerConfig) -> Iterator[torch.Tensor]:
    """Yield the logits of a prefill, of tokens decoded behind it, and of three sequences that go on together."""
    with Engine(store, config, cache_plan=CachePlan(is_guarded=False)) as engine:
        sequence = engine.new_sequence()
        sequence.append(PROMPT)
        yield engine.step([sequence])
        for token_id in PROMPT[:6]:
            sequence.append([token_id])
            yield engine.step([sequence])
        others = [engine.new_sequence() for _ in range(2)]
        for place, other in enumerate(others):
            other.append(PROMPT[: 5 + 2 * place])
        for token_id in PROMPT[:4]:
            sequence.append([token_id])
            yield engine.step([sequence, *others])
            for other in others:
                other.append([token_id + 1])


def generated(store: LocalStore | SlotStore, **options: object) -> tuple[list[int], Counters | None]:
    """Return a greedy answer, and what was counted meanwhile."""
    with Engine(store, settings(**options), cache_plan=CachePlan(is_guarded=False)) as engine:
        return list(engine.generate(PROMPT, max_new_tokens=N_NEW)), engine.counters


@pytest.mark.parametrize("n_slots", [LEAST, 5, 8, 13, 16, 24, N_KEYS])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_logits_have_the_same_bits_with_any_number_of_slots(files: LocalStore, n_slots: int, depth: int) -> None:
    in_place = list(logits(files, settings()))

    tiered = list(logits(SlotStore(files, n_slots, seed=n_slots), settings(prefetch_depth=depth)))

    assert all(torch.equal(a, b) for a, b in zip(tiered, in_place, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_logits_have_the_same_bits_when_slots_messages_and_sessions_get_lost(files: LocalStore, seed: int) -> None:
    in_place = list(logits(files, settings()))
    faults = Faults(loses=0.1, session_ends_after=60)

    store = SlotStore(files, LEAST + 3 * seed, faults=faults, seed=seed)
    tiered = list(logits(store, settings(prefetch_depth=2)))

    assert all(torch.equal(a, b) for a, b in zip(tiered, in_place, strict=True))
    assert store.n_sessions > 1


def test_exact_results_and_small_chunks_are_the_same(files: LocalStore) -> None:
    in_place = list(logits(files, settings(exact=True, prefill_chunk=7)))

    tiered = list(logits(SlotStore(files, 6), settings(exact=True, prefill_chunk=7)))

    assert all(torch.equal(a, b) for a, b in zip(tiered, in_place, strict=True))


def test_a_quarter_of_the_experts_is_enough_for_the_same_answer(files: LocalStore) -> None:
    tokens, counters = generated(SlotStore(files, N_KEYS // 4))

    assert tokens == generated(files)[0]
    assert counters is not None
    assert counters.misses > 0
    assert counters.prefetches_used > 0


def test_with_a_slot_for_each_every_expert_is_read_once(files: LocalStore) -> None:
    store = SlotStore(files, N_KEYS)

    _, first = generated(store)
    n_reads = store.n_reads
    _, second = generated(store)

    assert first is not None
    assert first.misses > 0
    assert second is not None
    assert (second.misses, second.copied_nbytes) == (0, 0)
    assert store.n_reads == n_reads


def test_a_prefill_gets_more_experts_than_there_are_slots_in_portions(files: LocalStore) -> None:
    store = SlotStore(files, LEAST)

    next(logits(store, settings(prefetch_depth=0)))

    asked = [message for message in store.received if isinstance(message, Acquire)]
    assert max(len(message.keys) for message in asked) <= LEAST // 2


def test_a_corrupt_expert_ends_an_answer_by_its_name(files: LocalStore) -> None:
    store = SlotStore(files, LEAST, faults=Faults(corrupt=[ExpertKey(2, expert) for expert in range(N_EXPERTS)]))

    with pytest.raises(CorruptExpert, match=r"^layers\.2\.experts\.\d is corrupt"):
        generated(store)


def test_a_session_that_cannot_be_had_again_ends_an_answer(files: LocalStore) -> None:
    store = SlotStore(files, LEAST, faults=Faults(session_ends_after=20, is_gone_for_good=True))

    with pytest.raises(StoreUnavailable):
        generated(store)


def test_an_accelerator_over_a_store_with_slots_is_refused_with_the_remedy(files: LocalStore) -> None:
    with pytest.raises(ConfigInvalid, match=r"^--device: link:1GB/s takes experts from memory.*--device cpu$"):
        generated(SlotStore(files, LEAST), device="link:1GB/s", cache_experts=2)
