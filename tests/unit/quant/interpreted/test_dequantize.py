"""Strips of rows expanded to 16 bits, bit for bit those of the reference."""

import pytest
import torch
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import Scheme
from quant.device_parts import DevicePart
from quant.encode import encode_part
from quant.reference import dequantize
from quant.triton_experts import TritonProducts
from tests.unit.quant.interpreted.parts import COLS, CPU, random_part
from tests.unit.quant.matrices import QUANTIZED, gaussian, name_of

ROWS = 21


def expanded(part: DevicePart, dtype: torch.dtype, first_row: int, n_rows: int) -> Tensor:
    products = TritonProducts(CPU, dtype, scratch_nbytes=24 * part.part.cols * 2)
    return products._expanded(part, first_row, n_rows).clone()


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_weights_in_fp16_are_bit_for_bit_the_references(scheme: Scheme) -> None:
    cols = COLS[scheme.name]
    part = Part("matrix", ROWS, cols, scheme.name)
    part_bytes = encode_part(gaussian(ROWS, cols), part, solver="shortcut")

    weights = expanded(DevicePart(part, part_bytes), torch.float16, 0, ROWS)

    expected = dequantize(part_bytes, ROWS, cols, scheme).half()
    assert torch.equal(weights.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_every_code_expands_to_the_references_float(scheme: Scheme) -> None:
    part, part_bytes = random_part(8, 256, scheme)

    weights = expanded(part, torch.bfloat16, 0, 8)

    # The interpreter cuts a float32 off where bf16 ends; that a device rounds is asserted where kernels are compiled.
    expected = (dequantize(part_bytes, 8, 256, scheme).view(torch.int32) >> 16).to(torch.int16)
    assert torch.equal(weights.view(torch.int16), expected)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_a_strip_is_the_rows_that_it_is_asked_for(scheme: Scheme) -> None:
    part, part_bytes = random_part(ROWS, 128, scheme)

    weights = expanded(part, torch.bfloat16, 8, 13)

    expected = (dequantize(part_bytes, ROWS, 128, scheme)[8:].view(torch.int32) >> 16).to(torch.int16)
    assert torch.equal(weights.view(torch.int16), expected)
