"""Whole models with their experts in a cache return what they return with experts in place, bit for bit."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from expertd.convert.config import QuantizeConfig
from quant.library import has_c_library
from quant.timed_copies import Copies, start_copies
from quant.timed_copies_reference import ThreadCopies
from runner.config import RunnerConfig
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.devices.link_stepped import RandomScheduler
from runner.engine import Engine
from runner.errors import ConfigInvalid
from runner.experts.cache import CacheMode
from runner.metrics import read_memory
from runner.models.opening import CachePlan
from tests.support.local_store import LocalStore
from tests.support.small_stores import make_small_store

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28]
N_NEW = 12

# Without the library torch computes, which rounds otherwise where tokens are grouped otherwise.
pytestmark = pytest.mark.skipif(not has_c_library(), reason="bits are promised by the C library")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    config = QuantizeConfig(experts="4bit-g64", attention="4bit-g64", head="8bit-g64")
    folder = tmp_path_factory.mktemp("store")
    small = make_small_store(folder, config, n_experts=8, n_layers=4, hidden=64, intermediate=128)
    return LocalStore(small.path)


def settings(device: str = "link:100GB/s", **options: object) -> RunnerConfig:
    return RunnerConfig(device=device, threads=1, context=64, **options)  # type: ignore[arg-type]


def random_order(seed: int, **options: object) -> CachePlan:
    """Return a plan whose queues run in an order from that seed, on a strict device."""

    def new_device(speed: LinkSpeed) -> LinkDevice:
        return LinkDevice(speed, strict=True, scheduler=RandomScheduler(seed))

    return CachePlan(
        is_guarded=False,
        is_direct=seed % 2 == 0,
        new_device=new_device,
        stepped_by=lambda engine: engine.step(),
        **options,  # type: ignore[arg-type]
    )


def generated(store: LocalStore, config: RunnerConfig, plan: CachePlan | None = None) -> tuple[list[int], list[int]]:
    """Return a greedy answer and one that is drawn with a seed."""
    with Engine(store, config, cache_plan=plan) as engine:
        greedy = list(engine.generate(PROMPT, max_new_tokens=N_NEW))
        drawn = list(engine.generate(PROMPT, max_new_tokens=N_NEW, temperature=1.0, seed=7))
        return greedy, drawn


def logits(store: LocalStore, config: RunnerConfig, plan: CachePlan | None = None) -> Iterator[torch.Tensor]:
    """Yield the logits of a prefill, and of each token decoded behind it."""
    with Engine(store, config, cache_plan=plan) as engine:
        sequence = engine.new_sequence()
        sequence.append(PROMPT)
        yield engine.step([sequence])
        for token_id in PROMPT[:6]:
            sequence.append([token_id])
            yield engine.step([sequence])


@pytest.mark.parametrize("k", range(2, 9))
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_any_number_of_cached_experts_gives_the_same_tokens(store: LocalStore, k: int, depth: int) -> None:
    in_place = generated(store, settings("cpu"))

    cached = generated(store, settings(cache_experts=k, prefetch_depth=depth), CachePlan(is_guarded=False))

    assert cached == in_place


@pytest.mark.parametrize("k", range(2, 9))
def test_logits_have_the_same_bits_in_any_order_of_the_queues(store: LocalStore, k: int) -> None:
    in_place = list(logits(store, settings("cpu")))

    for seed in range(100 * k, 100 * k + 15):
        config = settings(cache_experts=k, prefetch_depth=seed % 3, prefetch_experts=1 + seed % 2)
        cached = list(logits(store, config, random_order(seed)))

        assert all(torch.equal(a, b) for a, b in zip(cached, in_place, strict=True)), f"seed {seed}"


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("new_copies", [start_copies, ThreadCopies])
def test_logits_have_the_same_bits_whoever_copies_in_real_time(
    store: LocalStore, new_copies: Callable[[], Copies], *, strict: bool, is_direct: bool
) -> None:
    in_place = list(logits(store, settings("cpu")))
    plan = CachePlan(
        is_guarded=False,
        is_direct=is_direct,
        new_device=lambda speed: LinkDevice(speed, strict=strict, new_copies=new_copies),
    )

    cached = list(logits(store, settings("link:1GB/s", cache_experts=3), plan))

    assert all(torch.equal(a, b) for a, b in zip(cached, in_place, strict=True))


@pytest.mark.parametrize("mode", [CacheMode.UNCACHED, CacheMode.NAIVE])
def test_without_a_cache_the_tokens_are_the_same(store: LocalStore, mode: CacheMode) -> None:
    cached = generated(store, settings(cache_experts=3), CachePlan(mode=mode))

    assert cached == generated(store, settings("cpu"))


def test_exact_results_are_the_same_from_a_cache(store: LocalStore) -> None:
    cached = list(logits(store, settings(cache_experts=2, exact=True)))

    in_place = list(logits(store, settings("cpu", exact=True)))
    assert all(torch.equal(a, b) for a, b in zip(cached, in_place, strict=True))


def test_foreseen_experts_are_used(store: LocalStore) -> None:
    with Engine(store, settings(cache_experts=2), cache_plan=CachePlan(is_guarded=False)) as engine:
        list(engine.generate(PROMPT, max_new_tokens=N_NEW))

        counters = engine.counters

    assert counters is not None
    assert counters.prefetches_used > 0
    assert counters.hits + counters.misses > 0


def test_with_all_experts_resident_nothing_is_foreseen_or_copied_again(store: LocalStore) -> None:
    with Engine(store, settings(cache_experts=8), cache_plan=CachePlan(is_guarded=False)) as engine:
        list(logits_of(engine))
        before = engine.counters
        list(logits_of(engine))

        after = engine.counters

    assert before is not None
    assert after is not None
    assert (after - before).copied_nbytes == 0


def logits_of(engine: Engine) -> Iterator[torch.Tensor]:
    for first in range(len(PROMPT)):
        yield engine.logits(PROMPT[first:])


def test_a_budget_too_small_says_what_the_least_is(store: LocalStore) -> None:
    with pytest.raises(ConfigInvalid, match=r"--device-memory: at least \d+ bytes .* are needed, 1048576 .* came"):
        Engine(store, settings(device_memory=1 << 20))


@pytest.mark.parametrize("k", [1, 9])
def test_a_number_of_experts_that_cannot_be_is_refused(store: LocalStore, k: int) -> None:
    with pytest.raises(ConfigInvalid, match=rf"--cache-experts: 2 .* to 8 .* are expected, {k} came"):
        Engine(store, settings(cache_experts=k))


def test_memory_never_is_above_the_budget(store: LocalStore) -> None:
    budget = 16 << 20
    with Engine(store, settings("cpu")) as engine:
        list(engine.generate(PROMPT, max_new_tokens=N_NEW))  # what the interpreter and torch take once
    before = read_memory().private_nbytes

    with Engine(store, settings(device_memory=budget)) as engine:
        list(engine.generate(PROMPT, max_new_tokens=N_NEW))

        assert engine.planned_nbytes is not None
        assert engine.planned_nbytes <= budget
        assert read_memory().private_nbytes - before <= budget


def test_a_closed_engine_has_ended_its_threads(store: LocalStore, tmp_path: Path) -> None:
    import threading

    del tmp_path
    before = threading.active_count()
    with Engine(store, settings(cache_experts=2)) as engine:
        list(engine.generate(PROMPT, max_new_tokens=2))

    assert threading.active_count() == before
