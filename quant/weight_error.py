"""What storing a weight cost: measured on the bytes that are stored, by what computes with them. Knows no solver."""

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.layout import Part
from quant.kernels import dequantize_rows

_STRIP_NELEMENTS = 1 << 20


@dataclass(slots=True)
class WeightLoss:
    """The error ||w - ŵ|| / ||w|| of a weight that comes in pieces of rows: w what it was, ŵ what its bytes hold."""

    lost: float = 0.0
    total: float = 0.0

    @property
    def error(self) -> float:
        """The error so far, to five digits; 0 where both are zeros, of zeros that are not stored as such ||ŵ||."""
        # A tie in the last bits of a sum would be another digest of the store.
        return float(f"{(self.lost / (self.total or 1.0)) ** 0.5:.4e}")

    def add(self, weight: Tensor, part: Part, part_bytes: Tensor) -> None:
        """Take a piece [rows, cols] of any float type, and its part; raise BadPart."""
        strip_rows = max(1, _STRIP_NELEMENTS // part.cols)
        for first in range(0, part.rows, strip_rows):
            strip = weight[first : first + strip_rows].float()
            stored = torch.empty(strip.shape)
            dequantize_rows(part_bytes, part, first, strip.shape[0], stored)
            self.lost += _square(stored.sub_(strip))
            self.total += _square(strip)


def weight_error(weight: Tensor, part: Part, part_bytes: Tensor) -> float:
    """Return the error of a whole weight [rows, cols]; raise BadPart."""
    loss = WeightLoss()
    loss.add(weight, part, part_bytes)
    return loss.error


def _square(values: Tensor) -> float:
    """Return the sum of squares; in float64, as the largest weights' squares leave float32."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
