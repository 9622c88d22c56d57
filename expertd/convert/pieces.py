"""A matrix of a checkpoint as the bytes of its part, a piece of rows at a time: what is held does not grow with it.

A quantized matrix is solved whole if it has no more weights than memory.QUANTIZED_NELEMENTS_MAX, as those of experts in
every known model have; of a larger one (an output head of many tokens) each piece by itself. How long pieces are no
machine and no option changes: it shows in the bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertd.convert.errors import EncodeFailed
from expertd.convert.matrices import SourceMatrix, strips
from expertd.convert.memory import QUANTIZED_NELEMENTS_MAX, SIXTEEN_BIT_NELEMENTS_MAX
from protocol.errors import LayoutError
from protocol.layout import PANEL_ROWS, PanelPlan, Part, panel_plan, part_nbytes
from protocol.schemes import BF16, FP16, scheme_named
from quant.encode import encode_part
from quant.errors import QuantError
from quant.weight_error import WeightLoss

_DATA_NBYTES = 4 << 20
# From here on the half step between fp16's least numbers is less, beside the largest weight, than bf16's rounding.
_FP16_LARGEST_LEAST = 2.0**-16


@dataclass(frozen=True, slots=True)
class PlacedBytes:
    """Some of a part's bytes, and where they belong in it."""

    offset: int
    data: bytearray


class EncodedMatrix:
    """One matrix on its way into a store. `part` has the scheme that its weights allow."""

    def __init__(
        self, matrix: SourceMatrix, planned: Part, *, solver: str, refine: bool, n_elements_max: int | None = None
    ) -> None:
        """Raise CheckpointError or NotFinite; `n_elements_max` None is what memory says of a piece."""
        self.part = _fitting_part(matrix, planned)
        self._matrix, self._solver, self._refine = matrix, solver, refine
        is_quantized = scheme_named(planned.scheme).is_quantized
        if n_elements_max is None:
            n_elements_max = QUANTIZED_NELEMENTS_MAX if is_quantized else SIXTEEN_BIT_NELEMENTS_MAX
        n_rows = max(PANEL_ROWS, n_elements_max // planned.cols // PANEL_ROWS * PANEL_ROWS)
        self._pieces = [(first, min(n_rows, planned.rows - first)) for first in range(0, planned.rows, n_rows)]
        self._plan = panel_plan(planned.rows, planned.cols, scheme_named(planned.scheme)) if is_quantized else None
        self._loss = WeightLoss()

    @property
    def is_in_order(self) -> bool:
        """Whether the bytes come as they lie in the part, without a gap."""
        return self._plan is None or len(self._pieces) == 1

    @property
    def weight_error(self) -> float:
        """What the bytes that have come lost of their weights."""
        return self._loss.error

    def bytes(self, hub_name: str) -> Iterator[PlacedBytes]:
        """Yield all bytes, the part's last ones last; raise CheckpointError, or EncodeFailed naming the tensor."""
        if self._plan is not None and not self.is_in_order:
            yield PlacedBytes(0, bytearray(self._plan.panels_offset))  # there are zeros between planes
        for first, n in self._pieces:
            weight = self._matrix.rows(first, n)
            part = replace(self.part, rows=n)
            try:
                encoded = encode_part(weight, part, solver=self._solver, refine=self._refine)
            except (QuantError, LayoutError) as error:
                raise EncodeFailed(f"{hub_name}: {error}") from None
            self._loss.add(weight, part, encoded)
            del weight
            for offset, data in self._placed(part, encoded, first):
                yield from _in_bytes(offset, data)

    def _placed(self, part: Part, encoded: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
        """Yield a piece's bytes, u8, with their places in the whole part."""
        if self._plan is None:
            yield first * (part_nbytes(part) // part.rows), encoded
        elif self.is_in_order:
            yield 0, encoded
        else:
            yield from _planes(encoded, panel_plan(part.rows, part.cols, scheme_named(part.scheme)), self._plan, first)


def _planes(encoded: Tensor, piece: PanelPlan, whole: PanelPlan, first: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the planes and the panels of a piece, with their places in the whole."""
    row_nbytes = 4 * PANEL_ROWS * piece.n_panels
    for offset, place in (
        (piece.scale_step_offset, whole.scale_step_offset),
        (piece.base_min_offset, whole.base_min_offset),
        (piece.base_step_offset, whole.base_step_offset),
    ):
        yield place + 4 * first, encoded[offset : offset + row_nbytes]
    yield whole.panels_offset + first // PANEL_ROWS * whole.panel_nbytes, encoded[piece.panels_offset :]


def _in_bytes(offset: int, data: Tensor) -> Iterator[PlacedBytes]:
    for piece in strips(data, _DATA_NBYTES):
        copied = bytearray(piece.numel())
        torch.frombuffer(copied, dtype=torch.uint8)[:] = piece
        yield PlacedBytes(offset, copied)
        offset += len(copied)


def _fitting_part(matrix: SourceMatrix, planned: Part) -> Part:
    """Return the part with the scheme that holds the weights: bf16 for those that fp16 makes infinite, or nearly 0."""
    if planned.scheme == FP16.name and matrix.dtype == torch.float32:
        largest = matrix.largest()
        is_finite = bool(torch.tensor(largest).half().isfinite())
        if not is_finite or 0 < largest < _FP16_LARGEST_LEAST:
            return replace(planned, scheme=BF16.name)
    return planned
