"""Parts that lie, or reach, further than 32 bits count: in memory that is only taken where it is written."""

import mmap

import pytest
import torch
from torch import Tensor

from protocol.layout import PLANE_ALIGNMENT, panel_plan
from protocol.schemes import Q4_G64, Scheme
from quant.device_parts import DeviceExpert, DevicePart, PartOnDevice
from quant.triton_dequantize import dequantize_kernel
from quant.triton_experts import TritonProducts
from quant.triton_gemv import multiply_kernel
from tests.unit.quant.expert_records import mixtral_parts, record_of
from tests.unit.quant.interpreted.parts import CPU, random_part, tokens
from tests.unit.quant.matrices import QUANTIZED, name_of

POOL_NBYTES = 7 << 30
MAP_NORESERVE = 0x4000
# The most that fits into 32 bits with a sign: a kernel that counts bytes in 32 bits is wrong from the second panel on.
PANEL_NBYTES = (1 << 31) - PLANE_ALIGNMENT
N_PANELS = 4


@pytest.fixture(scope="module")
def pool() -> Tensor:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, POOL_NBYTES, flags=flags), dtype=torch.uint8)


def spread(part: DevicePart, part_bytes: Tensor, pool: Tensor) -> PartOnDevice:
    """Put the part's panels into the pool, 2 GiB from one to the next; return it as kernels take it."""
    plan = panel_plan(part.part.rows, part.part.cols, part.scheme)
    pool[: plan.panels_offset] = part_bytes[: plan.panels_offset]
    for panel in range(N_PANELS):
        first, at = plan.panels_offset + panel * plan.panel_nbytes, plan.panels_offset + panel * PANEL_NBYTES
        pool[at : at + plan.panel_nbytes] = part_bytes[first : first + plan.panel_nbytes]
    return PartOnDevice(pool, part.part.rows, part.part.cols, plan.base_min_offset, PANEL_NBYTES)


def test_an_expert_behind_4_gib_is_computed_as_anywhere(pool: Tensor) -> None:
    record, spans = record_of(*mixtral_parts(Q4_G64, Q4_G64, Q4_G64, hidden=64, intermediate=64))
    far = pool[(5 << 30) : (5 << 30) + record.numel()]
    far.copy_(record)
    x = tokens(1, 64, torch.float16)
    here, there = torch.full((2, 1, 64), torch.nan)
    products = TritonProducts(CPU, torch.float16, scratch_nbytes=1 << 16)

    products.expert(x, DeviceExpert(record, spans), here)
    products.expert(x, DeviceExpert(far, spans), there)

    assert torch.equal(here, there)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_panels_behind_4_gib_are_multiplied_as_anywhere(scheme: Scheme, pool: Tensor) -> None:
    part, part_bytes = random_part(8 * N_PANELS, 64, scheme)
    x = tokens(1, 64, torch.float16)
    here, there = torch.full((2, 1, part.part.rows), torch.nan)

    TritonProducts(CPU, torch.float16, scratch_nbytes=1 << 16).multiply(x, part, here)
    multiply_kernel[(N_PANELS,)](
        *spread(part, part_bytes, pool), x, 64, there, part.part.rows, 1, scheme.name, TOKENS=1
    )

    assert torch.equal(here, there)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_panels_behind_4_gib_are_expanded_as_anywhere(scheme: Scheme, pool: Tensor) -> None:
    part, part_bytes = random_part(8 * N_PANELS, 64, scheme)
    there = torch.zeros(16, 64, dtype=torch.bfloat16)

    here = TritonProducts(CPU, torch.bfloat16, scratch_nbytes=1 << 16)._expanded(part, 16, 16)
    dequantize_kernel[(2,)](*spread(part, part_bytes, pool), 2, there, scheme.name)

    assert torch.equal(here, there)
