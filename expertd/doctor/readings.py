"""What the checks are given: read from /proc, /sys, limits, one tool. Decides nothing; None is what cannot be read."""

import importlib.util
import pwd
import resource
import shutil
import subprocess
import time
from pathlib import Path

from expertd.config import load_config
from expertd.doctor.processor import Gpus
from expertd.errors import ConfigError
from protocol.errors import OutOfMemory, RuntimeDirError, SegmentError
from protocol.runtime_dir import RuntimeDir, check_runtime_dir
from protocol.segment import HUGE_PAGE_NBYTES, SegmentBuilder, check_seals_hold

LIBRARY_FILE = "libexpertd_kernels.so"
_TOOL_WITHIN_S = 5.0
_COLLAPSE_WITHIN_S = 1.0


def text_of(path: str | Path) -> str | None:
    """Return a file's text, None if it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def number_of(path: str, default: int) -> int:
    """Return the number a file holds, the default if it cannot be read."""
    text = text_of(path)
    return default if text is None else int(text)


def hard_limit(which: int) -> int | None:
    """Return the hard limit of a resource, None if there is none."""
    limit = resource.getrlimit(which)[1]
    return None if limit == resource.RLIM_INFINITY else limit


def huge_nbytes() -> int:
    """Return how much of 2 MiB of shared memory the kernel makes a huge page of when asked."""
    try:
        with SegmentBuilder("expertd-doctor", HUGE_PAGE_NBYTES) as builder:
            nbytes = builder.populate(0, HUGE_PAGE_NBYTES, collapse_until=time.monotonic() + _COLLAPSE_WITHIN_S)
            builder.view.release()
            return nbytes
    except (SegmentError, OutOfMemory):
        return 0


def broken_seal() -> str | None:
    """Return how a sealed segment can be changed here, None if it cannot."""
    try:
        check_seals_hold()
    except SegmentError as error:
        return str(error)
    return None


def has_c_library() -> bool:
    """Whether the C kernels are installed: their file lies in the package, which is not imported for that."""
    spec = importlib.util.find_spec("quant")
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / LIBRARY_FILE).is_file() for folder in folders or ())


def gpus() -> Gpus:
    """Return which GPUs NVIDIA's driver shows."""
    has_driver = Path("/proc/driver/nvidia/version").exists()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Gpus(has_driver, None)
    fields = "--query-gpu=name,memory.total,driver_version"
    try:
        result = subprocess.run(
            [tool, fields, "--format=csv,noheader"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TOOL_WITHIN_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return Gpus(has_driver, None)
    return Gpus(has_driver, tuple(result.stdout.splitlines()) if result.returncode == 0 else ())


def runtime_dir_problem(directory: RuntimeDir) -> str | None:
    """Return why a runtime directory is not safe, None if it is, or is not there yet."""
    if not directory.path.exists() and not directory.path.is_symlink():
        return None
    try:
        check_runtime_dir(directory)
    except RuntimeDirError as error:
        return str(error)
    return None


def settings_problem() -> str | None:
    """Return what is wrong with the user's own settings, None if nothing is, or there are none."""
    try:
        load_config(None)
    except ConfigError as error:
        return str(error)
    return None


def vanishes_at_logout(directory: RuntimeDir, uid: int) -> bool:
    """Whether the login manager removes the directory with the user's last session."""
    if not directory.path.is_relative_to(f"/run/user/{uid}"):
        return False
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return True
    return not Path("/var/lib/systemd/linger", name).exists()
