"""Matrices that tests share."""

from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Q2_G16, Q3_G64, Q4_G64, Q8_G64, Scheme
from quant.encode import encode_part
from quant.packing import QuantizedMatrix

QUANTIZED = (Q8_G64, Q4_G64, Q3_G64, Q2_G16)
ALL_SCHEMES = (BF16, FP16, *QUANTIZED)
FIELDS = ("codes", "scale_codes", "base_codes", "scale_step", "base_min", "base_step")

schemes = st.sampled_from(QUANTIZED)
all_schemes = st.sampled_from(ALL_SCHEMES)
seeds = st.integers(0, 2**31)


def name_of(scheme: Scheme) -> str:
    return scheme.name


def gaussian(rows: int, cols: int, *, std: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * std


def random_quantized(rows: int, cols: int, scheme: Scheme, seed: int = 0) -> QuantizedMatrix:
    """Return a matrix of random fields: every code of every width occurs, and no field follows from another."""
    assert scheme.group_size is not None
    generator = torch.Generator().manual_seed(seed)

    def codes(n_cols: int, nbits: int) -> Tensor:
        return torch.randint(0, 2**nbits, (rows, n_cols), generator=generator, dtype=torch.uint8)

    steps = torch.randn(3, rows, generator=generator)
    n_groups = cols // scheme.group_size
    return QuantizedMatrix(scheme, codes(cols, scheme.nbits), codes(n_groups, 8), codes(n_groups, 8), *steps)


def zero_quantized(rows: int, cols: int, scheme: Scheme) -> QuantizedMatrix:
    return constant_quantized(rows, cols, scheme, code=0, scale_code=0, base_code=0, steps=(0.0, 0.0, 0.0))


def constant_quantized(
    rows: int, cols: int, scheme: Scheme, *, code: int, scale_code: int, base_code: int,
    steps: tuple[float, float, float],
) -> QuantizedMatrix:  # fmt: skip
    """Return a matrix that is the same everywhere; `steps` are scale_step, base_min and base_step."""
    assert scheme.group_size is not None

    def codes(n_cols: int, value: int) -> Tensor:
        return torch.full((rows, n_cols), value, dtype=torch.uint8)

    n_groups = cols // scheme.group_size
    planes = [torch.full((rows,), step) for step in steps]
    return QuantizedMatrix(scheme, codes(cols, code), codes(n_groups, scale_code), codes(n_groups, base_code), *planes)


@cache
def encoded(rows: int, cols: int, scheme: Scheme, *, name: str = "matrix", seed: int = 0) -> tuple[Part, Tensor]:
    """Return a part and its bytes, the same to every caller: nobody writes to a part."""
    part = Part(name, rows, cols, scheme.name)
    return part, encode_part(gaussian(rows, cols, seed=seed), part, solver="shortcut")


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def have_equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors agree in every bit, zeros' signs too; all NaNs count as one."""
    assert a.dtype == b.dtype == torch.float32
    a_nan, b_nan = a.isnan(), b.isnan()
    return torch.equal(a_nan, b_nan) and torch.equal(a.view(torch.int32)[~a_nan], b.view(torch.int32)[~b_nan])
