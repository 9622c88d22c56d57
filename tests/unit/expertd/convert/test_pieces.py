"""Matrices as the bytes of their parts, a piece of rows at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertd.convert.errors import NotFinite
from expertd.convert.matrices import SourceMatrix
from expertd.convert.pieces import EncodedMatrix
from expertd.convert.safetensors_header import TensorSlot
from expertd.convert.shard import TensorPlace, shard_of_file
from expertd.convert.worker_messages import MatrixSource
from protocol.layout import Part, part_nbytes
from protocol.schemes import BF16, FP16, Scheme
from quant.encode import encode_part
from quant.packing import joined, pack, unpack
from quant.weight_error import weight_error
from tests.unit.quant.matrices import QUANTIZED, gaussian, name_of

ROWS, COLS = 43, 128
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def source_of(path: Path, weight: Tensor) -> SourceMatrix:
    """Return the weight as it lies in a shard, behind some bytes of others."""
    path.write_bytes(b"12345678" + bytes(weight.contiguous().view(torch.uint8).flatten().tolist()))
    with path.open("rb") as file:
        shard = shard_of_file(path.name, file.fileno())
    slot = TensorSlot(DTYPES[weight.dtype], tuple(weight.shape), 8, weight.numel() * weight.element_size())
    return SourceMatrix(MatrixSource("w1.weight", str(path), TensorPlace(shard, slot)), *weight.shape)


def bytes_of(encoded: EncodedMatrix) -> Tensor:
    """Return what a part is when all its bytes are where they belong; what none came for is 0xff."""
    data = bytearray(b"\xff" * part_nbytes(encoded.part))
    for placed in encoded.bytes("w1.weight"):
        data[placed.offset : placed.offset + len(placed.data)] = placed.data
    return torch.frombuffer(data, dtype=torch.uint8)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_a_quantized_matrix_in_pieces_is_each_of_them_by_itself(tmp_path: Path, scheme: Scheme) -> None:
    weight = gaussian(ROWS, COLS)
    encoded = EncodedMatrix(
        source_of(tmp_path / "s", weight),
        Part("w1", ROWS, COLS, scheme.name),
        solver="shortcut",
        refine=True,
        n_elements_max=17 * COLS,
    )

    part_bytes = bytes_of(encoded)

    pieces = [weight[:16], weight[16:32], weight[32:]]
    parts = [Part("w1", len(piece), COLS, scheme.name) for piece in pieces]
    alone = [
        unpack(encode_part(piece, part), len(piece), COLS, scheme) for piece, part in zip(pieces, parts, strict=True)
    ]
    assert not encoded.is_in_order
    assert torch.equal(part_bytes, pack(joined(alone)))
    assert encoded.weight_error == weight_error(weight, encoded.part, part_bytes)


@pytest.mark.parametrize("scheme", [*QUANTIZED, BF16, FP16], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_of_one_piece_is_encoded_whole_and_comes_in_order(
    tmp_path: Path, scheme: Scheme, dtype: torch.dtype
) -> None:
    weight = gaussian(ROWS, COLS).to(dtype)
    part = Part("w1", ROWS, COLS, scheme.name)
    encoded = EncodedMatrix(source_of(tmp_path / "s", weight), part, solver="shortcut", refine=False)

    part_bytes = bytes_of(encoded)

    assert encoded.is_in_order
    assert torch.equal(part_bytes, encode_part(weight, part, refine=False))
    assert encoded.weight_error == weight_error(weight, part, part_bytes)


@pytest.mark.parametrize("shape", [(ROWS, COLS), (1, 3000), (5, 30)])
def test_16_bit_pieces_follow_each_other(tmp_path: Path, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    part = Part("w1", *shape, FP16.name)
    encoded = EncodedMatrix(
        source_of(tmp_path / "s", weight), part, solver="shortcut", refine=True, n_elements_max=10 * shape[1]
    )

    placed = list(encoded.bytes("w1.weight"))

    assert encoded.is_in_order
    assert [one.offset for one in placed] == [sum(len(one.data) for one in placed[:n]) for n in range(len(placed))]
    assert b"".join(one.data for one in placed) == bytes(encode_part(weight, part).tolist())


@pytest.mark.parametrize(
    ("largest", "scheme"), [(1.0, "fp16"), (65519.0, "fp16"), (65520.0, "bf16"), (1e-4, "fp16"), (1e-5, "bf16")]
)
def test_f32_in_16_bits_is_what_loses_least(tmp_path: Path, largest: float, scheme: str) -> None:
    weight = gaussian(ROWS, COLS)
    weight *= largest / float(weight.abs().max())
    weight[7, 9] = -largest

    encoded = EncodedMatrix(
        source_of(tmp_path / "s", weight), Part("w1", ROWS, COLS, "fp16"), solver="shortcut", refine=True
    )

    assert encoded.part.scheme == scheme
    bytes_of(encoded)
    assert encoded.weight_error < 2e-3


def test_f32_zeros_and_16_bit_weights_of_any_size_keep_their_type(tmp_path: Path) -> None:
    for weight in (torch.zeros(ROWS, COLS), gaussian(ROWS, COLS, std=1e-7).half()):
        encoded = EncodedMatrix(
            source_of(tmp_path / "s", weight), Part("w1", ROWS, COLS, "fp16"), solver="shortcut", refine=True
        )

        bytes_of(encoded)

        assert (encoded.part.scheme, encoded.weight_error) == ("fp16", 0.0)


@pytest.mark.parametrize("scheme", ["bf16", "4bit-g64"])
def test_a_weight_that_is_not_finite_is_seen_in_whichever_piece_it_is(tmp_path: Path, scheme: str) -> None:
    weight = gaussian(ROWS, COLS)
    weight[42, 1] = -torch.inf
    encoded = EncodedMatrix(
        source_of(tmp_path / "s", weight),
        Part("w1", ROWS, COLS, scheme),
        solver="shortcut",
        refine=True,
        n_elements_max=16 * COLS,
    )

    with pytest.raises(NotFinite, match=r"w1\.weight: holds weights that are NaN or infinite"):
        bytes_of(encoded)
