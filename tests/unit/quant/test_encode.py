"""Weights as the bytes of parts, in every scheme."""

import pytest
import torch

from protocol.errors import LayoutError, UnknownScheme
from protocol.layout import Part, part_nbytes
from protocol.schemes import BF16, FP16, Q4_G64, Scheme
from quant.encode import encode_part
from quant.errors import BadWeights, UnknownSolver
from quant.reference import dequantize
from tests.unit.quant.matrices import ALL_SCHEMES, QUANTIZED, gaussian, name_of, relative_error


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_a_part_is_as_long_as_the_layout_says(scheme: Scheme) -> None:
    part = Part("w1", 21, 128, scheme.name)

    part_bytes = encode_part(gaussian(21, 128), part, solver="shortcut")

    assert part_bytes.shape == (part_nbytes(part),)
    assert part_bytes.dtype == torch.uint8


@pytest.mark.parametrize(
    ("scheme", "error"), [(QUANTIZED[0], 0.006), (QUANTIZED[1], 0.095), (QUANTIZED[2], 0.2), (QUANTIZED[3], 0.32)]
)
def test_a_quantized_part_holds_the_weight(scheme: Scheme, error: float) -> None:
    weight = gaussian(64, 512)

    part_bytes = encode_part(weight, Part("w1", 64, 512, scheme.name), solver="shortcut")

    assert relative_error(dequantize(part_bytes, 64, 512, scheme), weight) <= error


@pytest.mark.parametrize(("scheme", "dtype"), [(BF16, torch.bfloat16), (FP16, torch.float16)])
def test_a_16_bit_weight_is_stored_as_it_is(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = gaussian(5, 30).to(dtype)

    part_bytes = encode_part(weight.t(), Part("q_proj", 30, 5, scheme.name), solver="shortcut")

    assert bytes(part_bytes.tolist()) == weight.t().contiguous().view(torch.int16).numpy().tobytes()


def test_a_weight_that_its_16_bits_cannot_hold_is_refused() -> None:
    for scheme, value in ((FP16, 70000.0), (BF16, torch.nan)):
        with pytest.raises(BadWeights, match=f"norm: a weight is not finite in {scheme.name}"):
            encode_part(torch.full((1, 8), value), Part("norm", 1, 8, scheme.name), solver="shortcut")


def test_a_quantized_weight_that_is_not_finite_is_refused_by_name() -> None:
    weight = gaussian(8, 64)
    weight[3, 5] = torch.inf

    with pytest.raises(BadWeights, match="w2: weights are expected to be finite"):
        encode_part(weight, Part("w2", 8, 64, Q4_G64.name), solver="shortcut")


def test_what_does_not_fit_the_part_is_refused() -> None:
    with pytest.raises(
        BadWeights, match=r"w1: floats of shape \[8, 64\] are expected, torch.float32 of shape \[64, 8\]"
    ):
        encode_part(torch.zeros(64, 8), Part("w1", 8, 64, Q4_G64.name), solver="shortcut")
    with pytest.raises(BadWeights, match=r"torch\.int8"):
        encode_part(torch.zeros(8, 64, dtype=torch.int8), Part("w1", 8, 64, BF16.name), solver="shortcut")
    with pytest.raises(LayoutError, match="w1: 72 inputs do not divide"):
        encode_part(torch.zeros(8, 72), Part("w1", 8, 72, Q4_G64.name), solver="shortcut")
    with pytest.raises(UnknownScheme, match="5bit"):
        encode_part(torch.zeros(8, 64), Part("w1", 8, 64, "5bit"), solver="shortcut")
    with pytest.raises(UnknownSolver, match="magic"):
        encode_part(torch.zeros(8, 64), Part("w1", 8, 64, Q4_G64.name), solver="magic")
