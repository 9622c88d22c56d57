"""Activations that are not finite, huge, tiny or far apart: what they do to their own token, and to no other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.layout import BLOCK_COLS
from protocol.schemes import Scheme
from quant.kernels import Product
from quant.packing import unpack
from quant.workspace import Workspace
from tests.unit.quant.activations import activations, weights_with_magnitudes
from tests.unit.quant.c_library import by_all_kernels, needs_library
from tests.unit.quant.matrices import (
    ALL_SCHEMES,
    QUANTIZED,
    all_schemes,
    encoded,
    gaussian,
    have_equal_bits,
    name_of,
    relative_error,
)

pytestmark = needs_library

ROWS, COLS = 45, 320

# Below this a block's largest magnitude counts as 0: its 127th part would not be a normal number.
LEAST_BLOCK = 127 * 2.0**-126


def multiply(x: Tensor, scheme: Scheme, *, exact: bool = False) -> Tensor:
    """Return the product with the test's matrix; all kernels agree in its bits."""
    with Workspace(2) as workspace:
        product = Product([encoded(ROWS, COLS, scheme)], workspace=workspace, exact=exact)
        results = by_all_kernels(lambda: product(x)[0])
    assert all(have_equal_bits(y, results[0]) for y in results)
    return results[0]


@settings(max_examples=80)
@given(
    scheme=all_schemes,
    exact=st.booleans(),
    n_tokens=st.integers(1, 9),
    at=st.integers(0, 8),
    column=st.integers(0, COLS - 1),
    value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
)
def test_what_is_not_finite_reaches_every_row_of_its_token_and_no_other_token(
    *, scheme: Scheme, exact: bool, n_tokens: int, at: int, column: int, value: float
) -> None:
    x = gaussian(n_tokens, COLS, std=1.0, seed=1)
    token = at % n_tokens
    others = torch.arange(n_tokens) != token
    before = multiply(x, scheme, exact=exact)

    x[token, column] = value
    y = multiply(x, scheme, exact=exact)

    assert not bool(y[token].isfinite().any())
    assert have_equal_bits(y[others], before[others])


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_infinity_makes_int8_products_nan_as_nan_does(scheme: Scheme, value: float) -> None:
    x = gaussian(1, COLS, std=1.0, seed=1)
    x[0, 100] = value

    assert bool(multiply(x, scheme).isnan().all())


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
@pytest.mark.parametrize("exact", [False, True])
def test_nothing_times_anything_is_nothing(scheme: Scheme, *, exact: bool) -> None:
    assert multiply(torch.zeros(3, COLS), scheme, exact=exact).tolist() == [[0.0] * ROWS] * 3


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("largest", [0.999 * LEAST_BLOCK, 2.0**-126, 1e-40, 1.4e-45])
def test_a_block_too_small_to_be_scaled_counts_as_nothing(scheme: Scheme, largest: float) -> None:
    x = gaussian(2, COLS, std=1.0, seed=1)
    without, tiny = x.clone(), x.clone()
    without[:, :BLOCK_COLS] = 0
    tiny[:, :BLOCK_COLS] = largest

    assert have_equal_bits(multiply(tiny, scheme), multiply(without, scheme))


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_the_smallest_blocks_that_count_keep_their_accuracy(scheme: Scheme) -> None:
    x = torch.full((1, COLS), 1.001 * LEAST_BLOCK)

    y = multiply(x, scheme)

    assert relative_error(y.double() / LEAST_BLOCK, 1.001 * multiply(torch.ones(1, COLS), scheme).double()) <= 1e-5


@settings(max_examples=40)
@given(scheme=all_schemes, exact=st.booleans(), exponent=st.integers(-90, 90))
def test_a_product_of_activations_times_a_power_of_two_is_the_product_times_it(
    *, scheme: Scheme, exact: bool, exponent: int
) -> None:
    x = gaussian(5, COLS, std=1.0, seed=1)

    scaled = multiply(x * 2.0**exponent, scheme, exact=exact)

    assert have_equal_bits(scaled, multiply(x, scheme, exact=exact) * 2.0**exponent)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_huge_activations_are_rounded_as_any(scheme: Scheme) -> None:
    x = gaussian(2, COLS, std=1.0, seed=1)

    y = multiply(x * 1e30, scheme)

    assert relative_error(y.double() / 1e30, multiply(x, scheme).double()) <= 1e-2


@settings(max_examples=40)
@given(st.sampled_from(QUANTIZED), st.sampled_from(["outliers", "blocks of different size"]), st.integers(0, 1000))
def test_rounding_errs_by_half_a_step_of_each_blocks_own_scale(scheme: Scheme, kind: str, seed: int) -> None:
    x = activations(kind, 4, COLS, seed)
    part, part_bytes = encoded(ROWS, COLS, scheme)
    weights, magnitudes = weights_with_magnitudes(unpack(part_bytes, ROWS, COLS, scheme))

    y = multiply(x, scheme)

    half_step = x.double().view(4, -1, BLOCK_COLS).abs().amax(-1) / 127 / 2  # [T, blocks]
    by_input = half_step.repeat_interleave(BLOCK_COLS, dim=1)
    bound = by_input @ weights.abs().t() + 2e-6 * x.double().abs() @ magnitudes.t()
    assert bool(((y - x.double() @ weights.t()).abs() <= bound).all())
    assert part.cols == COLS
