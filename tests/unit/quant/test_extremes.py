"""The largest codes and metadata times the largest activations: where sums in 16 bits would overflow if they could."""

import itertools

import pytest
import torch
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import Scheme
from quant.kernels import Product
from quant.packing import QuantizedMatrix, pack
from quant.workspace import Workspace
from tests.unit.quant.c_library import by_all_kernels, needs_library
from tests.unit.quant.matrices import QUANTIZED, constant_quantized, have_equal_bits, name_of

pytestmark = needs_library

ROWS, COLS = 43, 192

# A float32 holds integers to 2^24; a sum of three blocks' terms, each rounded once or twice.
ROUNDING = 4 * 2.0**-24

# Integers whose largest magnitude is 127 in each block, so that they are their own codes, with a scale of 1.
PERIODS = ((127,), (-127,), (127, -127), (127, 127, -127, -127), (127, -126, -1, 0), (127, 0, 0, 0))
X = torch.tensor([list(itertools.islice(itertools.cycle(period), COLS)) for period in PERIODS], dtype=torch.float32)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("scale_code", [0, 1, 255])
@pytest.mark.parametrize("base_code", [0, 128, 255])
def test_no_sum_of_the_largest_codes_overflows(scheme: Scheme, scale_code: int, base_code: int) -> None:
    largest = 2**scheme.nbits - 1
    matrices = [
        constant_quantized(
            ROWS, COLS, scheme, code=code, scale_code=scale_code, base_code=base_code, steps=(1.0, base_min, 1.0)
        )
        for code in (0, largest)
        for base_min in (0.0, -128.0, 255.0)
    ]

    errors = [error_of(matrix, X[tokens]) for matrix in matrices for tokens in (slice(0, 6), [0], [0, 1], [3, 1, 4])]

    assert max(errors) <= ROUNDING


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4])
def test_no_sum_of_codes_that_follow_the_activations_signs_overflows(scheme: Scheme, sign: int, n_tokens: int) -> None:
    # The greatest and the least dot products there are: codes largest where that adds most, else 0.
    generator = torch.Generator().manual_seed(n_tokens)
    x = 127.0 * (2 * torch.randint(0, 2, (1, COLS), generator=generator) - 1)
    matrix = constant_quantized(ROWS, COLS, scheme, code=0, scale_code=255, base_code=0, steps=(1.0, 0.0, 1.0))
    matrix.codes[:, (sign * x[0]) > 0] = 2**scheme.nbits - 1

    error = error_of(matrix, x.expand(n_tokens, COLS))

    assert error <= ROUNDING


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_no_sum_of_random_extremes_overflows(scheme: Scheme) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = 127.0 * (2 * torch.randint(0, 2, (1 + seed % 4, COLS), generator=generator) - 1)
        matrix = constant_quantized(ROWS, COLS, scheme, code=0, scale_code=0, base_code=0, steps=(1.0, 0.0, 1.0))
        for plane, largest in (
            (matrix.codes, 2**scheme.nbits - 1), (matrix.scale_codes, 255), (matrix.base_codes, 255)
        ):  # fmt: skip
            plane.copy_(largest * torch.randint(0, 2, plane.shape, generator=generator))

        error = error_of(matrix, x)

        assert error <= ROUNDING


def error_of(matrix: QuantizedMatrix, x: Tensor) -> float:
    """Return the largest error of any kernels' product, of the sum of the magnitudes added; they agree in all bits."""
    part = (Part("matrix", ROWS, COLS, matrix.scheme.name), pack(matrix))
    with Workspace() as workspace:
        product = Product([part], workspace=workspace, exact=False)
        results = by_all_kernels(lambda: product(x)[0])
    assert all(have_equal_bits(y, results[0]) for y in results)
    expected, magnitude = product_in_integers(matrix, x)
    return float(((results[0].double() - expected) / magnitude.clamp_min(1)).abs().max())


def product_in_integers(matrix: QuantizedMatrix, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x · Wᵀ, computed in int64 from integer steps, and the sum of its terms' magnitudes; f64 [T, rows]."""
    group_size = matrix.scheme.group_size
    assert group_size is not None
    codes, x_codes = (tensor.long().view(len(tensor), -1, group_size) for tensor in (matrix.codes, x))
    base = matrix.base_min.long()[:, None] + matrix.base_step.long()[:, None] * matrix.base_codes.long()  # [rows, G]
    step, scale = matrix.scale_step.long()[:, None], matrix.scale_codes.long()
    dot = (x_codes[:, None] * (codes - matrix.scheme.center)[None]).sum(-1)  # [T, rows, G]
    based = base[None] * x_codes.sum(-1)[:, None]
    # Kernels add the least base and what lies above it apart.
    apart = matrix.base_min.long()[:, None] * x_codes.sum(-1)[:, None]
    magnitude = step * (scale * dot.abs() + based.abs() + 2 * apart.abs())
    return (step * (scale * dot + based)).sum(-1).double(), magnitude.sum(-1).double()
