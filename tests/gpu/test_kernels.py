"""The Triton kernels on a device: errors, repeats, and that compiling succeeds. The same rules hold without one in
tests/unit/quant, under the interpreter and on what the compiler makes."""

import logging
from functools import cache

import pytest
import torch
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import SCHEMES, scheme_named
from quant.device_parts import DeviceExpert, DevicePart
from quant.reference import dequantize
from quant.torch_products import TorchProducts
from quant.triton_kernels import Products, open_products, why_not_on
from tests.unit.quant.activations import product_with_bound
from tests.unit.quant.expert_records import mixtral_parts, record_of
from tests.unit.quant.matrices import encoded, gaussian, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch.cuda finds none")

DEVICE = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16)
QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.is_quantized]
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64, 128)

# A last panel that is not whole, a last tile that is not, a stripe that is not.
ROWS, COLS = 1021, 1088
HIDDEN, INTERMEDIATE = 512, 1792
N_REPEATS = 100

# The kernels' own, taken when they are opened.
SCRATCH_NBYTES = 32 << 20

# Rounding in float32, of sums that are at most as large as their terms' magnitudes; of weights, to 16 bits.
SUMS = 8 * 2.0**-24
WEIGHTS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@cache
def products_of(dtype: torch.dtype) -> Products:
    """Return the kernels for activations of that type, compiled for every scheme; skip where a device has none."""
    reason = why_not_on(torch.cuda.get_device_capability(DEVICE), dtype)
    if reason is not None:
        pytest.skip(reason)
    products = open_products(DEVICE, dtype, schemes=SCHEMES, experts=[(name,) * 3 for name in SCHEMES])
    assert products.name == "triton"
    return products


def part_of(scheme: str) -> tuple[DevicePart, Part, Tensor]:
    part, part_bytes = encoded(ROWS, COLS, scheme_named(scheme))
    return DevicePart(part, part_bytes.to(DEVICE)), part, part_bytes


def expert_of(scheme: str) -> DeviceExpert:
    scheme_of_all = scheme_named(scheme)
    parts = mixtral_parts(scheme_of_all, scheme_of_all, scheme_of_all, hidden=HIDDEN, intermediate=INTERMEDIATE)
    record, spans = record_of(*parts)
    return DeviceExpert(record.to(DEVICE), spans)


def tokens(n_tokens: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Return activations [T, cols]; fewer tokens are the first of more."""
    return gaussian(max(COUNTS), cols, std=1.0, seed=3)[:n_tokens].to(dtype).to(DEVICE)


def output_of(products: Products, expert: DeviceExpert, x: Tensor) -> Tensor:
    out = torch.full((len(x), HIDDEN), torch.nan, device=DEVICE)
    products.expert(x, expert, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_compiled_and_no_warning_is_needed(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        products = products_of(dtype)

    assert products.name == "triton"
    assert not caplog.records


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n_tokens", COUNTS)
def test_products_are_those_of_the_weights(n_tokens: int, scheme: str, dtype: torch.dtype) -> None:
    products = products_of(dtype)
    on_device, part, part_bytes = part_of(scheme)
    x = tokens(n_tokens, COLS, dtype)
    y = torch.full((n_tokens, ROWS), torch.nan, device=DEVICE)

    products.multiply(x, on_device, y)

    expected, magnitude = product_with_bound(x.cpu(), part, part_bytes)
    tolerance = SUMS if n_tokens <= 8 else SUMS + WEIGHTS[dtype]
    assert bool(((y.cpu() - expected).abs() <= tolerance * magnitude).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_expanded_weights_are_bit_for_bit_the_references(scheme: str, dtype: torch.dtype) -> None:
    products = products_of(dtype)
    on_device, _, part_bytes = part_of(scheme)
    # With a matrix of ones on its diagonal the product is the weights: all other terms are 0.
    x = torch.eye(COLS, dtype=dtype, device=DEVICE)
    y = torch.full((COLS, ROWS), torch.nan, device=DEVICE)

    products.multiply(x, on_device, y)

    expected = dequantize(part_bytes, ROWS, COLS, scheme_named(scheme)).to(dtype).float()
    assert torch.equal(y.t().cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n_tokens", [1, 8, 9, 128])
def test_an_expert_is_torchs(n_tokens: int, scheme: str, dtype: torch.dtype) -> None:
    products, expert = products_of(dtype), expert_of(scheme)
    x = tokens(n_tokens, HIDDEN, dtype)
    by_torch = torch.full((n_tokens, HIDDEN), torch.nan, device=DEVICE)

    by_kernels = output_of(products, expert, x)

    TorchProducts(DEVICE, dtype).expert(x, expert, by_torch)
    assert relative_error(by_kernels, by_torch) <= 4 * WEIGHTS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n_tokens", [1, 3, 8, 9, 128])
def test_a_hundred_repeats_have_the_same_bits(n_tokens: int, scheme: str, dtype: torch.dtype) -> None:
    products, expert = products_of(dtype), expert_of(scheme)
    x = tokens(n_tokens, HIDDEN, dtype)
    first = output_of(products, expert, x)

    differing = sum(not torch.equal(output_of(products, expert, x), first) for _ in range(N_REPEATS))

    assert differing == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_up_to_eight_tokens_do_not_change_each_others_results(scheme: str, dtype: torch.dtype) -> None:
    products, expert = products_of(dtype), expert_of(scheme)
    of_eight = output_of(products, expert, tokens(8, HIDDEN, dtype))

    for n_tokens in range(1, 8):
        assert torch.equal(output_of(products, expert, tokens(n_tokens, HIDDEN, dtype)), of_eight[:n_tokens])


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_a_record_behind_4_gib_is_computed_as_anywhere(n_tokens: int) -> None:
    products, expert = products_of(torch.float16), expert_of("4bit-g64")
    if torch.cuda.mem_get_info(DEVICE)[0] < 6 << 30:
        pytest.skip("needs 6 GiB of the device's memory")
    parts = mixtral_parts(*[scheme_named("4bit-g64")] * 3, hidden=HIDDEN, intermediate=INTERMEDIATE)
    record, spans = record_of(*parts)
    pool = torch.empty((5 << 30) + record.numel(), dtype=torch.uint8, device=DEVICE)
    far = pool[5 << 30 :]
    far.copy_(record)
    x = tokens(n_tokens, HIDDEN, torch.float16)

    there = output_of(products, DeviceExpert(far, spans), x)

    assert torch.equal(there, output_of(products, expert, x))


@pytest.mark.parametrize("n_tokens", [1, 8, 9, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_more_memory_is_taken_than_is_said(scheme: str, n_tokens: int) -> None:
    kernels, by_torch = products_of(torch.float16), TorchProducts(DEVICE, torch.float16)
    expert, x = expert_of(scheme), tokens(n_tokens, HIDDEN, torch.float16)
    out = torch.empty(n_tokens, HIDDEN, device=DEVICE)

    for products, taken_before in ((kernels, SCRATCH_NBYTES), (by_torch, 0)):
        products.expert(x, expert, out)  # cuBLAS takes its workspace with its first product
        nbytes_before = torch.cuda.memory_allocated(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)

        products.expert(x, expert, out)

        taken = torch.cuda.max_memory_allocated(DEVICE) - nbytes_before
        # The allocator rounds each tensor up to 512 bytes.
        assert taken <= products.workspace_nbytes(n_tokens, expert) - taken_before + 16 * 512


def test_kernels_run_on_the_current_stream() -> None:
    products, expert = products_of(torch.float16), expert_of("4bit-g64")
    x = tokens(1, HIDDEN, torch.float16)
    expected = output_of(products, expert, x)
    stream = torch.cuda.Stream(DEVICE)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(DEVICE))

    with torch.cuda.stream(stream):
        # Seconds of work before it: on another stream the product would see zeros.
        late = torch.zeros_like(x)
        torch.cuda._sleep(1 << 30)  # type: ignore[no-untyped-call]
        late.copy_(x)
        out = output_of(products, expert, late)
    stream.synchronize()

    assert torch.equal(out, expected)
