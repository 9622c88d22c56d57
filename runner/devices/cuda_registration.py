"""Page-locking host memory that others own, so that a GPU copies straight out of it: the store's shared mapping.

Owns what it registered until it is closed, and nothing of the memory. A mapping of a sealed segment is read-only, and
whether CUDA page-locks such memory depends on the GPU and its driver: nobody knows but by trying. Where it refuses,
nothing stays registered, and records go through staging chunks.

The driver's interface is used, by ctypes: it keeps no error for later, while one of the runtime's would be found by
torch behind its next kernel. Registering blocks the calling thread for as long as the kernel takes to lock the pages;
what other processes do with theirs meanwhile is what `make gpu` measures. CUDA's context is that of the thread that
calls, which torch makes with the first thing that it does on the GPU.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from runner.errors import DeviceUnavailable

# cuMemHostRegister takes longer ranges, but locks each in one go.
REGISTERED_NBYTES_MAX = 1 << 30

_PORTABLE = 0x01  # CU_MEMHOSTREGISTER_PORTABLE: for all contexts of the process
_READ_ONLY = 0x08  # CU_MEMHOSTREGISTER_READ_ONLY: the GPU will not write there
_SUCCESS = 0
_PAGE_NBYTES = 4096


class CudaDriver(Protocol):
    """As much of libcuda as page-locking needs; what it returns are CUresults, 0 is success."""

    def register(self, address: int, nbytes: int, flags: int) -> int:
        """Call cuMemHostRegister."""
        ...

    def unregister(self, address: int) -> int:
        """Call cuMemHostUnregister."""
        ...

    def name_of(self, result: int) -> str:
        """Return what CUDA calls a result, like CUDA_ERROR_INVALID_VALUE."""
        ...


class LibCuda:
    """The CudaDriver of this machine; raise DeviceUnavailable if it has none."""

    def __init__(self, path: str = "libcuda.so.1") -> None:
        try:
            library = ctypes.CDLL(path)
            self._register = library.cuMemHostRegister_v2
            self._unregister = library.cuMemHostUnregister
            self._get_error_name = library.cuGetErrorName
        except (OSError, AttributeError) as error:
            raise DeviceUnavailable(f"the CUDA driver cannot be used: {error}") from None
        self._register.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
        self._unregister.argtypes = (ctypes.c_void_p,)
        self._get_error_name.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))

    def register(self, address: int, nbytes: int, flags: int) -> int:
        """Call cuMemHostRegister."""
        return int(self._register(address, nbytes, flags))

    def unregister(self, address: int) -> int:
        """Call cuMemHostUnregister."""
        return int(self._unregister(address))

    def name_of(self, result: int) -> str:
        """Return what CUDA calls a result."""
        name = ctypes.c_char_p()
        if self._get_error_name(result, ctypes.byref(name)) != _SUCCESS or name.value is None:
            return f"CUresult {result}"
        return name.value.decode("ascii", "replace")


@dataclass(frozen=True, slots=True)
class HostRange:
    """Bytes address … address + nbytes of this process."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Refused:
    """CUDA page-locks no such memory, and what it said."""

    reason: str


class Registration:
    """Page-locked ranges. Close it before the memory is unmapped, and after the device was drained."""

    def __init__(self, driver: CudaDriver, ranges: list[HostRange]) -> None:
        self._driver = driver
        self._ranges = ranges

    @property
    def nbytes(self) -> int:
        """How much is page-locked."""
        return sum(registered.nbytes for registered in self._ranges)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all pages; what CUDA says to that is of no use to anybody."""
        while self._ranges:
            self._driver.unregister(self._ranges.pop().address)


def register(driver: CudaDriver, ranges: Iterable[HostRange], *, is_read_only: bool) -> Registration | Refused:
    """Page-lock all of the ranges, or none if CUDA refuses one."""
    flags = _PORTABLE | (_READ_ONLY if is_read_only else 0)
    registered: list[HostRange] = []
    for wanted in ranges:
        result = driver.register(wanted.address, wanted.nbytes, flags)
        if result != _SUCCESS:
            Registration(driver, registered).close()
            return Refused(driver.name_of(result))
        registered.append(wanted)
    return Registration(driver, registered)


def contiguous_ranges(records: Iterable[HostRange], *, nbytes_max: int = REGISTERED_NBYTES_MAX) -> list[HostRange]:
    """Return whole pages that hold all the records: neighbours together, as long as that is no more than nbytes_max.

    A page is in one range only: records that share one are together in any case. In a store none do.
    """
    ranges: list[HostRange] = []
    for record in sorted(records, key=lambda record: record.address):
        start = record.address // _PAGE_NBYTES * _PAGE_NBYTES
        end = -(-(record.address + record.nbytes) // _PAGE_NBYTES) * _PAGE_NBYTES
        if ranges:
            last = ranges[-1]
            last_end = last.address + last.nbytes
            if start <= last_end and (start < last_end or end - last.address <= nbytes_max):
                ranges[-1] = HostRange(last.address, max(last_end, end) - last.address)
                continue
        ranges.append(HostRange(start, end - start))
    return ranges
