"""Products with parts and experts by the Triton kernels: which kernel for how many tokens, and how it is launched.

Up to 8 tokens a kernel multiplies with the bytes as they lie. For more, strips of rows are expanded to 16 bits in a
scratch of fixed size and multiplied by the device's library. 16-bit parts are matrices as they lie.

Owns the scratch. Work is queued on the current stream of the device; nobody blocks, but for the first launch of a
kernel, which compiles it: `warm_up` does that before anybody waits for a token.

Letters: T tokens, H hidden size, I intermediate size.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import silu

from protocol.layout import BLOCK_COLS, PANEL_ROWS, R8, Part, part_nbytes, record_nbytes, record_spans
from protocol.schemes import BF16
from quant.device_parts import LOAD_NBYTES, DeviceExpert, DevicePart, check_product
from quant.errors import BadShape
from quant.triton_codes import N_WARPS, UNITS, unit_cols_of
from quant.triton_dequantize import dequantize_kernel
from quant.triton_gemv import gate_up_kernel, multiply_kernel

GEMV_TOKENS_MAX = 8
KERNEL_TOKENS = (1, 2, 4)
SCRATCH_NBYTES = 32 << 20

# Operations are rounded one by one, or fused where a kernel says so: results do not depend on the compiler's choice.
# Nothing in the loops is staged by the compiler: it is many warps that hide the memory's latency, and 128 registers
# leave room for them.
OPTIONS = {"num_warps": N_WARPS, "num_stages": 1, "enable_fp_fusion": False, "maxnreg": 128}


class TritonProducts:
    """Products of fp16 or bf16 activations with parts, by kernels. For one thread and one stream at a time."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype, *, scratch_nbytes: int = SCRATCH_NBYTES) -> None:
        """Take the scratch, which strips of expanded rows are written to."""
        self.device = device
        self.dtype = dtype
        self._scratch = torch.empty(scratch_nbytes // 2, dtype=dtype, device=device)

    def multiply(self, x: Tensor, part: DevicePart, out: Tensor) -> None:
        """Write x · Wᵀ into out, f32 [T, rows], of x [T, cols] in this dtype; raise BadShape."""
        check_product(x, part.part, out, self.dtype)
        with self._on_device():
            self._multiply(x, part, out)

    def expert(self, hidden_states: Tensor, expert: DeviceExpert, out: Tensor) -> None:
        """Write w2 · (silu(w1 x) * (w3 x)) into out, f32 [T, H], of hidden_states [T, H]; raise BadShape.

        The inner values are rounded to this dtype. Up to 8 tokens a token's result does not depend on the others.
        """
        check_product(hidden_states, expert.gate.part, None, self.dtype)
        with self._on_device():
            inner = torch.empty(hidden_states.shape[0], expert.gate.part.rows, dtype=self.dtype, device=self.device)
            check_product(inner, expert.down.part, out, self.dtype)
            self._gate_up(hidden_states, expert, inner)
            self._multiply(inner, expert.down, out)

    def workspace_nbytes(self, n_tokens: int, expert: DeviceExpert) -> int:
        """Return the most memory that a product of that expert takes besides what it is given."""
        gate, down = expert.gate.part, expert.down.part
        # Of a strip, and of all rows where gate and up differ in scheme: both in float32, what silu makes of one, and
        # that in 16 bits.
        strip_rows = max(min(part.rows, self._strip_rows(part.cols)) for part in (gate, down))
        n_rows = gate.rows if n_tokens <= GEMV_TOKENS_MAX else strip_rows
        return self._scratch.nbytes + n_tokens * (gate.rows * 2 + n_rows * 14)

    def warm_up(self, schemes: Iterable[str], experts: Iterable[tuple[str, str, str]]) -> None:
        """Compile what parts of these schemes, and experts of (gate, up, down) schemes, need: by using it."""
        for scheme in schemes:
            self._use_part(Part("warm-up", PANEL_ROWS, BLOCK_COLS, scheme))
        for gate, up, down in experts:
            size = BLOCK_COLS
            self._use_expert((Part("w1", size, size, gate), Part("w3", size, size, up), Part("w2", size, size, down)))

    def _use_part(self, part: Part) -> None:
        part_bytes = torch.zeros(part_nbytes(part), dtype=torch.uint8, device=self.device)
        for n_tokens in (*KERNEL_TOKENS, GEMV_TOKENS_MAX + 1):
            x = torch.zeros(n_tokens, part.cols, dtype=self.dtype, device=self.device)
            self.multiply(x, DevicePart(part, part_bytes), torch.empty(n_tokens, part.rows, device=self.device))

    def _use_expert(self, parts: tuple[Part, Part, Part]) -> None:
        record = torch.zeros(record_nbytes(R8, parts), dtype=torch.uint8, device=self.device)
        expert = DeviceExpert(record, record_spans(R8, parts))
        for n_tokens in (*KERNEL_TOKENS, GEMV_TOKENS_MAX + 1):
            x = torch.zeros(n_tokens, BLOCK_COLS, dtype=self.dtype, device=self.device)
            self.expert(x, expert, torch.empty(n_tokens, BLOCK_COLS, device=self.device))

    def _multiply(self, x: Tensor, part: DevicePart, out: Tensor) -> None:
        n_tokens = x.shape[0]
        if self._is_for_gemv(x, n_tokens, part):
            tokens = kernel_tokens(n_tokens)
            arguments = (x, x.stride(0), out, out.stride(0), n_tokens, part.scheme.name, tokens)
            multiply_kernel[_grid(part.part, n_tokens, tokens)](*part.on_device, *arguments, **OPTIONS)
            return
        for first_row, n_rows in self._strips(part.part):
            out[:, first_row : first_row + n_rows] = _times(x, self._expanded(part, first_row, n_rows))

    def _gate_up(self, x: Tensor, expert: DeviceExpert, inner: Tensor) -> None:
        n_tokens, gate, up = x.shape[0], expert.gate, expert.up
        if self._is_for_gemv(x, n_tokens, gate) and self._is_for_gemv(x, n_tokens, up):
            self._gate_up_gemv(x, n_tokens, gate, up, inner)
            return
        for first_row, n_rows in self._strips(gate.part):
            # One after the other: both are expanded to the same scratch.
            gates = _times(x, self._expanded(gate, first_row, n_rows))
            ups = _times(x, self._expanded(up, first_row, n_rows))
            inner[:, first_row : first_row + n_rows] = silu(gates).mul_(ups)

    def _gate_up_gemv(self, x: Tensor, n_tokens: int, gate: DevicePart, up: DevicePart, inner: Tensor) -> None:
        if gate.scheme == up.scheme:
            tokens = kernel_tokens(n_tokens)
            arguments = (x, x.stride(0), inner, inner.stride(0), n_tokens, gate.scheme.name, tokens)
            grid = _grid(gate.part, n_tokens, tokens)
            gate_up_kernel[grid](gate.part_bytes, *up.on_device, *arguments, **OPTIONS)
            return
        gates, ups = (torch.empty(inner.shape, device=self.device) for _ in range(2))
        self._multiply(x, gate, gates)
        self._multiply(x, up, ups)
        inner.copy_(silu(gates).mul_(ups))

    def _is_for_gemv(self, x: Tensor, n_tokens: int, part: DevicePart) -> bool:
        """Whether the kernels that read parts as they lie can and should be used; raise BadShape."""
        if not 0 < n_tokens <= GEMV_TOKENS_MAX or not _has_whole_loads(part):
            return False
        if x.data_ptr() % LOAD_NBYTES or (n_tokens > 1 and x.stride(0) * x.itemsize % LOAD_NBYTES):
            raise BadShape(f"{part.part.name}: rows of activations have to start at multiples of {LOAD_NBYTES} bytes")
        return True

    def _expanded(self, part: DevicePart, first_row: int, n_rows: int) -> Tensor:
        """Return rows of the matrix in this dtype, [n_rows, cols], until the next call; first_row a multiple of 8."""
        cols = part.part.cols
        strip = self._scratch[: n_rows * cols].view(n_rows, cols)
        if part.scheme.is_quantized:
            n_tiles = -(-cols // (unit_cols_of(part.scheme.name) * UNITS.value))
            grid = (-(-n_rows // PANEL_ROWS) * n_tiles,)
            dequantize_kernel[grid](*part.on_device, first_row // PANEL_ROWS, strip, part.scheme.name, **OPTIONS)
            return strip
        stored = part.part_bytes.view(torch.bfloat16 if part.scheme == BF16 else torch.float16)
        rows = stored.view(part.part.rows, cols)[first_row : first_row + n_rows]
        return rows if rows.dtype == self.dtype else strip.copy_(rows)

    def _strips(self, part: Part) -> Iterable[tuple[int, int]]:
        strip_rows = self._strip_rows(part.cols)
        if not strip_rows:
            needed = PANEL_ROWS * part.cols * 2
            raise BadShape(f"{part.name}: {needed} bytes of scratch are needed, there are {self._scratch.nbytes}")
        return ((first, min(strip_rows, part.rows - first)) for first in range(0, part.rows, strip_rows))

    def _strip_rows(self, cols: int) -> int:
        return self._scratch.numel() // (cols * PANEL_ROWS) * PANEL_ROWS

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        # Kernels are launched on the current device, whatever their arguments lie on.
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def kernel_tokens(n_tokens: int) -> int:
    """Return how many tokens a program of the kernel computes that is used for that many."""
    return next((tokens for tokens in KERNEL_TOKENS if n_tokens <= tokens), KERNEL_TOKENS[-1])


def _grid(part: Part, n_tokens: int, tokens: int) -> tuple[int]:
    """Return the number of programs: a function of the shapes alone."""
    return (-(-part.rows // PANEL_ROWS) * -(-n_tokens // tokens),)


def _has_whole_loads(part: DevicePart) -> bool:
    """Whether every row starts where 16 bytes can be read at once; in panels they always can."""
    return part.scheme.is_quantized or part.part.cols * 2 % LOAD_NBYTES == 0


def _times(x: Tensor, weights: Tensor) -> Tensor:
    """Return x · Wᵀ, f32, of 16-bit matrices; sums are never rounded to 16 bits on the way."""
    if x.device.type == "cuda":
        return torch.mm(x, weights.t(), out_dtype=torch.float32)
    return x.float() @ weights.float().t()
