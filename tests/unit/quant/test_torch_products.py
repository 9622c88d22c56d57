"""Products with parts by torch alone: what computes where the kernels cannot."""

import pytest
import torch

from protocol.schemes import FP16, Q2_G16, Q3_G64, Q4_G64, Scheme
from quant.device_parts import DeviceExpert, DevicePart
from quant.reference import dequantize
from quant.torch_products import TorchProducts
from tests.unit.quant.expert_records import HIDDEN, mixtral_parts, record_of, swiglu_in_float64
from tests.unit.quant.matrices import ALL_SCHEMES, encoded, gaussian, name_of, relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_products_are_those_of_the_references_weights(scheme: Scheme, dtype: torch.dtype) -> None:
    # Two strips of 8192 rows and some, a last panel that is not whole.
    part, part_bytes = encoded(8197, 512, scheme)
    x = gaussian(3, 512, std=1.0).to(dtype)
    y = torch.empty(3, 8197)

    TorchProducts(CPU, dtype).multiply(x, DevicePart(part, part_bytes), y)

    assert relative_error(y, x.double() @ dequantize(part_bytes, 8197, 512, scheme).double().t()) <= 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("scheme", [FP16, Q4_G64, Q3_G64, Q2_G16], ids=name_of)
def test_an_expert_is_a_swiglu_up_to_the_rounding_of_its_inner_values(
    scheme: Scheme, dtype: torch.dtype, tolerance: float
) -> None:
    record, spans = record_of(*mixtral_parts(scheme, scheme, scheme))
    x = gaussian(5, HIDDEN, std=1.0).to(dtype)
    out = torch.empty(5, HIDDEN)

    TorchProducts(CPU, dtype).expert(x, DeviceExpert(record, spans), out)

    assert relative_error(out, swiglu_in_float64(record, spans, x.float())) <= tolerance
