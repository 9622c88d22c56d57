"""The door to the C library: unpacks rows, multiplies with rows. Without the library torch does the same, slower.

The library is built when the package is installed with a C compiler; it lies in this package's directory (in an
editable install, in the directory of the installed one, which is on the package's path too). Its calls release the
interpreter's lock, so that threads may split the rows of a matrix. It never writes but to the output it is given.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

import quant
from protocol.layout import Part
from quant import reference
from quant.errors import BadPart, BadShape, QuantError, StaleLibrary
from quant.part_bytes import check_part, check_rows

LIBRARY_FILE = "libexpertd_kernels.so"

# Changes with the signatures or the meaning of anything the library exports.
_ABI_VERSION = 1

# From here on expanding strips for torch's matrix product is faster than multiplying while unpacking.
_FUSED_TOKENS_MAX = 16

_OK = 0

_FORMATS = {"bf16": 0, "fp16": 1, "8bit-g64": 2, "4bit-g64": 3, "3bit-g64": 4, "2bit-g16": 5}

_REASONS = {
    1: "the format is not known",
    2: "the shape cannot be stored in this format",
    3: "a length is not what the shape needs",
    4: "an address is not a multiple of 4",
    5: "the part has no such rows",
}


class _CPart(ctypes.Structure):
    """struct expertd_part of csrc/api.h."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("nbytes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("format", ctypes.c_int64),
    )


def has_c_library() -> bool:
    """Whether the C library is there; raise StaleLibrary if it is one of another version."""
    return _library() is not None


def multiplies(*, n_tokens: int) -> bool:
    """Whether multiply_rows is to be used for that many tokens: the library is there and expanding is not faster."""
    return n_tokens <= _FUSED_TOKENS_MAX and has_c_library()


def dequantize_rows(part_bytes: Tensor, part: Part, first_row: int, n_rows: int, out: Tensor) -> None:
    """Write the weights of a range of rows into out, f32 [n_rows, cols]; raise BadPart or BadShape.

    Bit for bit what reference.dequantize_rows writes, with the library and without.
    """
    check_part(part_bytes, part)
    check_rows(part, first_row, n_rows)
    _check_floats("out", out, (n_rows, part.cols))
    library = _library()
    if library is None:
        reference.dequantize_rows(part_bytes, part, first_row, n_rows, out)
        return
    if n_rows == 0:
        return  # an empty tensor has no address
    c_part = _c_part(part_bytes, part)
    status = library.expertd_dequantize_rows(ctypes.byref(c_part), first_row, n_rows, out.data_ptr(), out.numel())
    _check_status(status, part)


def multiply_rows(x: Tensor, part_bytes: Tensor, part: Part, first_row: int, n_rows: int, *, y: Tensor) -> None:
    """Write x · Wᵀ for a range of W's rows into those columns of y, f32 [T, rows]; x is f32 [T, cols].

    Needs the library. Sums are added in an order that depends on cols and scheme alone: neither the range of rows nor
    the other tokens change a bit. Raise BadPart or BadShape.
    """
    check_part(part_bytes, part)
    check_rows(part, first_row, n_rows)
    _check_floats("x", x, (x.shape[0], part.cols))
    _check_floats("y", y, (x.shape[0], part.rows))
    library = _library()
    if library is None:
        raise QuantError("multiply_rows needs the C library, which was not built")
    if x.shape[0] == 0:
        return  # an empty tensor has no address
    c_part = _c_part(part_bytes, part)
    status = library.expertd_multiply_rows(
        ctypes.byref(c_part), first_row, n_rows, x.data_ptr(), x.numel(), x.shape[0], y.data_ptr(), y.numel()
    )
    _check_status(status, part)


# A process loads a library once whoever asks; this remembers that it did, and what it found.
@functools.cache
def _library() -> ctypes.CDLL | None:
    for folder in quant.__path__:
        path = Path(folder) / LIBRARY_FILE
        if path.is_file():
            return _load(path)
    return None


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    version = library.expertd_abi_version()
    if version != _ABI_VERSION:
        raise StaleLibrary(f"{path}: version {version}, this code needs {_ABI_VERSION}; install the package again")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.expertd_dequantize_rows.argtypes = (ctypes.POINTER(_CPart), count, count, pointer, count)
    library.expertd_multiply_rows.argtypes = (
        ctypes.POINTER(_CPart), count, count, pointer, count, count, pointer, count,
    )  # fmt: skip
    return library


def _c_part(part_bytes: Tensor, part: Part) -> _CPart:
    return _CPart(part_bytes.data_ptr(), part_bytes.numel(), part.rows, part.cols, _FORMATS[part.scheme])


def _check_floats(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
        raise BadShape(
            f"{name}: contiguous float32 {list(shape)} is expected, {tensor.dtype} {list(tensor.shape)} came"
        )


def _check_status(status: int, part: Part) -> None:
    if status != _OK:
        raise BadPart(f"{part.name}: {_REASONS.get(status, f'status {status}')}")
