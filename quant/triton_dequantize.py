"""A kernel that expands a strip of a part's panels to 16-bit floats, for products with many tokens.

Each operation is rounded to float32 by itself, as in quant.reference; the weight is then rounded once to 16 bits, so
that it is bit for bit the reference's. The launcher turns the compiler's fusing of operations off.

Importing it needs triton. Nobody blocks in here.
"""

import triton
import triton.language as tl

from quant.device_parts import PartOnDevice
from quant.triton_codes import (
    ROWS,
    UNITS,
    code_of,
    group_codes,
    load_vectors,
    nbits_of,
    panel_words,
    quad_bit,
    quad_words,
    row_values,
    unit_cols_of,
)


@triton.jit(do_not_specialize=(*PartOnDevice._fields, "first_panel", "strip"))
def dequantize_kernel(
    part_bytes: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    row_plane_nbytes: tl.tensor,
    panel_nbytes: tl.tensor,
    first_panel: tl.tensor,
    strip: tl.tensor,
    SCHEME: tl.constexpr,
) -> None:
    """Store panels from first_panel on as 16-bit floats, [8 * panels, cols]; a program for 64 units of a panel."""
    part = PartOnDevice(part_bytes, rows, cols, row_plane_nbytes, panel_nbytes)
    QUADS: tl.constexpr = unit_cols_of(SCHEME) // 4
    n_units = part.cols // unit_cols_of(SCHEME)
    n_tiles = tl.cdiv(n_units, UNITS)
    panel_of_strip = tl.program_id(0) // n_tiles
    panel = first_panel + panel_of_strip
    unit = tl.program_id(0) % n_tiles * UNITS + tl.arange(0, UNITS)
    mask = unit < n_units
    panel_at = panel_words(part, panel)
    scale_step, base_min, base_step = row_values(part, panel)
    vectors = load_vectors(panel_at, unit, mask, SCHEME)
    scale, base = group_codes(panel_at, unit, mask, SCHEME)
    base = base_min[None, :] + base_step[None, :] * base
    row = panel_of_strip * ROWS + tl.arange(0, ROWS)
    row_at = tl.multiple_of(strip.to(tl.pointer_type(tl.uint64)) + row.to(tl.int64) * (part.cols // 4), 16)
    for quad in tl.static_range(QUADS):
        words = quad_words(vectors, quad, SCHEME)
        packed = _packed_quad(words, quad, scale, base, scale_step[None, :], SCHEME, strip.dtype.element_ty)
        tl.store(row_at[None, :] + (unit * QUADS + quad)[:, None], packed, mask[:, None])


@triton.jit
def _packed_quad(
    words: tl.tensor,
    QUAD: tl.constexpr,
    scale: tl.tensor,
    base: tl.tensor,
    scale_step: tl.tensor,
    SCHEME: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    # Four neighbouring weights as one word, u64 [U, 8].
    NBITS: tl.constexpr = nbits_of(SCHEME)
    packed = tl.zeros([UNITS, ROWS], tl.uint64)
    for place in tl.static_range(4):
        code = code_of(words, 8 * place + quad_bit(QUAD, SCHEME), NBITS, 128 if NBITS == 8 else 0)
        weight = (scale * code + base) * scale_step
        packed = packed | weight.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint64) << (16 * place)
    return packed
