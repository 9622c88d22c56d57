"""Parts on a "device" that is this processor's memory, and products with them. Interpreting is slow: all is small."""

from functools import cache

import torch
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import Scheme
from quant.device_parts import DevicePart
from quant.packing import pack
from quant.triton_experts import TritonProducts
from tests.unit.quant.matrices import encoded, gaussian, random_quantized

CPU = torch.device("cpu")

# Two panels, of which the second is not whole.
ROWS = 13
# Inputs of which a tile of 64 units is full, and some more: a stripe that is not whole, a tile that is mostly masked.
COLS = {"8bit-g64": 320, "4bit-g64": 576, "3bit-g64": 2112, "2bit-g16": 1088, "fp16": 264, "bf16": 264}


@cache
def part_of(scheme: Scheme) -> tuple[DevicePart, Tensor]:
    """Return a part with a tail in both directions, the same to every caller, and its bytes."""
    part, part_bytes = encoded(ROWS, COLS[scheme.name], scheme)
    return DevicePart(part, part_bytes), part_bytes


def random_part(rows: int, cols: int, scheme: Scheme) -> tuple[DevicePart, Tensor]:
    """Return a part of random codes, all of which occur, and its bytes."""
    part_bytes = pack(random_quantized(rows, cols, scheme))
    return DevicePart(Part("matrix", rows, cols, scheme.name), part_bytes), part_bytes


@cache
def tokens(n_tokens: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Return activations [T, cols]; fewer tokens are the first of more."""
    return gaussian(64, cols, std=1.0, seed=3).to(dtype)[:n_tokens]


@cache
def product(scheme: Scheme, n_tokens: int, dtype: torch.dtype) -> Tensor:
    """Return the kernels' product of the part of that scheme with so many tokens, f32 [T, ROWS]."""
    part, _ = part_of(scheme)
    x = tokens(n_tokens, part.part.cols, dtype)
    out = torch.full((n_tokens, ROWS), torch.nan)
    TritonProducts(CPU, dtype, scratch_nbytes=1 << 16).multiply(x, part, out)
    return out
