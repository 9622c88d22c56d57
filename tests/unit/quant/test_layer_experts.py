"""A layer's experts in one call: who is computed, in which order it is added; nothing else shows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.schemes import BF16, Q2_G16, Q3_G64, Q4_G64, Q8_G64, Scheme
from quant.errors import BadShape, ExpertMissing
from quant.expert import Expert, LayerExperts, sum_in_order
from quant.workspace import Workspace
from tests.unit.quant.c_library import by_all_kernels, needs_avx2, needs_library
from tests.unit.quant.expert_records import HIDDEN, expert_of, mixtral_parts, record_of, swiglu_in_float64
from tests.unit.quant.matrices import all_schemes, gaussian, have_equal_bits, relative_error, seeds

N_EXPERTS = 6
SCHEMES = (Q4_G64, Q3_G64, Q2_G16, Q8_G64, BF16, Q4_G64)


@pytest.fixture(scope="module")
def experts() -> list[Expert]:
    """Experts of different schemes: in a layer they may."""
    return [expert_of(scheme, seed) for seed, scheme in enumerate(SCHEMES)]


def layer_of(experts: dict[int, Expert], workspace: Workspace, *, exact: bool = False) -> LayerExperts:
    layer = LayerExperts(N_EXPERTS, HIDDEN, workspace=workspace, exact=exact)
    for expert_id, expert in experts.items():
        layer.put(expert_id, expert)
    return layer


def choose(n_tokens: int, top_k: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden_states [T, H], expert_ids and weights, both [T, top_k]."""
    hidden_states = gaussian(n_tokens, HIDDEN, std=1.0, seed=seed)
    logits, expert_ids = gaussian(n_tokens, N_EXPERTS, std=1.0, seed=seed + 1).topk(top_k)
    return hidden_states, expert_ids, logits.softmax(-1)


def forward(
    experts: list[Expert], chosen: tuple[Tensor, Tensor, Tensor], *, exact: bool = False, n_threads: int = 1
) -> Tensor:
    with Workspace(n_threads) as workspace:
        return layer_of(dict(enumerate(experts)), workspace, exact=exact).forward(*chosen)


def contribute(experts: dict[int, Expert], hidden_states: Tensor, expert_ids: Tensor, into: Tensor) -> Tensor:
    with Workspace(2) as workspace:
        layer_of(experts, workspace).contribute(hidden_states, expert_ids, into)
    return into


def by_reference(experts: list[Expert], hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    outputs = torch.stack([expert.reference(hidden_states) for expert in experts])  # [E, T, H]
    tokens = torch.arange(len(hidden_states))[:, None]
    return (outputs[expert_ids, tokens] * weights[:, :, None]).sum(dim=1)


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 40, 400])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_output_is_the_weighted_sum_of_the_chosen_experts(experts: list[Expert], n_tokens: int, top_k: int) -> None:
    chosen = choose(n_tokens, top_k)

    fast, exact = (forward(experts, chosen, exact=exact, n_threads=2) for exact in (False, True))

    expected = by_reference(experts, *chosen)
    assert relative_error(fast, expected) <= 0.02
    assert relative_error(exact, expected) <= 2e-6


@needs_library
@settings(max_examples=40)
@given(n_tokens=st.integers(1, 20), top_k=st.integers(1, N_EXPERTS), exact=st.booleans(), seed=seeds)
def test_neither_threads_nor_kernels_nor_other_tokens_change_a_bit(
    experts: list[Expert], *, n_tokens: int, top_k: int, exact: bool, seed: int
) -> None:
    chosen = choose(n_tokens, top_k, seed)

    results = [
        y
        for n_threads in (1, 2, 3)
        for y in by_all_kernels(lambda n=n_threads: forward(experts, chosen, exact=exact, n_threads=n))  # type: ignore[misc]
    ]
    each = [tuple(part[token : token + 1] for part in chosen) for token in range(n_tokens)]
    alone = torch.cat([forward(experts, one, exact=exact) for one in each])  # type: ignore[arg-type]

    assert all(have_equal_bits(y, alone) for y in results)


@needs_library
@needs_avx2
@settings(max_examples=25)
@given(
    scheme=all_schemes,
    hidden_blocks=st.integers(1, 5),
    intermediate_blocks=st.integers(1, 9),
    n_tokens=st.integers(1, 9),
    exact=st.booleans(),
    seed=seeds,
)
def test_experts_of_any_size_have_the_same_bits_by_all_kernels(
    *, scheme: Scheme, hidden_blocks: int, intermediate_blocks: int, n_tokens: int, exact: bool, seed: int
) -> None:
    hidden = 64 * hidden_blocks
    parts = mixtral_parts(scheme, scheme, scheme, hidden=hidden, intermediate=64 * intermediate_blocks)
    record, spans = record_of(*parts, seed=seed % 1000)
    x, ids = gaussian(n_tokens, hidden, std=1.0, seed=seed), torch.zeros(n_tokens, 1, dtype=torch.int64)

    with Workspace(1 + seed % 3) as workspace:
        layer = LayerExperts(1, hidden, workspace=workspace, exact=exact)
        layer.put(0, Expert(record, spans))
        portable, *others = by_all_kernels(lambda: layer.forward(x, ids, torch.ones(n_tokens, 1)))

    assert all(have_equal_bits(portable, other) for other in others)
    # Where an inner activation lies between two codes, rounding may decide otherwise than in float64: a code is 0.3 %.
    expected = swiglu_in_float64(record, spans, x, rounds_to_int8=not exact)
    assert relative_error(portable, expected) <= (2e-6 if exact else 0.01)


@settings(max_examples=40)
@given(st.integers(1, 20), st.sets(st.integers(0, N_EXPERTS - 1)), seeds)
def test_experts_computed_in_two_calls_contribute_what_they_do_in_one(
    experts: list[Expert], n_tokens: int, first: set[int], seed: int
) -> None:
    hidden_states, expert_ids, weights = choose(n_tokens, 3, seed)
    some = {expert_id: expert for expert_id, expert in enumerate(experts) if expert_id in first}
    others = {expert_id: expert for expert_id, expert in enumerate(experts) if expert_id not in first}
    at_once, in_two = torch.full((2, n_tokens, 3, HIDDEN), torch.nan)

    contribute(dict(enumerate(experts)), hidden_states, expert_ids, at_once)
    contribute(some, hidden_states, expert_ids, in_two)
    contribute(others, hidden_states, expert_ids, in_two)

    assert have_equal_bits(in_two, at_once)
    assert have_equal_bits(
        sum_in_order(in_two, weights), forward(experts, (hidden_states, expert_ids, weights), n_threads=3)
    )


def test_the_places_of_experts_that_are_not_here_are_left_as_they_are(experts: list[Expert]) -> None:
    hidden_states, expert_ids, _ = choose(30)
    contributions = torch.full((30, 2, HIDDEN), -7.0)

    contribute({2: experts[2], 4: experts[4]}, hidden_states, expert_ids, contributions)

    is_ours = (expert_ids == 2) | (expert_ids == 4)
    assert bool((contributions[~is_ours] == -7).all())
    assert not bool((contributions[is_ours] == -7).any())


def test_an_expert_taken_away_is_computed_no_more(experts: list[Expert]) -> None:
    contributions = torch.full((1, 1, HIDDEN), -7.0)
    with Workspace() as workspace:
        layer = layer_of({0: experts[0]}, workspace)
        layer.put(0, None)

        layer.contribute(torch.ones(1, HIDDEN), torch.zeros(1, 1, dtype=torch.int64), contributions)

    assert not layer.has(0)
    assert bool((contributions == -7).all())


def test_contributions_are_added_in_the_gates_order(experts: list[Expert]) -> None:
    # In fp32, (1e8 y + y') - 1e8 y is not y', and (1e8 y - 1e8 y) + y' is.
    hidden_states = gaussian(1, HIDDEN, std=1.0)
    large, small = experts[0], experts[1]
    layer = [large, small, large, *experts[3:]]

    cancelled, lost = (
        forward(layer, (hidden_states, torch.tensor([ids]), torch.tensor([weights])))
        for ids, weights in (([0, 2, 1], [1e12, -1e12, 1.0]), ([0, 1, 2], [1e12, 1.0, -1e12]))
    )

    alone = forward(layer, (hidden_states, torch.tensor([[1]]), torch.ones(1, 1)))
    assert have_equal_bits(cancelled, alone)
    assert not bool((lost == alone).any())


@needs_library
@pytest.mark.parametrize("n_tokens", [1, 50])
def test_the_number_of_an_expert_changes_no_bit(experts: list[Expert], n_tokens: int) -> None:
    # The same experts under other numbers: what was computed first is computed last.
    hidden_states, expert_ids, weights = choose(n_tokens)

    forwards = forward(experts, (hidden_states, expert_ids, weights))
    backwards = forward(experts[::-1], (hidden_states, N_EXPERTS - 1 - expert_ids, weights))

    assert have_equal_bits(backwards, forwards)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_with_its_token(experts: list[Expert], *, exact: bool, value: float) -> None:
    hidden_states, expert_ids, weights = choose(9)
    before = forward(experts, (hidden_states, expert_ids, weights), exact=exact)

    hidden_states[4, 77] = value
    output = forward(experts, (hidden_states, expert_ids, weights), exact=exact)

    others = torch.arange(9) != 4
    assert not bool(output[4].isfinite().any())
    assert have_equal_bits(output[others], before[others])


def test_the_same_expert_may_be_chosen_twice(experts: list[Expert]) -> None:
    hidden_states = gaussian(3, HIDDEN, std=1.0)

    twice = forward(experts, (hidden_states, torch.full((3, 2), 5), torch.full((3, 2), 0.5)))

    assert have_equal_bits(twice, forward(experts, (hidden_states, torch.full((3, 1), 5), torch.ones(3, 1))))


@needs_library
@pytest.mark.slow
def test_a_prompt_of_more_tiles_than_fit_in_one_job_is_computed_whole() -> None:
    n_tokens = 4 * 2**16 + 21
    expert = expert_of(Q4_G64, hidden=64, intermediate=64)
    few = gaussian(7, 64, std=1.0)
    many = few.repeat(-(-n_tokens // 7), 1)[:n_tokens]

    with Workspace(2) as workspace:
        layer = LayerExperts(1, 64, workspace=workspace)
        layer.put(0, expert)
        expected, output = (
            layer.forward(x, torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)) for x in (few, many)
        )

    assert torch.equal(output, expected.repeat(-(-n_tokens // 7), 1)[:n_tokens])


def test_no_tokens_give_no_output(experts: list[Expert]) -> None:
    output = forward(experts, (torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)))

    assert output.shape == (0, HIDDEN)


@needs_library
@pytest.mark.parametrize("expert_id", [-1, N_EXPERTS, 2**62])
def test_an_expert_that_the_layer_does_not_have_is_refused(experts: list[Expert], expert_id: int) -> None:
    with pytest.raises(ExpertMissing):
        forward(experts, (torch.ones(2, HIDDEN), torch.tensor([[0, 1], [1, expert_id]]), torch.ones(2, 2)))


@needs_library
def test_what_does_not_fit_is_refused(experts: list[Expert]) -> None:
    hidden_states, expert_ids, weights = choose(4)

    for wrong, match in (
        ((hidden_states[:, :-1], expert_ids, weights), r"hidden_states: contiguous torch.float32 \[4, 192\]"),
        ((hidden_states.double(), expert_ids, weights), "hidden_states: .*torch.float64"),
        ((hidden_states, expert_ids.int(), weights), "expert_ids: .*torch.int32"),
        ((hidden_states, expert_ids.t().contiguous().t(), weights), "expert_ids: contiguous"),
        ((hidden_states, expert_ids, weights[:3]), r"weights: contiguous torch.float32 \[4, 2\]"),
    ):
        with pytest.raises(BadShape, match=match):
            forward(experts, wrong)


def test_an_expert_of_another_size_is_not_put_into_a_layer() -> None:
    with Workspace() as workspace, pytest.raises(BadShape, match="an expert of 192 inputs is expected, one of 64 came"):
        layer_of({0: expert_of(BF16, hidden=64, intermediate=64)}, workspace)
