"""The model on a device against the model on the CPU and against transformers: on the strict stand-in accelerator.

What is launched runs there in a thread, or in an order drawn from a seed, so that whatever is not ordered by an event
raises; the arithmetic is torch's, as it is on a GPU without kernels.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.convert.config import QuantizeConfig
from expertd.convert.overrides import Override
from protocol.handles import ExpertKey
from quant.segment import Step
from runner.devices.device import Device
from runner.devices.errors import UnorderedAccess, UnrecordedEvent
from runner.engine import Engine
from runner.errors import CorruptExpert, OutOfMemory
from runner.experts.cache import CacheMode
from runner.models.device_lookahead import DeviceLookahead
from runner.models.device_mixtral import DeviceMixtral
from tests.support.device_models import engine_on, link
from tests.support.local_store import LocalStore
from tests.support.reference import load_reference, reference_logits, relative_difference
from tests.support.small_stores import SmallStore, make_small_store
from tests.unit.runner.experts.watched_device import WatchedDevice

# Both compute in fp32 and differ in the order of additions alone.
FP32_TOLERANCE = 1e-5
# Activations, queries, keys and values rounded to 11 bits, against none of them.
FP16_TOLERANCE = 5e-3

FOUR_BIT = QuantizeConfig(experts="4bit-g64", attention="4bit-g64", head="8bit-g64", solver="shortcut")
# Records of four lengths go through the same slots.
MIXED = QuantizeConfig(
    experts="4bit-g64", override=(Override(2, experts="1"), Override(8, layers="1"), Override(16, experts="2"))
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_small_store(tmp_path_factory.mktemp("plain"), n_experts=8, n_layers=3)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    ids: list[int] = torch.randint(3, 96, (40,), generator=generator).tolist()
    return ids


def on_cpu(store: SmallStore, prompt: list[int], **options: Any) -> Tensor:  # noqa: ANN401  # RunnerConfig's
    with store.engine(**options) as engine:
        return engine.logits(prompt)


def on_device(store: SmallStore, prompt: list[int], **options: Any) -> Tensor:  # noqa: ANN401  # RunnerConfig's
    with engine_on(store, link(), **({"cache_experts": 2} | options)) as engine:
        return engine.logits(prompt)


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one kv head": {"n_kv_heads": 1},
    "as many kv heads": {"n_kv_heads": 4},
    "top three": {"top_k": 3},
    "tied": {"tied": True},
    "window": {"sliding_window": 7},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_in_fp32_are_those_of_transformers(tmp_path: Path, prompt: list[int], shape: dict[str, Any]) -> None:
    store = make_small_store(tmp_path, **shape)
    k = shape.get("top_k", 2)

    logits = on_device(store, prompt, cache_experts=k)

    assert relative_difference(logits, reference_logits(load_reference(store.checkpoint), prompt)) < FP32_TOLERANCE


def test_logits_in_fp16_are_near_those_of_the_float_reference(tmp_path: Path, prompt: list[int]) -> None:
    # All experts are chosen: where two are nearly as good, rounding would choose another one than the reference.
    store = make_small_store(tmp_path, n_experts=2, top_k=2)
    expected = on_cpu(store, prompt)

    logits = on_device(store, prompt, exact=False)

    assert 0 < relative_difference(logits, expected) < FP16_TOLERANCE


@pytest.mark.parametrize("config", [FOUR_BIT, MIXED], ids=["4 bits", "experts of several widths"])
def test_quantized_weights_mean_on_a_device_what_they_mean_on_the_cpu(
    tmp_path: Path, prompt: list[int], config: QuantizeConfig
) -> None:
    store = make_small_store(tmp_path, config)

    assert relative_difference(on_device(store, prompt), on_cpu(store, prompt)) < FP32_TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_a_prompt_in_chunks_gives_the_same_logits(plain: SmallStore, prompt: list[int], chunk: int) -> None:
    expected = on_cpu(plain, prompt)

    logits = on_device(plain, prompt, prefill_chunk=chunk)

    assert relative_difference(logits, expected) < FP32_TOLERANCE


def test_decoding_token_by_token_goes_on_where_the_prefill_ended(plain: SmallStore, prompt: list[int]) -> None:
    expected = on_cpu(plain, prompt)

    with engine_on(plain, link(), cache_experts=3) as engine:
        sequence = engine.new_sequence()
        sequence.append(prompt[:25])
        steps = [engine.step([sequence])]
        for token_id in prompt[25:]:
            sequence.append([token_id])
            steps.append(engine.step([sequence]))

    assert relative_difference(torch.cat(steps), expected[24:]) < FP32_TOLERANCE


def test_several_sequences_in_one_step_do_not_know_of_each_other(plain: SmallStore, prompt: list[int]) -> None:
    early, late = prompt[:20], prompt[20:29]
    expected = [on_cpu(plain, early)[-1], on_cpu(plain, late)[-1]]

    with engine_on(plain, link(), cache_experts=2, prefill_chunk=8) as engine:
        sequences = [engine.new_sequence() for _ in range(2)]
        sequences[0].append(early[:15])
        engine.step(sequences[:1])
        sequences[0].append(early[15:])
        sequences[1].append(late)
        logits = engine.step(sequences)

    assert relative_difference(logits, torch.stack(expected)) < FP32_TOLERANCE


def greedy(engine: Engine, prompt: list[int], n_tokens: int) -> list[int]:
    return list(engine.generate(prompt, max_new_tokens=n_tokens))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_logits_have_the_same_bits_whatever_is_cached(
    plain: SmallStore, prompt: list[int], k: int, *, exact: bool
) -> None:
    with engine_on(plain, link(), cache_experts=8, prefetch_depth=0, exact=exact) as engine:
        expected = engine.logits(prompt), greedy(engine, prompt[:9], 12)

    with engine_on(plain, link(), cache_experts=k, prefetch_experts=2, exact=exact) as engine:
        logits, token_ids = engine.logits(prompt), greedy(engine, prompt[:9], 12)

    assert torch.equal(logits, expected[0])
    assert token_ids == expected[1]


@pytest.mark.parametrize("mode", CacheMode)
def test_logits_have_the_same_bits_in_every_order_of_the_queues(
    plain: SmallStore, prompt: list[int], mode: CacheMode
) -> None:
    options: dict[str, Any] = {"prefill_chunk": 7, "prefetch_depth": 2}
    expected = on_device(plain, prompt[:14], cache_experts=8, **options)

    for seed in range(8):
        with engine_on(plain, link(seed), is_direct=seed % 2 == 0, mode=mode, cache_experts=2, **options) as engine:
            logits = engine.logits(prompt[:14])

        assert torch.equal(logits, expected)


def test_what_is_guessed_on_the_device_is_what_the_next_gate_would_choose(plain: SmallStore, prompt: list[int]) -> None:
    # All experts are guessed, so that no copy is ever asked for that was not; a late one is used all the same.
    with engine_on(plain, link(), cache_experts=2, prefetch_experts=4) as engine:
        greedy(engine, prompt[:9], 20)
        counters = engine.counters

    assert counters is not None
    assert counters.prefetches_issued > 0
    assert counters.prefetches_used > counters.prefetches_issued / 4


class GuessWatcher:
    """Compares what was guessed for a later layer with what its gate says of the states behind this attention."""

    def __init__(self, engine: Engine, lookahead: DeviceLookahead, n_guessed: int) -> None:
        self.n_compared = 0
        self._engine = engine
        self._lookahead = lookahead
        self._n_guessed = n_guessed

    def after_layer(self, layer: int, step: Step) -> None:
        for later, guess in self._lookahead.guesses(layer, step.hidden_states):
            highest = self._engine.gates[later](step.hidden_states).topk(self._n_guessed).indices
            assert torch.equal(guess(), highest)
            self.n_compared += 1


def test_a_guess_is_what_the_later_gates_say_of_the_states_behind_the_attention(
    plain: SmallStore, prompt: list[int]
) -> None:
    with engine_on(plain, link(), cache_experts=2, prefetch_experts=3, prefetch_depth=2) as engine:
        model = engine._model
        assert isinstance(model, DeviceMixtral)
        assert model._lookahead is not None
        watcher = GuessWatcher(engine, model._lookahead, n_guessed=3)

        with engine.observed_by(watcher):
            engine.logits(prompt[:9])

    # Of three layers, the first one looks at two and the second one at one.
    assert watcher.n_compared == 3


def test_a_long_prompts_next_layer_is_copied_without_a_guess(plain: SmallStore, prompt: list[int]) -> None:
    with engine_on(plain, link(), cache_experts=2, prefetch_experts=1) as engine:
        engine.logits(prompt)
        counters = engine.counters

    assert counters is not None
    # Two layers are behind another one, and there are four spare slots.
    assert counters.prefetches_issued == 8
    assert counters.prefetches_used > 2


def test_a_device_that_holds_all_experts_is_asked_for_no_guess(plain: SmallStore, prompt: list[int]) -> None:
    with engine_on(plain, link(), cache_experts=8) as engine:
        engine.logits(prompt)
        warm = engine.counters
        greedy(engine, prompt, 6)
        counters = engine.counters

    assert warm is not None
    assert counters is not None
    assert (counters - warm).prefetches_issued == 0


def test_a_corrupt_expert_is_named_and_the_sequence_stays_as_it_was(plain: SmallStore) -> None:
    corrupt = [ExpertKey(1, expert) for expert in range(8)]
    with engine_on(LocalStore(plain.path, corrupt=corrupt), link(), cache_experts=2) as engine:
        sequence = engine.new_sequence()
        sequence.append([5, 6])

        with pytest.raises(CorruptExpert, match=r"layers\.1\.experts\.\d: "):
            engine.step([sequence])

        assert (sequence.kv_cache.length, sequence.pending) == (0, [5, 6])


def test_a_model_computes_on_behind_a_step_that_failed(plain: SmallStore) -> None:
    used = LocalStore(plain.path)
    with engine_on(used, link(), cache_experts=2) as engine:
        expected = engine.logits([5])
    spared = {key for key in used.manifest.experts if key not in used.touched}

    with engine_on(LocalStore(plain.path, corrupt=spared), link(), cache_experts=2, prefetch_depth=0) as engine:
        with pytest.raises(CorruptExpert):
            engine.logits(list(range(3, 60)))
        logits = engine.logits([5])

    assert torch.equal(logits, expected)


def test_more_than_the_device_has_is_refused_before_anything_is_taken(plain: SmallStore) -> None:
    device = link()

    with (
        pytest.raises(OutOfMemory, match=r"\d+ bytes are needed on the device .* 5001000 can be had"),
        engine_on(plain, device, cache_experts=8, free_nbytes=5_000_000),
    ):
        pass
    device.close()


def test_without_a_limit_the_device_is_filled_with_experts(plain: SmallStore, prompt: list[int]) -> None:
    with engine_on(plain, link()) as engine:
        first = engine.logits(prompt)
        before = engine.counters
        again = engine.logits(prompt)
        after = engine.counters

    assert torch.equal(first, again)
    assert before is not None
    assert after is not None
    assert (after - before).misses == 0


@pytest.mark.parametrize("call", ["compute.record", "synchronize"])
@pytest.mark.parametrize("event", ["choice written", "logits written"])
def test_a_wait_for_the_device_that_is_left_out_is_found(
    plain: SmallStore, prompt: list[int], call: str, event: str
) -> None:
    device = link()
    watched = WatchedDevice(device, lambda made, name: (made, name) != (call, event))

    with pytest.raises((UnorderedAccess, UnrecordedEvent), match=event.removesuffix(" written")):
        run_to_the_end(plain, watched, prompt)
    device.close()


def run_to_the_end(store: SmallStore, device: Device, prompt: list[int]) -> None:
    with engine_on(store, device, cache_experts=2) as engine:
        engine.logits(prompt)
