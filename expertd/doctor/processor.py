"""Processor, NUMA and GPU: which kernels will compute. Pure checks.

The serving side knows nothing of `quant`: which kernels its library would choose is told from the same features.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from expertd.doctor.findings import Finding, note, ok

_AVX2 = frozenset({"avx2", "fma"})
_VNNI = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}


@dataclass(frozen=True, slots=True)
class Gpus:
    """What is known of GPUs: whether the driver is loaded, and its tool's lines, None without the tool."""

    has_driver: bool
    lines: tuple[str, ...] | None


def kernels_name(flags: Collection[str]) -> str:
    """Return which of the C kernels a processor with these features gets."""
    if _VNNI.issubset(flags):
        return "vnni"
    return "avx2" if _AVX2.issubset(flags) else "portable"


def check_kernels(flags: Collection[str], *, has_library: bool) -> Finding:
    """Say which kernels compute on the processor."""
    name = "processor"
    if not has_library:
        remedy = "install a C compiler and expertd again"
        return note(name, "no C kernels are installed: torch computes, several times slower", remedy)
    kernels = kernels_name(flags)
    if kernels == "vnni":
        return ok(name, "AVX-512 VNNI kernels")
    if kernels == "avx2":
        return ok(name, "AVX2 kernels (no AVX-512 VNNI here)")
    return note(name, "portable kernels: no AVX2 here", "a processor with AVX2 or AVX-512 VNNI is several times faster")


def check_numa(online_nodes: str | None) -> Finding:
    """Say whether memory lies in more than one place; the text is a list of the kernel's, like `0-1,3`."""
    n_nodes = count_of_list(online_nodes) if online_nodes else 1
    if n_nodes <= 1:
        return ok("NUMA", "one node")
    remedy = "bind daemon and runners to one node: `numactl --cpunodebind=0 --membind=0`"
    return note("NUMA", f"{n_nodes} nodes: expertd does not place memory, half the reads may be remote", remedy)


def check_gpu(gpus: Gpus) -> Finding:
    """Say which GPUs there are."""
    if gpus.lines:
        return ok("GPU", "; ".join(gpus.lines))
    if gpus.has_driver:
        remedy = "`nvidia-smi` should list it: look at the driver, and at the container's devices"
        return note("GPU", "a driver is loaded, and no GPU can be asked", remedy)
    return ok("GPU", "none: experts are computed on the processor")


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Return the features that every processor of /proc/cpuinfo has; those of ARM are called otherwise."""
    rows = (line.partition(":") for line in cpuinfo.splitlines())
    sets: Sequence[frozenset[str]] = [
        frozenset(words.split()) for key, _, words in rows if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*sets) if sets else frozenset()


def count_of_list(text: str) -> int:
    """Return how many numbers a list of the kernel's names, like 3 for `0-1,3`."""
    n = 0
    for piece in text.strip().split(","):
        first, _, last = piece.partition("-")
        n += int(last or first) - int(first) + 1
    return n
