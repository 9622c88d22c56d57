"""Products of up to eight tokens with the bytes as they lie, against float64."""

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Q4_G64, Scheme
from quant.device_parts import DevicePart
from quant.encode import encode_part
from quant.triton_experts import TritonProducts
from tests.unit.quant.activations import product_with_bound
from tests.unit.quant.interpreted.parts import COLS, CPU, ROWS, part_of, product, random_part, tokens
from tests.unit.quant.matrices import ALL_SCHEMES, QUANTIZED, gaussian, name_of

# Rounding in float32, of sums that are at most as large as their terms' magnitudes.
TOLERANCE = 8 * 2.0**-24

FEW_TOKENS = [(scheme, n_tokens) for scheme in ALL_SCHEMES for n_tokens in (1, 3, 8)]
ALL_COUNTS = [(Q4_G64, n_tokens) for n_tokens in (2, 4, 5, 6, 7)]


@pytest.mark.parametrize(("scheme", "n_tokens"), FEW_TOKENS + ALL_COUNTS)
def test_products_of_fp16_are_those_of_the_weights_up_to_the_rounding_of_sums(scheme: Scheme, n_tokens: int) -> None:
    part, part_bytes = part_of(scheme)
    expected, magnitude = product_with_bound(tokens(n_tokens, part.part.cols, torch.float16), part.part, part_bytes)

    y = product(scheme, n_tokens, torch.float16)

    assert bool(((y - expected).abs() <= TOLERANCE * magnitude).all())


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_products_of_bf16_are_those_of_the_weights_up_to_the_rounding_of_sums(scheme: Scheme) -> None:
    part, part_bytes = part_of(scheme)
    expected, magnitude = product_with_bound(tokens(2, part.part.cols, torch.bfloat16), part.part, part_bytes)

    y = product(scheme, 2, torch.bfloat16)

    assert bool(((y - expected).abs() <= TOLERANCE * magnitude).all())


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_every_code_scale_and_base_counts(scheme: Scheme) -> None:
    part, part_bytes = random_part(8, 256, scheme)
    x = gaussian(1, 256, std=1.0).half()
    expected, magnitude = product_with_bound(x, part.part, part_bytes)
    y = torch.empty(1, 8)

    TritonProducts(CPU, torch.float16, scratch_nbytes=1 << 16).multiply(x, part, y)

    assert bool(((y - expected).abs() <= TOLERANCE * magnitude).all())


@pytest.mark.parametrize(("scheme", "counts"), [(Q4_G64, (1, 2, 3, 4, 5, 6, 7)), (FP16, (1, 3))])
def test_a_tokens_product_does_not_depend_on_how_many_tokens_there_are(scheme: Scheme, counts: tuple[int, ...]) -> None:
    of_eight = product(scheme, 8, torch.float16)

    for n_tokens in counts:
        assert torch.equal(product(scheme, n_tokens, torch.float16), of_eight[:n_tokens])


def test_what_lies_beside_the_result_is_not_written() -> None:
    part, _ = part_of(Q4_G64)
    wide = torch.full((5, ROWS + 7), -7.0)

    TritonProducts(CPU, torch.float16, scratch_nbytes=1 << 16).multiply(
        tokens(3, part.part.cols, torch.float16), part, wide[1:4, 2 : 2 + ROWS]
    )

    assert torch.equal(wide[1:4, 2 : 2 + ROWS], product(Q4_G64, 3, torch.float16))
    wide[1:4, 2 : 2 + ROWS] = -7
    assert bool((wide == -7).all())


@pytest.mark.parametrize("scheme", [FP16, BF16], ids=name_of)
def test_rows_that_start_anywhere_are_multiplied_too(scheme: Scheme) -> None:
    part = Part("matrix", ROWS, 12, scheme.name)
    part_bytes = encode_part(gaussian(ROWS, 12), part, solver="shortcut")
    x = gaussian(2, 12, std=1.0).half()
    expected, magnitude = product_with_bound(x, part, part_bytes)
    y = torch.empty(2, ROWS)

    TritonProducts(CPU, torch.float16, scratch_nbytes=1 << 16).multiply(x, DevicePart(part, part_bytes), y)

    # A weight is rounded to the activations' type here: the matrix is a product of the device's library.
    assert bool(((y - expected).abs() <= 2.0**-11 * magnitude).all())


def test_how_many_programs_run_depends_on_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []
    set_grid_dim = interpreter_builder.set_grid_dim

    def note_and_set(*grid: int) -> None:
        grids.append(grid)
        set_grid_dim(*grid)

    monkeypatch.setattr(interpreter_builder, "set_grid_dim", note_and_set)
    products = TritonProducts(CPU, torch.float16, scratch_nbytes=1 << 16)

    for std in (0.0, 0.02, 100.0):
        part = Part("matrix", ROWS, 64, Q4_G64.name)
        part_bytes = encode_part(gaussian(ROWS, 64, std=std), part, solver="shortcut")
        products.multiply(gaussian(5, 64, std=std).half(), DevicePart(part, part_bytes), torch.empty(5, ROWS))

    # Two panels, five tokens in groups of four.
    assert grids == [(4, 1, 1)] * 3


def test_repeats_have_the_same_bits() -> None:
    part, _ = part_of(Q4_G64)
    y = torch.empty(3, ROWS)

    TritonProducts(CPU, torch.float16, scratch_nbytes=1 << 16).multiply(
        tokens(3, COLS[Q4_G64.name], torch.float16), part, y
    )

    assert torch.equal(y, product(Q4_G64, 3, torch.float16))
