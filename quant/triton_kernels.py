"""The door to products on a device: kernels where they can be used, torch where they cannot, and why.

Kernels are compiled when they are first launched, for which Triton needs a C compiler and Python's headers: both are
looked for here, and everything is compiled before anybody waits for a token. Triton itself is imported only where it
is used: that takes seconds. Nobody but `open_products` blocks, for as long as compiling takes; a second process finds
the kernels in Triton's cache.
"""

import logging
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quant.device_parts import DeviceExpert, DevicePart
from quant.torch_products import TorchProducts

_log = logging.getLogger(__name__)

_CAPABILITY_MIN = (7, 5)
_CAPABILITY_OF_BF16 = (8, 0)
# Older ones lack functions of constants and tuples, which the kernels are written with.
_TRITON_MIN = (3, 7)

# What compiling, linking and loading raise besides Triton's own errors; it asserts that it finds the CUDA driver.
_COMPILING_FAILED = (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError)


class Products(Protocol):
    """Products of 16-bit activations with the bytes of parts, on one device's current stream."""

    @property
    def name(self) -> str:
        """What computes: "triton" or "torch"."""

    @property
    def device(self) -> torch.device:
        """Where."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations."""

    def multiply(self, x: Tensor, part: DevicePart, out: Tensor) -> None:
        """Write x · Wᵀ into out, f32 [T, rows], of x [T, cols]; raise BadShape."""

    def expert(self, hidden_states: Tensor, expert: DeviceExpert, out: Tensor) -> None:
        """Write the expert's output into out, f32 [T, H], of hidden_states [T, H]; raise BadShape."""

    def workspace_nbytes(self, n_tokens: int, expert: DeviceExpert) -> int:
        """Return the most memory that a product of that expert takes besides what it is given."""


def open_products(
    device: torch.device, dtype: torch.dtype, *, schemes: Iterable[str], experts: Iterable[tuple[str, str, str]]
) -> Products:
    """Return products that are ready: kernels, compiled for these schemes, or torch, with a warning that says why.

    `schemes` are those of parts to be multiplied with; `experts` the (gate, up, down) schemes of experts.
    """
    reason = why_no_kernels(device, dtype)
    products = compiled(device, dtype, schemes, experts) if reason is None else reason
    if not isinstance(products, str):
        return products
    _log.warning("experts are computed by torch, several times slower than by kernels: %s", products)
    return TorchProducts(device, dtype)


def compiled(
    device: torch.device, dtype: torch.dtype, schemes: Iterable[str], experts: Iterable[tuple[str, str, str]]
) -> Products | str:
    """Return the kernels' products, compiled for these schemes, or why that failed."""
    from triton.errors import TritonError

    from quant.triton_experts import TritonProducts

    products = TritonProducts(device, dtype)
    try:
        products.warm_up(schemes, experts)
    except torch.OutOfMemoryError:
        raise  # no fault of the compiler's, and torch needs more
    except (TritonError, *_COMPILING_FAILED) as error:
        return f"compiling failed: {error or type(error).__name__}"
    return products


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what keeps kernels from being used, and what to do about it; None if nothing does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"kernels are for CUDA devices, this is {'a ROCm device' if device.type == 'cuda' else device.type}"
    return why_not_on(torch.cuda.get_device_capability(device), dtype) or why_not_importable() or why_not_compilable()


def why_not_on(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Return what keeps kernels of that dtype from a device of that compute capability; None if nothing does."""
    needed = _CAPABILITY_OF_BF16 if dtype == torch.bfloat16 else _CAPABILITY_MIN
    if dtype not in {torch.float16, torch.bfloat16}:
        return f"kernels take float16 or bfloat16, not {dtype}"
    if capability < needed:
        has, needs = (".".join(map(str, version)) for version in (capability, needed))
        return f"the device has compute capability {has}, kernels for {dtype} need {needs}"
    return None


def why_not_compilable() -> str | None:
    """Return what Triton misses to compile with; None if nothing. It looks where Triton does."""
    from triton import knobs

    if not (knobs.build.cc or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc or clang, or name one in CC"
    # Debian's own scheme names a folder for local installations, which has no headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = Path(sysconfig.get_paths(scheme)["include"])
    if not (include / "Python.h").is_file():
        return f"Triton needs Python's headers, and {include} has none: install python3-dev or the like"
    return None


def why_not_importable() -> str | None:
    """Return what keeps Triton from being imported; None if nothing does."""
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "Triton is not installed: pip install 'expertd[cuda]'"
        return f"Triton cannot be imported: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton cannot be imported: {error}"
    return why_not_this_triton(triton.__version__)


def why_not_this_triton(version: str) -> str | None:
    """Return what keeps kernels from that version of Triton; None if nothing does."""
    if tuple(map(int, version.split(".")[:2])) >= _TRITON_MIN:
        return None
    needed = ".".join(map(str, _TRITON_MIN))
    return f"Triton {version} is installed, {needed} is needed: pip install 'expertd[cuda]'"
