"""Where kernels can be used, and what happens where they cannot."""

import logging
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from protocol.schemes import Q4_G64
from quant import triton_kernels
from quant.torch_products import TorchProducts
from quant.triton_kernels import (
    compiled,
    open_products,
    why_no_kernels,
    why_not_compilable,
    why_not_on,
    why_not_this_triton,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_devices_from_turing_on_have_kernels_and_from_ampere_on_those_for_bf16(
    capability: tuple[int, int], dtype: torch.dtype
) -> None:
    assert why_not_on(capability, dtype) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 0), torch.float16, "the device has compute capability 7.0, kernels for torch.float16 need 7.5"),
        ((7, 5), torch.bfloat16, "the device has compute capability 7.5, kernels for torch.bfloat16 need 8.0"),
        ((9, 0), torch.float32, "kernels take float16 or bfloat16, not torch.float32"),
    ],
)
def test_what_keeps_kernels_from_a_device_is_said(capability: tuple[int, int], dtype: torch.dtype, reason: str) -> None:
    assert why_not_on(capability, dtype) == reason


def test_a_processor_is_no_device_for_kernels() -> None:
    assert why_no_kernels(CPU, torch.float16) == "kernels are for CUDA devices, this is cpu"


def test_with_a_compiler_and_headers_kernels_can_be_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path), "scheme": scheme})
    monkeypatch.setenv("CC", "cc-of-our-own")

    assert why_not_compilable() is None


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    assert why_not_compilable() == "Triton needs a C compiler: install gcc or clang, or name one in CC"


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path), "scheme": scheme})
    monkeypatch.setenv("CC", "gcc")

    assert why_not_compilable() == (
        f"Triton needs Python's headers, and {tmp_path} has none: install python3-dev or the like"
    )


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.6.0", "Triton 3.6.0 is installed, 3.7 is needed: pip install 'expertd[cuda]'"),
        ("2.10.1", "Triton 2.10.1 is installed, 3.7 is needed: pip install 'expertd[cuda]'"),
        ("3.7.1", None),
        ("3.10.0+git1234", None),
    ],
)
def test_a_triton_that_is_too_old_is_named(version: str, reason: str | None) -> None:
    assert why_not_this_triton(version) == reason


def test_what_cannot_be_compiled_is_a_reason_and_no_error() -> None:
    # Here Triton finds no device to compile for.
    if torch.cuda.is_available():
        pytest.skip("there is a device to compile for")

    reason = compiled(CPU, torch.float16, [Q4_G64.name], [(Q4_G64.name,) * 3])

    assert isinstance(reason, str)
    assert reason.startswith("compiling failed: 0 active drivers")


def test_without_kernels_torch_computes_and_one_warning_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        products = open_products(CPU, torch.float16, schemes=[Q4_G64.name], experts=[(Q4_G64.name,) * 3])

    assert isinstance(products, TorchProducts)
    assert [record.getMessage() for record in caplog.records] == [
        "experts are computed by torch, several times slower than by kernels: kernels are for CUDA devices, this is cpu"
    ]


def test_without_triton_the_door_opens_onto_torch() -> None:
    # What is not installed cannot be found: None in sys.modules is that.
    program = """
import sys
sys.modules["triton"] = None
import torch
from quant.triton_kernels import open_products, why_not_importable
from quant import device_parts, torch_products
print(why_not_importable())
print(open_products(torch.device("cpu"), torch.float16, schemes=[], experts=[]).name)
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["Triton is not installed: pip install 'expertd[cuda]'", "torch"]


def test_the_door_imports_no_triton() -> None:
    program = f"import sys; import {triton_kernels.__name__}; sys.exit('triton' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", program], check=False)

    assert done.returncode == 0
