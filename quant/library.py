"""The C library: found, loaded, its version checked; which of its kernels compute; what its statuses mean.

The library is built when the package is installed with a C compiler; it lies in this package's directory (in an
editable install, in the directory of the installed one, which is on the package's path too). Its calls release the
interpreter's lock.
"""

import ctypes
import functools
from pathlib import Path

import quant
from quant.errors import (
    BadPart,
    ExpertMissing,
    KernelsMissing,
    QuantError,
    StaleLibrary,
    WorkspaceBusy,
    WorkspaceForked,
)

LIBRARY_FILE = "libexpertd_kernels.so"

# Changes with the signatures or the meaning of anything the library exports.
_ABI_VERSION = 7

OK = 0

_REASONS = {
    1: "the format is not known",
    2: "the shape cannot be stored in this format",
    3: "a length is not what the shape needs",
    4: "an address is no multiple of what it points to",
    5: "the part has no such rows",
}
MISSING_EXPERT, _BUSY, _FORKED, _NO_WORKSPACE, _NO_MEMORY = 6, 7, 8, 9, 10
_NO_COPIES = 12


def has_c_library() -> bool:
    """Whether the C library is there; raise StaleLibrary if it is one of another version."""
    return library() is not None


# A process loads a library once whoever asks; this remembers that it did, and what it found.
@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, None if it was not built; raise StaleLibrary."""
    for folder in quant.__path__:
        path = Path(folder) / LIBRARY_FILE
        if path.is_file():
            return _load(path)
    return None


def kernels_in_use() -> str | None:
    """Return the name of the kernels that compute, None without the library."""
    loaded = library()
    return None if loaded is None else _kernels_name(loaded)


def use_kernels(name: str) -> None:
    """Compute with these kernels from now on, in the whole process, to test or measure them; raise KernelsMissing."""
    loaded = library()
    if loaded is None:
        raise KernelsMissing(f"{name}: the C library was not built")
    if loaded.expertd_use_kernels(name.encode()):
        raise KernelsMissing(f"{name}: this machine or this build has none; those in use are {_kernels_name(loaded)}")


def check_status(status: int, what: str) -> None:
    """Raise the error that a status stands for, if it stands for one; `what` is what the call was about."""
    if status == OK:
        return
    if status == MISSING_EXPERT:
        raise ExpertMissing(f"{what}: one was chosen that is not here")
    if status == _BUSY:
        raise WorkspaceBusy("this workspace computes in another thread; each thread needs a workspace of its own")
    if status == _FORKED:
        raise WorkspaceForked("this process was forked from the one whose threads these are; make a workspace here")
    if status == _NO_MEMORY:
        raise MemoryError(f"{what}: the system has no memory for what lies between the products")
    if status == _NO_WORKSPACE:
        raise QuantError(f"{what}: the workspace is closed")
    if status == _NO_COPIES:
        raise QuantError(f"{what}: closed")
    raise BadPart(f"{what}: {_REASONS.get(status, f'status {status}')}")


def _kernels_name(loaded: ctypes.CDLL) -> str:
    function = loaded["expertd_kernels_name"]  # an object of its own, unlike the attribute
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    version = loaded.expertd_abi_version()
    if version != _ABI_VERSION:
        raise StaleLibrary(f"{path}: version {version}, this code needs {_ABI_VERSION}; install the package again")
    return loaded
