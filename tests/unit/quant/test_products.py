"""Products against float64, and that nothing but a token and a row decides about a result's bits."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Q2_G16, Q3_G64, Q4_G64, Q8_G64, Scheme
from quant.encode import encode_part
from quant.errors import BadShape
from quant.kernels import PRODUCTS_MAX, Product
from quant.packing import QuantizedMatrix, pack
from quant.reference import dequantize
from quant.workspace import Workspace
from tests.unit.quant.activations import KINDS, activations, product_with_bound, rounded_to_int8
from tests.unit.quant.c_library import KERNELS, by_all_kernels, has_kernels, kernels, needs_avx2, needs_library
from tests.unit.quant.matrices import (
    ALL_SCHEMES,
    QUANTIZED,
    all_schemes,
    encoded,
    gaussian,
    have_equal_bits,
    name_of,
    random_quantized,
    relative_error,
    schemes,
    seeds,
)

# Of the sum of the magnitudes of all that is added, in float32: some roundings, not one for each addition.
ROUNDING = 2e-6

n_tokens_of_a_batch = st.integers(1, 20)


def multiply(x: Tensor, *parts: tuple[Part, Tensor], exact: bool = False, n_threads: int = 1) -> list[Tensor]:
    with Workspace(n_threads) as workspace:
        return Product(parts, workspace=workspace, exact=exact)(x)


def part_of(matrix: QuantizedMatrix) -> tuple[Part, Tensor]:
    rows, cols = matrix.codes.shape
    return Part("matrix", rows, cols, matrix.scheme.name), pack(matrix)


@needs_library
@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_rounding_activations_costs_less_than_a_hundredth_of_the_product(scheme: Scheme, n_tokens: int) -> None:
    part, part_bytes = encoded(509, 1024, scheme)
    x = gaussian(n_tokens, 1024, std=1.0, seed=1)

    (y,) = multiply(x, (part, part_bytes))

    expected = x.double() @ dequantize(part_bytes, 509, 1024, scheme).double().t()
    assert relative_error(y, expected) <= 0.01


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
@pytest.mark.parametrize("n_tokens", [1, 7])
def test_exact_products_differ_from_float64_by_rounding(scheme: Scheme, n_tokens: int) -> None:
    part, part_bytes = encoded(509, 1024, scheme)
    x = gaussian(n_tokens, 1024, std=1.0, seed=1)

    (y,) = multiply(x, (part, part_bytes), exact=True)

    expected = x.double() @ dequantize(part_bytes, 509, 1024, scheme).double().t()
    assert relative_error(y, expected) <= 1e-6


@needs_library
@settings(max_examples=150)
@given(
    scheme=schemes,
    rows=st.integers(1, 70),
    n_blocks=st.integers(1, 9),
    n_tokens=n_tokens_of_a_batch,
    kind=st.sampled_from(KINDS),
    seed=seeds,
)
def test_a_product_is_that_of_the_rounded_activations(
    *, scheme: Scheme, rows: int, n_blocks: int, n_tokens: int, kind: str, seed: int
) -> None:
    part, part_bytes = part_of(random_quantized(rows, 64 * n_blocks, scheme, seed))
    x = activations(kind, n_tokens, part.cols, seed)

    results = by_all_kernels(lambda: multiply(x, (part, part_bytes), n_threads=1 + seed % 3)[0])

    expected, bound = product_with_bound(rounded_to_int8(x), part, part_bytes)
    assert all(bool(((y - expected).abs() <= ROUNDING * bound).all()) for y in results)


@settings(max_examples=100)
@given(
    scheme=all_schemes,
    rows=st.integers(1, 70),
    n_blocks=st.integers(1, 9),
    n_tokens=n_tokens_of_a_batch,
    kind=st.sampled_from(KINDS),
    seed=seeds,
)
def test_an_exact_product_is_that_of_the_activations(
    *, scheme: Scheme, rows: int, n_blocks: int, n_tokens: int, kind: str, seed: int
) -> None:
    if scheme.is_quantized:
        part, part_bytes = part_of(random_quantized(rows, 64 * n_blocks, scheme, seed))
    else:
        part, part_bytes = random_16bit(rows, any_cols(n_blocks, seed), scheme, seed)
    x = activations(kind, n_tokens, part.cols, seed)

    (y,) = multiply(x, (part, part_bytes), exact=True, n_threads=1 + seed % 3)

    expected, bound = product_with_bound(x, part, part_bytes)
    assert bool(((y - expected).abs() <= ROUNDING * bound).all())


@pytest.mark.parametrize("scheme", [BF16, FP16], ids=name_of)
@pytest.mark.parametrize("cols", [1, 7, 65, 100])
def test_16_bit_products_are_always_exact(scheme: Scheme, cols: int) -> None:
    part, part_bytes = encoded(6, cols, scheme)
    x = gaussian(3, cols, std=1.0, seed=1)

    (fast,), (exact,) = (multiply(x, (part, part_bytes), exact=exact) for exact in (False, True))

    expected, bound = product_with_bound(x, part, part_bytes)
    assert have_equal_bits(fast, exact)
    assert bool(((fast - expected).abs() <= ROUNDING * bound).all())


@needs_library
@needs_avx2
@settings(max_examples=150)
@given(
    scheme=all_schemes,
    rows=st.integers(1, 90),
    n_blocks=st.integers(1, 30),
    n_tokens=n_tokens_of_a_batch,
    kind=st.sampled_from(KINDS),
    exact=st.booleans(),
    seed=seeds,
)
def test_all_sets_of_kernels_compute_the_same_bits(
    *, scheme: Scheme, rows: int, n_blocks: int, n_tokens: int, kind: str, exact: bool, seed: int
) -> None:
    part, part_bytes = fuzzed_part(rows, n_blocks, scheme, seed)
    x = activations(kind, n_tokens, part.cols, seed)

    portable, *others = by_all_kernels(lambda: multiply(x, (part, part_bytes), exact=exact)[0])

    assert all(have_equal_bits(other, portable) for other in others)


@needs_library
@settings(max_examples=60)
@given(
    scheme=all_schemes,
    rows=st.integers(1, 700),
    n_blocks=st.integers(1, 6),
    n_tokens=n_tokens_of_a_batch,
    exact=st.booleans(),
    seed=seeds,
)
def test_the_number_of_threads_changes_no_bit(
    *, scheme: Scheme, rows: int, n_blocks: int, n_tokens: int, exact: bool, seed: int
) -> None:
    part, part_bytes = fuzzed_part(rows, n_blocks, scheme, seed)
    x = gaussian(n_tokens, part.cols, std=1.0, seed=seed)

    one, two, three = (multiply(x, (part, part_bytes), exact=exact, n_threads=n)[0] for n in (1, 2, 3))

    assert have_equal_bits(one, two)
    assert have_equal_bits(one, three)


@needs_library
@settings(max_examples=60)
@given(
    scheme=all_schemes,
    rows=st.integers(1, 90),
    n_blocks=st.integers(1, 6),
    n_tokens=n_tokens_of_a_batch,
    exact=st.booleans(),
    data=st.data(),
)
def test_a_token_alone_gets_the_bits_it_gets_among_others(
    *, scheme: Scheme, rows: int, n_blocks: int, n_tokens: int, exact: bool, data: st.DataObject
) -> None:
    part, part_bytes = fuzzed_part(rows, n_blocks, scheme, data.draw(seeds))
    x = gaussian(n_tokens, part.cols, std=1.0, seed=1)
    cuts = sorted(data.draw(st.sets(st.integers(1, 19))) | {0, 20})

    (together,) = multiply(x, (part, part_bytes), exact=exact)
    pieces = [x[first:last] for first, last in pairwise(cuts) if first < n_tokens]
    apart = torch.cat([multiply(piece, (part, part_bytes), exact=exact)[0] for piece in pieces])

    assert have_equal_bits(together, apart)


@needs_library
@settings(max_examples=40)
@given(
    scheme=schemes,
    rows=st.integers(2, 90),
    n_blocks=st.integers(1, 6),
    n_tokens=st.integers(1, 6),
    exact=st.booleans(),
    data=st.data(),
)
def test_a_row_gets_the_same_bits_wherever_it_stands(
    *, scheme: Scheme, rows: int, n_blocks: int, n_tokens: int, exact: bool, data: st.DataObject
) -> None:
    matrix = random_quantized(rows, 64 * n_blocks, scheme, data.draw(seeds))
    order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=60)))
    x = gaussian(n_tokens, 64 * n_blocks, std=1.0, seed=1)

    (whole,) = multiply(x, part_of(matrix), exact=exact)
    (chosen,) = multiply(x, part_of(rows_of(matrix, order)), exact=exact)

    assert have_equal_bits(chosen, whole[:, order].contiguous())


@needs_library
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 3, 6])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_products_in_one_call_are_those_of_a_call_each(*, exact: bool, n_tokens: int, n_threads: int) -> None:
    parts = [
        encoded(rows, 512, scheme, name=f"part {rows}")
        for rows, scheme in ((1, Q4_G64), (333, BF16), (40, Q2_G16), (77, Q8_G64), (512, Q3_G64), (9, FP16))
    ]
    x = gaussian(n_tokens, 512, std=1.0, seed=1)

    together = multiply(x, *parts, exact=exact, n_threads=n_threads)

    apart = [multiply(x, part, exact=exact)[0] for part in parts]
    assert [y.shape for y in together] == [(n_tokens, part.rows) for part, _ in parts]
    assert all(have_equal_bits(y, alone) for y, alone in zip(together, apart, strict=True))


@needs_library
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_the_kernels_asked_for_are_those_that_compute(name: str, scheme: Scheme) -> None:
    if not has_kernels(name):
        pytest.skip(f"this machine has no {name} kernels")
    part, part_bytes = encoded(45, 320, scheme)
    x = gaussian(3, 320, std=1.0, seed=1)

    with kernels(name):
        (y,) = multiply(x, (part, part_bytes))

    rounded = rounded_to_int8(x) if scheme.is_quantized else x
    expected, bound = product_with_bound(rounded, part, part_bytes)
    assert bool(((y - expected).abs() <= ROUNDING * bound).all())


def test_no_tokens_give_no_rows() -> None:
    results = multiply(torch.empty(0, 64), encoded(16, 64, Q4_G64), encoded(8, 64, BF16))

    assert [y.shape for y in results] == [(0, 16), (0, 8)]


def test_activations_need_not_be_contiguous() -> None:
    part = encoded(16, 64, Q4_G64)
    x = gaussian(64, 3, std=1.0).t()

    (y,), (expected,) = multiply(x, part), multiply(x.contiguous(), part)

    assert have_equal_bits(y, expected)


def test_parts_that_cannot_share_their_activations_are_refused() -> None:
    with pytest.raises(BadShape, match=r"same number of inputs are expected, matrix \[8, 64\], matrix \[8, 128\] came"):
        multiply(torch.zeros(1, 64), encoded(8, 64, Q4_G64), encoded(8, 128, Q4_G64))
    with pytest.raises(BadShape, match=f"at most {PRODUCTS_MAX} parts"):
        multiply(torch.zeros(1, 64), *[encoded(8, 64, Q4_G64)] * (PRODUCTS_MAX + 1))


def test_as_many_parts_as_one_call_takes_are_multiplied() -> None:
    part = encoded(8, 64, Q4_G64)
    x = gaussian(2, 64, std=1.0)

    results = multiply(x, *[part] * PRODUCTS_MAX)

    assert all(have_equal_bits(y, multiply(x, part)[0]) for y in results)


@pytest.mark.parametrize(
    "x", [torch.zeros(64), torch.zeros(2, 63), torch.zeros(2, 64, dtype=torch.float16)], ids=lambda x: str(x.shape)
)
def test_activations_that_do_not_fit_are_refused(x: Tensor) -> None:
    with pytest.raises(BadShape, match=r"matrix: float32 \[T, 64\] is expected"):
        multiply(x, encoded(8, 64, Q4_G64))


def random_16bit(rows: int, cols: int, scheme: Scheme, seed: int) -> tuple[Part, Tensor]:
    part = Part("matrix", rows, cols, scheme.name)
    return part, encode_part(gaussian(rows, cols, std=1.0, seed=seed), part, solver="shortcut")


def any_cols(n_blocks: int, seed: int) -> int:
    """Return a number of columns, every second time one of whole vectors."""
    return 8 * (3 * n_blocks + seed % 7) if seed % 2 else 23 * n_blocks + seed % 23


def fuzzed_part(rows: int, n_blocks: int, scheme: Scheme, seed: int) -> tuple[Part, Tensor]:
    if scheme.is_quantized:
        return part_of(random_quantized(rows, 64 * n_blocks, scheme, seed))
    return random_16bit(rows, any_cols(n_blocks, seed), scheme, seed)


def rows_of(matrix: QuantizedMatrix, order: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(
        matrix.scheme, matrix.codes[order], matrix.scale_codes[order], matrix.base_codes[order],
        matrix.scale_step[order], matrix.base_min[order], matrix.base_step[order],
    )  # fmt: skip
