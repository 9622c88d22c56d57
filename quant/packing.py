"""A quantized matrix as numbers and as the bytes of a part of layout r8, exact both ways. Knows no solver.

`protocol.layout` is the authority on where each byte lies. Packing goes through the matrix in strips of panels, so
that what is allocated besides the result stays a few MB however large the matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.layout import BLOCK_COLS, PANEL_ROWS, PanelPlan, Part, panel_plan
from protocol.schemes import Scheme
from quant.errors import BadPart, BadShape
from quant.panel_codes import deinterleave, interleave
from quant.part_bytes import check_part

_STRIP_NELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix [N, K] of codes with an 8-bit second level; g is the scheme's group_size.

    w[n, k] = (codes[n, k] - zero) * scale, with scale = scale_step[n] * scale_codes[n, k // g] and
    zero = zero_min[n] + zero_step[n] * zero_codes[n, k // g].
    """

    scheme: Scheme
    codes: Tensor  # u8 [N, K]
    scale_codes: Tensor  # u8 [N, K/g]
    zero_codes: Tensor  # u8 [N, K/g]
    scale_step: Tensor  # f32 [N]
    zero_min: Tensor  # f32 [N]
    zero_step: Tensor  # f32 [N]


def pack(matrix: QuantizedMatrix) -> Tensor:
    """Return the bytes of the part, u8 [part_nbytes]; raise BadShape or LayoutError if the tensors do not fit."""
    rows, cols = matrix.codes.shape
    part = Part("matrix", rows, cols, matrix.scheme.name)
    _check_matrix(matrix, part)
    plan = panel_plan(rows, cols, matrix.scheme)
    part_bytes = torch.zeros(plan.nbytes, dtype=torch.uint8)
    for plane, values in zip(row_planes(part_bytes, plan, rows), _row_values(matrix), strict=True):
        plane.copy_(values)
    panels = panels_of(part_bytes, plan)
    for first, last in panel_strips(plan):
        strip = slice(first * PANEL_ROWS, last * PANEL_ROWS)
        metadata = metadata_of(panels[first:last], plan)  # [P, B, 2, 8, groups]
        metadata[:, :, 0] = _by_panel(matrix.scale_codes[strip], plan)
        metadata[:, :, 1] = _by_panel(matrix.zero_codes[strip], plan)
        codes_of(panels[first:last], plan).copy_(interleave(_whole_panels(matrix.codes[strip]), matrix.scheme.nbits))
    return part_bytes


def unpack(part_bytes: Tensor, rows: int, cols: int, scheme: Scheme) -> QuantizedMatrix:
    """Return the matrix [rows, cols] in the bytes of a part; raise BadPart or LayoutError. The inverse of pack."""
    if scheme.group_size is None:
        raise BadPart(f"scheme {scheme.name} holds no codes")
    check_part(part_bytes, Part("matrix", rows, cols, scheme.name))
    plan = panel_plan(rows, cols, scheme)
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scale_codes = torch.empty(rows, cols // scheme.group_size, dtype=torch.uint8)
    zero_codes = torch.empty_like(scale_codes)
    panels = panels_of(part_bytes, plan)
    for first, last in panel_strips(plan):
        strip = slice(first * PANEL_ROWS, min(rows, last * PANEL_ROWS))
        n_rows = strip.stop - strip.start
        scales, zeros = unpack_metadata(panels[first:last], plan)
        scale_codes[strip], zero_codes[strip] = scales[:n_rows], zeros[:n_rows]
        codes[strip] = deinterleave(codes_of(panels[first:last], plan), cols, scheme.nbits)[:n_rows]
    scale_step, zero_min, zero_step = (plane.clone() for plane in row_planes(part_bytes, plan, rows))
    return QuantizedMatrix(scheme, codes, scale_codes, zero_codes, scale_step, zero_min, zero_step)


def row_planes(part_bytes: Tensor, plan: PanelPlan, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale_step, zero_min and zero_step, each f32 [rows], as views of the part's bytes."""
    offsets = (plan.scale_step_offset, plan.zero_min_offset, plan.zero_step_offset)
    scale_step, zero_min, zero_step = (part_bytes[at : at + 4 * rows].view(torch.float32) for at in offsets)
    return scale_step, zero_min, zero_step


def panels_of(part_bytes: Tensor, plan: PanelPlan) -> Tensor:
    """Return the panels, u8 [P, panel_nbytes], as a view of the part's bytes."""
    return part_bytes[plan.panels_offset :].view(plan.n_panels, plan.panel_nbytes)


def codes_of(panels: Tensor, plan: PanelPlan) -> Tensor:
    """Return the codes planes, u8 [P, codes_nbytes], as a view of the panels."""
    return panels[:, plan.codes_offset : plan.codes_offset + plan.codes_nbytes]


def metadata_of(panels: Tensor, plan: PanelPlan) -> Tensor:
    """Return the metadata planes, u8 [P, B, 2, 8, groups per block], as a view: [:, :, 0] scales, [:, :, 1] zeros."""
    shape = (panels.shape[0], plan.n_blocks, 2, PANEL_ROWS, plan.groups_per_block)
    return panels[:, : plan.metadata_nbytes].view(shape)


def unpack_metadata(panels: Tensor, plan: PanelPlan) -> tuple[Tensor, Tensor]:
    """Return scale codes and zero codes of the panels, each u8 [P * 8, K/g]."""
    by_row = metadata_of(panels, plan).permute(2, 0, 3, 1, 4)  # [2, P, 8, B, groups]
    scales, zeros = by_row.reshape(2, panels.shape[0] * PANEL_ROWS, -1)
    return scales, zeros


def panel_strips(plan: PanelPlan) -> Iterator[tuple[int, int]]:
    """Yield the (first, last + 1) panels of each strip."""
    per_strip = max(1, _STRIP_NELEMENTS // (PANEL_ROWS * BLOCK_COLS * plan.n_blocks))
    for first in range(0, plan.n_panels, per_strip):
        yield first, min(plan.n_panels, first + per_strip)


def _row_values(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    return matrix.scale_step, matrix.zero_min, matrix.zero_step


def _by_panel(group_codes: Tensor, plan: PanelPlan) -> Tensor:
    rows = _whole_panels(group_codes)
    return rows.view(-1, PANEL_ROWS, plan.n_blocks, plan.groups_per_block).permute(0, 2, 1, 3)  # [P, B, 8, groups]


def _whole_panels(rows: Tensor) -> Tensor:
    """Return the rows padded with zeros to whole panels, contiguous."""
    missing = -rows.shape[0] % PANEL_ROWS
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()


def _check_matrix(matrix: QuantizedMatrix, part: Part) -> None:
    group_size = matrix.scheme.group_size
    if group_size is None:
        raise BadShape(f"scheme {matrix.scheme.name} holds no codes")
    groups = (part.rows, part.cols // group_size)
    expected = (
        ("codes", matrix.codes, (part.rows, part.cols), torch.uint8),
        ("scale_codes", matrix.scale_codes, groups, torch.uint8),
        ("zero_codes", matrix.zero_codes, groups, torch.uint8),
        ("scale_step", matrix.scale_step, (part.rows,), torch.float32),
        ("zero_min", matrix.zero_min, (part.rows,), torch.float32),
        ("zero_step", matrix.zero_step, (part.rows,), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype:
            raise BadShape(f"{name}: {dtype} {list(shape)} is expected, {tensor.dtype} {list(tensor.shape)} came")
    if matrix.scheme.nbits < 8 and int(matrix.codes.max()) >> matrix.scheme.nbits:
        raise BadShape(f"codes: the largest is {int(matrix.codes.max())}, {matrix.scheme.nbits} bits are expected")
