"""The header of a safetensors file, both ways: reading bounds everything before it is used, writing aligns the data.

A file is the header's length (u64, little endian), the header (JSON), the data. Tensors cover the data without holes;
offsets count from the data's first byte. Knows neither models nor stores, and reads no tensor.
"""

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from expertd.convert.errors import MalformedCheckpoint
from expertd.convert.json_file import parse_object
from protocol.layout import PAGE_NBYTES, aligned

HEADER_NBYTES_MAX = 100_000_000

_LENGTH_NBYTES = 8
_DIMS_MAX = 8
_DIM_MAX = 1 << 40
_ITEM_NBYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor of a file; `offset` counts from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: BinaryIO, name: str) -> dict[str, TensorSlot]:
    """Return every tensor's place in a safetensors file; raise MalformedCheckpoint with the file's name."""
    return read_header_of(file, name, os.fstat(file.fileno()).st_size)


def read_header_of(file: BinaryIO, name: str, file_nbytes: int) -> dict[str, TensorSlot]:
    """Return the same for a file of which perhaps only the beginning is here."""
    header_nbytes = _read_length(file, name, file_nbytes)
    data_offset = _LENGTH_NBYTES + header_nbytes
    document = parse_object(file.read(header_nbytes), f"{name}: the safetensors header")
    document.pop("__metadata__", None)
    slots = {tensor: _read_slot(f"{name}: {tensor!r:.200}", item, data_offset) for tensor, item in document.items()}
    _check_cover(name, slots, data_offset, file_nbytes)
    return slots


def build_header(tensors: Sequence[tuple[str, int]]) -> bytes:
    """Return length and header for flat U8 tensors (name, nbytes) in that order, padded so that data starts a page."""
    document: dict[str, object] = {"__metadata__": {"format": "expertd"}}
    offset = 0
    for name, nbytes in tensors:
        document[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    header_nbytes = aligned(_LENGTH_NBYTES + len(text), PAGE_NBYTES) - _LENGTH_NBYTES
    return struct.pack("<Q", header_nbytes) + text.ljust(header_nbytes, b" ")


def _read_length(file: BinaryIO, name: str, file_nbytes: int) -> int:
    prefix = file.read(_LENGTH_NBYTES)
    if len(prefix) < _LENGTH_NBYTES:
        raise MalformedCheckpoint(f"{name}: truncated; {file_nbytes} bytes are too few for a safetensors file")
    (header_nbytes,) = struct.unpack("<Q", prefix)
    if header_nbytes > HEADER_NBYTES_MAX:
        raise MalformedCheckpoint(
            f"{name}: no safetensors file; a header of {header_nbytes} bytes is announced, at most "
            f"{HEADER_NBYTES_MAX} are allowed"
        )
    if _LENGTH_NBYTES + header_nbytes > file_nbytes:
        raise MalformedCheckpoint(
            f"{name}: truncated; a header of {header_nbytes} bytes is announced, the file has {file_nbytes} bytes"
        )
    return int(header_nbytes)


def _read_slot(name: str, item: object, data_offset: int) -> TensorSlot:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise MalformedCheckpoint(f"{name}: dtype, shape and data_offsets are expected")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str):
        raise MalformedCheckpoint(f"{name}: the name of a type is expected, {dtype!r:.60} came")
    if not _are_counts(shape) or len(shape) > _DIMS_MAX:
        raise MalformedCheckpoint(f"{name}: a shape of at most {_DIMS_MAX} counts is expected, {shape!r:.60} came")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedCheckpoint(f"{name}: two offsets in order are expected, {offsets!r:.60} came")
    begin, end = offsets
    item_nbytes = _ITEM_NBYTES.get(dtype)
    if item_nbytes is not None and math.prod(shape) * item_nbytes != end - begin:
        raise MalformedCheckpoint(
            f"{name}: {dtype} {shape} needs {math.prod(shape) * item_nbytes} bytes, its offsets give {end - begin}"
        )
    return TensorSlot(dtype, tuple(shape), data_offset + begin, end - begin)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _DIM_MAX for value in values)


def _check_cover(name: str, slots: dict[str, TensorSlot], data_offset: int, file_nbytes: int) -> None:
    """Raise MalformedCheckpoint unless the tensors cover the data exactly: no overlap, no hole, no rest."""
    spans = sorted((slot.offset, slot.offset + slot.nbytes, tensor) for tensor, slot in slots.items())
    spans = [(data_offset, data_offset, "the header"), *spans]
    for (_, end, _), (begin, _, tensor) in pairwise(spans):
        if begin < end:
            raise MalformedCheckpoint(f"{name}: {tensor!r:.200} overlaps the tensor before it")
        if begin > end:
            raise MalformedCheckpoint(f"{name}: before {tensor!r:.200} {begin - end} bytes belong to nothing")
    data_end = spans[-1][1]
    if data_end > file_nbytes:
        raise MalformedCheckpoint(
            f"{name}: truncated; its header lists {data_end} bytes, the file has {file_nbytes}; fetch it again"
        )
    if data_end < file_nbytes:
        raise MalformedCheckpoint(f"{name}: {file_nbytes - data_end} bytes after the last tensor belong to nothing")
