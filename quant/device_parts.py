"""Parts and experts that lie in a device's memory, checked once, as products take them. Knows no arithmetic.

Whoever makes one keeps the memory alive and unchanged: a slot of the expert cache is wrapped once, and what it holds is
the cache's to know. Nobody blocks in here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from protocol.layout import Part, PartSpan, panel_plan
from protocol.schemes import Scheme, scheme_named
from quant.errors import BadPart, BadShape
from quant.part_bytes import check_part

# Kernels read this much at once; inside a part the layout sees to it, so the part has to start at a multiple.
LOAD_NBYTES = 16

_GATE, _DOWN, _UP = "w1", "w2", "w3"


class PartOnDevice(NamedTuple):
    """A part as kernels take it: its bytes, its shape, and where its planes lie. 16-bit parts have no planes."""

    part_bytes: Tensor
    rows: int
    cols: int
    row_plane_nbytes: int
    panel_nbytes: int


class DevicePart:
    """One part where it lies."""

    def __init__(self, part: Part, part_bytes: Tensor) -> None:
        """Check the bytes' type, length and alignment; raise BadPart or LayoutError."""
        check_part(part_bytes, part)
        if part_bytes.data_ptr() % LOAD_NBYTES:
            raise BadPart(f"{part.name}: its bytes do not start at a multiple of {LOAD_NBYTES}")
        self.part = part
        self.part_bytes = part_bytes
        self.scheme: Scheme = scheme_named(part.scheme)
        self.on_device = _on_device(part, self.scheme, part_bytes)


class DeviceExpert:
    """The three matrices of one expert's record where it lies: w1 (gate) and w3 (up) [I, H], w2 (down) [H, I]."""

    def __init__(self, record: Tensor, spans: tuple[PartSpan, ...]) -> None:
        """Check the record's parts; raise BadPart, BadShape or LayoutError."""
        parts = {span.part.name: DevicePart(span.part, _bytes_of(record, span)) for span in spans}
        if set(parts) != {_GATE, _DOWN, _UP} or len(spans) != len(parts):
            raise BadShape(f"an expert has the parts w1, w2 and w3; {', '.join(span.part.name for span in spans)} came")
        self.gate, self.up, self.down = parts[_GATE], parts[_UP], parts[_DOWN]
        gate, up, down = self.gate.part, self.up.part, self.down.part
        if (gate.rows, gate.cols) != (up.rows, up.cols) or (gate.rows, gate.cols) != (down.cols, down.rows):
            came = ", ".join(f"{part.name} [{part.rows}, {part.cols}]" for part in (gate, up, down))
            raise BadShape(f"w1 and w3 [I, H] and w2 [H, I] are expected, {came} came")


def check_product(x: Tensor, part: Part, out: Tensor | None, dtype: torch.dtype) -> None:
    """Raise BadShape unless x [T, cols] and out, f32 [T, rows], fit the part, with rows that are whole."""
    if x.dim() != 2 or x.shape[1] != part.cols or x.dtype != dtype or x.stride(1) != 1:
        raise BadShape(f"{part.name}: {dtype} [T, {part.cols}] is expected, {x.dtype} {list(x.shape)} came")
    if out is None:
        return
    if out.shape != (x.shape[0], part.rows) or out.dtype != torch.float32 or out.stride(1) != 1:
        expected = f"torch.float32 [{x.shape[0]}, {part.rows}]"
        raise BadShape(f"{part.name}: the result is {expected}, {out.dtype} {list(out.shape)} came for it")


def _bytes_of(record: Tensor, span: PartSpan) -> Tensor:
    return record[span.offset : span.offset + span.nbytes]


def _on_device(part: Part, scheme: Scheme, part_bytes: Tensor) -> PartOnDevice:
    if not scheme.is_quantized:
        return PartOnDevice(part_bytes, part.rows, part.cols, 0, 0)
    plan = panel_plan(part.rows, part.cols, scheme)
    # Kernels count planes from one length: equal planes one after another, then the panels.
    planes = (plan.scale_step_offset, plan.base_min_offset, plan.base_step_offset, plan.panels_offset)
    if planes != tuple(place * plan.base_min_offset for place in range(4)):
        raise BadPart(f"{part.name}: planes at 0, n, 2n, 3n are expected, {planes} came")
    return PartOnDevice(part_bytes, part.rows, part.cols, plan.base_min_offset, plan.panel_nbytes)
