"""The products of parts of Mixtral's size: error, repeats, and speed beside a copy inside the GPU's memory.

error       the largest difference from torch's product of the same bytes in fp32, over the largest result
repeats     how many of 100 further products had other bits than the first
gb_per_s    the part's bytes over the time, by how many tokens are multiplied at once
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.figures import gb_per_s, median_s, open_gpu
from benchmarks.gpu.steps import StepInput
from protocol.layout import Part, part_nbytes
from quant.device_parts import DevicePart
from quant.torch_products import TorchProducts
from quant.triton_kernels import Products, open_products
from runner.devices.cuda import CudaDevice
from tools.synthetic_store.packed import random_part

_SCHEMES = ("4bit-g64", "3bit-g64", "2bit-g16", "8bit-g64", "fp16")
_ROWS, _COLS = 14336, 4096
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
_N_REPEATS = 100
_N_LAUNCHED = 10


def measure(_: StepInput) -> dict[str, object]:
    """Return every scheme's figures."""
    device = open_gpu()
    try:
        with device.computing():
            products = open_products(device.torch_device, torch.float16, schemes=_SCHEMES, experts=[])
            wait = device.drain
            copied = _device_copy_gb_per_s(device)
            return {
                "products": products.name,
                "device_copy_gb_per_s": copied,
                "schemes": {
                    scheme: part_figures(products, scheme, (_ROWS, _COLS), wait, n_repeats=_N_REPEATS)
                    for scheme in _SCHEMES
                },
            }
    finally:
        device.close()


def part_figures(
    products: Products, scheme: str, shape: tuple[int, int], wait: Callable[[], None], *, n_repeats: int
) -> dict[str, object]:
    """Return one part's figures; `wait` returns when all that was launched has run."""
    part = Part("part", *shape, scheme)
    data = np.concatenate(list(random_part(part, part.cols**-0.5, np.random.default_rng(0))))[: part_nbytes(part)]
    on_device = DevicePart(part, torch.from_numpy(data).to(products.device))
    exact = TorchProducts(products.device, torch.float32)
    errors, speeds, differing = {}, {}, 0
    for n_tokens in _TOKENS:
        x = _activations(n_tokens, part.cols, products)
        first, expected = (torch.empty(n_tokens, part.rows, device=products.device) for _ in range(2))
        products.multiply(x, on_device, first)
        exact.multiply(x.float(), on_device, expected)
        errors[n_tokens] = float(f"{float((first - expected).abs().max() / expected.abs().max()):.3g}")
        if n_tokens in (1, _TOKENS[-1]):
            differing += _n_differing(products, on_device, x, first, n_repeats)
        speeds[n_tokens] = _gb_per_s(products, on_device, x, first, wait)
    return {"error": errors, "repeats_that_differ": differing, "gb_per_s": speeds}


def _activations(n_tokens: int, cols: int, products: Products) -> Tensor:
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randn(n_tokens, cols, generator=generator).to(products.dtype).to(products.device)


def _n_differing(products: Products, part: DevicePart, x: Tensor, first: Tensor, n_repeats: int) -> int:
    again = torch.empty_like(first)
    differing = 0
    for _ in range(n_repeats):
        products.multiply(x, part, again)
        differing += not torch.equal(again, first)
    return differing


def _gb_per_s(products: Products, part: DevicePart, x: Tensor, out: Tensor, wait: Callable[[], None]) -> float:
    def work() -> None:
        for _ in range(_N_LAUNCHED):
            products.multiply(x, part, out)
        wait()

    return gb_per_s(part.part_bytes.numel() * _N_LAUNCHED, median_s(work, 3))


def _device_copy_gb_per_s(device: CudaDevice) -> float:
    """Return the bytes read and written a second by a copy inside the GPU's memory."""
    source = torch.zeros(256 << 20, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)

    def work() -> None:
        target.copy_(source)
        device.drain()

    return gb_per_s(2 * source.numel(), median_s(work, 9))
