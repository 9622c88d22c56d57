"""Pack and unpack against each other, and against the bytes that protocol/layout.py describes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import LayoutError
from protocol.layout import R8, Part, record_nbytes
from protocol.schemes import BF16, Q2_G16, Q3_G64, Q4_G64, Q8_G64, Scheme
from quant.errors import BadPart, BadShape
from quant.packing import QuantizedMatrix, pack, unpack
from tests.unit.quant.matrices import FIELDS, QUANTIZED, name_of, random_quantized, schemes, zero_quantized

# Bytes of a codes plane, counted by hand from the layout's description: byte 32 v + 4 r + b is byte b of lane r of
# vector v. Each item: scheme, row, input, code, and what the bytes hold when every other code is 0.
PLACES: list[tuple[Scheme, int, int, int, dict[int, int]]] = [
    (Q8_G64, 0, 0, 0xFF, {0: 0xFF}),
    (Q8_G64, 0, 3, 0xA5, {3: 0xA5}),
    (Q8_G64, 0, 4, 0xA5, {32: 0xA5}),
    (Q8_G64, 1, 0, 0xA5, {4: 0xA5}),
    (Q8_G64, 3, 5, 0x80, {45: 0x80}),
    (Q8_G64, 7, 63, 0xA5, {511: 0xA5}),
    (Q4_G64, 0, 0, 0xB, {0: 0x0B}),
    (Q4_G64, 0, 4, 0xB, {0: 0xB0}),
    (Q4_G64, 0, 7, 0xB, {3: 0xB0}),
    (Q4_G64, 1, 0, 0xB, {4: 0x0B}),
    (Q4_G64, 2, 8, 0xB, {40: 0x0B}),
    (Q4_G64, 5, 13, 0xF, {53: 0xF0}),
    (Q4_G64, 7, 63, 0xB, {255: 0xB0}),
    (Q2_G16, 0, 0, 3, {0: 0b00000011}),
    (Q2_G16, 0, 4, 3, {0: 0b00001100}),
    (Q2_G16, 0, 8, 2, {0: 0b00100000}),
    (Q2_G16, 0, 12, 1, {0: 0b01000000}),
    (Q2_G16, 0, 16, 3, {32: 0b00000011}),
    (Q2_G16, 4, 22, 3, {50: 0b00001100}),
    (Q2_G16, 7, 63, 3, {127: 0b11000000}),
    (Q3_G64, 0, 0, 7, {0: 0b00000111}),
    (Q3_G64, 0, 4, 7, {0: 0b00111000}),
    (Q3_G64, 0, 8, 5, {32: 0b00000101}),
    (Q3_G64, 0, 12, 5, {32: 0b00101000}),
    (Q3_G64, 0, 16, 5, {64: 0b00000101}),
    (Q3_G64, 0, 20, 5, {64: 0b00101000}),
    (Q3_G64, 0, 24, 7, {0: 0b11000000, 64: 0b01000000}),
    (Q3_G64, 0, 24, 4, {0: 0, 64: 0b01000000}),
    (Q3_G64, 0, 28, 6, {32: 0b10000000, 64: 0b10000000}),
    (Q3_G64, 2, 37, 7, {105: 0b00111000}),
    (Q3_G64, 7, 63, 5, {159: 0b01000000, 191: 0b10000000}),
]


@settings(max_examples=60, deadline=None)
@given(schemes, st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31))
def test_unpack_returns_what_pack_was_given(scheme: Scheme, rows: int, n_blocks: int, seed: int) -> None:
    matrix = random_quantized(rows, 64 * n_blocks, scheme, seed)

    back = unpack(pack(matrix), rows, 64 * n_blocks, scheme)

    assert back.scheme == scheme
    assert all(torch.equal(getattr(back, field), getattr(matrix, field)) for field in FIELDS)


@settings(max_examples=30, deadline=None)
@given(schemes, st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**31))
def test_pack_writes_the_bytes_of_the_layout(scheme: Scheme, rows: int, n_blocks: int, seed: int) -> None:
    matrix = random_quantized(rows, 64 * n_blocks, scheme, seed)

    part_bytes = pack(matrix)

    assert bytes(part_bytes.tolist()) == bytes_by_the_layout(matrix)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_a_matrix_of_several_strips_comes_back(scheme: Scheme) -> None:
    # More than the 1 M weights of a strip, and a last panel that is not whole.
    matrix = random_quantized(1003, 64 * 20, scheme)

    back = unpack(pack(matrix), 1003, 64 * 20, scheme)

    assert all(torch.equal(getattr(back, field), getattr(matrix, field)) for field in FIELDS)


@pytest.mark.parametrize(("scheme", "row", "column", "code", "expected"), PLACES)
def test_each_code_has_its_place(scheme: Scheme, row: int, column: int, code: int, expected: dict[int, int]) -> None:
    matrix = zero_quantized(8, 64, scheme)
    matrix.codes[row, column] = code

    part_bytes = pack(matrix)

    # One panel: three planes of 128 bytes and the stripe's metadata come before the codes.
    codes_plane = part_bytes[448:].tolist()
    assert {at: byte for at, byte in enumerate(codes_plane) if byte} == {
        at: byte for at, byte in expected.items() if byte
    }


def test_planes_and_metadata_of_groups_of_16_have_their_places() -> None:
    # Two panels of two stripes of 64 + 128 bytes: planes of 128 bytes at 0, 128, 256, panels at 384 and 768.
    matrix = zero_quantized(9, 128, Q2_G16)
    matrix.scale_step[8], matrix.base_min[0], matrix.base_step[1] = 1.0, 2.0, -2.0
    matrix.scale_codes[3, 2] = 11  # row 3, third group of block 0
    matrix.scale_codes[0, 4] = 12  # first group of block 1
    matrix.base_codes[3, 2] = 13
    matrix.base_codes[8, 7] = 14  # row 0 of panel 1, last group of block 1
    matrix.codes[1, 64] = 3  # row 1, first input of block 1

    part_bytes = pack(matrix)

    expected = {
        34: 0x80, 35: 0x3F,  # 1.0 as the ninth float of its plane
        131: 0x40,  # 2.0
        263: 0xC0,  # -2.0
        384 + 4 * 3 + 2: 11,
        384 + 192: 12,
        384 + 192 + 64 + 4: 3,
        384 + 32 + 4 * 3 + 2: 13,
        768 + 192 + 32 + 3: 14,
    }  # fmt: skip
    assert part_bytes.numel() == 384 + 2 * 384
    assert {at: byte for at, byte in enumerate(part_bytes.tolist()) if byte} == expected


def test_metadata_and_codes_of_groups_of_64_have_their_places() -> None:
    # Five blocks are a stripe of 64 + 4 * 256 bytes and one of 64 + 256: 1408 bytes a panel, a multiple of 128.
    matrix = zero_quantized(8, 320, Q4_G64)
    matrix.scale_codes[3, 0] = 11
    matrix.scale_codes[3, 3] = 12
    matrix.base_codes[2, 3] = 13
    matrix.base_codes[7, 4] = 14  # of the second stripe
    matrix.codes[0, 192] = 5  # block 3
    matrix.codes[1, 256] = 6  # block 4

    part_bytes = pack(matrix)

    expected = {
        384 + 3: 11,
        384 + 3 * 16 + 3: 12,
        384 + 3 * 16 + 8 + 2: 13,
        384 + 1088 + 8 + 7: 14,
        384 + 64 + 3 * 256: 5,
        384 + 1088 + 64 + 4: 6,
    }
    assert part_bytes.numel() == 384 + 1408
    assert {at: byte for at, byte in enumerate(part_bytes.tolist()) if byte} == expected


@pytest.mark.parametrize(("scheme", "megabytes"), [(Q4_G64, 93.63), (Q3_G64, 71.65), (Q2_G16, 66.40)])
def test_a_mixtral_expert_is_as_small_as_its_codes_scales_and_zeros(scheme: Scheme, megabytes: float) -> None:
    shapes = {"w1": (14336, 4096), "w3": (14336, 4096), "w2": (4096, 14336)}
    parts = [Part(name, rows, cols, scheme.name) for name, (rows, cols) in shapes.items()]

    nbytes = record_nbytes(R8, parts)

    assert megabytes * 1e6 * 0.999 <= nbytes <= megabytes * 1e6 * 1.005


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_wrong_shape_or_type_is_refused(field: str) -> None:
    matrix = random_quantized(8, 64, Q4_G64)
    tensor = getattr(matrix, field)

    # With fewer rows of codes it is the other fields that do not fit.
    for wrong in (tensor[:4], tensor.double()):
        with pytest.raises(BadShape, match="is expected"):
            pack(replace(matrix, **{field: wrong}))


def test_a_code_beyond_its_width_is_refused() -> None:
    matrix = zero_quantized(8, 64, Q3_G64)
    matrix.codes[1, 2] = 8

    with pytest.raises(BadShape, match="the largest is 8, 3 bits are expected"):
        pack(matrix)


def test_inputs_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(LayoutError, match="96 inputs do not divide"):
        unpack(torch.zeros(4096, dtype=torch.uint8), 8, 96, Q4_G64)


def test_bytes_that_are_not_the_part_are_refused() -> None:
    part_bytes = pack(random_quantized(8, 64, Q4_G64))

    with pytest.raises(BadPart, match="bytes are expected"):
        unpack(part_bytes[:-1], 8, 64, Q4_G64)
    with pytest.raises(BadPart, match="flat contiguous uint8"):
        unpack(part_bytes.view(torch.int8), 8, 64, Q4_G64)
    with pytest.raises(BadPart, match="flat contiguous uint8"):
        unpack(part_bytes[None], 8, 64, Q4_G64)
    with pytest.raises(BadPart, match="multiple of 4"):
        unpack(torch.cat((part_bytes[:1], part_bytes))[1:], 8, 64, Q4_G64)
    with pytest.raises(BadPart, match="holds no codes"):
        unpack(part_bytes, 8, 64, BF16)


def bytes_by_the_layout(matrix: QuantizedMatrix) -> bytes:
    """Return the part byte by byte, as the docstring of protocol/layout.py says it; slow and without tensors."""
    rows, cols = matrix.codes.shape
    n_panels, n_blocks, per_stripe = -(-rows // 8), cols // 64, 1 if matrix.scheme == Q2_G16 else 4
    part = bytearray()
    for values in (matrix.scale_step, matrix.base_min, matrix.base_step):
        part += padded(values.numpy().tobytes() + bytes(4 * (8 * n_panels - rows)))
    for panel in range(n_panels):
        stripes = bytearray()
        for first in range(0, n_blocks, per_stripe):
            blocks = range(first, min(first + per_stripe, n_blocks))
            for block in blocks:
                for plane in (matrix.scale_codes, matrix.base_codes):
                    stripes += block_of(plane, panel, block, cols)
            stripes += bytes(64 // per_stripe * (per_stripe - len(blocks)))
            for block in blocks:
                stripes += codes_block(matrix, panel, block)
        part += padded(stripes)
    return bytes(part)


def padded(plane: bytes | bytearray) -> bytes:
    return bytes(plane) + bytes(-len(plane) % 128)


def block_of(plane: torch.Tensor, panel: int, block: int, cols: int) -> bytes:
    per_block = plane.shape[1] * 64 // cols
    values = bytearray()
    for row in range(8 * panel, 8 * panel + 8):
        for group in range(block * per_block, (block + 1) * per_block):
            values.append(int(plane[row, group]) if row < plane.shape[0] else 0)
    return bytes(values)


def codes_block(matrix: QuantizedMatrix, panel: int, block: int) -> bytes:
    nbits = matrix.scheme.nbits
    rows = [
        matrix.codes[row, 64 * block : 64 * block + 64].tolist() if row < matrix.codes.shape[0] else [0] * 64
        for row in range(8 * panel, 8 * panel + 8)
    ]
    return bytes(code_byte(rows[r], v, b, nbits) for v in range(2 * nbits) for r in range(8) for b in range(4))


def code_byte(c: list[int], v: int, b: int, nbits: int) -> int:
    if nbits == 8:
        return c[4 * v + b]
    if nbits == 4:
        return c[8 * v + b] | c[8 * v + 4 + b] << 4
    if nbits == 2:
        return c[16 * v + b] | c[16 * v + b + 4] << 2 | c[16 * v + b + 8] << 4 | c[16 * v + b + 12] << 6
    h, third = divmod(v, 3)
    s = [c[32 * h + 4 * i + b] for i in range(8)]
    return (
        s[0] | s[1] << 3 | (s[6] & 3) << 6,
        s[2] | s[3] << 3 | (s[7] & 3) << 6,
        s[4] | s[5] << 3 | (s[6] >> 2) << 6 | (s[7] >> 2) << 7,
    )[third]
