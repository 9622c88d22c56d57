"""Messages to bytes and back: the one door to msgpack. What comes in is bounded and checked here, and trusted after.

Nothing but the schema's records can come out of `decode`: no maps, no extension types, no depth beyond the schema's.
"""

import math
from enum import StrEnum

import msgpack

from protocol.errors import MalformedMessage
from protocol.messages import Message
from protocol.schema import (
    MESSAGE_NBYTES_MAX,
    SCHEMA,
    Blob,
    Channel,
    Count,
    Items,
    Kind,
    Maybe,
    Real,
    Sender,
    Struct,
    Text,
    Word,
)

# Built once from the constant table: what each side may send on each channel.
_BY_CLASS = {spec.struct.cls: spec for spec in SCHEMA}
_BY_NUMBER = {(spec.channel, spec.sender, spec.number): spec for spec in SCHEMA}


def encode(message: Message) -> bytes:
    """Return the bytes of a message; raise MalformedMessage if it breaks its own bounds."""
    spec = _BY_CLASS[type(message)]
    fields = _plain(spec.struct, message)
    # The sender keeps its own bounds: what the peer would refuse is our bug, seen here.
    _record(spec.struct, fields, spec.name)
    data = pack([spec.number, *fields])
    if len(data) > MESSAGE_NBYTES_MAX:
        raise MalformedMessage(f"{spec.name}: {len(data)} bytes, at most {MESSAGE_NBYTES_MAX} are allowed")
    return data


def decode(data: bytes, channel: Channel, sender: Sender) -> Message:
    """Return the message in those bytes, if that sender may send it on that channel; raise MalformedMessage."""
    plain = unpack(data, nbytes_max=MESSAGE_NBYTES_MAX)
    if not isinstance(plain, list) or not plain or type(plain[0]) is not int:
        raise MalformedMessage("an array that starts with a message number was expected")
    spec = _BY_NUMBER.get((channel, sender, plain[0]))
    if spec is None:
        raise MalformedMessage(f"message number {plain[0]} is not known from the {sender} on the {channel} channel")
    message: Message = _record(spec.struct, plain[1:], spec.name)  # type: ignore[assignment]
    return message


def pack(plain: object) -> bytes:
    """Return plain lists, numbers, texts and bytes as msgpack."""
    try:
        packed: bytes = msgpack.packb(plain, use_bin_type=True)
    except (ValueError, OverflowError) as error:
        raise MalformedMessage(f"cannot be packed ({type(error).__name__})") from None
    return packed


def unpack(data: bytes, *, nbytes_max: int) -> object:
    """Return what plain msgpack of bounded size holds; raise MalformedMessage."""
    if len(data) > nbytes_max:
        raise MalformedMessage(f"{len(data)} bytes, at most {nbytes_max} are allowed")
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise MalformedMessage(f"not msgpack of plain arrays ({type(error).__name__})") from None


def _plain(struct: Struct, record: object) -> list[object]:
    return [_plain_value(kind, value) for kind, value in zip(struct.kinds, _fields(struct, record), strict=True)]


def _plain_value(kind: Kind, value: object) -> object:
    if isinstance(kind, Maybe):
        return None if value is None else _plain_value(kind.kind, value)
    if isinstance(kind, Struct):
        return _plain(kind, value)
    if isinstance(kind, Items):
        return [_plain_value(kind.kind, item) for item in value]  # type: ignore[attr-defined]
    return str(value) if isinstance(value, StrEnum) else value


def _fields(struct: Struct, record: object) -> tuple[object, ...]:
    if isinstance(record, tuple):
        return record
    names = struct.cls.__dataclass_fields__  # type: ignore[attr-defined]
    return tuple(getattr(record, name) for name in names)


def _record(struct: Struct, plain: object, name: str) -> object:
    if not isinstance(plain, list) or len(plain) != len(struct.kinds):
        raise MalformedMessage(f"{name}: an array of {len(struct.kinds)} fields was expected in {struct.cls.__name__}")
    return struct.cls(*(_value(kind, value, name) for kind, value in zip(struct.kinds, plain, strict=True)))


def _value(kind: Kind, value: object, name: str) -> object:
    if isinstance(kind, Struct):
        return _record(kind, value, name)
    if isinstance(kind, Maybe):
        return None if value is None else _value(kind.kind, value, name)
    if isinstance(kind, Items):
        if not isinstance(value, list) or len(value) > kind.length_max:
            raise MalformedMessage(f"{name}: a list of at most {kind.length_max} was expected")
        return tuple(_value(kind.kind, item, name) for item in value)
    if isinstance(kind, Word):
        return _word(kind, value, name)
    if not _fits(kind, value):
        raise MalformedMessage(f"{name}: {kind} was expected")
    return value


def _word(kind: Word, value: object, name: str) -> StrEnum:
    try:
        return kind.words(str(value))
    except ValueError:
        raise MalformedMessage(f"{name}: no word of {kind.words.__name__}") from None


def _fits(kind: Count | Real | Text | Blob, value: object) -> bool:
    match kind:
        case Count(maximum):
            return type(value) is int and 0 <= value <= maximum
        case Real():
            return type(value) is float and math.isfinite(value) and value >= 0
        case Text(length_max):
            return isinstance(value, str) and len(value) <= length_max
        case Blob(nbytes):
            return isinstance(value, bytes) and len(value) == nbytes
