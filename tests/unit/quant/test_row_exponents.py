"""The ends of float32's range: every finite weight is quantized, within a bounded part of its row's range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import Scheme
from quant import refinement_reference, solver_reference
from quant.encode import encode_part
from quant.kernels import Product, dequantize_rows
from quant.reference import dequantize
from quant.row_exponents import least_steps, moved, moved_back, row_shifts
from quant.second_level import quantize_groups
from quant.solver import quantize, solve
from quant.weight_error import weight_error
from quant.workspace import Workspace
from tests.unit.quant.c_library import by_all_kernels, needs_library
from tests.unit.quant.matrices import FIELDS, QUANTIZED, gaussian, have_equal_bits, name_of, schemes
from tests.unit.quant.test_refinement import GAUSSIAN_ERROR_MOST, restored

ROWS, COLS = 24, 256
# The largest float32 and bf16, their least normal number, the least bf16, and what was refused or lost once.
LARGEST_F32, LARGEST_BF16 = torch.finfo(torch.float32).max, torch.finfo(torch.bfloat16).max
EXTREMES = (LARGEST_BF16, 1e38, 1e31, 1e-31, 2.0**-126, 2.0**-130)
LEAST_BF16 = 2.0**-133
# By how much of its row's range a weight is off at most, if that is at least a bf16's least number: half a step of the
# codes and of the second level, more where refinement trades the ends of a range for its middle.
PART_OF_RANGE_MOST = {"8bit-g64": 0.01, "4bit-g64": 0.09, "3bit-g64": 0.19, "2bit-g16": 0.4}


def up_to(magnitude: float, *, rows: int = ROWS, seed: int = 0) -> Tensor:
    """Return gaussian weights, f32, of which the largest is that magnitude."""
    weight = gaussian(rows, COLS, std=1.0, seed=seed).double()
    return (weight / weight.abs().max() * magnitude).float()


def lost_share(back: Tensor, weight: Tensor) -> float:
    return float((back.double() - weight.double()).norm() / weight.double().norm())


def parts_of_range(back: Tensor, weight: Tensor) -> Tensor:
    """Return each row's largest error in units of its range, 0 included, f64 [N]."""
    exact = weight.double()
    span = exact.amax(1).clamp_min(0) - exact.amin(1).clamp_max(0)
    return ((back.double() - exact).abs().amax(1) / span).nan_to_num(0.0)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", EXTREMES)
def test_the_largest_and_the_smallest_weights_lose_no_more_than_any_others(
    scheme: Scheme, dtype: torch.dtype, magnitude: float
) -> None:
    weight = up_to(magnitude).to(dtype)

    back = restored(quantize(weight, scheme))

    assert lost_share(back, weight) <= 1.05 * GAUSSIAN_ERROR_MOST[scheme]


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("refine", [False, True])
def test_what_would_be_restored_above_the_largest_float_is_drawn_in(scheme: Scheme, *, refine: bool) -> None:
    weight = torch.where(up_to(1.0, rows=64) > 0, LARGEST_F32, -LARGEST_F32)
    weight[::2] *= up_to(1.0, rows=32, seed=1).abs().clamp_min(0.9)

    back = restored(quantize(weight, scheme, refine=refine))

    assert bool(back.isfinite().all())
    assert float(parts_of_range(back, weight).max()) <= 0.2


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_every_row_keeps_its_own_magnitude(scheme: Scheme) -> None:
    magnitudes = torch.tensor([3e38, 1.0, 1e-38, 0.0, 1e-20, 2.0**-130, 1e35, 0.02]).double()
    weight = (up_to(1.0, rows=8).double() * magnitudes[:, None]).float()

    back = restored(quantize(weight, scheme))

    assert torch.equal(back[3], torch.zeros(COLS))
    for row in (0, 1, 2, 4, 5, 6, 7):
        assert lost_share(back[row], weight[row]) <= 1.3 * GAUSSIAN_ERROR_MOST[scheme]


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("value", [LARGEST_F32, -LARGEST_BF16, 1e-31, 2.0**-126, -LEAST_BF16])
def test_a_constant_extreme_comes_back(scheme: Scheme, value: float) -> None:
    weight = torch.full((9, 128), value)

    back = restored(quantize(weight, scheme))

    torch.testing.assert_close(back, weight, rtol=1e-6, atol=2.0**-149)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("solver", ["kernels", "torch"])
@pytest.mark.parametrize("ratio", [1e-10, 1e-20, 1e-35])
def test_a_group_that_is_nothing_beside_its_row_comes_back_as_next_to_nothing(
    scheme: Scheme, solver: str, ratio: float
) -> None:
    weight = gaussian(8, COLS, std=1e10)
    weight[:, 64:128] *= ratio

    if solver == "torch":
        matrix = refinement_reference.refine(weight, solver_reference.solve(weight, scheme), scheme)
    else:
        matrix = quantize(weight, scheme)

    back = restored(matrix)
    assert float(back[:, 64:128].abs().max()) <= 0.01 * float(weight.abs().max())
    assert lost_share(back, weight) <= 1.3 * GAUSSIAN_ERROR_MOST[scheme]


@settings(max_examples=150, deadline=None)
@given(
    scheme=schemes,
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=8),
    seed=st.integers(0, 2**31),
    refine=st.booleans(),
)
def test_every_finite_matrix_has_finite_fields_and_an_error_within_its_rows_range(
    scheme: Scheme, values: list[float], seed: int, *, refine: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.tensor(values)[torch.randint(0, len(values), (3, 128), generator=generator)]

    matrix = quantize(weight, scheme, refine=refine)

    back = restored(matrix)
    assert all(bool(getattr(matrix, field).isfinite().all()) for field in FIELDS)
    assert bool(back.isfinite().all())
    parts = parts_of_range(back, weight)
    # Below a bf16's least number steps of float32 itself are as large as those of the codes.
    is_ordinary = weight.abs().amax(1) >= LEAST_BF16
    assert bool((parts[is_ordinary] <= PART_OF_RANGE_MOST[scheme.name]).all())
    assert bool((parts <= 1.0).all())


def test_ordinary_rows_are_not_moved() -> None:
    for weight in (gaussian(8, 64), up_to(1e28), up_to(1e-23), torch.zeros(4, 64), gaussian(8, 64).half()):
        assert row_shifts(weight) is None


def test_rows_are_moved_and_moved_back_exactly() -> None:
    weight = torch.cat((up_to(3e38, rows=4), up_to(1e-38, rows=4), gaussian(4, COLS)))
    shifts = row_shifts(weight)
    assert shifts is not None

    there = moved(weight, shifts)

    assert torch.equal(there[8:], weight[8:])
    assert 2.0**-81 <= float(there[4:8].abs().amax(1).min()) <= float(there.abs().max()) <= 2.0**96
    assert torch.equal(there[:8].double() * 2.0 ** -shifts[:8, None].double(), weight[:8].double())
    assert least_steps(shifts).tolist() == [0.0] * 4 + [2.0 ** (-149 + int(shift)) for shift in shifts[4:8]] + [0.0] * 4


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_steps_are_moved_back_exactly(scheme: Scheme) -> None:
    weight = torch.cat((up_to(1e38, rows=4), up_to(1e-38, rows=4), gaussian(4, COLS)))
    shifts = row_shifts(weight)
    assert shifts is not None
    groups = solve(moved(weight, shifts), scheme)

    matrix = quantize_groups(groups, scheme, least_steps(shifts))

    back = moved_back(matrix, shifts).scale_step.double()
    assert torch.equal(back, matrix.scale_step.double() * 2.0 ** -shifts.double())


@needs_library
@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("magnitude", [*EXTREMES, 2.0**-140, LARGEST_F32])
def test_every_kernel_restores_the_extremes_as_the_reference_does(scheme: Scheme, magnitude: float) -> None:
    part = Part("w1", ROWS, COLS, scheme.name)
    part_bytes = encode_part(up_to(magnitude), part)

    def all_rows() -> Tensor:
        weights = torch.empty(ROWS, COLS)
        dequantize_rows(part_bytes, part, 0, ROWS, weights)
        return weights

    expected = dequantize(part_bytes, ROWS, COLS, scheme)
    assert all(have_equal_bits(weights, expected) for weights in by_all_kernels(all_rows))


@needs_library
@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize(("magnitude", "states"), [(1e38, 1e-3), (LARGEST_BF16, 1e-10), (1e-31, 1.0), (2.0**-126, 1e6)])
@pytest.mark.parametrize("exact", [False, True])
def test_products_with_extreme_weights_are_those_of_any_others(
    scheme: Scheme, magnitude: float, states: float, *, exact: bool
) -> None:
    part = Part("w1", ROWS, COLS, scheme.name)
    part_bytes = encode_part(up_to(magnitude), part)
    x = up_to(states, rows=3, seed=2)

    with Workspace() as workspace:
        product = Product([(part, part_bytes)], workspace=workspace, exact=exact)
        results = by_all_kernels(lambda: product(x)[0])

    weights = dequantize(part_bytes, ROWS, COLS, scheme).double()
    expected, magnitudes = x.double() @ weights.t(), x.double().abs() @ weights.abs().t()
    assert all(have_equal_bits(y, results[0]) for y in results)
    assert float(((results[0].double() - expected).abs() / magnitudes).max()) <= (1e-6 if exact else 5e-3)


def test_the_error_of_extremes_is_measured_as_any_others() -> None:
    part = Part("w1", ROWS, COLS, "4bit-g64")
    for magnitude in (*EXTREMES, LARGEST_F32):
        weight = up_to(magnitude)

        error = weight_error(weight, part, encode_part(weight, part))

        assert error == pytest.approx(0.081, rel=0.03)


def test_in_16_bits_the_largest_floats_become_the_largest_bf16() -> None:
    weight = torch.tensor([[LARGEST_F32, -LARGEST_F32, 3.4e38, 1.0]])

    part_bytes = encode_part(weight, Part("norm", 1, 4, "bf16"))

    assert part_bytes.view(torch.bfloat16).tolist() == [LARGEST_BF16, -LARGEST_BF16, LARGEST_BF16, 1.0]
