"""Norms, the choice of experts and the exponential, against float64 and the torch reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import layer_reference
from quant.errors import BadShape, QuantError
from quant.layer import choose_experts, exponentials, rms_norm
from quant.workspace import Workspace
from tests.unit.quant.c_library import by_all_kernels, needs_avx2, needs_library
from tests.unit.quant.matrices import gaussian

EPS = 1e-5


def norm(x: Tensor, weight: Tensor, *, n_threads: int = 1, added: Tensor | None = None) -> Tensor:
    with Workspace(n_threads) as workspace:
        return rms_norm(x, weight, EPS, workspace=workspace, added=added)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 200) | st.just(4096), st.integers(1, 3))
def test_a_norm_is_that_of_float64(n_tokens: int, hidden: int, n_threads: int) -> None:
    x, weight = gaussian(n_tokens, hidden, std=3.0), gaussian(1, hidden, std=1.0, seed=1)[0]

    normed = norm(x, weight, n_threads=n_threads)

    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert torch.allclose(normed.double(), expected, rtol=1e-6, atol=0)


def test_what_is_added_before_a_norm_is_added_in_place() -> None:
    x, added, weight = gaussian(5, 100, std=1.0), gaussian(5, 100, std=1.0, seed=1), torch.ones(100)
    total = x + added

    normed = norm(x, weight, added=added)

    assert torch.equal(x, total)
    assert torch.equal(normed, norm(total, weight))


@needs_library
def test_neither_threads_nor_other_tokens_change_a_bit_of_a_norm() -> None:
    x, weight = gaussian(40, 300, std=1.0), gaussian(1, 300, std=1.0, seed=1)[0]

    together = norm(x, weight, n_threads=3)

    assert torch.equal(together, norm(x, weight))
    assert torch.equal(together, torch.cat([norm(x[token : token + 1], weight) for token in range(40)]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_nan_or_an_infinity_spoils_its_own_token_alone(poison: float) -> None:
    x = gaussian(3, 70, std=1.0)
    clean = norm(x, torch.ones(70))
    x[1, 69] = poison

    normed = norm(x, torch.ones(70))

    assert torch.equal(normed[[0, 2]], clean[[0, 2]])
    assert bool(normed[1, 69].isnan())


def test_norms_of_shapes_that_do_not_fit_are_refused() -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)

    refused = [(x, torch.ones(7), None), (x.double(), weight, None), (x.t(), torch.ones(3), None), (x, weight, x[:2])]
    for states, other, added in refused:
        with pytest.raises(BadShape, match="is expected"):
            norm(states, other, added=added)


@needs_library
def test_a_closed_workspace_is_refused() -> None:
    workspace = Workspace()
    workspace.close()

    with pytest.raises(QuantError, match="closed"):
        rms_norm(torch.ones(1, 8), torch.ones(8), EPS, workspace=workspace)


# Few different values, so that there are ties; both zeros, infinities and NaN among them.
logits = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 88.0, -200.0, torch.inf, -torch.inf, torch.nan])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(0, 4))
def test_the_experts_of_the_highest_logits_are_chosen(data: st.DataObject, n_experts: int, n_tokens: int) -> None:
    rows = [data.draw(st.lists(logits, min_size=n_experts, max_size=n_experts)) for _ in range(n_tokens)]
    gate_logits = torch.tensor(rows, dtype=torch.float32).view(n_tokens, n_experts)
    top_k = data.draw(st.integers(1, n_experts))

    expert_ids, weights = choose_experts(gate_logits, top_k)

    expected_ids, expected_weights = layer_reference.choose_experts(gate_logits, top_k)
    assert torch.equal(expert_ids, expected_ids)
    assert torch.allclose(weights, expected_weights, rtol=1e-6, atol=1e-38, equal_nan=True)


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    expert_ids, weights = choose_experts(torch.tensor([[1.0, 3.0, -0.0, 3.0, 0.0]]), 4)

    assert expert_ids.tolist() == [[1, 3, 0, 2]]
    assert weights[0, 0] == weights[0, 1]


def test_a_nan_is_chosen_and_makes_every_weight_a_nan() -> None:
    expert_ids, weights = choose_experts(torch.tensor([[1.0, torch.inf, torch.nan, 3.0]]), 2)

    assert expert_ids.tolist() == [[2, 1]]
    assert bool(weights.isnan().all())


@needs_library
def test_a_choice_does_not_depend_on_other_tokens() -> None:
    gate_logits = gaussian(50, 8, std=1.0)

    together = choose_experts(gate_logits, 3)[1]

    assert torch.equal(together, torch.cat([choose_experts(row.unsqueeze(0), 3)[1] for row in gate_logits]))


@pytest.mark.parametrize("top_k", [0, 9])
def test_a_number_of_experts_that_cannot_be_chosen_is_refused(top_k: int) -> None:
    with pytest.raises(BadShape, match="to be chosen of 8"):
        choose_experts(torch.zeros(1, 8), top_k)


@needs_library
def test_the_exponential_errs_by_less_than_one_and_a_half_units_in_the_last_place() -> None:
    # Every 1021st float of either sign: all exponents, and no period of two.
    bits = torch.arange(0, 0x7F800000, 1021, dtype=torch.int32)
    x = torch.cat((bits.view(torch.float32), -bits.view(torch.float32)))

    computed = exponentials(x)

    exact = x.double().exp()
    # A float32 has 24 bits, but none below 2^-149; where it overflows, both are infinite.
    unit = torch.ldexp(torch.ones_like(exact), (exact.frexp().exponent - 24).clamp(min=-149))
    is_finite = exact.float().isfinite()
    error = ((computed.double() - exact) / unit).abs()
    assert float(error[is_finite].max()) < 1.5
    assert bool(computed[~is_finite].isinf().all())


@needs_library
def test_the_exponential_of_special_numbers() -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1e30, 1e30])

    computed = exponentials(x)

    assert computed[:4].tolist() == [1.0, 1.0, torch.inf, 0.0]
    assert bool(computed[4].isnan())
    assert computed[5:].tolist() == [0.0, torch.inf]


@needs_avx2
def test_the_instruction_set_changes_no_bit_of_what_a_layer_computes() -> None:
    x, weight = gaussian(9, 77, std=1.0), torch.ones(77)

    for results in (
        by_all_kernels(lambda: norm(x, weight)),
        by_all_kernels(lambda: choose_experts(x, 5)[1]),
        by_all_kernels(lambda: exponentials(x)),
    ):
        assert all(torch.equal(results[0], other) for other in results[1:])
