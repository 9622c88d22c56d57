"""Builds the library for aarch64, computes under emulation, compares with this machine's library bit for bit.

Needs cmake, gcc for aarch64 and qemu's user emulation; ends with one line and exit code 1 if one is missing, if
something cannot be built or run, or if a bit differs.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from quant.library import has_c_library, kernels_in_use
from quant.workspace import Workspace
from tests.cross_check.cases import Case, all_cases, write_cases
from tests.unit.quant.matrices import have_equal_bits

_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "build" / "aarch64"
_COMPILER, _EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
_DEBIAN_PACKAGES = "cmake gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
_N_THREADS = 3


class CrossCheckFailed(Exception):
    """What is wrong, in one line."""


def main() -> int:
    """Return the exit code."""
    try:
        sys.stdout.write(check() + "\n")
    except CrossCheckFailed as error:
        sys.stderr.write(f"cross-check: {error}\n")
        return 1
    return 0


def check() -> str:
    """Return what was found to be equal; raise CrossCheckFailed."""
    for tool in ("cmake", _COMPILER, _EMULATOR):
        if shutil.which(tool) is None:
            raise CrossCheckFailed(f"{tool} is not installed (on Debian: apt install {_DEBIAN_PACKAGES})")
    if not has_c_library():
        raise CrossCheckFailed("this machine has no C library to compare with; install the package with a compiler")
    program = _build()
    cases = all_cases()
    with Workspace(_N_THREADS) as workspace:
        ours = [case.compute(workspace) for case in cases]
    their_kernels, theirs = _compute_under_emulation(program, cases)
    _compare(cases, ours, theirs)
    n_values = sum(result.numel() for result in ours)
    return f"{len(cases)} cases, {n_values} values: {their_kernels} on aarch64 = {kernels_in_use()} here, bit for bit"


def _build() -> Path:
    """Return the program's path, linked with the library beside it."""
    _run(
        "cmake", "-S", str(_ROOT), "-B", str(_BUILD), "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_C_COMPILER={_COMPILER}",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    )  # fmt: skip
    _run("cmake", "--build", str(_BUILD))
    program = _BUILD / "compute_cases"
    _run(
        _COMPILER, "-std=c11", "-O2", "-Wall", "-Wextra", f"-I{_ROOT / 'quant' / 'csrc'}",
        str(Path(__file__).with_name("compute_cases.c")), "-o", str(program),
        f"-L{_BUILD}", "-lexpertd_kernels", f"-Wl,-rpath,{_BUILD}",
    )  # fmt: skip
    return program


def _compute_under_emulation(program: Path, cases: list[Case]) -> tuple[str, Tensor]:
    """Return the name of the kernels and all results, flat."""
    given, results = _BUILD / "cases", _BUILD / "results"
    with given.open("wb") as file:
        write_cases(cases, file)
    name = _run(_EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(program), str(given), str(results), str(_N_THREADS))
    return name.strip(), torch.frombuffer(bytearray(results.read_bytes()), dtype=torch.float32)


def _compare(cases: list[Case], ours: list[Tensor], theirs: Tensor) -> None:
    n_values = sum(result.numel() for result in ours)
    if theirs.numel() != n_values:
        raise CrossCheckFailed(f"{n_values} values are expected, {theirs.numel()} came")
    pieces = torch.split(theirs, [result.numel() for result in ours])
    differing = [
        case.name for case, a, b in zip(cases, ours, pieces, strict=True) if not have_equal_bits(a, b.contiguous())
    ]
    if differing:
        raise CrossCheckFailed(f"{len(differing)} of {len(cases)} cases differ: {'; '.join(differing)}")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        said = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise CrossCheckFailed(f"{command[0]} ended with {done.returncode}: {said}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
