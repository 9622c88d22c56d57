"""The scales and zeros of groups as bytes: 8 bits each, in steps of their output row. Knows no weights.

    scale_step = max(scale) / 255               scale_codes = round(scale / scale_step)
    zero_min = min(zero)                        zero_codes = round((zero - zero_min) / zero_step)
    zero_step = (max(zero) - min(zero)) / 255

A row of one's own for both, and floats for the steps, cost less than 0.5 % of the weight error; a step per matrix or a
lower bound for scales would lose the rows of small weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.schemes import Scheme
from quant.packing import QuantizedMatrix

_CODE_MAX = 255


@dataclass(frozen=True, slots=True, eq=False)
class FloatGroups:
    """What a solver returns: w = (codes - zero) * scale. A scale of 0 marks a group of zeros, whose zero is free."""

    codes: Tensor  # u8 [N, K]
    scale: Tensor  # f32 [N, K/g], >= 0
    zero: Tensor  # f32 [N, K/g], in units of codes


def quantize_groups(groups: FloatGroups, scheme: Scheme) -> QuantizedMatrix:
    """Return the matrix with 8-bit scales and zeros; every field is finite where the groups are."""
    scale_step = groups.scale.amax(dim=1) / _CODE_MAX  # [N]
    scale_codes = _codes_of(groups.scale, scale_step)
    zero_min, zero_max = _zero_range(groups)  # each [N]
    zero_step = (zero_max - zero_min) / _CODE_MAX
    zero_codes = _codes_of(groups.zero - zero_min[:, None], zero_step)
    return QuantizedMatrix(scheme, groups.codes, scale_codes, zero_codes, scale_step, zero_min, zero_step)


def _zero_range(groups: FloatGroups) -> tuple[Tensor, Tensor]:
    """Return the least and greatest zero of each row, counting groups of zeros only where there are no others."""
    is_free = groups.scale == 0
    zero_min = groups.zero.masked_fill(is_free, torch.inf).amin(dim=1)
    zero_max = groups.zero.masked_fill(is_free, -torch.inf).amax(dim=1)
    is_empty = is_free.all(dim=1)
    return zero_min.masked_fill(is_empty, 0), zero_max.masked_fill(is_empty, 0)


def _codes_of(values: Tensor, step: Tensor) -> Tensor:
    """Return round(values / step) in a byte, u8 [N, K/g]; 0 where the step is 0."""
    divisor = step.masked_fill(step == 0, torch.inf)
    return (values / divisor[:, None]).round_().clamp_(0, _CODE_MAX).to(torch.uint8)
