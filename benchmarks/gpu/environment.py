"""Which GPU, driver and libraries there are, and whether kernels can be compiled. No names of hosts or users."""

import shutil
import subprocess

import torch

from benchmarks.gpu.steps import StepInput
from quant.triton_kernels import why_no_kernels

_ASKED = (
    "driver_version",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "persistence_mode",
)


def measure(_: StepInput) -> dict[str, object]:
    """Return what there is."""
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "n_gpus": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_nbytes": properties.total_memory,
        "free_nbytes": torch.cuda.mem_get_info(0)[0],
        "n_multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "why_no_kernels": why_no_kernels(device, torch.float16),
        "driver": _asked_of_driver(),
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _asked_of_driver() -> dict[str, str] | None:
    """Return what nvidia-smi says of the first GPU; None where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--id=0", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    answers = asked.stdout.strip().split(", ")
    return dict(zip(_ASKED, answers, strict=True)) if len(answers) == len(_ASKED) else None
