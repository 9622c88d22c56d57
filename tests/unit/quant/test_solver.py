"""The solver: what it makes of odd matrices, what its second level costs. Its codes: test_solver_against_hqq.py."""

import pytest
import torch
from torch import Tensor

from protocol.errors import LayoutError
from protocol.schemes import BF16, Q2_G16, Q4_G64, Scheme
from quant.errors import BadWeights, UnknownSolver
from quant.packing import QuantizedMatrix, pack
from quant.reference import dequantize
from quant.second_level import FloatGroups, quantize_groups
from quant.solver import quantize, solve
from tests.unit.quant.matrices import FIELDS, QUANTIZED, gaussian, name_of, relative_error

# What HQQ leaves of a gaussian matrix, ||w - ŵ|| / ||w||, by scheme (published for the package, 8 bits measured).
GAUSSIAN_ERROR = {"8bit-g64": 0.0051, "4bit-g64": 0.0871, "3bit-g64": 0.1844, "2bit-g16": 0.3023}


def restored(matrix: QuantizedMatrix) -> Tensor:
    rows, cols = matrix.codes.shape
    return dequantize(pack(matrix), rows, cols, matrix.scheme)


def without_second_level(groups: FloatGroups) -> Tensor:
    codes = groups.codes.view(*groups.scale.shape, -1).float()
    return ((codes - groups.zero[..., None]) * groups.scale[..., None]).view_as(groups.codes)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_gaussian_matrix_keeps_what_hqq_keeps(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = gaussian(256, 1024).to(dtype)

    groups = solve(weight, scheme)

    assert relative_error(without_second_level(groups), weight.float()) == pytest.approx(
        GAUSSIAN_ERROR[scheme.name], rel=0.02
    )


@pytest.mark.parametrize("scheme", QUANTIZED[1:], ids=name_of)
@pytest.mark.parametrize("std", [0.02, 0.002, 1e-5])
def test_the_second_level_costs_at_most_half_a_percent_of_the_error(scheme: Scheme, std: float) -> None:
    weight = gaussian(256, 4096, std=std)

    groups = solve(weight, scheme)

    first = relative_error(without_second_level(groups), weight)
    both = relative_error(restored(quantize_groups(groups, scheme)), weight)
    assert both <= 1.005 * first


def test_the_second_level_of_8_bits_costs_less_than_the_last_bit() -> None:
    # The error of 8-bit codes is so small that steps of 1/255 in scale and zero show: 5 % to 9 %,
    # the more the longer the row.
    weight = gaussian(256, 4096)

    groups = solve(weight, QUANTIZED[0])

    first = relative_error(without_second_level(groups), weight)
    both = relative_error(restored(quantize_groups(groups, QUANTIZED[0])), weight)
    assert first < both <= 1.12 * first


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_the_magnitude_of_the_weights_does_not_matter(scheme: Scheme) -> None:
    weight = gaussian(64, 512)

    ordinary, small = (quantize(weight * factor, scheme) for factor in (1.0, 2.0**-30))

    assert torch.equal(ordinary.codes, small.codes)
    assert torch.equal(restored(ordinary) * 2.0**-30, restored(small))


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-6, -250.0])
def test_a_constant_matrix_comes_back(scheme: Scheme, value: float) -> None:
    weight = torch.full((9, 128), value)

    back = restored(quantize(weight, scheme))

    torch.testing.assert_close(back, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_a_group_of_zeros_comes_back_as_zeros_and_costs_its_row_nothing(scheme: Scheme) -> None:
    weight = gaussian(16, 512)
    with_hole = weight.clone()
    with_hole[:, 64:128] = 0

    back, whole = restored(quantize(with_hole, scheme)), restored(quantize(weight, scheme))

    assert torch.equal(back[:, 64:128], torch.zeros(16, 64))
    others = torch.cat((torch.arange(64), torch.arange(128, 512)))
    error = relative_error(back[:, others], weight[:, others])
    assert error <= 1.01 * relative_error(whole[:, others], weight[:, others])


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("offset", [0.02, -0.05])
def test_a_nearly_constant_group_does_not_spoil_its_row(scheme: Scheme, offset: float) -> None:
    weight = gaussian(16, 512)
    weight[:, 64:128] = offset + gaussian(16, 64, std=1e-7, seed=1)

    back = restored(quantize(weight, scheme))

    # Its zero, of 1e6 codes in the package, would have cost the other groups all their precision.
    assert relative_error(back[:, 128:], weight[:, 128:]) <= 1.25 * GAUSSIAN_ERROR[scheme.name]
    assert relative_error(back[:, 64:128], weight[:, 64:128]) <= 0.02


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype) -> None:
    weight = gaussian(300, 512).to(dtype)
    weight[299, 511] = bad

    with pytest.raises(BadWeights, match="finite"):
        quantize(weight, Q4_G64)


def test_the_weight_is_not_written_to() -> None:
    # One group: the solver's transposed view is then the caller's own memory.
    weight = gaussian(1, 64)
    before = weight.clone()

    quantize(weight, Q4_G64)

    assert torch.equal(weight, before)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_the_number_of_threads_changes_no_bit(scheme: Scheme, *, refine: bool) -> None:
    # Nine strips of rows, the last one short.
    weight = gaussian(1030, 8192)

    one, three = (quantize(weight, scheme, refine=refine, n_threads=n) for n in (1, 3))

    assert all(torch.equal(getattr(one, field), getattr(three, field)) for field in FIELDS)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_16_bit_weights_are_read_as_the_floats_they_are(scheme: Scheme) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight = gaussian(40, 256).to(dtype)

        matrix, expected = quantize(weight, scheme), quantize(weight.float(), scheme)

        assert all(torch.equal(getattr(matrix, field), getattr(expected, field)) for field in FIELDS)


def test_a_slice_of_a_matrix_is_quantized_as_its_copy() -> None:
    wide = gaussian(40, 256)

    matrix, expected = quantize(wide[::2, 64:192], Q2_G16), quantize(wide[::2, 64:192].contiguous(), Q2_G16)

    assert all(torch.equal(getattr(matrix, field), getattr(expected, field)) for field in FIELDS)


def test_what_is_no_matrix_of_floats_or_does_not_divide_is_refused() -> None:
    with pytest.raises(BadWeights, match="a matrix of floats is expected"):
        quantize(torch.zeros(64), Q4_G64)
    with pytest.raises(BadWeights, match="a matrix of floats is expected"):
        quantize(torch.zeros(8, 64, dtype=torch.int32), Q4_G64)
    with pytest.raises(LayoutError, match="72 inputs do not divide"):
        quantize(torch.zeros(8, 72), Q4_G64)
    with pytest.raises(BadWeights, match="not quantized"):
        quantize(torch.zeros(8, 64), BF16)
    with pytest.raises(UnknownSolver, match="'magic' is not known; this version knows shortcut, hqq"):
        quantize(torch.zeros(8, 64), Q4_G64, solver="magic")
