"""What the compiler makes of the kernels for each generation of devices, looked at without one.

The driver here compiles what the launcher launches, and launches nothing.
"""

import re
from pathlib import Path

import pytest
import torch

from protocol.schemes import BF16, FP16, Q2_G16, Q3_G64, Q4_G64, Q8_G64, Scheme, scheme_named
from quant.device_parts import DeviceExpert
from quant.triton_codes import unit_words_of
from quant.triton_experts import TritonProducts
from tests.support.compile_only import Compiled, compile_only
from tests.unit.quant.expert_records import HIDDEN, mixtral_parts, record_of
from tests.unit.quant.matrices import QUANTIZED

CAPABILITIES = (75, 80, 86, 89, 90)
ALL = [
    (capability, dtype, scheme)
    for capability in CAPABILITIES
    for dtype in (torch.float16, torch.bfloat16)
    for scheme in (*QUANTIZED, FP16, BF16)
    if dtype == torch.float16 or capability >= 80
]
# Each capability, type and scheme once; all of it takes minutes.
SOME = [
    (75, torch.float16, Q4_G64),
    (75, torch.float16, FP16),
    (80, torch.bfloat16, Q8_G64),
    (86, torch.float16, Q2_G16),
    (89, torch.bfloat16, Q3_G64),
    (90, torch.bfloat16, Q4_G64),
    (90, torch.bfloat16, BF16),
]
CPU = torch.device("cpu")

Case = tuple[int, torch.dtype, Scheme]


def name_of(case: Case) -> str:
    capability, dtype, scheme = case
    return f"sm_{capability}-{str(dtype).removeprefix('torch.')}-{scheme.name}"


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=name_of(case), marks=() if case in SOME else pytest.mark.slow) for case in ALL],
)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """All kernels that experts of a scheme take, as the launcher has them compiled."""
    capability, dtype, scheme = request.param
    with compile_only(capability, tmp_path_factory.mktemp("triton")) as compiler:
        TritonProducts(CPU, dtype, scratch_nbytes=1 << 16).warm_up([scheme.name], [(scheme.name,) * 3])
        return compiler.compiled()


def loops_of(ptx: str) -> list[str]:
    """Return what lies between a label and a branch back to it, for each such branch."""
    lines = ptx.splitlines()
    labels = {match[1]: place for place, line in enumerate(lines) if (match := re.match(r"(\$\w+):", line))}
    branches = [
        (labels[to], place) for place, line in enumerate(lines) for to in re.findall(r"\bbra\S*\s+(\$\w+)", line)
    ]
    return ["\n".join(lines[label:place]) for label, place in branches if label < place]


def n_loads_expected(kernel: Compiled) -> int:
    """Return how many loads of 16 bytes a thread needs for a tile's codes, of each matrix that the kernel reads."""
    scheme = scheme_named(kernel.scheme)
    # A unit of a group of 16 has its scale and base codes in words too.
    n_vectors: int = unit_words_of(kernel.scheme) + (2 if scheme == Q2_G16 else 0)
    return n_vectors * (2 if kernel.name == "gate_up_kernel" else 1)


def test_there_is_a_kernel_for_each_count_of_tokens(kernels: list[Compiled]) -> None:
    names = sorted((kernel.name, kernel.tokens) for kernel in kernels if kernel.tokens is not None)

    assert names == [(name, tokens) for name in ("gate_up_kernel", "multiply_kernel") for tokens in (1, 2, 4)]


def test_codes_are_read_16_bytes_at_once(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        if scheme_named(kernel.scheme).is_quantized:
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.ptx)) == n_loads_expected(kernel), kernel.name


def test_16_bit_weights_and_activations_are_read_16_bytes_at_once(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        if not scheme_named(kernel.scheme).is_quantized:
            loads = re.findall(r"ld\.global\S*", kernel.ptx)
            assert loads, kernel.name
            assert all(load.endswith(".v2.b64") for load in loads), kernel.name


def test_no_kernel_takes_more_than_128_registers_or_puts_any_on_the_stack(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        assert kernel.n_registers <= 128, kernel.name
        assert (kernel.stack_nbytes, kernel.local_nbytes) == (0, 0), kernel.name


def test_threads_of_a_program_do_not_wait_for_each_other_in_the_loop(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        loops = loops_of(kernel.ptx)
        n_loops = {"multiply_kernel": 1, "gate_up_kernel": 2, "dequantize_kernel": 0}[kernel.name]
        assert len(loops) == n_loops, kernel.name
        assert all("ld.global" in loop for loop in loops), kernel.name
        assert not any(re.search(r"\b(bar|barrier)\.", loop) for loop in loops), kernel.name


def test_nothing_is_added_up_in_an_order_that_depends_on_timing(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        assert not re.search(r"\b(atom|red)\.", kernel.ptx), kernel.name


def test_rows_and_panels_are_found_by_64_bit_arithmetic(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        # A row of 16-bit weights is one of 8 at once; a panel is one for the program.
        of_what = "i64" if scheme_named(kernel.scheme).is_quantized else "tensor<8xi64"
        assert re.search(rf"arith\.muli .* : {of_what}\b", kernel.ttgir), kernel.name


def test_a_tokens_sums_meet_in_the_same_order_for_any_count_of_tokens(kernels: list[Compiled]) -> None:
    orders = {
        name: {kernel.tokens: reduced_layouts(kernel.ttgir) for kernel in kernels if kernel.name == name}
        for name in ("multiply_kernel", "gate_up_kernel")
    }

    for of_tokens in orders.values():
        assert len(of_tokens[1]) == 1
        assert of_tokens[1] == of_tokens[2] == of_tokens[4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_is_rounded_like_the_references_operation_by_operation(dtype: torch.dtype, tmp_path: Path) -> None:
    with compile_only(80, tmp_path) as compiler:
        TritonProducts(CPU, dtype, scratch_nbytes=1 << 16).warm_up([Q4_G64.name], [])
        (kernel,) = (kernel for kernel in compiler.compiled() if kernel.name == "dequantize_kernel")

    # Nothing is fused, nothing flushed to zero, and the 16 bits are the nearest ones, of two the even one.
    assert not re.search(r"\bfma\.|\.ftz\b", kernel.ptx)
    assert re.search(r"\bmul\.(rn\.)?f32\b", kernel.ptx)
    conversions = set(re.findall(r"\bcvt\.\S*16\S*\.f32\b", kernel.ptx))
    assert conversions
    assert all(conversion.startswith("cvt.rn.") for conversion in conversions)


def test_after_the_warm_up_nothing_is_left_to_compile(tmp_path: Path) -> None:
    expert = DeviceExpert(*record_of(*mixtral_parts(Q8_G64, Q8_G64, Q8_G64)))
    # Results that start anywhere, in rows of a length of their own.
    out = torch.empty(65, HIDDEN + 3)
    with compile_only(80, tmp_path) as compiler:
        products = TritonProducts(CPU, torch.float16)
        products.warm_up([], [(Q8_G64.name,) * 3])
        n_compiled = len(compiler.compiled())

        for n_tokens in (*range(1, 10), 64):
            x = torch.zeros(n_tokens, HIDDEN, dtype=torch.float16)
            products.expert(x, expert, out[1 : 1 + n_tokens, 1 : 1 + HIDDEN])

        assert n_compiled == 7
        assert len(compiler.compiled()) == n_compiled


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_an_expert_of_up_to_eight_tokens_is_two_launches(n_tokens: int, tmp_path: Path) -> None:
    expert = DeviceExpert(*record_of(*mixtral_parts(Q8_G64, Q8_G64, Q8_G64)))
    x = torch.zeros(n_tokens, HIDDEN, dtype=torch.float16)

    with compile_only(80, tmp_path) as compiler:
        TritonProducts(CPU, torch.float16).expert(x, expert, torch.empty(n_tokens, HIDDEN))

    assert compiler.n_launches == 2


def reduced_layouts(ttgir: str) -> set[str]:
    """Return which thread has which of the summands, for all sums over threads."""
    operands = re.findall(r'"tt\.reduce"\(.*?\}\) : \((tensor<[^)]*>)\)', ttgir, re.DOTALL)
    aliases = dict(re.findall(r"^(#\w+) = (#ttg.*)$", ttgir, re.MULTILINE))
    return {re.sub(r"#\w+", lambda alias: aliases[alias[0]], operand) for operand in operands}
