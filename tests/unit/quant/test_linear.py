"""Linear, with the library and by strips, against the dense product in float64."""

import mmap

import pytest
import torch
from torch import Tensor

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Q3_G64, Q4_G64, Scheme
from quant.errors import BadPart, BadShape
from quant.linear import Linear
from quant.reference import dequantize
from quant.workspace import Workspace
from tests.unit.quant.matrices import ALL_SCHEMES, encoded, gaussian, name_of

# Of y's range: float32 additions in another order than the float64 sum.
TOLERANCE = 1e-5


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
@pytest.mark.parametrize("n_tokens", [1, 16, 17, 33])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_product_is_that_of_the_dense_matrix(scheme: Scheme, n_tokens: int, n_threads: int) -> None:
    # Two strips of 1 M weights, several shares of rows, a last panel that is not whole.
    part, part_bytes = encoded(2101, 512, scheme)
    x = gaussian(n_tokens, 512, std=1.0, seed=1)

    with Workspace(n_threads) as workspace:
        y = Linear(part, part_bytes, workspace=workspace)(x)

    assert_is_product(y, x, dequantize(part_bytes, 2101, 512, scheme))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_few_tokens_without_the_library_go_by_strips(scheme: Scheme) -> None:
    part, part_bytes = encoded(2101, 512, scheme)
    x, y = gaussian(2, 512, std=1.0, seed=1), torch.full((2, 2101), torch.nan)

    Linear(part, part_bytes)._multiply_by_strips(x, y)

    assert_is_product(y, x, dequantize(part_bytes, 2101, 512, scheme))


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_a_token_alone_and_among_others_differ_by_rounding(scheme: Scheme) -> None:
    part, part_bytes = encoded(600, 512, scheme)
    linear = Linear(part, part_bytes)
    x = gaussian(40, 512, std=1.0, seed=1)

    together, alone = linear(x), torch.cat([linear(x[token : token + 1]) for token in range(40)])

    assert float((together - alone).abs().max() / together.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_threads_change_no_bit(n_tokens: int) -> None:
    part, part_bytes = encoded(2048, 512, Q4_G64)
    x = gaussian(n_tokens, 512, std=1.0, seed=1)

    with Workspace(4) as workspace:
        together, alone = Linear(part, part_bytes, workspace=workspace)(x), Linear(part, part_bytes)(x)

    assert torch.equal(together, alone)


def test_no_tokens_give_no_rows() -> None:
    part, part_bytes = encoded(16, 64, Q4_G64)

    assert Linear(part, part_bytes)(torch.empty(0, 64)).shape == (0, 16)


def test_activations_need_not_be_contiguous() -> None:
    part, part_bytes = encoded(16, 64, Q4_G64)
    x = gaussian(64, 3, std=1.0).t()

    assert torch.equal(Linear(part, part_bytes)(x), Linear(part, part_bytes)(x.contiguous()))


def test_the_bytes_may_lie_in_memory_that_cannot_be_written() -> None:
    # A write would end the process: bytes are read in place, from a mapping as the daemon hands it out.
    part, part_bytes = encoded(256, 256, Q3_G64)
    expected = Linear(part, part_bytes)(torch.ones(1, 256))
    with mmap.mmap(-1, part_bytes.numel()) as memory:
        memory.write(bytes(part_bytes.tolist()))
        shared = torch.frombuffer(memory, dtype=torch.uint8)
        before = shared.clone()

        one, many = (Linear(part, shared)(torch.ones(n_tokens, 256)) for n_tokens in (1, 20))

        assert torch.equal(one, expected)
        assert float((many - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
        assert torch.equal(shared, before)
        del shared


@pytest.mark.parametrize("scheme", [BF16, FP16], ids=name_of)
def test_rows_are_looked_up_by_id(scheme: Scheme) -> None:
    part, part_bytes = encoded(50, 72, scheme)
    ids = torch.tensor([3, 49, 0, 3])

    rows = Linear(part, part_bytes).rows(ids)

    assert torch.equal(rows, dequantize(part_bytes, 50, 72, scheme)[ids])
    assert rows.dtype == torch.float32


def test_no_ids_give_no_rows() -> None:
    part, part_bytes = encoded(5, 64, BF16)

    assert Linear(part, part_bytes).rows(torch.empty(0, dtype=torch.int64)).shape == (0, 64)


@pytest.mark.parametrize("ids", [[5], [0, -1]])
def test_ids_that_the_part_does_not_have_are_refused(ids: list[int]) -> None:
    part, part_bytes = encoded(5, 64, BF16)

    with pytest.raises(BadShape, match="ids are expected from 0 to 4"):
        Linear(part, part_bytes).rows(torch.tensor(ids))


def test_rows_of_a_quantized_part_are_refused() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)

    with pytest.raises(BadPart, match="16-bit parts only"):
        Linear(part, part_bytes).rows(torch.tensor([0]))


def test_a_part_of_one_row_is_a_vector() -> None:
    part, part_bytes = encoded(1, 100, FP16)

    vector = Linear(part, part_bytes).vector()

    assert torch.equal(vector, dequantize(part_bytes, 1, 100, FP16)[0])


def test_a_part_of_more_rows_is_no_vector() -> None:
    part, part_bytes = encoded(2, 64, FP16)

    with pytest.raises(BadShape, match="the part has 2"):
        Linear(part, part_bytes).vector()


def test_activations_and_bytes_that_do_not_fit_are_refused() -> None:
    part, part_bytes = encoded(8, 64, Q4_G64)
    linear = Linear(part, part_bytes)

    for x in (torch.zeros(64), torch.zeros(2, 63), torch.zeros(2, 64, dtype=torch.float16)):
        with pytest.raises(BadShape, match=r"float32 \[T, 64\] is expected"):
            linear(x)
    with pytest.raises(BadPart, match="bytes are expected"):
        Linear(Part("matrix", 16, 64, Q4_G64.name), part_bytes)


def assert_is_product(y: Tensor, x: Tensor, weights: Tensor) -> None:
    expected = x.double() @ weights.double().t()
    assert float((y - expected).abs().max() / expected.abs().max()) <= TOLERANCE
