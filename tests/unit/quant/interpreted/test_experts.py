"""Experts by the kernels, against torch with the same rounding between the two halves of a SwiGLU."""

import pytest
import torch

from protocol.layout import Part
from protocol.schemes import FP16, Q2_G16, Q3_G64, Q4_G64, Q8_G64, Scheme
from quant.device_parts import DeviceExpert
from quant.torch_products import TorchProducts
from quant.triton_experts import TritonProducts
from tests.unit.quant.expert_records import mixtral_parts, record_of
from tests.unit.quant.interpreted.parts import CPU, tokens
from tests.unit.quant.matrices import ALL_SCHEMES, name_of, relative_error

HIDDEN, INTERMEDIATE = 64, 64

# Two float32 that differ in their last bits may round to neighbours in 16 bits; the interpreter cuts bf16 off.
INNER_ERROR = {torch.float16: 1e-4, torch.bfloat16: 8e-3}
# With many tokens weights are rounded to 16 bits too.
WEIGHTS_ERROR = {torch.float16: 1e-3, torch.bfloat16: 2e-2}


def error_of(parts: tuple[Part, Part, Part], n_tokens: int, dtype: torch.dtype) -> float:
    """Return how far the kernels' expert is from torch's."""
    expert = DeviceExpert(*record_of(*parts))
    x = tokens(n_tokens, HIDDEN, dtype)
    by_kernels, by_torch = torch.full((2, n_tokens, HIDDEN), torch.nan)
    # Strips of 16 rows.
    TritonProducts(CPU, dtype, scratch_nbytes=16 * HIDDEN * 2).expert(x, expert, by_kernels)
    TorchProducts(CPU, dtype).expert(x, expert, by_torch)
    return relative_error(by_kernels, by_torch)


def parts_of(scheme: Scheme) -> tuple[Part, Part, Part]:
    return mixtral_parts(scheme, scheme, scheme, hidden=HIDDEN, intermediate=INTERMEDIATE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_an_expert_of_one_token_is_torchs(scheme: Scheme, dtype: torch.dtype) -> None:
    error = error_of(parts_of(scheme), 1, dtype)

    assert error <= INNER_ERROR[dtype]


@pytest.mark.parametrize("scheme", [Q8_G64, Q4_G64, FP16], ids=name_of)
def test_an_expert_of_eight_tokens_is_torchs(scheme: Scheme) -> None:
    error = error_of(parts_of(scheme), 8, torch.float16)

    assert error <= INNER_ERROR[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [9, 40])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_an_expert_of_many_tokens_is_torchs_up_to_the_rounding_of_weights(
    scheme: Scheme, n_tokens: int, dtype: torch.dtype
) -> None:
    error = error_of(parts_of(scheme), n_tokens, dtype)

    assert error <= WEIGHTS_ERROR[dtype]


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_the_matrices_of_an_expert_may_differ_in_scheme(n_tokens: int) -> None:
    parts = mixtral_parts(Q4_G64, Q8_G64, Q2_G16, hidden=HIDDEN, intermediate=INTERMEDIATE)

    error = error_of(parts, n_tokens, torch.float16)

    assert error <= WEIGHTS_ERROR[torch.float16]


def test_an_expert_of_no_tokens_is_nothing() -> None:
    expert = DeviceExpert(*record_of(*parts_of(Q3_G64)))
    out = torch.empty(0, HIDDEN)

    TritonProducts(CPU, torch.float16, scratch_nbytes=1 << 16).expert(tokens(0, HIDDEN, torch.float16), expert, out)

    assert out.shape == (0, HIDDEN)
