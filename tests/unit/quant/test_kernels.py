"""The C library against the torch reference, and what it refuses. Needs the library; see test_without_library.py."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Q2_G16, Q4_G64, Scheme
from quant import kernels, reference
from quant.errors import BadPart, BadShape
from quant.packing import pack
from tests.unit.quant.matrices import ALL_SCHEMES, QUANTIZED, encoded, gaussian, name_of, random_quantized, schemes

pytestmark = pytest.mark.skipif(not kernels.has_c_library(), reason="the C library was not built")

# Of y's range: float32 additions in another order than the float64 sum.
PRODUCT_TOLERANCE = 1e-5


@settings(max_examples=80, deadline=None)
@given(schemes, st.integers(1, 40), st.integers(1, 5), st.data())
def test_rows_are_bit_for_bit_those_of_the_reference(
    scheme: Scheme, rows: int, n_blocks: int, data: st.DataObject
) -> None:
    part = Part("matrix", rows, 64 * n_blocks, scheme.name)
    part_bytes = pack(random_quantized(rows, part.cols, scheme, data.draw(st.integers(0, 2**31))))
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
@pytest.mark.parametrize("n_tokens", [1, 2, 8, 9, 20])
def test_products_are_those_of_the_dense_matrix(scheme: Scheme, n_tokens: int) -> None:
    part, part_bytes = encoded(45, 320, scheme)
    x = gaussian(n_tokens, 320, std=1.0, seed=1)
    y = torch.full((n_tokens, 45), torch.nan)

    kernels.multiply_rows(x, part_bytes, part, 0, 45, y=y)

    assert_is_product(y, x, reference.dequantize(part_bytes, 45, 320, scheme))


@pytest.mark.parametrize("scheme", [BF16, FP16], ids=name_of)
@pytest.mark.parametrize("cols", [1, 7, 65, 100])
def test_16_bit_rows_may_have_any_length(scheme: Scheme, cols: int) -> None:
    part, part_bytes = encoded(6, cols, scheme)
    x = gaussian(3, cols, std=1.0, seed=1)
    y = torch.full((3, 6), torch.nan)

    kernels.multiply_rows(x, part_bytes, part, 0, 6, y=y)

    assert_is_product(y, x, reference.dequantize(part_bytes, 6, cols, scheme))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_a_product_depends_neither_on_the_split_of_rows_nor_on_other_tokens(scheme: Scheme) -> None:
    part, part_bytes = encoded(45, 320, scheme)
    x = gaussian(11, 320, std=1.0, seed=1)
    whole, split, single = torch.full((3, 11, 45), torch.nan)
    kernels.multiply_rows(x, part_bytes, part, 0, 45, y=whole)

    for first_row, n_rows in ((0, 3), (3, 5), (8, 8), (16, 29)):
        kernels.multiply_rows(x, part_bytes, part, first_row, n_rows, y=split)
    for token in range(11):
        kernels.multiply_rows(x[token : token + 1], part_bytes, part, 0, 45, y=single[token : token + 1])

    assert torch.equal(split, whole)
    assert torch.equal(single, whole)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_only_the_rows_asked_for_are_written(scheme: Scheme) -> None:
    part, part_bytes = encoded(24, 64, scheme)
    y = torch.full((2, 24), -7.0)
    weights = torch.full((7, 64), -7.0)

    kernels.multiply_rows(torch.ones(2, 64), part_bytes, part, 11, 3, y=y)
    kernels.dequantize_rows(part_bytes, part, 11, 3, weights[2:5])

    assert bool((y[:, :11] == -7).all())
    assert bool((y[:, 14:] == -7).all())
    assert not bool((y[:, 11:14] == -7).any())
    assert bool((weights[[0, 1, 5, 6]] == -7).all())


def test_no_rows_and_no_tokens_are_no_error() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)

    kernels.dequantize_rows(part_bytes, part, 3, 0, torch.empty(0, 64))
    kernels.multiply_rows(torch.empty(0, 64), part_bytes, part, 0, 8, y=torch.empty(0, 8))


def test_wrong_sizes_are_refused() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)
    out = torch.empty(8, 64)

    with pytest.raises(BadPart, match="bytes are expected"):
        kernels.dequantize_rows(part_bytes[:-4], part, 0, 8, out)
    with pytest.raises(BadShape, match="rows 1 to 9 of 8"):
        kernels.dequantize_rows(part_bytes, part, 1, 8, out)
    with pytest.raises(BadShape, match="out: contiguous float32"):
        kernels.dequantize_rows(part_bytes, part, 0, 7, out)
    with pytest.raises(BadShape, match="out: contiguous float32"):
        kernels.dequantize_rows(part_bytes, part, 0, 8, torch.empty(64, 8).t())
    with pytest.raises(BadShape, match="x: contiguous float32"):
        kernels.multiply_rows(torch.empty(2, 63), part_bytes, part, 0, 8, y=torch.empty(2, 8))
    with pytest.raises(BadShape, match="y: contiguous float32"):
        kernels.multiply_rows(torch.empty(2, 64), part_bytes, part, 0, 8, y=torch.empty(3, 8))


def call_c(part_bytes: Tensor, *, address: int = 0, nbytes: int = 0, shape: tuple[int, int] = (8, 64), form: int = 3,
           rows: tuple[int, int] = (0, 8), out_address: int = 0, out_length: int = 0) -> int:  # fmt: skip
    """Call the library with one argument wrong; what is 0 stays right."""
    library = kernels._library()
    assert library is not None
    out = torch.empty(8, 64)
    part = kernels._CPart(part_bytes.data_ptr() + address, part_bytes.numel() + nbytes, *shape, form)
    status = library.expertd_dequantize_rows(
        ctypes.byref(part), *rows, out.data_ptr() + out_address, out.numel() + out_length
    )
    assert isinstance(status, int)
    return status


def test_the_library_itself_checks_before_it_reads() -> None:
    # Python checks first; these are the second locks, for callers to come.
    _, part_bytes = encoded(8, 64, Q4_G64)
    longest = 2**63 - 1

    assert call_c(part_bytes) == 0
    assert call_c(part_bytes, form=6) == call_c(part_bytes, form=-1) == 1
    assert call_c(part_bytes, shape=(0, 64)) == call_c(part_bytes, shape=(8, 63)) == 2
    assert call_c(part_bytes, shape=(longest, 64)) == call_c(part_bytes, shape=(8, longest - 63)) == 2
    assert call_c(part_bytes, nbytes=-1) == call_c(part_bytes, nbytes=1) == call_c(part_bytes, shape=(9, 64)) == 3
    assert call_c(part_bytes, out_length=-1) == call_c(part_bytes, out_length=1) == 3
    assert call_c(part_bytes, address=1) == call_c(part_bytes, address=-part_bytes.data_ptr()) == 4
    assert call_c(part_bytes, out_address=2) == 4
    assert call_c(part_bytes, rows=(1, 8)) == call_c(part_bytes, rows=(-1, 8)) == call_c(part_bytes, rows=(0, -1)) == 5
    assert call_c(part_bytes, rows=(longest, longest)) == 5


def test_the_library_checks_the_lengths_of_a_product() -> None:
    part, part_bytes = encoded(8, 64, Q2_G16)
    library = kernels._library()
    assert library is not None
    c_part = kernels._c_part(part_bytes, part)
    x, y = torch.ones(2, 64), torch.empty(2, 8)

    def status(x_length: int, n_tokens: int, y_length: int) -> int:
        arguments = (0, 8, x.data_ptr(), x_length, n_tokens, y.data_ptr(), y_length)
        return int(library.expertd_multiply_rows(ctypes.byref(c_part), *arguments))

    assert status(128, 2, 16) == 0
    assert status(127, 2, 16) == status(128, 2, 17) == status(128, 3, 16) == 3
    assert status(-64, -1, -8) == status(0, 2**62, 0) == 3


def test_the_library_knows_every_quantized_scheme_and_both_16_bit_ones() -> None:
    assert {scheme.name for scheme in (*QUANTIZED, BF16, FP16)} == set(kernels._FORMATS)


def assert_is_product(y: Tensor, x: Tensor, weights: Tensor) -> None:
    expected = x.double() @ weights.double().t()
    assert float((y - expected).abs().max() / expected.abs().max()) <= PRODUCT_TOLERANCE
