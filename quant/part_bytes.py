"""What the bytes of a part, and the floats beside them, must be before anybody computes on them. Knows no numbers.

Parts come from memory that other processes share, so they are checked where they enter and trusted afterwards; they
are never written to: a shared mapping is read-only, and a write into it ends the process.
"""

from torch import Tensor, float32, uint8

from protocol.layout import Part, part_nbytes
from quant.errors import BadPart, BadShape

# The planes of a part hold 32-bit values, which torch and the C kernels read in place.
_ALIGNMENT = 4


def check_part(part_bytes: Tensor, part: Part) -> None:
    """Raise BadPart unless part_bytes is a flat, aligned u8 tensor of the part's length; LayoutError likewise."""
    nbytes = part_nbytes(part)
    if part_bytes.dtype != uint8 or part_bytes.dim() != 1 or not part_bytes.is_contiguous():
        raise BadPart(
            f"{part.name}: a flat contiguous uint8 tensor is expected, "
            f"{part_bytes.dtype} of shape {list(part_bytes.shape)} came"
        )
    if part_bytes.numel() != nbytes:
        raise BadPart(f"{part.name}: {nbytes} bytes are expected, {part_bytes.numel()} came")
    if part_bytes.data_ptr() % _ALIGNMENT or part_bytes.storage_offset() % _ALIGNMENT:
        raise BadPart(f"{part.name}: its bytes do not start at a multiple of {_ALIGNMENT}")


def check_rows(part: Part, first_row: int, n_rows: int) -> None:
    """Raise BadShape unless the part has that range of rows."""
    if first_row < 0 or n_rows < 0 or first_row + n_rows > part.rows:
        raise BadShape(f"{part.name}: rows {first_row} to {first_row + n_rows} of {part.rows} were asked for")


def check_floats(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise BadShape unless the tensor is contiguous f32 of that shape; the library trusts lengths."""
    if tensor.dtype is not float32 or tensor.shape != shape or not tensor.is_contiguous():
        raise BadShape(
            f"{name}: contiguous float32 {list(shape)} is expected, {tensor.dtype} {list(tensor.shape)} came"
        )
