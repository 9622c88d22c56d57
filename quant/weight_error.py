"""What storing a weight cost: measured on the bytes that are stored, by what computes with them. Knows no solver."""

import torch
from torch import Tensor

from protocol.layout import Part
from quant.kernels import dequantize_rows

_STRIP_NELEMENTS = 1 << 20


def weight_error(weight: Tensor, part: Part, part_bytes: Tensor) -> float:
    """Return ||w - ŵ|| / ||w|| to five digits, w the weight [rows, cols] of any float type, ŵ what the bytes hold.

    0 where both are zeros; of a matrix of zeros that is not stored as such, ||ŵ||. Raise BadPart.
    """
    strip_rows = max(1, _STRIP_NELEMENTS // part.cols)
    lost = total = 0.0
    for first in range(0, part.rows, strip_rows):
        strip = weight[first : first + strip_rows].float()
        stored = torch.empty(strip.shape)
        dequantize_rows(part_bytes, part, first, strip.shape[0], stored)
        lost += _square(stored.sub_(strip))
        total += _square(strip)
    # A tie in the last bits of a sum would be another digest of the store.
    return float(f"{(lost / (total or 1.0)) ** 0.5:.4e}")


def _square(values: Tensor) -> float:
    """Return the sum of squares; in float64, as the largest weights' squares leave float32."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
