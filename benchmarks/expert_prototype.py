"""Another implementation of the experts, a single C file in a format of its own, measured beside ours.

What is expected of the file: mat_bytes, fill_random and expert with the signatures below, formats numbered 0 (4 bits),
1 (3 bits) and 2 (2 bits), matrices at multiples of 32 bytes, at most 64 tokens a call.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.compiled import compiled
from benchmarks.errors import NothingToMeasure
from benchmarks.segments import sealed
from protocol.layout import PAGE_NBYTES, aligned
from tools.geometry import Geometry

_FORMATS = {"4bit-g64": 0, "3bit-g64": 1, "2bit-g16": 2}
_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-fopenmp")


class Prototype:
    """Experts in the prototype's format, in a sealed segment of their own."""

    def __init__(self, source: Path, folder: Path, geometry: Geometry, scheme: str, n_experts: int) -> None:
        """Compile it and fill the segment; raise CompileFailed, or NothingToMeasure for a scheme it does not have."""
        if scheme not in _FORMATS:
            raise NothingToMeasure(f"the prototype has no {scheme}; it has {', '.join(_FORMATS)}")
        self._library = _typed(compiled(source, folder, flags=_FLAGS))
        self._format = _FORMATS[scheme]
        self._hidden, self._inner = geometry.hidden, geometry.intermediate
        up, down = (self._inner, self._hidden), (self._hidden, self._inner)
        lengths = [aligned(self._library.mat_bytes(self._format, *shape), PAGE_NBYTES) for shape in (up, up, down)]
        self.nbytes = sum(lengths)
        self._offsets = (0, lengths[0], lengths[0] + lengths[1])
        self._n_experts = n_experts
        self._segment = sealed(n_experts * self.nbytes, self._fill)
        self._address = _address(self._segment)

    def experts(self, n_threads: int) -> tuple[Callable[[Tensor], Tensor], ...]:
        """Return what computes each expert on so many threads."""
        return tuple(self._expert(number, n_threads) for number in range(self._n_experts))

    def _expert(self, number: int, n_threads: int) -> Callable[[Tensor], Tensor]:
        at = [self._address + number * self.nbytes + offset for offset in self._offsets]
        library, fmt, hidden, inner = self._library, self._format, self._hidden, self._inner

        def compute(x: Tensor) -> Tensor:
            y = torch.empty_like(x)
            library.expert(fmt, fmt, *at, hidden, inner, x.data_ptr(), x.shape[0], y.data_ptr(), n_threads)
            return y

        return compute

    def _fill(self, view: memoryview) -> None:
        address = _address(view)
        shapes = ((self._inner, self._hidden), (self._inner, self._hidden), (self._hidden, self._inner))
        for number in range(self._n_experts):
            for matrix, (offset, shape) in enumerate(zip(self._offsets, shapes, strict=True)):
                at = address + number * self.nbytes + offset
                self._library.fill_random(self._format, at, *shape, number * 3 + matrix + 1)


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.mat_bytes.argtypes = [number, number, number]
    library.mat_bytes.restype = ctypes.c_size_t
    library.fill_random.argtypes = [number, pointer, number, number, ctypes.c_uint64]
    library.fill_random.restype = None
    library.expert.argtypes = [
        number, number, pointer, pointer, pointer, number, number, pointer, number, pointer, number,
    ]  # fmt: skip
    library.expert.restype = None
    return library
