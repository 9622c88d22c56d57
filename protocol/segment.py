"""Sealed shared memory: made once by the daemon, mapped read-only by everyone. Owns memfd, seals and mappings.

A segment has no name: it lives as long as a descriptor or a mapping does and is freed by the kernel however its last
holder dies. Order of a segment's life, which only the daemon walks through:

    SegmentBuilder   memfd, size seals: nobody can cut it (a shrunk mapping is SIGBUS)
      .populate      memory is taken now, an error now, in huge pages where the kernel gives them
      .view          filled by preadv from worker threads; the one writable mapping there ever is
      .seal          unmap, write seal: from here on nobody, the daemon included, can change a byte
      -> fd          a read-only re-open; the writable descriptor is closed

Slots, which are filled again and again, lie in segments that end differently:

      .share         no seal against the builder's own mapping, one against every other there could be; the builder is
                     kept for as long as the slots are
      -> fd          a read-only re-open, through which nobody can write either

Readers trust nothing: `map_segment` checks seals and size before it maps. A mapping ends when the last buffer over it
is garbage, so a tensor can never outlive its bytes.
"""

import ctypes
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterable
from enum import StrEnum
from types import TracebackType

from protocol.errors import OutOfMemory, SegmentError

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
ALL_SEALS = SIZE_SEALS | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_F_SEAL_FUTURE_WRITE = 0x10  # the fcntl module knows it from Python 3.13 on
SLOT_SEALS = SIZE_SEALS | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
HUGE_PAGE_NBYTES = 2 << 20

# While files fill the memory the kernel refuses every second or third huge page, and has made room for half of these by
# the next time it is asked: of 3 GB so many times left 1 in 100.
_COLLAPSE_AGAIN = 8

_MFD_NOEXEC_SEAL = 0x8
_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MADV_DONTDUMP, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 16, 23, 25
_MAP_FAILED = ctypes.c_void_p(-1).value

# The C library's calls with their types; loading it again in every call would cost more than the calls.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class SegmentKind(StrEnum):
    """What a segment is for, and with it who can write into it."""

    SEALED = "sealed"  # nobody
    SLOTS = "slots"  # the daemon, through the mapping it has
    SLOT_TABLE = "slot_table"  # the same


_SEALS = {SegmentKind.SEALED: ALL_SEALS, SegmentKind.SLOTS: SLOT_SEALS, SegmentKind.SLOT_TABLE: SLOT_SEALS}


class SegmentBuilder:
    """One segment in the making. `populate` and writes into `view` may come from several threads, the rest from one."""

    def __init__(self, name: str, nbytes: int) -> None:
        if nbytes <= 0:
            raise SegmentError(f"a segment of {nbytes} bytes was asked for")
        self.nbytes = nbytes
        self._fd: int | None = _create_memfd(name)
        self._address: int | None = None
        try:
            os.ftruncate(self._fd, nbytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
            self._address = _map_aligned(self._fd, nbytes, _PROT_READ | _PROT_WRITE)
            _libc.madvise(self._address, nbytes, _MADV_DONTDUMP)
        except BaseException:
            self.close()
            raise
        self.view = memoryview((ctypes.c_ubyte * nbytes).from_address(self._address)).cast("B")

    def __enter__(self) -> "SegmentBuilder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def populate(self, start: int, stop: int, *, collapse_until: float) -> int:
        """Take the memory of [start, stop) now; return how many bytes lie in huge pages. Raise OutOfMemory.

        Until the monotonic time `collapse_until`, one byte of each huge page is touched and the page collapsed: the
        kernel then clears 2 MiB at once, for less than 512 small faults cost. Those that it refuses are asked for again
        once the memory is taken, which drives files out of it. On a fragmented machine collapsing can become very slow,
        hence the time limit. `start` must be a multiple of HUGE_PAGE_NBYTES. Nothing may have been written yet.
        """
        address = self._require_address()

        def collapse(offset: int) -> bool:
            if time.monotonic() >= collapse_until:
                return False
            ctypes.memset(address + offset, 0, 1)
            return bool(_libc.madvise(address + offset, HUGE_PAGE_NBYTES, _MADV_COLLAPSE) == 0)

        pages = range(start, stop - HUGE_PAGE_NBYTES + 1, HUGE_PAGE_NBYTES)
        refused = still_refused(pages, collapse, n_times=1)
        if _libc.madvise(address + start, stop - start, _MADV_POPULATE_WRITE) != 0:
            self._populate_without_madvise(ctypes.get_errno(), start, stop)
        refused = still_refused(refused, collapse, n_times=_COLLAPSE_AGAIN)
        return (len(pages) - len(refused)) * HUGE_PAGE_NBYTES

    def seal(self) -> int:
        """Make the content immutable for everybody; return a read-only descriptor, which the caller owns."""
        fd = self._fd
        if fd is None:
            raise SegmentError("this segment is sealed already")
        self.view.release()
        self._unmap()
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
        # A write-sealed memfd can be mapped through a read-only descriptor on every kernel; through the writable
        # one older kernels refuse.
        read_only = _reopen_read_only(fd)
        self.close()
        return read_only

    def share(self) -> int:
        """Leave this mapping the only way to write; return a read-only descriptor, which the caller owns."""
        fd = self._fd
        if fd is None:
            raise SegmentError("this segment is sealed already")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SLOT_SEALS)
        read_only = _reopen_read_only(fd)
        os.close(fd)
        self._fd = None
        return read_only

    def close(self) -> None:
        """Let go of whatever is still held; calling it again does nothing."""
        self._unmap()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _require_address(self) -> int:
        if self._address is None:
            raise SegmentError("this segment is sealed already")
        return self._address

    def _unmap(self) -> None:
        if self._address is not None:
            _libc.munmap(self._address, self.nbytes)
            self._address = None

    def _populate_without_madvise(self, error: int, start: int, stop: int) -> None:
        # Kernels before 5.14 do not know MADV_POPULATE_WRITE (EINVAL); fallocate takes the memory without mapping it.
        if error != errno.EINVAL or self._fd is None:
            raise OutOfMemory(f"{stop - start} bytes of shared memory could not be had ({os.strerror(error)})")
        try:
            os.posix_fallocate(self._fd, start, stop - start)
        except OSError as failure:
            raise OutOfMemory(f"{stop - start} bytes of shared memory could not be had ({failure.strerror})") from None


def still_refused(pages: Iterable[int], collapse: Callable[[int], bool], *, n_times: int) -> list[int]:
    """Collapse each page, those that were refused again, up to n_times; return the pages refused each time."""
    refused = list(pages)
    for _ in range(n_times):
        refused = [page for page in refused if not collapse(page)]
    return refused


def make_segment(name: str, data: bytes) -> int:
    """Return a read-only descriptor of a sealed segment with that content, which the caller owns."""
    with SegmentBuilder(name, len(data)) as builder:
        builder.populate(0, len(data), collapse_until=0.0)
        builder.view[:] = data
        return builder.seal()


def map_segment(fd: int, nbytes: int, kind: SegmentKind = SegmentKind.SEALED) -> memoryview:
    """Map a segment read-only; raise SegmentError unless it is sealed as its kind is, and of exactly that size.

    The view is not marked read-only, so that tensors can be made over it without a copy; the mapping is: a write into
    it is SIGSEGV. The descriptor may be closed afterwards.
    """
    check_segment(fd, nbytes, kind)
    address = _map_aligned(fd, nbytes, _PROT_READ)
    buffer = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(buffer, _libc.munmap, address, nbytes).atexit = False
    return memoryview(buffer).cast("B")


def replace_mapping(view: memoryview, fd: int) -> None:
    """Put another sealed segment of the same content under a mapped one, in place; raise SegmentError.

    Whoever reads meanwhile reads either, at the same address. The memory of the first one is let go.
    """
    check_segment(fd, len(view))
    address = ctypes.addressof((ctypes.c_ubyte * len(view)).from_buffer(view))
    _mmap(address, len(view), _PROT_READ, _MAP_SHARED | _MAP_FIXED, fd)


def check_segment(fd: int, nbytes: int, kind: SegmentKind = SegmentKind.SEALED) -> None:
    """Raise SegmentError unless the descriptor is a segment of exactly that size, sealed as its kind is."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise SegmentError("a descriptor is no sealable memory") from None
    if seals & _SEALS[kind] != _SEALS[kind]:
        raise SegmentError(f"a segment has seals {seals:#x}, {_SEALS[kind]:#x} were expected: its content could change")
    actual = os.fstat(fd).st_size
    if actual != nbytes:
        raise SegmentError(f"a segment has {actual} bytes, {nbytes} were expected")


def segment_nbytes(fd: int) -> int:
    """Return the size of a segment."""
    return os.fstat(fd).st_size


def check_seals_hold() -> None:
    """Try to change a segment of either kind by every route; raise SegmentError if this kernel lets one through."""
    fd = make_segment("expertd-self-test", b"sealed")
    try:
        check_segment(fd, 6)
        _check_routes_are_closed(fd, 6)
    finally:
        os.close(fd)
    with SegmentBuilder("expertd-self-test", 6) as builder:
        builder.populate(0, 6, collapse_until=0.0)
        fd = builder.share()
        try:
            check_segment(fd, 6, SegmentKind.SLOTS)
            _check_routes_are_closed(fd, 6)
            builder.view[0] = 1  # the one route that must be open
        finally:
            os.close(fd)


def _check_routes_are_closed(fd: int, nbytes: int) -> None:
    _check_route_is_closed("a writable re-open", lambda: _map_writable_reopen(fd))
    _check_route_is_closed("a writable mapping", lambda: _map_aligned(fd, nbytes, _PROT_READ | _PROT_WRITE))
    _check_route_is_closed("cutting it", lambda: os.truncate(f"/proc/self/fd/{fd}", 1))


def _check_route_is_closed(name: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except (OSError, SegmentError):
        return
    raise SegmentError(f"this kernel lets {name} through a sealed segment; shared memory would not be safe here")


def _reopen_read_only(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _map_writable_reopen(fd: int) -> None:
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(writable, b"x", 0)
    finally:
        os.close(writable)


def _create_memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:  # kernels before 6.3 do not know the flag
                raise
            fd = os.memfd_create(name, flags)
    except OSError as error:
        raise SegmentError(f"shared memory could not be created ({error.strerror})") from None
    # A memfd is born readable and writable for everybody who gets at the descriptor.
    os.fchmod(fd, 0o400)
    return fd


def _map_aligned(fd: int, nbytes: int, protection: int) -> int:
    """Map at an address congruent to the file offset modulo the huge page, without which huge pages are not used."""
    reserved_nbytes = nbytes + HUGE_PAGE_NBYTES
    reserved = _mmap(None, reserved_nbytes, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1)
    address = -(-reserved // HUGE_PAGE_NBYTES) * HUGE_PAGE_NBYTES
    try:
        _mmap(address, nbytes, protection, _MAP_SHARED | _MAP_FIXED, fd)
    except BaseException:
        _libc.munmap(reserved, reserved_nbytes)
        raise
    if address > reserved:
        _libc.munmap(reserved, address - reserved)
    page = os.sysconf("SC_PAGE_SIZE")
    end = -(-(address + nbytes) // page) * page
    _libc.munmap(end, reserved + reserved_nbytes - end)
    return address


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if result is None or result == _MAP_FAILED:
        error = ctypes.get_errno()
        failure = OutOfMemory if error == errno.ENOMEM else SegmentError
        raise failure(f"{nbytes} bytes could not be mapped ({os.strerror(error)})")
    return int(result)
