"""A matrix product straight from the bytes of a part: y = x · Wᵀ without ever holding W expanded.

Letters: T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import BF16, scheme_named
from quant import kernels
from quant.errors import BadPart, BadShape
from quant.workspace import Workspace


class Linear:
    """The matrix [rows, cols] of one part, as something to multiply with or to look rows up in.

    `exact` multiplies with the activations as they are; without it they are rounded to int8, 64 at a time, for
    quantized parts: 0.8 % of the product, and several times as fast.
    """

    def __init__(
        self, part: Part, part_bytes: Tensor, *, workspace: Workspace | None = None, exact: bool = False
    ) -> None:
        self.part = part
        self.part_bytes = part_bytes
        self.workspace = workspace or Workspace()
        self.exact = exact
        self._product = kernels.Product([(part, part_bytes)], workspace=self.workspace, exact=exact)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ, f32 [T, rows], of x f32 [T, cols]; raise BadShape."""
        return self._product(x)[0]

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
        kernels.dequantize_rows(self.part_bytes, self.part, 0, 1, row)
        return row[0]

    def _stored_16bit(self) -> Tensor:
        scheme = scheme_named(self.part.scheme)
        if scheme.is_quantized:
            raise BadPart(f"{self.part.name}: rows are looked up in 16-bit parts only, this one is {scheme.name}")
        dtype = torch.bfloat16 if scheme == BF16 else torch.float16
        return self.part_bytes.view(dtype).view(self.part.rows, self.part.cols)


class LinearGroup:
    """Matrices that are multiplied with the same activations: one call, which rounds them once."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        """Keep the matrices, which share a workspace; raise BadShape if they have different numbers of inputs."""
        first = linears[0]
        parts = [(linear.part, linear.part_bytes) for linear in linears]
        self._product = kernels.Product(parts, workspace=first.workspace, exact=first.exact)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return x · Wᵀ for each matrix, f32 [T, rows], of x f32 [T, cols]; raise BadShape."""
        return self._product(x)
