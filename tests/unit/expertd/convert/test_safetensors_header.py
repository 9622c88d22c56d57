import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.convert.errors import MalformedCheckpoint
from expertd.convert.safetensors_header import TensorSlot, build_header, read_header

NAME = "model.safetensors"


def write(path: Path, header: object, data_nbytes: int = 0, *, announced: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(text) if announced is None else announced)
    path.write_bytes(length + text + bytes(data_nbytes))
    return path


def tensor(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def refusal_of(path: Path) -> str:
    with path.open("rb") as file, pytest.raises(MalformedCheckpoint) as refusal:
        read_header(file, NAME)
    line = str(refusal.value)
    assert "\n" not in line
    assert len(line) < 600
    assert line.startswith(f"{NAME}: ")
    return line.removeprefix(f"{NAME}: ")


def test_every_tensor_is_found_with_its_offset_in_the_file(tmp_path: Path) -> None:
    header = {"__metadata__": {"a": "b"}, "x": tensor(0, 24, "F32", [2, 3]), "y": tensor(24, 28, "BF16", [2])}
    path = write(tmp_path / NAME, header, 28)
    data_offset = path.stat().st_size - 28

    with path.open("rb") as file:
        slots = read_header(file, NAME)

    assert slots == {
        "x": TensorSlot("F32", (2, 3), data_offset, 24),
        "y": TensorSlot("BF16", (2,), data_offset + 24, 4),
    }


def test_a_tensor_of_an_unknown_type_has_its_place_all_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / NAME, {"x": tensor(0, 3, "F6_NEW", [4])}, 3)

    with path.open("rb") as file:
        slots = read_header(file, NAME)

    assert slots["x"].nbytes == 3


def test_a_header_that_is_longer_than_any_allowed_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path / NAME, b"{}", announced=1 << 62)

    line = refusal_of(path)

    assert line == (f"no safetensors file; a header of {1 << 62} bytes is announced, at most 100000000 are allowed")


def test_a_header_that_is_longer_than_the_file_is_called_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / NAME, b"{}", announced=1000)

    line = refusal_of(path)

    assert line == "truncated; a header of 1000 bytes is announced, the file has 10 bytes"


@pytest.mark.parametrize("nbytes", [0, 7])
def test_a_file_too_short_for_a_length_is_called_truncated(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / NAME
    path.write_bytes(bytes(nbytes))

    line = refusal_of(path)

    assert line == f"truncated; {nbytes} bytes are too few for a safetensors file"


def test_a_file_that_was_cut_is_called_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / NAME, {"x": tensor(0, 100)}, 60)
    file_nbytes = path.stat().st_size

    line = refusal_of(path)

    assert line == (f"truncated; its header lists {file_nbytes + 40} bytes, the file has {file_nbytes}; fetch it again")


@pytest.mark.parametrize(
    ("header", "data_nbytes", "expected"),
    [
        (b"{", 0, "the safetensors header: not JSON"),
        (b"\xff\xfe", 0, "the safetensors header: not JSON"),
        (b"[" * 100_000, 0, "the safetensors header: not JSON"),
        (b"[]", 0, "the safetensors header: a JSON object is expected, list came"),
        (b'{"x": 1, "x": 2}', 0, "the safetensors header: not JSON (key 'x' stands twice)"),
        ({"x": 1}, 0, "'x': dtype, shape and data_offsets are expected"),
        ({"x": {"dtype": "U8", "shape": [1]}}, 1, "'x': dtype, shape and data_offsets are expected"),
        ({"x": tensor(0, 1) | {"more": 1}}, 1, "'x': dtype, shape and data_offsets are expected"),
        ({"x": tensor(0, 1) | {"dtype": 8}}, 1, "'x': the name of a type is expected, 8 came"),
        ({"x": tensor(0, 1) | {"shape": [-1]}}, 1, "'x': a shape of at most 8 counts is expected, [-1] came"),
        ({"x": tensor(0, 1) | {"shape": [True]}}, 1, "'x': a shape of at most 8 counts is expected, [True] came"),
        ({"x": tensor(0, 1) | {"shape": [1] * 9}}, 1, "'x': a shape of at most 8 counts is expected"),
        ({"x": tensor(0, 1) | {"shape": [1 << 60]}}, 1, "'x': a shape of at most 8 counts is expected"),
        ({"x": tensor(0, 1) | {"data_offsets": [1, 0]}}, 1, "'x': two offsets in order are expected, [1, 0] came"),
        ({"x": tensor(0, 1) | {"data_offsets": [-1, 0]}}, 1, "'x': two offsets in order are expected, [-1, 0] came"),
        ({"x": tensor(0, 1) | {"data_offsets": [0.0, 1.0]}}, 1, "'x': two offsets in order are expected"),
        ({"x": tensor(0, 4, "F32", [2])}, 4, "'x': F32 [2] needs 8 bytes, its offsets give 4"),
        ({"x": tensor(0, 8), "y": tensor(4, 12)}, 12, "'y' overlaps the tensor before it"),
        ({"x": tensor(0, 8), "y": tensor(0, 8)}, 8, "'y' overlaps the tensor before it"),
        ({"x": tensor(0, 8), "y": tensor(12, 16)}, 16, "before 'y' 4 bytes belong to nothing"),
        ({"x": tensor(4, 8)}, 8, "before 'x' 4 bytes belong to nothing"),
        ({"x": tensor(0, 8)}, 12, "4 bytes after the last tensor belong to nothing"),
        ({}, 3, "3 bytes after the last tensor belong to nothing"),
        ({"a\nb" * 1000: 1}, 0, "'a\\nb"),
    ],
)
def test_a_hostile_header_is_refused_in_one_line(
    tmp_path: Path, header: object, data_nbytes: int, expected: str
) -> None:
    path = write(tmp_path / NAME, header, data_nbytes)

    line = refusal_of(path)

    assert line.startswith(expected)


VALID = json.dumps({"x": tensor(0, 4, "F32", [1]), "y": tensor(4, 8, "BF16", [2, 1])}).encode()


@given(st.binary(max_size=4), st.integers(0, len(VALID)), st.integers(0, 4))
def test_a_mutated_header_is_read_in_bounds_or_refused(
    tmp_path_factory: pytest.TempPathFactory, inserted: bytes, at: int, n_removed: int
) -> None:
    path = tmp_path_factory.mktemp("header") / NAME
    write(path, VALID[:at] + inserted + VALID[at + n_removed :], 8)

    with path.open("rb") as file:
        try:
            slots = read_header(file, NAME)
        except MalformedCheckpoint:
            return

    assert sum(slot.nbytes for slot in slots.values()) == 8
    assert all(slot.offset + slot.nbytes <= path.stat().st_size for slot in slots.values())


@given(st.lists(st.integers(1, 20).map(lambda pages: pages * 4096), max_size=200))
def test_a_built_header_is_read_back_and_its_data_starts_a_page(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("header") / NAME
    header = build_header([(f"t{index}", nbytes) for index, nbytes in enumerate(sizes)])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(sizes))

    with path.open("rb") as file:
        slots = read_header(file, NAME)

    assert len(header) % 4096 == 0
    assert [slot.nbytes for slot in slots.values()] == sizes
    assert all(slot.offset % 4096 == 0 for slot in slots.values())
