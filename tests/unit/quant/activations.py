"""Activations that tests share, and what the int8 products are to make of them, in float64."""

import torch
from torch import Tensor

from protocol.layout import BLOCK_COLS, Part
from protocol.schemes import scheme_named
from quant.packing import QuantizedMatrix, unpack
from tests.unit.quant.matrices import gaussian

KINDS = ("gaussian", "outliers", "blocks of different size", "zero blocks", "few values")


def activations(kind: str, n_tokens: int, cols: int, seed: int) -> Tensor:
    """Return x f32 [T, cols] of one kind."""
    x = gaussian(n_tokens, cols, std=1.0, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    if kind == "outliers":
        x[torch.rand(n_tokens, cols, generator=generator) < 0.01] *= 1e4
    if kind == "few values":
        return torch.randint(-1, 2, (n_tokens, cols), generator=generator).float()
    n_blocks = -(-cols // BLOCK_COLS)
    factors = torch.ones(n_tokens, n_blocks)
    if kind == "blocks of different size":
        factors = torch.randint(-60, 60, (n_tokens, n_blocks), generator=generator).float().exp2()
    if kind == "zero blocks":
        factors = torch.randint(0, 2, (n_tokens, n_blocks), generator=generator).float()
    return x * factors.repeat_interleave(BLOCK_COLS, dim=1)[:, :cols]


def rounded_to_int8(x: Tensor) -> Tensor:
    """Return what is left of x when each 64 are scale * q, q int8, scale = max |x| / 127: f64 [T, cols]."""
    blocks = x.view(x.shape[0], -1, BLOCK_COLS)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    inverse = torch.where(scale >= 2.0**-126, 1 / scale, torch.zeros_like(scale))
    codes = (blocks * inverse).round()  # of halves to the even one, as the library does
    return (codes.double() * scale.double()).view_as(x)


def product_with_bound(x: Tensor, part: Part, part_bytes: Tensor) -> tuple[Tensor, Tensor]:
    """Return x · Wᵀ in float64 and the sum of the magnitudes of what a kernel adds up to get there: both [T, rows].

    Each weight counts with its code and its base, which a kernel multiplies and adds apart.
    """
    scheme = scheme_named(part.scheme)
    if scheme.group_size is None:
        dtype = torch.bfloat16 if scheme.name == "bf16" else torch.float16
        weights = part_bytes.view(dtype).view(part.rows, part.cols).double()
        return x.double() @ weights.t(), x.double().abs() @ weights.abs().t()
    weights, magnitudes = weights_with_magnitudes(unpack(part_bytes, part.rows, part.cols, scheme))
    return x.double() @ weights.t(), x.double().abs() @ magnitudes.t()


def weights_with_magnitudes(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
    """Return the weights and the magnitudes of what a kernel adds up for them, f64 [rows, cols]."""
    assert matrix.scheme.group_size is not None

    def by_input(plane: Tensor) -> Tensor:
        return plane.repeat_interleave(matrix.scheme.group_size or 1, dim=1)

    scale_step, base_min, base_step = (
        plane.double()[:, None] for plane in (matrix.scale_step, matrix.base_min, matrix.base_step)
    )
    scale = by_input(scale_step * matrix.scale_codes.double())
    code = matrix.codes.double() - matrix.scheme.center
    base = by_input(base_min + base_step * matrix.base_codes.double()) * scale_step
    largest_base = (base_min.abs() + 255 * base_step.abs()) * scale_step.abs()
    return code * scale + base, code.abs() * scale.abs() + largest_base
