import pytest
import torch

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Scheme
from quant.encode import encode_part
from quant.reference import dequantize
from quant.weight_error import weight_error
from tests.unit.quant.matrices import QUANTIZED, gaussian, name_of, relative_error


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_it_is_the_distance_of_what_is_stored_over_the_weights_length(scheme: Scheme) -> None:
    # More than a strip of rows, the last one short.
    weight = gaussian(1100, 1024).bfloat16()
    part = Part("w1", 1100, 1024, scheme.name)
    part_bytes = encode_part(weight, part, solver="shortcut")

    error = weight_error(weight, part, part_bytes)

    assert error == pytest.approx(relative_error(dequantize(part_bytes, 1100, 1024, scheme), weight.float()), rel=1e-4)


def test_what_is_stored_as_it_is_loses_nothing() -> None:
    weight = gaussian(3, 5).bfloat16()
    part = Part("norm", 3, 5, BF16.name)

    assert weight_error(weight, part, encode_part(weight, part, solver="shortcut")) == 0.0


def test_it_has_five_digits() -> None:
    weight = gaussian(3, 50)
    part = Part("norm", 3, 50, FP16.name)

    error = weight_error(weight, part, encode_part(weight, part, solver="shortcut"))

    assert 0 < error < 1e-3
    assert error == float(f"{error:.4e}")


def test_zeros_have_no_error_and_the_largest_weights_a_finite_one() -> None:
    part = Part("w1", 8, 64, "4bit-g64")
    for weight in (torch.zeros(8, 64), gaussian(8, 64, std=1e29)):
        error = weight_error(weight, part, encode_part(weight, part, solver="shortcut"))

        assert 0 <= error < 0.2
