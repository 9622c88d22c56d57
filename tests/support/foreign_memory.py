"""Ways into the memory of another process, for tests that find them closed."""

import ctypes
from collections.abc import Callable
from pathlib import Path


class IoVec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def process_vm_readv(pid: int, address: int) -> bytes:
    """Return one byte of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    byte = ctypes.create_string_buffer(1)
    local, remote = IoVec(ctypes.addressof(byte), 1), IoVec(address, 1)
    if libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) != 1:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return byte.raw


def process_vm_writev(pid: int, address: int) -> None:
    """Write one byte into another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_writev.restype = ctypes.c_ssize_t
    byte = ctypes.create_string_buffer(b"x")
    local, remote = IoVec(ctypes.addressof(byte), 1), IoVec(address, 1)
    if libc.process_vm_writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) != 1:
        raise OSError(ctypes.get_errno(), "process_vm_writev")


def segment_address(pid: int) -> int:
    """Return where another process maps a segment."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:expertd-store" in line:
            return int(line.split("-")[0], 16)
    raise ValueError("no segment is mapped")


def fails(route: Callable[..., object], *arguments: int) -> bool:
    """Whether the kernel refuses that."""
    try:
        route(*arguments)
    except OSError:
        return True
    return False
