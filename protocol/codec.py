"""Messages to bytes and back: the one door to msgpack. What comes in is bounded and checked here, and trusted after.

Nothing but the schema's records can come out of `decode`: no maps, no extension types, no depth beyond the schema's.
"""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from operator import attrgetter, call
from typing import Any

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

# Checks a value and returns it: as what msgpack packs, or as what a message has in its field. One is made for every
# kind in the table, once, and bound to the message's name: what a kind asks for is not looked up for every value.
_Convert = Callable[[Any], Any]


def encode(message: Message) -> bytes:
    """Return the bytes of a message; raise MalformedMessage if it breaks its own bounds."""
    number, name, to_plain = _WRITERS[type(message)]
    # The sender keeps its own bounds: what the peer would refuse is our bug, seen here.
    data = pack([number, *to_plain(message)])
    if len(data) > MESSAGE_NBYTES_MAX:
        raise MalformedMessage(f"{name}: {len(data)} bytes, at most {MESSAGE_NBYTES_MAX} are allowed")
    return data


def decode(data: bytes, channel: Channel, sender: Sender) -> Message:
    """Return the message in those bytes, if that sender may send it on that channel; raise MalformedMessage."""
    plain = unpack(data, nbytes_max=MESSAGE_NBYTES_MAX)
    if not isinstance(plain, list) or not plain or type(plain[0]) is not int:
        raise MalformedMessage("an array that starts with a message number was expected")
    from_plain = _READERS.get((channel, sender, plain[0]))
    if from_plain is None:
        raise MalformedMessage(f"message number {plain[0]} is not known from the {sender} on the {channel} channel")
    message: Message = from_plain(plain[1:])
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


def _writer(kind: Kind, name: str) -> _Convert:
    """Return what checks a field's value and makes it plain."""
    match kind:
        case Struct():
            return _struct_writer(kind, name)
        case Maybe(inner):
            write = _writer(inner, name)
            return lambda value: None if value is None else write(value)
        case Items(inner, length_max):
            return _items(_writer(inner, name), length_max, name, into=list)
        case Word():
            read = _word_reader(kind, name)
            return lambda value: str(read(value))
        case Count() | Real() | Text() | Blob():
            return _checked(kind, name)


def _reader(kind: Kind, name: str) -> _Convert:
    """Return what checks a plain value and makes it a field's."""
    match kind:
        case Struct():
            return _struct_reader(kind, name)
        case Maybe(inner):
            read = _reader(inner, name)
            return lambda value: None if value is None else read(value)
        case Items(inner, length_max):
            return _items(_reader(inner, name), length_max, name, into=tuple)
        case Word():
            return _word_reader(kind, name)
        case Count() | Real() | Text() | Blob():
            return _checked(kind, name)


def _struct_writer(struct: Struct, name: str) -> _Convert:
    if _is_plain(struct):
        return _plain_checker(struct, name)
    writers = [_writer(kind, name) for kind in struct.kinds]
    if issubclass(struct.cls, tuple):
        return lambda record: list(map(call, writers, record))
    names = list(struct.cls.__dataclass_fields__)  # type: ignore[attr-defined]
    if len(names) < 2:  # of one field attrgetter makes no tuple
        return lambda record: [write(getattr(record, name)) for write, name in zip(writers, names, strict=True)]
    values_of = attrgetter(*names)
    return lambda record: list(map(call, writers, values_of(record)))


def _struct_reader(struct: Struct, name: str) -> _Convert:
    cls, readers = struct.cls, [_reader(kind, name) for kind in struct.kinds]
    n_fields = len(readers)
    check_pair = _pair_checker(struct, name)

    def read(plain: object) -> object:
        if not isinstance(plain, list) or len(plain) != n_fields:
            raise MalformedMessage(f"{name}: an array of {n_fields} fields was expected in {cls.__name__}")
        if check_pair is not None:
            return tuple.__new__(cls, check_pair(plain))  # its class called takes twice as long
        return cls(*map(call, readers, plain))

    return read


def _is_plain(kind: Kind) -> bool:
    """Whether a value of that kind is what msgpack packs already: a number, or a tuple of nothing else."""
    if isinstance(kind, Struct):
        return issubclass(kind.cls, tuple) and all(map(_is_plain, kind.kinds))
    return isinstance(kind, Count)


def _plain_checker(struct: Struct, name: str) -> _Convert:
    """Return what checks a record that is plain, and returns it as it is."""
    check_pair = _pair_checker(struct, name)
    if check_pair is not None:
        return check_pair
    n_fields = len(struct.kinds)
    maxima = [(index, kind.maximum) for index, kind in enumerate(struct.kinds) if isinstance(kind, Count)]
    checks = [(index, _writer(kind, name)) for index, kind in enumerate(struct.kinds) if isinstance(kind, Struct)]

    def check(record: tuple[Any, ...]) -> tuple[Any, ...]:
        for index, check_field in checks:
            check_field(record[index])
        for index, maximum in maxima:
            value = record[index]
            if type(value) is not int or not 0 <= value <= maximum:
                raise MalformedMessage(f"{name}: {Count(maximum)} was expected")
        if len(record) != n_fields:
            raise MalformedMessage(f"{name}: {n_fields} fields were expected in {struct.cls.__name__}")
        return record

    return check


def _pair_checker(struct: Struct, name: str) -> _Convert | None:
    """Return what `_plain_checker` does of a record of two numbers, without a call for each; None for another record.

    It is the most frequent one, ExpertKey.
    """
    match struct.kinds:
        case (Count(first_max), Count(second_max)) if issubclass(struct.cls, tuple):
            pass
        case _:
            return None

    def check(record: Sequence[Any]) -> Sequence[Any]:
        first, second = record
        if type(first) is int and type(second) is int and 0 <= first <= first_max and 0 <= second <= second_max:
            return record
        raise MalformedMessage(f"{name}: {struct.cls.__name__} of {struct.kinds} was expected")

    return check


def _items(convert: _Convert, length_max: int, name: str, into: type[list[Any]] | type[tuple[Any, ...]]) -> _Convert:
    # A message holds its items in a tuple, msgpack gives a list: each way only one of them comes.
    from_type = tuple if into is list else list

    def convert_all(value: object) -> object:
        if not isinstance(value, from_type) or len(value) > length_max:
            raise MalformedMessage(f"{name}: a list of at most {length_max} was expected")
        return into(map(convert, value))

    return convert_all


def _word_reader(kind: Word, name: str) -> _Convert:
    words = {str(word): word for word in kind.words}

    def read(value: object) -> StrEnum:
        word = words.get(value) if isinstance(value, str) else None
        if word is None:
            raise MalformedMessage(f"{name}: no word of {kind.words.__name__}")
        return word

    return read


def _checked(kind: Count | Real | Text | Blob, name: str) -> _Convert:
    if isinstance(kind, Count):
        return _count(kind, name)
    fits = _fits(kind)

    def check(value: object) -> object:
        if not fits(value):
            raise MalformedMessage(f"{name}: {kind} was expected")
        return value

    return check


def _count(kind: Count, name: str) -> _Convert:
    """Return what `_checked` does of the most frequent kind, with one call less."""
    maximum = kind.maximum

    def check(value: object) -> int:
        if type(value) is int and 0 <= value <= maximum:
            return value
        raise MalformedMessage(f"{name}: {kind} was expected")

    return check


def _fits(kind: Real | Text | Blob) -> Callable[[Any], bool]:
    match kind:
        case Real():
            return lambda value: type(value) is float and math.isfinite(value) and value >= 0
        case Text(length_max):
            return lambda value: isinstance(value, str) and len(value) <= length_max
        case Blob(nbytes):
            return lambda value: isinstance(value, bytes) and len(value) == nbytes


_WRITERS = {spec.struct.cls: (spec.number, spec.name, _writer(spec.struct, spec.name)) for spec in SCHEMA}
# What each side may send on each channel.
_READERS = {(spec.channel, spec.sender, spec.number): _reader(spec.struct, spec.name) for spec in SCHEMA}
