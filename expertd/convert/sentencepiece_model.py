"""A sentencepiece model file: its pieces with scores and kinds, and how text is normalized. Reads what anybody may have
made: lengths are bounded before they are used. Knows no tokenizer.

The file is a protobuf message (sentencepiece_model.proto): fields of a number and a wire type, of which those that
matter here are read and the others skipped.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from expertd.convert.errors import MalformedCheckpoint

MODEL_FILE = "tokenizer.model"
_PIECES_MAX = 1 << 20
_PIECE_NBYTES_MAX = 1 << 12

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Kind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    """How text is cut into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: its text, with ▁ for a space; among pieces that could be merged the one with the highest score is."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class SentencepieceModel:
    """The pieces by id, the algorithm, and what is done to text first."""

    pieces: tuple[Piece, ...]
    algorithm: Algorithm
    byte_fallback: bool
    bos_id: int
    eos_id: int
    unk_id: int
    charsmap: bytes
    adds_prefix: bool
    removes_extra_spaces: bool


def read_sentencepiece_model(data: bytes) -> SentencepieceModel:
    """Return the model in those bytes; raise MalformedCheckpoint."""
    try:
        return _read(data)
    except (ValueError, IndexError, struct.error) as error:
        raise MalformedCheckpoint(f"{MODEL_FILE}: no sentencepiece model ({error!s:.100})") from None


def _read(data: bytes) -> SentencepieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            if len(pieces) == _PIECES_MAX:
                raise ValueError(f"more than {_PIECES_MAX} pieces")
            pieces.append(_read_piece(_bytes(value)))
        elif number == _TRAINER:
            trainer |= dict(_fields(_bytes(value)))
        elif number == _NORMALIZER:
            normalizer |= dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencepieceModel(
        pieces=tuple(pieces),
        algorithm=Algorithm(_int(trainer.get(3, 1))),
        byte_fallback=_int(trainer.get(35, 0)) != 0,
        unk_id=_int(trainer.get(40, 0)),
        bos_id=_int(trainer.get(41, 1)),
        eos_id=_int(trainer.get(42, 2)),
        charsmap=_bytes(normalizer.get(2, b"")),
        adds_prefix=_int(normalizer.get(3, 1)) != 0,
        removes_extra_spaces=_int(normalizer.get(4, 1)) != 0,
    )


def _read_piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text = _bytes(fields.get(1, b""))
    if not 0 < len(text) <= _PIECE_NBYTES_MAX:
        raise ValueError(f"a piece of {len(text)} bytes")
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    return Piece(text.decode(), score, Kind(_int(fields.get(3, 1))))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field: a varint as an int that may be negative, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, at = _varint(data, at)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire_type == _BYTES:
            nbytes, at = _varint(data, at)
        elif wire_type in {_FIXED32, _FIXED64}:
            nbytes = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if at + nbytes > len(data):
            raise ValueError(f"it is cut at byte {len(data)}")
        yield number, data[at : at + nbytes]
        at += nbytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError(f"a number that does not end at byte {at}")


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number is expected")  # noqa: TRY004  # a malformed file, like the others
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes are expected")  # noqa: TRY004
    return value
