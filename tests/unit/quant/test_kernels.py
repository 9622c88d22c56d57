"""Rows unpacked by the C library against the torch reference. Needs the library; see test_without_library.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Q4_G64, Scheme
from quant import kernels, reference
from quant.errors import BadPart, BadShape
from quant.packing import pack
from tests.unit.quant.c_library import needs_library
from tests.unit.quant.matrices import ALL_SCHEMES, encoded, name_of, random_quantized, schemes, seeds

pytestmark = needs_library


@settings(max_examples=80)
@given(schemes, st.integers(1, 40), st.integers(1, 5), st.data())
def test_rows_are_bit_for_bit_those_of_the_reference(
    scheme: Scheme, rows: int, n_blocks: int, data: st.DataObject
) -> None:
    part = Part("matrix", rows, 64 * n_blocks, scheme.name)
    part_bytes = pack(random_quantized(rows, part.cols, scheme, data.draw(seeds)))
    first_row = data.draw(st.integers(0, rows))
    n_rows = data.draw(st.integers(0, rows - first_row))

    ours, expected = torch.full((2, n_rows, part.cols), torch.nan)
    kernels.dequantize_rows(part_bytes, part, first_row, n_rows, ours)

    reference.dequantize_rows(part_bytes, part, first_row, n_rows, expected)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("scheme", [BF16, FP16], ids=name_of)
@pytest.mark.parametrize("cols", [1, 7, 8, 64, 129])
def test_every_16_bit_value_converts_as_in_torch(scheme: Scheme, cols: int) -> None:
    # All 65536 patterns, and some again, so that rows are whole; NaNs are compared as bits.
    rows = -(-(2**16) // cols)
    values = (torch.arange(rows * cols) % 2**16).to(torch.int32).to(torch.int16).view(rows, cols)
    part = Part("matrix", rows, cols, scheme.name)
    weights = torch.empty(rows, cols)

    kernels.dequantize_rows(values.view(torch.uint8).view(-1), part, 0, rows, weights)

    expected = values.view(torch.bfloat16 if scheme == BF16 else torch.float16).float()
    is_nan = expected.isnan()
    assert torch.equal(weights.isnan(), is_nan)
    assert torch.equal(weights.view(torch.int32)[~is_nan], expected.view(torch.int32)[~is_nan])


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_only_the_rows_asked_for_are_written(scheme: Scheme) -> None:
    part, part_bytes = encoded(24, 64, scheme)
    weights = torch.full((7, 64), -7.0)

    kernels.dequantize_rows(part_bytes, part, 11, 3, weights[2:5])

    assert bool((weights[[0, 1, 5, 6]] == -7).all())
    assert not bool((weights[2:5] == -7).any())


def test_no_rows_are_no_error() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)

    kernels.dequantize_rows(part_bytes, part, 3, 0, torch.empty(0, 64))


def test_wrong_sizes_are_refused() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)
    out = torch.empty(8, 64)

    with pytest.raises(BadShape, match=r"out: contiguous float32 \[8, 64\] is expected"):
        kernels.dequantize_rows(part_bytes, part, 0, 8, out[:7])
    with pytest.raises(BadShape, match="out: contiguous"):
        kernels.dequantize_rows(part_bytes, part, 0, 8, torch.empty(64, 8).t())
    with pytest.raises(BadShape, match="rows 1 to 9 of 8 were asked for"):
        kernels.dequantize_rows(part_bytes, part, 1, 8, out)
    with pytest.raises(BadPart, match=r"matrix: \d+ bytes are expected, \d+ came"):
        kernels.dequantize_rows(part_bytes[:-4], part, 0, 8, out)
    with pytest.raises(BadPart, match="flat contiguous uint8"):
        kernels.dequantize_rows(part_bytes.view(torch.int8), part, 0, 8, out)


def test_a_part_that_does_not_start_at_a_multiple_of_4_is_refused() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)
    shifted = torch.zeros(part_bytes.numel() + 1, dtype=torch.uint8)[1:]
    shifted.copy_(part_bytes)

    with pytest.raises(BadPart, match="multiple of 4"):
        kernels.dequantize_rows(shifted, part, 0, 8, torch.empty(8, 64))


def test_the_library_knows_every_scheme() -> None:
    assert {scheme.name for scheme in ALL_SCHEMES} == set(kernels._FORMATS)
