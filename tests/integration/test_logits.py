"""The runner's logits against transformers', on random small Mixtrals; and against its own, computed another way."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.convert.config import QuantizeConfig
from expertd.convert.overrides import Override
from protocol.handles import ExpertKey
from runner.config import RunnerConfig
from runner.engine import Engine
from runner.errors import CorruptExpert
from tests.support.local_store import LocalStore
from tests.support.reference import (
    ReferenceModel,
    load_dequantized,
    load_reference,
    reference_logits,
    relative_difference,
)
from tests.support.small_stores import SmallStore, make_small_store

N_TOKENS = 48

# What must hold, and what does: both sides compute in fp32 and differ in the order of additions alone.
TOLERANCE = 1e-3
FP32_TOLERANCE = 1e-5
# Keys and values rounded to 11 bits.
FP16_CACHE_TOLERANCE = 1e-3

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "one kv head": {"n_kv_heads": 1},
    "as many kv heads": {"n_kv_heads": 4},
    "eight experts": {"n_experts": 8, "n_layers": 3},
    "top one": {"top_k": 1},
    "top three": {"top_k": 3},
    "tied": {"tied": True},
    "window": {"sliding_window": 7},
    "odd sizes": {"hidden": 40, "intermediate": 72, "n_heads": 5, "n_kv_heads": 5, "vocab": 101},
    "old config in bf16": {"rope": "old", "dtype": "bf16", "n_shards": 3},
}
SCHEMES = {
    "4 bits": QuantizeConfig(experts="4bit-g64", attention="4bit-g64", head="4bit-g64"),
    "3 bits": QuantizeConfig(experts="3bit-g64", attention="4bit-g64", head="8bit-g64"),
    "2 bits": QuantizeConfig(experts="2bit-g16", attention="16bit", head="16bit"),
    "all widths": QuantizeConfig(
        experts="3bit-g64",
        override=(
            Override(2, layers="0"),
            Override(8, experts="1"),
            Override(16, layers="1", experts="2-3"),
            Override(4, layers="1", experts="0"),
        ),
    ),
}


class SwappedExperts(LocalStore):
    """A store that gives every expert its neighbour's record."""

    def expert_record(self, key: ExpertKey) -> memoryview:
        return super().expert_record(key._replace(expert=(key.expert + 1) % self.manifest.model.n_experts))


@dataclass(frozen=True)
class Pair:
    store: SmallStore
    reference: ReferenceModel


def prompt(vocab: int, n_tokens: int = N_TOKENS) -> list[int]:
    # Not below 3: neither the BOS nor the EOS of the random checkpoints.
    return torch.randint(3, vocab, (n_tokens,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    store = make_small_store(tmp_path_factory.mktemp("shape"), **SHAPES[request.param])
    return Pair(store, load_reference(store.checkpoint))


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    shape: dict[str, Any] = {"hidden": 128, "intermediate": 192, "head_dim": 32, "n_experts": 8}
    store = make_small_store(tmp_path_factory.mktemp("scheme"), SCHEMES[request.param], **shape)
    return Pair(store, load_dequantized(store.checkpoint, LocalStore(store.path)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_small_store(tmp_path_factory.mktemp("plain"), sliding_window=11)


@pytest.fixture
def engine(plain: SmallStore) -> Iterator[Engine]:
    with plain.engine() as engine:
        yield engine


def test_logits_are_those_of_transformers(pair: Pair) -> None:
    with pair.store.engine() as engine:
        token_ids = prompt(engine.config.vocab_size)
        logits = engine.logits(token_ids)

    assert relative_difference(logits, reference_logits(pair.reference, token_ids)) <= FP32_TOLERANCE


def test_logits_over_a_16_bit_kv_cache_are_those_of_transformers(pair: Pair) -> None:
    with pair.store.engine(exact=False) as engine:
        token_ids = prompt(engine.config.vocab_size)
        logits = engine.logits(token_ids)

    assert relative_difference(logits, reference_logits(pair.reference, token_ids)) <= FP16_CACHE_TOLERANCE


def test_logits_of_a_quantized_store_are_those_of_its_dequantized_weights(quantized: Pair) -> None:
    with quantized.store.engine() as engine:
        token_ids = prompt(engine.config.vocab_size)
        logits = engine.logits(token_ids)

    assert relative_difference(logits, reference_logits(quantized.reference, token_ids)) <= FP32_TOLERANCE


def test_the_comparison_notices_experts_swapped_by_one(pair: Pair) -> None:
    with Engine(SwappedExperts(pair.store.path), RunnerConfig(threads=1, exact=True)) as engine:
        token_ids = prompt(engine.config.vocab_size)
        logits = engine.logits(token_ids)

    assert relative_difference(logits, reference_logits(pair.reference, token_ids)) > 10 * TOLERANCE


def test_greedy_tokens_are_those_of_transformers_wherever_they_are_decided(pair: Pair) -> None:
    with pair.store.engine() as engine:
        start = prompt(engine.config.vocab_size, 16)
        ends = engine.config.eos_token_ids
        answer = list(engine.generate(start, max_new_tokens=64))

    # One pass over prompt and answer gives the reference's choice at each place, given the same tokens before.
    expected = reference_logits(pair.reference, start + answer)[len(start) - 1 :]
    assert_greedy(answer, expected, ends)


def assert_greedy(answer: list[int], expected: Tensor, ends: frozenset[int]) -> None:
    """Assert that each token is the expected one where the two best differ by more than the tolerance."""
    tolerance = TOLERANCE * float(expected.max() - expected.min())
    best = expected.topk(2)
    decided = (best.values[:, 0] - best.values[:, 1] > tolerance).tolist()
    choices = best.indices[:, 0].tolist()
    wrong = [place for place, token_id in enumerate(answer) if decided[place] and token_id != choices[place]]
    assert wrong == []
    assert len(answer) == 64 or not decided[len(answer)] or choices[len(answer)] in ends


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_prefill_in_chunks_agrees_with_one_at_once(plain: SmallStore, engine: Engine, chunk: int) -> None:
    token_ids = prompt(engine.config.vocab_size)
    with plain.engine(prefill_chunk=chunk) as chunked:
        logits = chunked.logits(token_ids)

    assert relative_difference(logits, engine.logits(token_ids)) <= 1e-4


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunks_agree_over_a_16_bit_kv_cache_too(plain: SmallStore, chunk: int) -> None:
    with plain.engine(exact=False) as at_once, plain.engine(exact=False, prefill_chunk=chunk) as chunked:
        token_ids = prompt(at_once.config.vocab_size)
        difference = relative_difference(chunked.logits(token_ids), at_once.logits(token_ids))

    # A key that lies between two 16-bit numbers may be rounded to the other one.
    assert difference <= 1e-4


def test_decoding_token_by_token_agrees_with_the_prefill(engine: Engine) -> None:
    token_ids = prompt(engine.config.vocab_size)
    sequence = engine.new_sequence()
    steps = []
    for token_id in token_ids:
        sequence.append([token_id])
        steps.append(engine.step([sequence])[0])

    assert relative_difference(torch.stack(steps), engine.logits(token_ids)) <= 1e-4


def test_several_sequences_in_one_step_equal_each_alone(engine: Engine) -> None:
    token_ids = prompt(engine.config.vocab_size)
    prompts = [token_ids[:20], token_ids[20:21], token_ids[21:48]]
    together, alone = ([engine.new_sequence() for _ in prompts] for _ in range(2))
    for sequences in (together, alone):
        for sequence, ids in zip(sequences, prompts, strict=True):
            sequence.append(ids)

    for next_id in (7, 8, 9):
        logits = engine.step(together)
        expected = torch.cat([engine.step([sequence]) for sequence in alone])
        assert relative_difference(logits, expected) <= 1e-4
        for sequence in (*together, *alone):
            sequence.append([next_id])


def test_sequences_keep_their_own_positions(engine: Engine) -> None:
    token_ids = prompt(engine.config.vocab_size)
    early, late = engine.new_sequence(), engine.new_sequence()
    early.append(token_ids[:30])
    engine.step([early])
    early.append(token_ids[30:40])
    late.append(token_ids[:12])

    logits = engine.step([late, early])

    expected = torch.stack((engine.logits(token_ids[:12])[-1], engine.logits(token_ids[:40])[-1]))
    assert relative_difference(logits, expected) <= 1e-4
    assert (early.kv_cache.length, late.kv_cache.length) == (40, 12)


def test_logits_do_not_depend_on_the_number_of_threads(quantized: Pair) -> None:
    computed = []
    for threads in (1, 2, 3):
        with quantized.store.engine(threads=threads) as engine:
            token_ids = prompt(engine.config.vocab_size)
            sequence = engine.new_sequence()
            sequence.append(token_ids)
            steps = [engine.step([sequence])]
            for token_id in token_ids[:8]:
                sequence.append([token_id])
                steps.append(engine.step([sequence]))
            computed.append(torch.cat([engine.logits(token_ids), *steps]))

    assert torch.equal(computed[0], computed[1])
    assert torch.equal(computed[0], computed[2])


def test_only_the_experts_that_are_used_are_touched(plain: SmallStore) -> None:
    store = LocalStore(plain.path)

    with Engine(store, RunnerConfig(threads=1)) as engine:
        untouched = set(store.touched)
        engine.logits([5])

    assert untouched == set()
    assert len(store.touched) == store.manifest.model.n_layers * store.manifest.model.top_k


def test_a_corrupt_expert_is_named_and_the_sequence_stays_as_it_was(plain: SmallStore) -> None:
    keys = [ExpertKey(1, expert) for expert in range(4)]
    with Engine(LocalStore(plain.path, corrupt=keys), RunnerConfig(threads=1)) as engine:
        sequence = engine.new_sequence()
        sequence.append([5, 6])

        with pytest.raises(CorruptExpert, match=r"layers\.1\.experts\.\d: "):
            engine.step([sequence])

        assert (sequence.kv_cache.length, sequence.pending) == (0, [5, 6])


def test_a_model_without_its_corrupt_experts_goes_on(plain: SmallStore) -> None:
    used = LocalStore(plain.path)
    with Engine(used, RunnerConfig(threads=1)) as engine:
        expected = engine.logits([5])
    unused = {key for key in used.manifest.experts if key not in used.touched}

    with Engine(LocalStore(plain.path, corrupt=unused), RunnerConfig(threads=1)) as engine:
        assert torch.equal(engine.logits([5]), expected)
