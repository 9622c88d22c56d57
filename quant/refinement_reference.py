"""Refinement by torch alone: what the C library's loops are held to, and what refines where it was not built.

See refinement.py. Works on strips of rows; groups are columns, so that what is done along a group is done to vectors.

Letters: g weights of a group, n groups.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from protocol.schemes import Scheme
from quant.packing import QuantizedMatrix
from quant.second_level import FittedGroups, FloatGroups, SecondLevel, group_size_of, second_level

_N_STARTS = 5  # of each end of the range
_N_ROUNDS = 2
_N_LAST_ROUNDS = 8
_N_GRID_ROUNDS = 2
_MANY_STARTS_NBITS = 4
_NARROW = 1 / 16
# What a row's step is so many times more than is nothing in that row: a group of it is not looked at more closely, or
# the squares of its errors in a step would leave the range of floats.
_NEGLIGIBLE = 2.0**-20
_CODE_MAX = 255

_STRIP_NELEMENTS = 1 << 18


def refine(weight: Tensor, start: FloatGroups, scheme: Scheme, least_step: Tensor | None = None) -> QuantizedMatrix:
    """Return the matrix with the least error that is found from HQQ's scales and zeros on."""
    strip_rows = max(1, _STRIP_NELEMENTS // weight.shape[1])
    strips = [slice(first, first + strip_rows) for first in range(0, weight.shape[0], strip_rows)]
    fits = [_refined(_Groups.of(weight[rows], start.scale[rows], scheme), start, rows) for rows in strips]
    fitted = FittedGroups(*(torch.cat(planes) for planes in zip(*fits, strict=True)))
    level = second_level(fitted, least_step)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for rows in strips:
        groups = _Groups.of(weight[rows], fitted.scale[rows], scheme, level.scale_step[rows] * _NEGLIGIBLE)
        codes[rows] = _put_on_grid(groups, fitted, level, rows)
    return QuantizedMatrix(
        scheme, codes, level.scale_codes, level.base_codes, level.scale_step, level.base_min, level.base_step
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Groups of some rows: w = middle + half * x, so that x is in -1 … 1."""

    scheme: Scheme
    n_rows: int
    x: Tensor  # f32 [g, n]
    middle: Tensor  # f32 [n]
    half: Tensor  # f32 [n]
    is_narrow: Tensor  # nearly constant
    is_empty: Tensor  # all zeros

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, scheme: Scheme, least_half: Tensor | None = None) -> Self:
        """Return the groups of a weight [rows, K]; a scale of 0 says which are empty.

        No half is less than the row's `least_half`, [rows].
        """
        groups = weight.reshape(-1, group_size_of(scheme)).t().float()
        low, high = groups.aminmax(dim=0)
        half = (high - low) * 0.5
        is_narrow = high - low < torch.maximum(low.abs(), high.abs()) * _NARROW
        middle = low + half
        if least_half is not None:
            half = torch.maximum(half.view(weight.shape[0], -1), least_half[:, None]).flatten()
        half = half.masked_fill(half == 0, 1)
        x = (groups - middle) / half
        return cls(scheme, weight.shape[0], x, middle, half, is_narrow, scale.flatten() == 0)

    @property
    def code_max(self) -> int:
        return (1 << self.scheme.nbits) - 1

    def by_row(self, plane: Tensor) -> Tensor:
        """Return a number of each group as f32 [rows, K/g]."""
        return plane.view(self.n_rows, -1)


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """x = scale * q + offset, each f32 [n], and the sum of squared errors of the codes that it was fitted to."""

    scale: Tensor
    offset: Tensor
    error: Tensor

    def or_better(self, other: "_Fit", *, unless: Tensor) -> "_Fit":
        """Return the better one of each group; this one of those in `unless`."""
        better = (other.error < self.error) & ~unless
        return _Fit(
            torch.where(better, other.scale, self.scale),
            torch.where(better, other.offset, self.offset),
            torch.where(better, other.error, self.error),
        )


def _refined(groups: _Groups, start: FloatGroups, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, base and mean code of the groups of those rows, each f32 [rows, K/g]."""
    hqq_scale = start.scale[rows].flatten().masked_fill(groups.is_empty, 1)
    hqq_offset = -start.zero[rows].flatten() * hqq_scale
    hqq = _Fit(hqq_scale / groups.half, (hqq_offset - groups.middle) / groups.half, torch.zeros_like(hqq_scale))
    fit = _best_fit(groups, hqq, groups.is_narrow | groups.is_empty)
    mean_code = _codes(groups, fit).mean(dim=0) - groups.scheme.center
    base = (fit.offset + groups.middle / groups.half) / fit.scale + groups.scheme.center
    planes = (
        (fit.scale * groups.half).masked_fill(groups.is_empty, 0),
        base.masked_fill(groups.is_empty, 0),
        mean_code,
    )
    scale, base, mean_code = map(groups.by_row, planes)
    return scale, base, mean_code


def _best_fit(groups: _Groups, hqq: _Fit, is_kept: Tensor) -> _Fit:
    best = _refitted(groups, hqq, _N_ROUNDS)
    draw = 0.1 if groups.scheme.nbits < _MANY_STARTS_NBITS else 0.06
    n_starts = 1 if groups.scheme.nbits > _MANY_STARTS_NBITS else _N_STARTS
    for drawn_low in range(n_starts):
        for drawn_high in range(n_starts):
            low, high = -1 + draw * drawn_low, 1 - draw * drawn_high
            scale = torch.full_like(hqq.scale, (high - low) / groups.code_max)
            fit = _Fit(scale, torch.full_like(scale, low), torch.zeros_like(scale))
            best = best.or_better(_refitted(groups, fit, _N_ROUNDS), unless=is_kept)
    best = _refitted(groups, best, _N_LAST_ROUNDS)
    return _Fit(torch.where(is_kept, hqq.scale, best.scale), torch.where(is_kept, hqq.offset, best.offset), best.error)


def _codes(groups: _Groups, fit: _Fit) -> Tensor:
    """Return the codes as floats, [g, n]."""
    inverse = 1 / fit.scale
    return (groups.x * inverse - fit.offset * inverse).round_().clamp_(0, groups.code_max)


def _refitted(groups: _Groups, fit: _Fit, n_rounds: int) -> _Fit:
    """Return the fit after some rounds: the codes for scale and offset, then scale and offset for the codes."""
    for _ in range(n_rounds):
        q = _codes(groups, fit)
        r = (groups.x - fit.offset) / fit.scale - q  # what the codes leave, in steps
        spread = (q - q.mean(dim=0)).square().sum(dim=0)
        slope = ((q - q.mean(dim=0)) * r).sum(dim=0) / spread.masked_fill(spread == 0, torch.inf)
        lift = r.mean(dim=0) - slope * q.mean(dim=0)
        left = (r - slope * q - lift).square().sum(dim=0)
        fit = _Fit(fit.scale * (1 + slope), fit.offset + fit.scale * lift, left * fit.scale.square())
    return fit


def _put_on_grid(groups: _Groups, fitted: FittedGroups, level: SecondLevel, rows: slice) -> Tensor:
    """Write the best scale and base codes near those floats into the level's rows; return the codes, u8 [rows, K]."""
    grid = _Grid.of(groups, level, rows)
    scale, base, mean_code = (plane[rows].flatten() for plane in (fitted.scale, fitted.base, fitted.mean_code))
    offset = scale * (base - groups.scheme.center) / groups.half - groups.middle / groups.half
    x_scale, x_mean_code = scale / groups.half, mean_code + groups.scheme.center
    nearest = _to_code(_divided(x_scale, grid.step))
    best = _Point(nearest, torch.zeros_like(nearest), torch.full_like(nearest, torch.inf))
    for shift in (0, 1, -1):
        scale_code = _to_code(nearest + shift)
        best = _try_scale(groups, grid, scale_code, offset + (x_scale - scale_code * grid.step) * x_mean_code, best)
    nothing = torch.zeros_like(nearest)
    zeros = _Point(nothing, grid.base_code(nothing, -groups.middle / groups.half), nothing)
    scale_code = torch.where(groups.is_empty, zeros.scale_code, best.scale_code)
    base_code = torch.where(groups.is_empty, zeros.base_code, best.base_code)
    level.scale_codes[rows] = groups.by_row(scale_code).to(torch.uint8)
    level.base_codes[rows] = groups.by_row(base_code).to(torch.uint8)
    q = _codes_on_grid(groups, scale_code * grid.step, grid.offset(scale_code, base_code))
    return q.t().reshape(groups.n_rows, -1).to(torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """The second level as the groups see it, each f32 [n]."""

    step: Tensor
    base_min: Tensor
    base_step: Tensor
    middle: Tensor
    center: int

    @classmethod
    def of(cls, groups: _Groups, level: SecondLevel, rows: slice) -> Self:
        n_groups = groups.x.shape[1] // groups.n_rows
        steps = (level.scale_step[rows], level.base_min[rows], level.base_step[rows])
        step, base_min, base_step = (plane.repeat_interleave(n_groups) for plane in steps)
        return cls(step / groups.half, base_min, base_step, groups.middle / groups.half, groups.scheme.center)

    def offset(self, scale_code: Tensor, base_code: Tensor) -> Tensor:
        return (self.base_min + self.base_step * base_code - scale_code * self.center) * self.step - self.middle

    def base_code(self, scale_code: Tensor, offset: Tensor) -> Tensor:
        """Return the code of the base that gives the nearest offset."""
        base = _divided(offset + self.middle, self.step) + scale_code * self.center
        return _to_code(_divided(base - self.base_min, self.base_step))


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """A point of the grid for each group, and the sum of squared errors that it leaves."""

    scale_code: Tensor
    base_code: Tensor
    error: Tensor


def _try_scale(groups: _Groups, grid: _Grid, scale_code: Tensor, offset: Tensor, best: _Point) -> _Point:
    """Return the better ones of `best` and what that scale gives with the bases that fit it."""
    scale = scale_code * grid.step
    for _ in range(_N_GRID_ROUNDS):
        base_code = grid.base_code(scale_code, offset)
        stored = grid.offset(scale_code, base_code)
        left = groups.x - (_codes_on_grid(groups, scale, stored) * scale + stored)
        error = left.square().sum(dim=0)
        better = error < best.error
        best = _Point(
            torch.where(better, scale_code, best.scale_code),
            torch.where(better, base_code, best.base_code),
            torch.where(better, error, best.error),
        )
        offset = stored + left.mean(dim=0)
    return best


def _codes_on_grid(groups: _Groups, scale: Tensor, offset: Tensor) -> Tensor:
    inverse = _divided(torch.ones_like(scale), scale)
    return (groups.x * inverse - offset * inverse).round_().clamp_(0, groups.code_max)


def _divided(value: Tensor, divisor: Tensor) -> Tensor:
    """Return the quotient; 0 where it is divided by 0."""
    return value / divisor.masked_fill(divisor == 0, torch.inf)


def _to_code(value: Tensor) -> Tensor:
    return value.clamp(0, _CODE_MAX).round_()
