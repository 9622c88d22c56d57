"""A matrix product straight from the bytes of a part: y = x · Wᵀ without ever holding W expanded.

Rows are expanded a strip at a time into scratch memory that stays in the cache, and multiplied from there. With the C
library and few tokens no weight leaves the registers at all. The part's bytes are only read.

Threads are the workspace's; torch's own are expected to be off (torch.set_num_threads(1)): they spin while they wait,
which costs several times the work as soon as another process wants the cores.

Letters: T tokens.
"""

import torch
from torch import Tensor

from protocol.layout import PANEL_ROWS, Part
from protocol.schemes import BF16, scheme_named
from quant import kernels
from quant.errors import BadPart, BadShape
from quant.part_bytes import check_part
from quant.workspace import Workspace

# 1 MB of scratch a thread: a strip is written, then read by the product, and should not go to memory in between.
_STRIP_NELEMENTS = 1 << 18


class Linear:
    """The matrix [rows, cols] of one part, as something to multiply with or to look rows up in."""

    def __init__(self, part: Part, part_bytes: Tensor, *, workspace: Workspace | None = None) -> None:
        check_part(part_bytes, part)
        self.part = part
        self._bytes = part_bytes
        self._workspace = workspace or Workspace()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ, f32 [T, rows], of x f32 [T, cols]; raise BadShape.

        A token's result depends on the other tokens by rounding alone: 1e-5 of its range.
        """
        part = self.part
        if x.dim() != 2 or x.shape[1] != part.cols or x.dtype != torch.float32:
            raise BadShape(f"{part.name}: float32 [T, {part.cols}] is expected, {x.dtype} {list(x.shape)} came")
        y = torch.empty(x.shape[0], part.rows)
        if kernels.multiplies(n_tokens=x.shape[0]):
            self._multiply_fused(x.contiguous(), y)
        else:
            self._multiply_by_strips(x, y)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of these ids, f32 [T, cols], of a 16-bit part; ids int64 [T]. Raise BadPart, BadShape."""
        stored = self._stored_16bit()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.part.rows:
            raise BadShape(f"{self.part.name}: ids are expected from 0 to {self.part.rows - 1}")
        return stored[ids].float()

    def vector(self) -> Tensor:
        """Return the one row, f32 [cols], of a part that has one; raise BadShape."""
        if self.part.rows != 1:
            raise BadShape(f"{self.part.name}: one row is expected, the part has {self.part.rows}")
        row = torch.empty(1, self.part.cols)
        kernels.dequantize_rows(self._bytes, self.part, 0, 1, row)
        return row[0]

    def _multiply_fused(self, x: Tensor, y: Tensor) -> None:
        part = self.part

        def work(first_panel: int, n_panels: int) -> None:
            first_row = first_panel * PANEL_ROWS
            n_rows = min(n_panels * PANEL_ROWS, part.rows - first_row)
            kernels.multiply_rows(x, self._bytes, part, first_row, n_rows, y=y)

        self._workspace.split(-(-part.rows // PANEL_ROWS), PANEL_ROWS * part.cols, work)

    def _multiply_by_strips(self, x: Tensor, y: Tensor) -> None:
        # Strips are the same whatever the number of threads, so the bits are too.
        part = self.part
        strip_rows = min(part.rows, max(1, _STRIP_NELEMENTS // (part.cols * PANEL_ROWS)) * PANEL_ROWS)

        def work(first_strip: int, n_strips: int) -> None:
            for strip in range(first_strip, first_strip + n_strips):
                first_row = strip * strip_rows
                n_rows = min(strip_rows, part.rows - first_row)
                weights = self._workspace.matrix(n_rows, part.cols)
                kernels.dequantize_rows(self._bytes, part, first_row, n_rows, weights)
                torch.mm(x, weights.t(), out=y[:, first_row : first_row + n_rows])

        self._workspace.split(-(-part.rows // strip_rows), strip_rows * part.cols, work)

    def _stored_16bit(self) -> Tensor:
        scheme = scheme_named(self.part.scheme)
        if scheme.is_quantized:
            raise BadPart(f"{self.part.name}: rows are looked up in 16-bit parts only, this one is {scheme.name}")
        dtype = torch.bfloat16 if scheme == BF16 else torch.float16
        return self._bytes.view(dtype).view(self.part.rows, self.part.cols)
