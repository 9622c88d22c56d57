"""What is refused before it gets to a kernel that trusts it."""

import pytest
import torch
from torch import Tensor

from protocol.layout import Part, record_spans
from protocol.schemes import FP16, Q4_G64, Q8_G64
from quant.device_parts import DeviceExpert, DevicePart
from quant.errors import BadPart, BadShape
from quant.torch_products import TorchProducts
from quant.triton_experts import TritonProducts
from tests.unit.quant.expert_records import HIDDEN, INTERMEDIATE, mixtral_parts, record_of
from tests.unit.quant.matrices import encoded

CPU = torch.device("cpu")
PRODUCTS = (TorchProducts, TritonProducts)


def placed_behind(part_bytes: Tensor, n_bytes: int) -> Tensor:
    """Return a copy that starts so many bytes behind a multiple of 64."""
    room = torch.zeros(part_bytes.numel() + 128, dtype=torch.uint8)
    first = -room.data_ptr() % 64 + n_bytes
    place = room[first : first + part_bytes.numel()]
    place.copy_(part_bytes)
    return place


@pytest.mark.parametrize("n_bytes", [4, 8, 12])
def test_a_part_that_is_not_where_16_bytes_can_be_read_is_refused(n_bytes: int) -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)

    with pytest.raises(BadPart, match="matrix: its bytes do not start at a multiple of 16"):
        DevicePart(part, placed_behind(part_bytes, n_bytes))


def test_a_part_at_any_multiple_of_16_is_taken() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)

    assert DevicePart(part, placed_behind(part_bytes, 16)).on_device.panel_nbytes > 0


def test_bytes_of_another_length_are_refused() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)

    with pytest.raises(BadPart, match=f"{part_bytes.numel()} bytes are expected"):
        DevicePart(part, part_bytes[:-16])


def test_an_expert_without_a_part_is_refused() -> None:
    parts = mixtral_parts(Q8_G64, Q8_G64, Q8_G64)
    record, _ = record_of(*parts)

    with pytest.raises(BadShape, match="an expert has the parts w1, w2 and w3; w1, w3 came"):
        DeviceExpert(record, record_spans("r8", parts[:2]))


def test_an_expert_whose_matrices_do_not_fit_each_other_is_refused() -> None:
    parts = (
        Part("w1", INTERMEDIATE, HIDDEN, Q8_G64.name),
        Part("w3", INTERMEDIATE, HIDDEN, Q8_G64.name),
        Part("w2", HIDDEN, INTERMEDIATE + 64, Q8_G64.name),
    )

    with pytest.raises(BadShape, match=r"w1 and w3 \[I, H\] and w2 \[H, I\] are expected"):
        DeviceExpert(*record_of(*parts))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(
    ("x", "out"),
    [
        (torch.zeros(2, 128, dtype=torch.float16), torch.zeros(2, 8)),
        (torch.zeros(2, 64), torch.zeros(2, 8)),
        (torch.zeros(64, dtype=torch.float16), torch.zeros(2, 8)),
        (torch.zeros(64, 2, dtype=torch.float16).t(), torch.zeros(2, 8)),
        (torch.zeros(2, 64, dtype=torch.float16), torch.zeros(3, 8)),
        (torch.zeros(2, 64, dtype=torch.float16), torch.zeros(2, 8, dtype=torch.float16)),
        (torch.zeros(2, 64, dtype=torch.float16), torch.zeros(8, 2).t()),
    ],
    ids=["cols", "type", "vector", "columns", "tokens", "type of result", "columns of result"],
)
def test_activations_and_results_that_do_not_fit_are_refused(
    products: type[TorchProducts] | type[TritonProducts], x: Tensor, out: Tensor
) -> None:
    part = DevicePart(*encoded(8, 64, Q4_G64))

    with pytest.raises(BadShape, match="matrix: "):
        products(CPU, torch.float16).multiply(x, part, out)


@pytest.mark.parametrize("products", PRODUCTS)
def test_an_expert_refuses_a_result_that_does_not_fit(products: type[TorchProducts] | type[TritonProducts]) -> None:
    expert = DeviceExpert(*record_of(*mixtral_parts(FP16, FP16, FP16)))
    x = torch.zeros(9, HIDDEN, dtype=torch.float16)

    with pytest.raises(BadShape, match="w2: the result is"):
        products(CPU, torch.float16).expert(x, expert, torch.zeros(9, HIDDEN - 1))


@pytest.mark.parametrize(("first_col", "n_tokens"), [(1, 1), (4, 2)])
def test_activations_that_are_not_where_16_bytes_can_be_read_are_refused(first_col: int, n_tokens: int) -> None:
    part = DevicePart(*encoded(8, 64, Q4_G64))
    x = torch.zeros(n_tokens, 72, dtype=torch.float16)[:, first_col : first_col + 64]

    with pytest.raises(BadShape, match="rows of activations have to start at multiples of 16 bytes"):
        TritonProducts(CPU, torch.float16).multiply(x, part, torch.zeros(n_tokens, 8))


def test_rows_of_activations_of_another_length_are_refused() -> None:
    part = DevicePart(*encoded(8, 64, Q4_G64))
    x = torch.zeros(2, 68, dtype=torch.float16)[:, :64]

    with pytest.raises(BadShape, match="rows of activations have to start at multiples of 16 bytes"):
        TritonProducts(CPU, torch.float16).multiply(x, part, torch.zeros(2, 8))


def test_a_scratch_that_holds_no_panel_is_refused() -> None:
    part = DevicePart(*encoded(8, 64, Q4_G64))
    products = TritonProducts(CPU, torch.float16, scratch_nbytes=1022)

    with pytest.raises(BadShape, match="matrix: 1024 bytes of scratch are needed, there are 1022"):
        products.multiply(torch.zeros(9, 64, dtype=torch.float16), part, torch.zeros(9, 8))
