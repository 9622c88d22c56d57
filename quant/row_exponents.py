"""Rows of weights at the ends of float32's range: moved towards its middle by powers of two, and back when stored.

Within 2^-80 … 2^96 the solvers' arithmetic neither overflows nor loses a bit to numbers below the least normal one; a
row whose largest weight lies outside is multiplied by the power of two that brings it to that end. That is exact, but
for weights so much smaller than their row's largest that they are nothing beside it. The way back is scale_step alone,
as w = scale_step * (…): exact, too, since

    a row's step is a multiple of the least float32, 2^-149 (`least_steps`, before scales are given codes), and
    a step with which a restored weight would exceed the largest float32 is drawn in until it does not: its row loses
    at most what the weight would have exceeded it by (`moved_back`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from quant.errors import BadWeights
from quant.packing import QuantizedMatrix

_EXPONENT_LEAST, _EXPONENT_MOST = -80, 96
_LEAST_EXPONENT = -149  # of float32's numbers
_LARGEST = torch.finfo(torch.float32).max
_STRIP_NELEMENTS = 1 << 20
_INTEGERS = {2: torch.int16, 4: torch.int32}


def row_shifts(weight: Tensor) -> Tensor | None:
    """Return the powers of two, i32 [N], for the rows of a weight [N, K], f32, f16 or bf16; None where all are 0.

    Raise BadWeights unless every weight is finite.
    """
    per_strip = max(1, _STRIP_NELEMENTS // weight.shape[1])
    strips = (weight[first : first + per_strip] for first in range(0, weight.shape[0], per_strip))
    magnitude = torch.cat([_magnitudes(strip) for strip in strips])
    if not bool(magnitude.isfinite().all()):
        raise BadWeights("weights are expected to be finite; a NaN or an infinity came")
    exponent = torch.frexp(magnitude).exponent
    shifts = exponent.clamp(_EXPONENT_LEAST, _EXPONENT_MOST).sub_(exponent).masked_fill_(magnitude == 0, 0)
    return shifts if bool(shifts.any()) else None


def moved(weight: Tensor, shifts: Tensor) -> Tensor:
    """Return the rows of a weight [N, K] moved by their powers of two, in the weight's type."""
    return weight * _powers(shifts).to(weight.dtype)[:, None]


def least_steps(shifts: Tensor) -> Tensor:
    """Return what moved rows' steps must be multiples of, f32 [N]; 0 where any step will do."""
    return _powers(shifts + _LEAST_EXPONENT).masked_fill_(shifts <= 0, 0)


def moved_back(matrix: QuantizedMatrix, shifts: Tensor) -> QuantizedMatrix:
    """Return the matrix of the rows as they were, every weight finite."""
    scale_step = matrix.scale_step * _powers(-shifts)
    largest = _largest_in_steps(matrix)
    # Of two roundings each may go up.
    drawn_in = (_LARGEST / largest).nextafter(torch.zeros(()))
    return replace(matrix, scale_step=torch.where((largest * scale_step).isinf(), drawn_in, scale_step))


def _magnitudes(strip: Tensor) -> Tensor:
    """Return each row's largest magnitude, f32 [n]; NaN or infinite where a weight is.

    Without their signs floats are ordered as the integers that their bits are, NaNs above all.
    """
    bits = strip.view(_INTEGERS[strip.element_size()])
    return (bits & torch.iinfo(bits.dtype).max).amax(dim=1).view(strip.dtype).float()


def _powers(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents)


def _largest_in_steps(matrix: QuantizedMatrix) -> Tensor:
    """Return the largest magnitude of each row in steps, f32 [N], rounded as a restored weight is."""
    codes = matrix.codes.view(*matrix.scale_codes.shape, -1)
    base = matrix.base_min[:, None] + matrix.base_step[:, None] * matrix.base_codes
    ends = torch.stack(codes.aminmax(dim=2)).float() - matrix.scheme.center  # [2, N, K/g]
    return (ends * matrix.scale_codes + base).abs().amax(dim=(0, 2))
