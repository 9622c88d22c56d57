"""Linear: one part as a matrix to multiply with, to look rows up in, or as a vector."""

import mmap

import pytest
import torch

from protocol.layout import Part
from protocol.schemes import BF16, FP16, Q3_G64, Q4_G64, Scheme
from quant.errors import BadPart, BadShape
from quant.linear import Linear, LinearGroup
from quant.reference import dequantize
from quant.workspace import Workspace
from tests.unit.quant.matrices import ALL_SCHEMES, encoded, gaussian, have_equal_bits, name_of, relative_error


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
@pytest.mark.parametrize("n_tokens", [1, 17])
@pytest.mark.parametrize(("exact", "error"), [(False, 0.01), (True, 1e-6)])
def test_a_product_is_that_of_the_dense_matrix(scheme: Scheme, n_tokens: int, *, exact: bool, error: float) -> None:
    part, part_bytes = encoded(2101, 512, scheme)
    x = gaussian(n_tokens, 512, std=1.0, seed=1)

    with Workspace(2) as workspace:
        y = Linear(part, part_bytes, workspace=workspace, exact=exact)(x)

    assert relative_error(y, x.double() @ dequantize(part_bytes, 2101, 512, scheme).double().t()) <= error


@pytest.mark.parametrize("exact", [False, True])
def test_a_group_of_matrices_gives_what_each_gives(*, exact: bool) -> None:
    x = gaussian(3, 320, std=1.0)
    with Workspace(2) as workspace:
        linears = [
            Linear(*encoded(rows, 320, scheme), workspace=workspace, exact=exact)
            for rows, scheme in ((45, Q4_G64), (8, BF16), (333, Q3_G64))
        ]

        together = LinearGroup(linears)(x)

        assert all(have_equal_bits(y, linear(x)) for y, linear in zip(together, linears, strict=True))


def test_matrices_of_different_widths_are_no_group() -> None:
    with pytest.raises(BadShape, match="same number of inputs"):
        LinearGroup([Linear(*encoded(8, 64, Q4_G64)), Linear(*encoded(8, 128, Q4_G64))])


@pytest.mark.parametrize("exact", [False, True])
def test_the_bytes_may_lie_in_memory_that_cannot_be_written(*, exact: bool) -> None:
    # Bytes are read in place, from a mapping as the daemon hands it out.
    part, part_bytes = encoded(256, 256, Q3_G64)
    expected = Linear(part, part_bytes, exact=exact)(torch.ones(1, 256))
    with mmap.mmap(-1, part_bytes.numel()) as memory:
        memory.write(bytes(part_bytes.tolist()))
        shared = torch.frombuffer(memory, dtype=torch.uint8)
        before = shared.clone()

        one, many = (Linear(part, shared, exact=exact)(torch.ones(n_tokens, 256)) for n_tokens in (1, 20))

        assert have_equal_bits(one, expected)
        assert have_equal_bits(many, expected.expand(20, 256).contiguous())
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

    with pytest.raises(BadShape, match=r"float32 \[T, 64\] is expected"):
        Linear(part, part_bytes)(torch.zeros(2, 63))
    with pytest.raises(BadPart, match="bytes are expected"):
        Linear(Part("matrix", 16, 64, Q4_G64.name), part_bytes)
