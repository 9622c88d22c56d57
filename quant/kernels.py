"""The door to the C library's work on parts: unpacks rows, multiplies. Without the library torch does the same, slower.

Its calls release the interpreter's lock. They read parts where they lie and write to nothing but the outputs.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.layout import Part
from quant import reference
from quant.errors import BadShape
from quant.library import check_status, library
from quant.part_bytes import check_floats, check_part, check_rows
from quant.workspace import Workspace

# The most products that one call shares its activations among, csrc/multiply.c.
PRODUCTS_MAX = 8

_FORMATS = {"bf16": 0, "fp16": 1, "8bit-g64": 2, "4bit-g64": 3, "3bit-g64": 4, "2bit-g16": 5}


class CPart(ctypes.Structure):
    """struct expertd_part of csrc/api.h."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("nbytes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("format", ctypes.c_int64),
    )


class _CProduct(ctypes.Structure):
    """struct expertd_product of csrc/api.h."""

    _fields_ = (("part", CPart), ("y", ctypes.c_void_p), ("y_length", ctypes.c_int64))


def c_part(part_bytes: Tensor, part: Part) -> CPart:
    """Return what the library takes for a part; whoever keeps it keeps the bytes. Raise BadPart."""
    check_part(part_bytes, part)
    return CPart(part_bytes.data_ptr(), part_bytes.numel(), part.rows, part.cols, _FORMATS[part.scheme])


def dequantize_rows(part_bytes: Tensor, part: Part, first_row: int, n_rows: int, out: Tensor) -> None:
    """Write the weights of a range of rows into out, f32 [n_rows, cols]; raise BadPart or BadShape.

    Bit for bit what reference.dequantize_rows writes, with the library and without.
    """
    functions = _functions()
    checked = c_part(part_bytes, part)
    check_rows(part, first_row, n_rows)
    check_floats("out", out, (n_rows, part.cols))
    if functions is None:
        reference.dequantize_rows(part_bytes, part, first_row, n_rows, out)
        return
    if n_rows == 0:
        return  # an empty tensor has no address
    status = functions.expertd_dequantize_rows(ctypes.byref(checked), first_row, n_rows, out.data_ptr(), out.numel())
    check_status(status, part.name)


class Product:
    """Several parts of the same number of inputs, to be multiplied with the same activations in one call.

    The activations are rounded to int8 once for all, unless the products are exact.
    """

    def __init__(self, parts: Sequence[tuple[Part, Tensor]], *, workspace: Workspace, exact: bool) -> None:
        """Keep the parts and their bytes; raise BadPart, or BadShape if the parts do not fit together."""
        self.parts = [part for part, _ in parts]
        self._bytes = [part_bytes for _, part_bytes in parts]
        self._workspace = workspace
        self._exact = exact
        self._cols = self.parts[0].cols
        if len(parts) > PRODUCTS_MAX or any(part.cols != self._cols for part in self.parts):
            came = ", ".join(f"{part.name} [{part.rows}, {part.cols}]" for part in self.parts)
            raise BadShape(f"at most {PRODUCTS_MAX} parts of the same number of inputs are expected, {came} came")
        self._functions = _functions()
        products = [_CProduct(c_part(part_bytes, part)) for part, part_bytes in parts]
        self._products = (_CProduct * len(products))(*products)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return x · Wᵀ for each part, f32 [T, rows], of x f32 [T, cols]; raise BadShape.

        A token's result depends neither on the other tokens nor on the number of threads.
        """
        if x.dim() != 2 or x.shape[1] != self._cols or x.dtype != torch.float32:
            names = ", ".join(part.name for part in self.parts)
            raise BadShape(f"{names}: float32 [T, {self._cols}] is expected, {x.dtype} {list(x.shape)} came")
        n_tokens = x.shape[0]
        if self._functions is None:
            return [
                reference.multiply(x, part_bytes, part)
                for part, part_bytes in zip(self.parts, self._bytes, strict=True)
            ]
        results = [torch.empty(n_tokens, part.rows) for part in self.parts]
        if n_tokens == 0:
            return results  # an empty tensor has no address
        x = x.contiguous()
        for product, y in zip(self._products, results, strict=True):
            product.y = y.data_ptr()
            product.y_length = y.numel()
        status = self._functions.expertd_multiply(
            self._workspace.address, self._products, len(results), x.data_ptr(), x.numel(), n_tokens, self._exact
        )
        if status:
            check_status(status, ", ".join(part.name for part in self.parts))
        return results


def _functions() -> ctypes.CDLL | None:
    loaded = library()
    return None if loaded is None else _typed(loaded)


# Types are the library's for as long as it is loaded; without them every call would convert its arguments by guessing.
@functools.cache
def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    address, count = ctypes.c_void_p, ctypes.c_int64
    loaded.expertd_dequantize_rows.argtypes = (ctypes.POINTER(CPart), count, count, address, count)
    loaded.expertd_multiply.argtypes = (
        address, ctypes.POINTER(_CProduct), count, address, count, count, count,
    )  # fmt: skip
    return loaded
