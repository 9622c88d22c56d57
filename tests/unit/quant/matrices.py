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
FIELDS = ("codes", "scale_codes", "zero_codes", "scale_step", "zero_min", "zero_step")

schemes = st.sampled_from(QUANTIZED)


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
    assert scheme.group_size is not None
    codes = torch.zeros(rows, cols, dtype=torch.uint8)
    group_codes = torch.zeros(rows, cols // scheme.group_size, dtype=torch.uint8)
    steps = torch.zeros(3, rows)
    return QuantizedMatrix(scheme, codes, group_codes, group_codes.clone(), *steps)


@cache
def encoded(rows: int, cols: int, scheme: Scheme, *, name: str = "matrix", seed: int = 0) -> tuple[Part, Tensor]:
    """Return a part and its bytes, the same to every caller: nobody writes to a part."""
    part = Part(name, rows, cols, scheme.name)
    return part, encode_part(gaussian(rows, cols, seed=seed), part, solver="shortcut")


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
