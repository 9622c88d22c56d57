"""Products with parts and experts on any device by torch alone: expand a strip of rows to float32, multiply.

What computes where kernels cannot: slower, and as exact as the device's float32. Results are those of quant.reference
up to the order of additions. Work is queued on the device's current stream; nobody blocks.

Letters: T tokens, H hidden size, I intermediate size.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from protocol.layout import PANEL_ROWS
from quant import reference
from quant.device_parts import DeviceExpert, DevicePart, check_product

_STRIP_NELEMENTS = 1 << 22


class TorchProducts:
    """Products of 16-bit activations with parts, by torch. For one thread at a time."""

    name = "torch"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype

    def multiply(self, x: Tensor, part: DevicePart, out: Tensor) -> None:
        """Write x · Wᵀ into out, f32 [T, rows], of x [T, cols] in this dtype; raise BadShape."""
        check_product(x, part.part, out, self.dtype)
        self._multiply(x.float(), part, out)

    def expert(self, hidden_states: Tensor, expert: DeviceExpert, out: Tensor) -> None:
        """Write w2 · (silu(w1 x) * (w3 x)) into out, f32 [T, H], of hidden_states [T, H]; raise BadShape."""
        check_product(hidden_states, expert.gate.part, None, self.dtype)
        x = hidden_states.float()
        gate, up = (torch.empty(x.shape[0], expert.gate.part.rows, device=x.device) for _ in range(2))
        self._multiply(x, expert.gate, gate)
        self._multiply(x, expert.up, up)
        # Rounded as kernels round it, so that one device's two ways differ by no more than the order of additions.
        inner = silu(gate).mul_(up).to(self.dtype)  # [T, I]
        self.multiply(inner, expert.down, out)

    def workspace_nbytes(self, n_tokens: int, expert: DeviceExpert) -> int:
        """Return the most memory that a product of that expert takes besides what it is given."""
        part = expert.gate.part
        strip = max(_strip_rows(part.cols) * part.cols, _strip_rows(part.rows) * part.rows)
        # A strip in float32, and what unpacking it takes: codes as int32 words twice, as bytes and as float32. Then, of
        # all tokens: x and the last product, gate and up, inner in 16 bits and in float32.
        return strip * 16 + n_tokens * (part.cols * 8 + part.rows * 14)

    def _multiply(self, x: Tensor, part: DevicePart, out: Tensor) -> None:
        strip_rows = _strip_rows(part.part.cols)
        for first_row in range(0, part.part.rows, strip_rows):
            n_rows = min(strip_rows, part.part.rows - first_row)
            weights = torch.empty(n_rows, part.part.cols, device=x.device)
            reference.dequantize_rows(part.part_bytes, part.part, first_row, n_rows, weights)
            out[:, first_row : first_row + n_rows] = x @ weights.t()


def _strip_rows(cols: int) -> int:
    return max(PANEL_ROWS, _STRIP_NELEMENTS // cols // PANEL_ROWS * PANEL_ROWS)
