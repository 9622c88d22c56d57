"""The weights of a part as float32: the reference that every kernel is held to. Clear before fast.

Each operation is rounded to float32 by itself, none is fused into another, so that a kernel can be bit-equal:
base = base_min + (base_step * b); w = ((s * (q - center)) + base) * scale_step. The first product is exact.
"""

import torch
from torch import Tensor

from protocol.layout import PANEL_ROWS, Part, panel_plan
from protocol.schemes import BF16, Scheme, scheme_named
from quant.packing import panels_of, row_planes, unpack_panels
from quant.part_bytes import check_part, check_rows

_STRIP_NELEMENTS = 1 << 20


def dequantize(part_bytes: Tensor, rows: int, cols: int, scheme: Scheme) -> Tensor:
    """Return the weights, f32 [rows, cols], of the bytes of a part, u8; raise BadPart or LayoutError."""
    part = Part("matrix", rows, cols, scheme.name)
    check_part(part_bytes, part)
    weights = torch.empty(rows, cols)
    rows_per_strip = max(PANEL_ROWS, _STRIP_NELEMENTS // cols // PANEL_ROWS * PANEL_ROWS)
    for first_row in range(0, rows, rows_per_strip):
        strip = weights[first_row : first_row + rows_per_strip]
        dequantize_rows(part_bytes, part, first_row, strip.shape[0], strip)
    return weights


def multiply(x: Tensor, part_bytes: Tensor, part: Part) -> Tensor:
    """Return x · Wᵀ, f32 [T, rows], of x f32 [T, cols] in float, a strip of expanded rows at a time; raise BadPart."""
    check_part(part_bytes, part)
    y = torch.empty(x.shape[0], part.rows)
    strip_rows = max(PANEL_ROWS, _STRIP_NELEMENTS // part.cols // PANEL_ROWS * PANEL_ROWS)
    for first_row in range(0, part.rows, strip_rows):
        n_rows = min(strip_rows, part.rows - first_row)
        weights = torch.empty(n_rows, part.cols)
        dequantize_rows(part_bytes, part, first_row, n_rows, weights)
        y[:, first_row : first_row + n_rows] = x @ weights.t()
    return y


def dequantize_rows(part_bytes: Tensor, part: Part, first_row: int, n_rows: int, out: Tensor) -> None:
    """Write the weights of a range of rows into out, f32 [n_rows, cols]; raise BadShape if the part has no such rows.

    The caller has checked the part's bytes: this runs once a strip.
    """
    check_rows(part, first_row, n_rows)
    scheme = scheme_named(part.scheme)
    if n_rows == 0:
        return
    if scheme.is_quantized:
        _dequantize_panels(part_bytes, part, scheme, first_row, out)
    else:
        dtype = torch.bfloat16 if scheme == BF16 else torch.float16
        out.copy_(part_bytes.view(dtype).view(part.rows, part.cols)[first_row : first_row + n_rows])


def _dequantize_panels(part_bytes: Tensor, part: Part, scheme: Scheme, first_row: int, out: Tensor) -> None:
    last_row = first_row + out.shape[0]
    plan = panel_plan(part.rows, part.cols, scheme)
    first_panel = first_row // PANEL_ROWS
    panels = panels_of(part_bytes, plan)[first_panel : -(-last_row // PANEL_ROWS)]
    wanted = slice(first_row - first_panel * PANEL_ROWS, last_row - first_panel * PANEL_ROWS)
    codes, scales, bases = (plane[wanted].float() for plane in unpack_panels(panels, scheme, plan))
    scale_step, base_min, base_step = (
        plane[first_row:last_row, None] for plane in row_planes(part_bytes, plan, part.rows)
    )
    base = base_min + base_step * bases  # [n, K/g]
    weights = out.view(*base.shape, -1)  # [n, K/g, g]
    torch.sub(codes.view_as(weights), scheme.center, out=weights)
    weights.mul_(scales[:, :, None]).add_(base[:, :, None]).mul_(scale_step[:, :, None])
