"""What a GPU's memory holds that nobody here allocates: the driver's context of this process. Measured, if possible.

The driver's management library tells the memory that all processes use, before this process has a context and behind
it; the difference, less what torch has taken meanwhile, is the context with its kernels. Another process that allocates
at that moment is counted too: a difference that cannot be a context's is replaced by what one takes at most.
"""

import ctypes
from typing import Protocol

# Seen of contexts: less than that has not been measured rightly, more is somebody else's.
_CONTEXT_NBYTES_MIN = 64 << 20
CONTEXT_NBYTES_MAX = 768 << 20

_SUCCESS = 0


class GpuMemory(Protocol):
    """What all processes together use of a GPU's memory."""

    def used_nbytes(self, uuid: str) -> int | None:
        """Return how much; None if nobody tells."""
        ...


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """The driver's management library, if it is there."""

    def __init__(self, path: str = "libnvidia-ml.so.1") -> None:
        try:
            library = ctypes.CDLL(path)
            self._library = library if library.nvmlInit_v2() == _SUCCESS else None
        except (OSError, AttributeError):
            self._library = None

    def used_nbytes(self, uuid: str) -> int | None:
        """Return what all processes use of the GPU with that id, like GPU-8a5c…; None if it cannot be told."""
        if self._library is None:
            return None
        handle, memory = ctypes.c_void_p(), _Memory()
        found = self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
        if found != _SUCCESS or self._library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != _SUCCESS:
            return None
        return int(memory.used)


def context_nbytes(used_before: int | None, used_after: int | None, taken_by_torch: int) -> int:
    """Return what the context takes; where that was not measured, what one takes at most."""
    if used_before is None or used_after is None:
        return CONTEXT_NBYTES_MAX
    measured = used_after - used_before - taken_by_torch
    return measured if _CONTEXT_NBYTES_MIN <= measured <= CONTEXT_NBYTES_MAX else CONTEXT_NBYTES_MAX
