"""The torch reference against the formula written out, a weight at a time."""

import pytest
import torch

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Q4_G64, Scheme
from quant.errors import BadPart, BadShape
from quant.packing import QuantizedMatrix, pack
from quant.reference import dequantize, dequantize_rows
from tests.unit.quant.matrices import ALL_SCHEMES, QUANTIZED, encoded, name_of, random_quantized


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_each_weight_is_what_the_formula_says(scheme: Scheme) -> None:
    matrix = random_quantized(11, 192, scheme)

    weights = dequantize(pack(matrix), 11, 192, scheme)

    assert all(
        weights[row, column].item() == weight_by_formula(matrix, row, column)
        for row in range(11)
        for column in range(192)
    )


@pytest.mark.parametrize(("scheme", "dtype"), [(BF16, torch.bfloat16), (FP16, torch.float16)])
def test_every_16_bit_value_comes_back(scheme: Scheme, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(512, 128)

    weights = dequantize(values.view(torch.uint8).view(-1), 512, 128, scheme)

    torch.testing.assert_close(weights, values.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_any_range_of_rows_is_the_matrix_there(scheme: Scheme) -> None:
    part, part_bytes = encoded(21, 128, scheme)
    whole = dequantize(part_bytes, 21, 128, scheme)

    for first_row, n_rows in ((0, 21), (3, 2), (7, 2), (8, 8), (20, 1), (5, 16), (4, 0)):
        rows = torch.full((n_rows, 128), torch.nan)
        dequantize_rows(part_bytes, part, first_row, n_rows, rows)

        assert torch.equal(rows, whole[first_row : first_row + n_rows])


def test_rows_that_the_part_does_not_have_are_refused() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)

    for first_row, n_rows in ((-1, 2), (7, 2), (0, -1)):
        with pytest.raises(BadShape, match="of 8 were asked for"):
            dequantize_rows(part_bytes, part, first_row, n_rows, torch.empty(max(0, n_rows), 64))


def test_bytes_of_another_length_are_refused() -> None:
    part = Part("matrix", 8, 64, BF16.name)

    with pytest.raises(BadPart, match="matrix: 1024 bytes are expected, 1020 came"):
        dequantize(torch.zeros(1020, dtype=torch.uint8), part.rows, part.cols, BF16)


def weight_by_formula(matrix: QuantizedMatrix, row: int, column: int) -> float:
    """Return one weight, computed with scalars, each operation rounded to float32."""
    assert matrix.scheme.group_size is not None
    group = column // matrix.scheme.group_size
    base = matrix.base_min[row] + (matrix.base_step[row] * matrix.base_codes[row, group].float())
    code = matrix.codes[row, column].float() - matrix.scheme.center
    return float((matrix.scale_codes[row, group].float() * code + base) * matrix.scale_step[row])
