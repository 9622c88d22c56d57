"""A driver for Triton that compiles for a device that is not there, and launches nothing.

What is compiled is what the launcher would compile on such a device: Triton specializes it on the same arguments. The
arguments lie in this processor's memory.
"""

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from quant.triton_dequantize import dequantize_kernel
from quant.triton_gemv import gate_up_kernel, multiply_kernel

KERNELS = (multiply_kernel, gate_up_kernel, dequantize_kernel)

# Of the smallest of our targets, sm_75.
_SHARED_NBYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as it was compiled: its compile-time arguments, and what came out."""

    name: str
    scheme: str
    tokens: int | None
    ttgir: str
    ptx: str
    n_registers: int
    stack_nbytes: int
    local_nbytes: int


class CompileOnly:
    """The driver. Its devices are numbered by their compute capability, so that none is mistaken for another."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self
        self.n_launches = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return device * 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_NBYTES, "device": device}

    def load_binary(
        self, name: str, binary: bytes, shared_nbytes: int, device: int
    ) -> tuple[object, object, int, int, int]:
        """Return module, function, registers, spills and the most threads of a kernel, none of which is looked at."""
        return object(), (name, len(binary), shared_nbytes, device), 0, 0, 1024

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """Return what launches a kernel: it counts."""

        def launch(*_: object) -> None:
            self.n_launches += 1

        assert source is not None
        assert metadata is not None
        return launch

    def compiled(self) -> list[Compiled]:
        """Return all that was compiled so far."""
        kernels = [kernel for function in KERNELS for kernel in function.device_caches[self.capability][0].values()]
        return [_compiled(kernel) for kernel in kernels]


@contextlib.contextmanager
def compile_only(capability: int, folder: Path) -> Iterator[CompileOnly]:
    """Have kernels compiled for that compute capability, into the folder, inside a with."""
    compiler = CompileOnly(capability)
    assert not knobs.runtime.interpret, "kernels are compiled where TRITON_INTERPRET is not set"
    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        driver.set_active(compiler)
        try:
            yield compiler
        finally:
            driver.set_active(None)
            for function in KERNELS:
                function.device_caches.pop(capability, None)


def _compiled(kernel: CompiledKernel) -> Compiled:
    constants = {name: kernel.src.constants.get((i,)) for i, name in enumerate(kernel.src.fn.arg_names)}
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return Compiled(
        name=kernel.name,
        scheme=constants["SCHEME"],
        tokens=constants.get("TOKENS"),
        ttgir=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
        n_registers=_number_behind("REG:", usage),
        stack_nbytes=_number_behind("STACK:", usage),
        local_nbytes=_number_behind("LOCAL:", usage),
    )


def _number_behind(name: str, text: str) -> int:
    match = re.search(rf"{name}(\d+)", text)
    assert match is not None, f"{name} does not occur in: {text}"
    return int(match[1])
