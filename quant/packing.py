"""A quantized matrix as numbers and as the bytes of a part of layout r8, exact both ways. Knows no solver.

`protocol.layout` is the authority on where each byte lies. Packing goes through the matrix in strips of panels, so
that what is allocated besides the result stays a few MB however large the matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from protocol.layout import BLOCK_COLS, PANEL_ROWS, STRIPE_METADATA_NBYTES, PanelPlan, Part, panel_plan
from protocol.schemes import Scheme
from quant.errors import BadPart, BadShape
from quant.panel_codes import deinterleave, interleave
from quant.part_bytes import check_part

_STRIP_NELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix [N, K] of codes with an 8-bit second level; g is the scheme's group_size.

    w[n, k] = scale_step[n] * (scale_codes[n, k // g] * (codes[n, k] - center) + base), with the scheme's center and
    base = base_min[n] + base_step[n] * base_codes[n, k // g].
    """

    scheme: Scheme
    codes: Tensor  # u8 [N, K]
    scale_codes: Tensor  # u8 [N, K/g]
    base_codes: Tensor  # u8 [N, K/g]
    scale_step: Tensor  # f32 [N]
    base_min: Tensor  # f32 [N]
    base_step: Tensor  # f32 [N]


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
        scales, bases = (_by_panel(plane[strip], plan) for plane in (matrix.scale_codes, matrix.base_codes))
        metadata = torch.stack((scales, bases), dim=2).flatten(2)  # [P, B, bytes of a block]
        codes = interleave(_whole_panels(matrix.codes[strip]), matrix.scheme.nbits)
        panels[first:last, : plan.filled_nbytes] = _striped(metadata, codes, plan)
    return part_bytes


def joined(strips: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Return the matrix that those strips of rows are."""

    def rows(plane: str) -> Tensor:
        return torch.cat([getattr(strip, plane) for strip in strips])

    names = (field.name for field in fields(QuantizedMatrix) if field.name != "scheme")
    return QuantizedMatrix(strips[0].scheme, *map(rows, names))


def unpack(part_bytes: Tensor, rows: int, cols: int, scheme: Scheme) -> QuantizedMatrix:
    """Return the matrix [rows, cols] in the bytes of a part; raise BadPart or LayoutError. The inverse of pack."""
    if scheme.group_size is None:
        raise BadPart(f"scheme {scheme.name} holds no codes")
    check_part(part_bytes, Part("matrix", rows, cols, scheme.name))
    plan = panel_plan(rows, cols, scheme)
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scale_codes = torch.empty(rows, cols // scheme.group_size, dtype=torch.uint8)
    base_codes = torch.empty_like(scale_codes)
    panels = panels_of(part_bytes, plan)
    for first, last in panel_strips(plan):
        strip = slice(first * PANEL_ROWS, min(rows, last * PANEL_ROWS))
        n_rows = strip.stop - strip.start
        contents = unpack_panels(panels[first:last], scheme, plan)
        codes[strip], scale_codes[strip], base_codes[strip] = (plane[:n_rows] for plane in contents)
    scale_step, base_min, base_step = (plane.clone() for plane in row_planes(part_bytes, plan, rows))
    return QuantizedMatrix(scheme, codes, scale_codes, base_codes, scale_step, base_min, base_step)


def row_planes(part_bytes: Tensor, plan: PanelPlan, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale_step, base_min and base_step, each f32 [rows], as views of the part's bytes."""
    offsets = (plan.scale_step_offset, plan.base_min_offset, plan.base_step_offset)
    scale_step, base_min, base_step = (part_bytes[at : at + 4 * rows].view(torch.float32) for at in offsets)
    return scale_step, base_min, base_step


def panels_of(part_bytes: Tensor, plan: PanelPlan) -> Tensor:
    """Return the panels, u8 [P, panel_nbytes], as a view of the part's bytes."""
    return part_bytes[plan.panels_offset :].view(plan.n_panels, plan.panel_nbytes)


def unpack_panels(panels: Tensor, scheme: Scheme, plan: PanelPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [P * 8, K], scale codes and base codes [P * 8, K/g], all u8, of panels u8 [P, panel_nbytes]."""
    n_panels, n_padding = panels.shape[0], plan.n_stripes * plan.stripe_nbytes - plan.panel_nbytes
    stripes = pad(panels, (0, n_padding)).view(n_panels, plan.n_stripes, plan.stripe_nbytes)
    metadata, codes = stripes[..., :STRIPE_METADATA_NBYTES], stripes[..., STRIPE_METADATA_NBYTES:]
    blocks = metadata.reshape(n_panels, -1, 2, PANEL_ROWS, plan.groups_per_block)[:, : plan.n_blocks]
    scales, bases = blocks.permute(2, 0, 3, 1, 4).reshape(2, n_panels * PANEL_ROWS, -1)
    planes = codes.reshape(n_panels, -1)[:, : plan.n_blocks * plan.block_nbytes].contiguous()
    return deinterleave(planes, plan.n_blocks * BLOCK_COLS, scheme.nbits), scales, bases


def panel_strips(plan: PanelPlan) -> Iterator[tuple[int, int]]:
    """Yield the (first, last + 1) panels of each strip."""
    per_strip = max(1, _STRIP_NELEMENTS // (PANEL_ROWS * BLOCK_COLS * plan.n_blocks))
    for first in range(0, plan.n_panels, per_strip):
        yield first, min(plan.n_panels, first + per_strip)


def _row_values(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    return matrix.scale_step, matrix.base_min, matrix.base_step


def _striped(metadata: Tensor, codes: Tensor, plan: PanelPlan) -> Tensor:
    """Return the panels' stripes, u8 [P, filled_nbytes], of metadata [P, B, n] and codes [P, B * block_nbytes]."""
    n_missing = plan.n_stripes * plan.blocks_per_stripe - plan.n_blocks
    metadata = pad(metadata, (0, 0, 0, n_missing)).view(-1, plan.n_stripes, STRIPE_METADATA_NBYTES)
    codes = pad(codes, (0, n_missing * plan.block_nbytes)).view(
        -1, plan.n_stripes, plan.stripe_nbytes - STRIPE_METADATA_NBYTES
    )
    # The codes of blocks that the last stripe does not have come last, and are cut off.
    return torch.cat((metadata, codes), dim=2).flatten(1)[:, : plan.filled_nbytes]


def _by_panel(group_codes: Tensor, plan: PanelPlan) -> Tensor:
    rows = _whole_panels(group_codes)
    return rows.view(-1, PANEL_ROWS, plan.n_blocks, plan.groups_per_block).permute(0, 2, 1, 3)  # [P, B, 8, groups]


def _whole_panels(rows: Tensor) -> Tensor:
    """Return the rows padded with zeros to whole panels, contiguous."""
    missing = -rows.shape[0] % PANEL_ROWS
    return pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()


def _check_matrix(matrix: QuantizedMatrix, part: Part) -> None:
    group_size = matrix.scheme.group_size
    if group_size is None:
        raise BadShape(f"scheme {matrix.scheme.name} holds no codes")
    groups = (part.rows, part.cols // group_size)
    expected = (
        ("codes", matrix.codes, (part.rows, part.cols), torch.uint8),
        ("scale_codes", matrix.scale_codes, groups, torch.uint8),
        ("base_codes", matrix.base_codes, groups, torch.uint8),
        ("scale_step", matrix.scale_step, (part.rows,), torch.float32),
        ("base_min", matrix.base_min, (part.rows,), torch.float32),
        ("base_step", matrix.base_step, (part.rows,), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype:
            raise BadShape(f"{name}: {dtype} {list(shape)} is expected, {tensor.dtype} {list(tensor.shape)} came")
    if matrix.scheme.nbits < 8 and int(matrix.codes.max()) >> matrix.scheme.nbits:
        raise BadShape(f"codes: the largest is {int(matrix.codes.max())}, {matrix.scheme.nbits} bits are expected")
