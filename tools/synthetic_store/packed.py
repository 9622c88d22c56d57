"""Random weights as the bytes of layout r8, a strip at a time: nothing is quantized, nothing is held whole.

Codes and second-level bytes are random in every matrix; its row planes are chosen so that the weights they mean have a
given standard deviation and the mean 0. Padding is zero, as the converter's is. `protocol.layout` is the authority on
where each byte lies.

For codes q of b bits, uniform in 0 … 2^b - 1, and second-level bytes s and z, uniform in 0 … 255:

    w = (q - zero) * scale_step * s              zero = zero_min + zero_step * z
    E[zero] = E[q], so E[w] = 0                  var(w) = scale_step² * E[s²] * (var(q) + zero_step² * var(z))
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.layout import PANEL_ROWS, PLANE_ALIGNMENT, PanelPlan, Part, aligned, panel_plan, part_nbytes
from protocol.schemes import BF16, Scheme, scheme_named

Bytes = NDArray[np.uint8]

_STRIP_NBYTES = 8 << 20
_BYTE_MAX = 255
# The zeros of a row differ by a quarter of the codes' range, about as much as quantized weights' do.
_ZERO_SPREAD = 0.25


def random_record(parts: Sequence[Part], nbytes: int, generator: np.random.Generator) -> Iterator[Bytes]:
    """Yield the bytes of a record of those parts, padded to its length; weights keep the variance of what comes in."""
    n_left = nbytes
    for part in parts:
        for data in random_part(part, part.cols**-0.5, generator):
            n_left -= data.nbytes
            yield data
    yield np.zeros(n_left, np.uint8)


def random_part(part: Part, std: float, generator: np.random.Generator) -> Iterator[Bytes]:
    """Yield the bytes of a part with weights of that standard deviation, in order, padded to the plane alignment."""
    scheme = scheme_named(part.scheme)
    if scheme.is_quantized:
        plan = panel_plan(part.rows, part.cols, scheme)
        yield _row_planes(part.rows, plan, scheme, std)
        yield from _panels(part.rows, plan, generator)
    else:
        yield from _sixteen_bit(part, scheme, std, generator)
    yield from _padding(part)


def ones_part(part: Part) -> Iterator[Bytes]:
    """Yield the bytes of a 16-bit part whose weights are all 1."""
    ones = np.ones(part.rows * part.cols, np.float32)
    yield _stored(ones, scheme_named(part.scheme))
    yield from _padding(part)


def _padding(part: Part) -> Iterator[Bytes]:
    nbytes = part_nbytes(part)
    yield np.zeros(aligned(nbytes, PLANE_ALIGNMENT) - nbytes, np.uint8)


def _row_planes(rows: int, plan: PanelPlan, scheme: Scheme, std: float) -> Bytes:
    """Return scale_step, zero_min and zero_step; 0 for the rows that only fill the last panel."""
    code_max = (1 << scheme.nbits) - 1
    zero_step = code_max * _ZERO_SPREAD / _BYTE_MAX
    zero_min = code_max / 2 - zero_step * _BYTE_MAX / 2
    variance_of_steps = ((code_max + 1) ** 2 - 1) / 12 + zero_step**2 * ((_BYTE_MAX + 1) ** 2 - 1) / 12
    mean_square_of_bytes = _BYTE_MAX * (2 * _BYTE_MAX + 1) / 6
    scale_step = std / math.sqrt(variance_of_steps * mean_square_of_bytes)
    planes = np.zeros(plan.panels_offset, np.uint8)
    for offset, value in (
        (plan.scale_step_offset, scale_step),
        (plan.zero_min_offset, zero_min),
        (plan.zero_step_offset, zero_step),
    ):
        planes[offset : offset + 4 * rows].view(np.float32)[:] = value
    return planes


def _panels(rows: int, plan: PanelPlan, generator: np.random.Generator) -> Iterator[Bytes]:
    per_strip = max(1, _STRIP_NBYTES // plan.panel_nbytes)
    for first in range(0, plan.n_panels, per_strip):
        n_panels = min(per_strip, plan.n_panels - first)
        panels = _random_bytes(n_panels * plan.panel_nbytes, generator).reshape(n_panels, plan.panel_nbytes)
        panels[:, plan.metadata_nbytes : plan.codes_offset] = 0
        panels[:, plan.codes_offset + plan.codes_nbytes :] = 0
        if first + n_panels == plan.n_panels and rows % PANEL_ROWS:
            _clear_missing_rows(panels[-1], rows % PANEL_ROWS, plan)
        yield panels.reshape(-1)


def _clear_missing_rows(panel: Bytes, n_rows: int, plan: PanelPlan) -> None:
    metadata = panel[: plan.metadata_nbytes].reshape(plan.n_blocks, 2, PANEL_ROWS, plan.groups_per_block)
    metadata[:, :, n_rows:] = 0
    codes = panel[plan.codes_offset : plan.codes_offset + plan.codes_nbytes].reshape(-1, PANEL_ROWS, 4)
    codes[:, n_rows:] = 0


def _sixteen_bit(part: Part, scheme: Scheme, std: float, generator: np.random.Generator) -> Iterator[Bytes]:
    n_left = part.rows * part.cols
    while n_left:
        n = min(n_left, _STRIP_NBYTES // 4)
        uniform = generator.random(n, np.float32)
        uniform -= np.float32(0.5)
        uniform *= np.float32(std * math.sqrt(12))
        yield _stored(uniform, scheme)
        n_left -= n


def _stored(weights: NDArray[np.float32], scheme: Scheme) -> Bytes:
    """Return weights in a 16-bit type; bf16 is cut, not rounded: they are random anyway."""
    if scheme == BF16:
        return np.ascontiguousarray(weights.view(np.uint16)[1::2]).view(np.uint8)
    return weights.astype(np.float16).view(np.uint8)


def _random_bytes(nbytes: int, generator: np.random.Generator) -> Bytes:
    words = generator.integers(0, 1 << 64, size=-(-nbytes // 8), dtype=np.uint64)
    return words.view(np.uint8)[:nbytes]
