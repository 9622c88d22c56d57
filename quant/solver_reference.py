"""HQQ by torch alone: what the C library's loops are held to, and what solves where it was not built. See solver.py.

Memory: one float32 copy of the matrix, in chunks that fit a core's cache. Blocks nobody; holds no state between calls.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.schemes import Scheme
from quant.errors import BadWeights
from quant.second_level import FloatGroups, group_size_of

_N_ITERATIONS_MAX = 20
_LP_NORM = 0.7
_BETA = 10.0
# At most this error is never shrunk; a little below (1/beta)^(1/(2-p)), for rounding.
_ERROR_UNSHRUNK_MAX = 0.99 * (1 / _BETA) ** (1 / (2 - _LP_NORM))

_NARROW = 1 / 16
# Outside these magnitudes 1/scale leaves the range of float32. Smaller weights are zeros; larger ones are refused.
_MAGNITUDE_MIN = 1e-30
_MAGNITUDE_MAX = 1e30

_CHUNK_NELEMENTS = 1 << 16


@torch.no_grad()
def solve(weight: Tensor, scheme: Scheme) -> FloatGroups:
    """Return codes, scales and zeros of a weight [N, K]; raise BadWeights unless every weight is finite."""
    rows, code_max = weight.shape[0], 2**scheme.nbits - 1
    groups = weight.reshape(-1, group_size_of(scheme))  # [N * K/g, g]
    chunks = [_start(groups[at], scheme.nbits) for at in _chunk_slices(groups)]
    scratch = torch.empty(chunks[0].x.numel())
    best = torch.inf
    for _ in range(_N_ITERATIONS_MAX):
        total = sum(_improve(chunk, code_max, scratch) for chunk in chunks)
        # In float32, as the package compares: below its resolution nothing improves any more.
        error = float(torch.tensor(total / weight.numel(), dtype=torch.float32))
        if not error < best:
            break
        best = error
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    for chunk, at in zip(chunks, _chunk_slices(groups), strict=True):
        codes[at] = _quantized(chunk, code_max, scratch).to(torch.uint8).t()
    scale = torch.cat([chunk.scale for chunk in chunks]).view(rows, -1)
    zero = torch.cat([chunk.zero for chunk in chunks]).view(rows, -1)
    return FloatGroups(codes.view(weight.shape), scale, zero)


@dataclass(slots=True, eq=False)
class _Chunk:
    """Some groups, one a column, so that what is done along a group is done to whole vectors; `zero` improves."""

    x: Tensor  # f32 [g, n], weights in units of codes
    scale: Tensor  # f32 [n], 0 for a group of zeros
    zero: Tensor  # f32 [n], in units of codes


def _start(groups: Tensor, nbits: int) -> _Chunk:
    """Return the chunk of some groups [n, g], its scale and zero from their least and greatest weight."""
    weights = groups.t().float().contiguous()  # [g, n]
    low, high = weights.aminmax(dim=0)
    magnitude = torch.maximum(low.abs(), high.abs())
    if not bool((magnitude <= _MAGNITUDE_MAX).all()):
        raise BadWeights(
            f"weights are expected to be finite and at most {_MAGNITUDE_MAX:g}; a NaN, an infinity or more came"
        )
    is_narrow = high - low < magnitude * _NARROW
    low = torch.where(is_narrow, low.clamp(max=0), low)
    high = torch.where(is_narrow, high.clamp(min=0), high)
    is_empty = magnitude < _MAGNITUDE_MIN
    inverse = ((2**nbits - 1) / (high - low)).masked_fill_(is_empty, 1)
    zero = -low * inverse
    if nbits == 4:
        zero.round_()
    # Out of place: where there is one group, `weights` may be the caller's own memory.
    return _Chunk(weights * inverse, inverse.reciprocal().masked_fill_(is_empty, 0), zero)


def _improve(chunk: _Chunk, code_max: int, scratch: Tensor) -> float:
    """Replace the chunk's zeros by better ones; return the sum of the |errors| that the old ones made."""
    residual = _quantized(chunk, code_max, scratch).sub_(chunk.x)  # q - x, [g, n]
    zero = residual.mean(dim=0)
    distance = residual.sub_(chunk.zero).abs_()  # |error| in units of codes
    group_errors = distance.sum(dim=0).mul_(chunk.scale)  # [n]
    # A group's largest error is at most the sum: mostly the sum says at once that there is nothing to shrink.
    if float(group_errors.max()) > _ERROR_UNSHRUNK_MAX:
        error_max = float((distance.amax(dim=0) * chunk.scale).max())
        if error_max > _ERROR_UNSHRUNK_MAX:
            zero = _shrunk_zero(chunk, code_max, scratch)
    chunk.zero = zero
    return float(group_errors.sum(dtype=torch.float64))


def _shrunk_zero(chunk: _Chunk, code_max: int, scratch: Tensor) -> Tensor:
    """Return the better zeros by the whole formula, outliers taken out of the mean."""
    residual = _quantized(chunk, code_max, scratch).sub_(chunk.x)
    error = (chunk.zero - residual) * chunk.scale  # w - (q - zero) * scale
    magnitude = error.abs()
    outlier = error.sign() * (magnitude - magnitude.pow(_LP_NORM - 1) / _BETA).clamp_(min=0)
    is_empty = chunk.scale == 0
    return (residual + outlier / chunk.scale.masked_fill(is_empty, 1)).mean(dim=0)


def _quantized(chunk: _Chunk, code_max: int, scratch: Tensor) -> Tensor:
    """Return the codes as floats, [g, n], in the scratch memory."""
    out = scratch[: chunk.x.numel()].view_as(chunk.x)
    return torch.add(chunk.x, chunk.zero, out=out).round_().clamp_(0, code_max)


def _chunk_slices(groups: Tensor) -> Iterator[slice]:
    n_groups, group_size = groups.shape
    per_chunk = _CHUNK_NELEMENTS // group_size
    for first in range(0, n_groups, per_chunk):
        yield slice(first, min(first + per_chunk, n_groups))
