"""The scales and bases of groups as bytes: 8 bits each, in steps of their output row. Knows no weights.

    scale_step = max(scale) / 255            s = round(scale / scale_step)
    base_min, base_step: 256 steps from the least to the greatest base of the row, so that a base of 0 is a step
    b = round((base - base_min) / base_step)

The base is fitted to the scale as it is stored, not as it was solved: for fixed codes and a given scale the error of a
group is least where its mean is 0, base = mean(w) - scale * mean(q - center). Row planes of one's own and floats for
the steps cost less than 0.5 % of the weight error; a step per matrix or a lower bound for scales would lose the rows of
small weights.
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


@dataclass(frozen=True, slots=True, eq=False)
class FittedGroups:
    """Groups as lines: w = scale * (codes - center + base)."""

    scale: Tensor  # f32 [N, K/g], 0 for a group of zeros
    base: Tensor  # f32 [N, K/g], in units of the scale
    mean_code: Tensor  # f32 [N, K/g], the mean of codes - center: there a line is turned when its scale is rounded


@dataclass(frozen=True, slots=True, eq=False)
class SecondLevel:
    """The steps of a matrix's rows, and the codes nearest to its groups' scales and bases."""

    scale_codes: Tensor  # u8 [N, K/g]
    base_codes: Tensor  # u8 [N, K/g]
    scale_step: Tensor  # f32 [N]
    base_min: Tensor  # f32 [N]
    base_step: Tensor  # f32 [N]


def quantize_groups(groups: FloatGroups, scheme: Scheme, least_step: Tensor | None = None) -> QuantizedMatrix:
    """Return the matrix with 8-bit scales and bases; every field is finite where the groups are.

    `least_step`, f32 [N], is what rows' steps are to be multiples of, but for rows where it is 0.
    """
    mean_code = groups.codes.view(*groups.scale.shape, -1).sum(dim=2) / group_size_of(scheme)
    level = second_level(FittedGroups(groups.scale, scheme.center - groups.zero, mean_code - scheme.center), least_step)
    return QuantizedMatrix(
        scheme, groups.codes, level.scale_codes, level.base_codes, level.scale_step, level.base_min, level.base_step
    )


def second_level(groups: FittedGroups, least_step: Tensor | None = None) -> SecondLevel:
    """Return the steps of the rows, and the codes nearest to the groups' scales and then to their bases."""
    scale_step = groups.scale.amax(dim=1) / _CODE_MAX  # [N]
    if least_step is not None:
        scale_step = torch.where(least_step > 0, (scale_step / least_step).ceil() * least_step, scale_step)
    scale_in_steps = groups.scale / _divisor(scale_step)  # [N, K/g]
    scale_codes = scale_in_steps.round().clamp_(0, _CODE_MAX)
    in_steps = scale_in_steps * (groups.mean_code + groups.base) - scale_codes * groups.mean_code
    in_steps.masked_fill_(groups.scale == 0, 0)
    base_min, base_step = _base_grid(in_steps)
    base_codes = ((in_steps - base_min[:, None]) / _divisor(base_step)).round_().clamp_(0, _CODE_MAX)
    return SecondLevel(scale_codes.to(torch.uint8), base_codes.to(torch.uint8), scale_step, base_min, base_step)


def group_size_of(scheme: Scheme) -> int:
    """Return the group size of a scheme that is known to be quantized."""
    if scheme.group_size is None:
        raise ValueError(f"{scheme.name} has no groups")
    return scheme.group_size


def _base_grid(base: Tensor) -> tuple[Tensor, Tensor]:
    """Return base_min and base_step of each row, [N]; a base of 0, as groups of zeros have it, is on the grid."""
    low, high = base.aminmax(dim=1)
    step = (high - low) / _CODE_MAX
    has_zero = (low < 0) & (high >= 0)
    return torch.where(has_zero, (low / step.masked_fill(~has_zero, 1)).round_() * step, low), step


def _divisor(step: Tensor) -> Tensor:
    """Return the steps as a column to divide by; what is divided by a step of 0 becomes 0."""
    return step.masked_fill(step == 0, torch.inf)[:, None]
