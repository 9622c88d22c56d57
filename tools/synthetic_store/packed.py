"""Random weights as the bytes of layout r8, a strip at a time: nothing is quantized, nothing is held whole.

Codes and second-level bytes are random in every matrix; its row planes are chosen so that the weights they mean have a
given standard deviation and the mean 0. Padding is zero, as the converter's is. `protocol.layout` is the authority on
where each byte lies.

For codes q, uniform in all that the width has, and second-level bytes s and b, uniform in 0 … 255, all independent:

    w = scale_step * (s * c + base)         c = q - center, base = base_min + base_step * b
    E[base] = -E[s] E[c], so E[w] = 0       var(w) = scale_step² * (E[s²] E[c²] - E[s]² E[c]² + base_step² * var(b))

Where llama.cpp is to compute with the same weights, they are such that a GGUF holds them exactly (SecondLevel.GGUF):
as Q4_K, w = d s q - dmin b with 6 bits for s and b, or as Q8_0, w = d q, both with d in fp16.
"""

import math
from collections.abc import Iterator, Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from protocol.layout import (
    PANEL_ROWS,
    PLANE_ALIGNMENT,
    STRIPE_METADATA_NBYTES,
    PanelPlan,
    Part,
    aligned,
    panel_plan,
    part_nbytes,
)
from protocol.schemes import BF16, Scheme, scheme_named

Bytes = NDArray[np.uint8]

_STRIP_NBYTES = 8 << 20
# The bases of a row differ by a quarter of what the codes span at a middling scale.
_BASE_SPREAD = 0.25
# So few that fp16 still holds the product of a row's step with a scale, and with a mean code such as 7.5.
_GGUF_STEP_NBITS = 5


class SecondLevel(Enum):
    """Which second-level bytes s and b there are; the value is the largest."""

    FULL = 255
    GGUF = 63


def random_record(parts: Sequence[Part], nbytes: int, generator: np.random.Generator) -> Iterator[Bytes]:
    """Yield the bytes of a record of those parts, padded to its length; weights keep the variance of what comes in."""
    n_left = nbytes
    for part in parts:
        for data in random_part(part, part.cols**-0.5, generator):
            n_left -= data.nbytes
            yield data
    yield np.zeros(n_left, np.uint8)


def random_part(
    part: Part, std: float, generator: np.random.Generator, second_level: SecondLevel = SecondLevel.FULL
) -> Iterator[Bytes]:
    """Yield the bytes of a part with weights of that standard deviation, in order, padded to the plane alignment."""
    scheme = scheme_named(part.scheme)
    if scheme.is_quantized:
        plan = panel_plan(part.rows, part.cols, scheme)
        yield _row_planes(part.rows, plan, scheme, std, second_level)
        yield from _panels(part.rows, plan, generator, second_level)
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


def _row_planes(rows: int, plan: PanelPlan, scheme: Scheme, std: float, second_level: SecondLevel) -> Bytes:
    """Return scale_step, base_min and base_step; 0 for the rows that only fill the last panel."""
    code_max = (1 << scheme.nbits) - 1
    mean_code = code_max / 2 - scheme.center
    mean_square_of_codes = _variance(code_max) + mean_code**2
    byte_max = second_level.value
    mean_byte = byte_max / 2
    mean_square_of_bytes = _variance(byte_max) + mean_byte**2
    base_min, base_step = _bases(scheme, code_max, mean_code, second_level)
    variance_of_products = mean_square_of_bytes * mean_square_of_codes - (mean_byte * mean_code) ** 2
    scale_step = std / math.sqrt(variance_of_products + base_step**2 * _variance(byte_max))
    if second_level is SecondLevel.GGUF:
        scale_step = _rounded(scale_step, _GGUF_STEP_NBITS)
    planes = np.zeros(plan.panels_offset, np.uint8)
    for offset, value in (
        (plan.scale_step_offset, scale_step),
        (plan.base_min_offset, base_min),
        (plan.base_step_offset, base_step),
    ):
        planes[offset : offset + 4 * rows].view(np.float32)[:] = value
    return planes


def _bases(scheme: Scheme, code_max: int, mean_code: float, second_level: SecondLevel) -> tuple[float, float]:
    """Return base_min and base_step, which make the weights' mean 0: nearly, for 8 bits in a GGUF."""
    if second_level is SecondLevel.GGUF:
        return 0.0, 0.0 if scheme.center else -mean_code
    mean_byte = second_level.value / 2
    base_step = code_max * mean_byte * _BASE_SPREAD / second_level.value
    return -mean_byte * mean_code - base_step * mean_byte, base_step


def _rounded(value: float, nbits: int) -> float:
    """Return the nearest number with a mantissa of so many bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, nbits)), exponent - nbits)


def _variance(largest: int) -> float:
    """Return the variance of whole numbers uniform in 0 … largest."""
    return ((largest + 1) ** 2 - 1) / 12


def _panels(rows: int, plan: PanelPlan, generator: np.random.Generator, second_level: SecondLevel) -> Iterator[Bytes]:
    per_strip = max(1, _STRIP_NBYTES // plan.panel_nbytes)
    for first in range(0, plan.n_panels, per_strip):
        n_panels = min(per_strip, plan.n_panels - first)
        panels = _random_bytes(n_panels * plan.panel_nbytes, generator).reshape(n_panels, plan.panel_nbytes)
        for start in range(0, plan.filled_nbytes, plan.stripe_nbytes):
            panels[:, start : start + STRIPE_METADATA_NBYTES] &= second_level.value
        last_stripe = (plan.n_stripes - 1) * plan.stripe_nbytes
        n_last_blocks = plan.n_blocks - (plan.n_stripes - 1) * plan.blocks_per_stripe
        last_metadata_nbytes = n_last_blocks * STRIPE_METADATA_NBYTES // plan.blocks_per_stripe
        panels[:, last_stripe + last_metadata_nbytes : last_stripe + STRIPE_METADATA_NBYTES] = 0
        panels[:, plan.filled_nbytes :] = 0
        if first + n_panels == plan.n_panels and rows % PANEL_ROWS:
            _clear_missing_rows(panels[-1], rows % PANEL_ROWS, plan)
        yield panels.reshape(-1)


def _clear_missing_rows(panel: Bytes, n_rows: int, plan: PanelPlan) -> None:
    for start in range(0, plan.filled_nbytes, plan.stripe_nbytes):
        codes_start, end = start + STRIPE_METADATA_NBYTES, min(start + plan.stripe_nbytes, plan.filled_nbytes)
        metadata = panel[start:codes_start].reshape(-1, PANEL_ROWS, plan.groups_per_block)
        metadata[:, n_rows:] = 0
        panel[codes_start:end].reshape(-1, PANEL_ROWS, 4)[:, n_rows:] = 0


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
