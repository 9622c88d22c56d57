import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.codec import decode, encode, pack, unpack
from protocol.errors import MalformedMessage
from protocol.handles import ExpertKey
from protocol.messages import Message
from protocol.schema import (
    KEYS_MAX,
    MESSAGE_NBYTES_MAX,
    SCHEMA,
    Blob,
    Channel,
    Count,
    Items,
    Kind,
    Maybe,
    MessageSpec,
    Real,
    Sender,
    Struct,
    Text,
    Word,
)
from tests.support.messages import EXAMPLES

GOLDEN_FILE = Path(__file__).parents[2] / "golden" / "frames.json"
PROTOCOL_PAGE = Path(__file__).parents[3] / "docs" / "protocol.md"


def spec_of(message: Message) -> MessageSpec:
    return next(spec for spec in SCHEMA if spec.struct.cls is type(message))


def values(kind: Kind) -> st.SearchStrategy[object]:  # noqa: C901 - one line for each kind
    match kind:
        case Count(maximum):
            return st.integers(0, maximum)
        case Real():
            return st.floats(0, 1e12, allow_nan=False)
        case Text(length_max):
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=min(length_max, 20))
        case Blob(nbytes):
            return st.binary(min_size=nbytes, max_size=nbytes)
        case Word(words):
            return st.sampled_from(list(words))
        case Maybe(inner):
            return st.none() | values(inner)
        case Items(inner, length_max):
            return st.lists(values(inner), max_size=min(length_max, 4)).map(tuple)
        case Struct(cls, kinds):
            return st.tuples(*map(values, kinds)).map(lambda fields: cls(*fields))


ANY_MESSAGE = st.one_of([values(spec.struct) for spec in SCHEMA])


@given(ANY_MESSAGE)
def test_every_message_comes_out_as_it_went_in(message: Message) -> None:
    spec = spec_of(message)

    decoded = decode(encode(message), spec.channel, spec.sender)

    assert decoded == message
    assert type(decoded) is type(message)


def test_there_is_an_example_of_every_message() -> None:
    assert [type(message) for message in EXAMPLES] == [spec.struct.cls for spec in SCHEMA]


def test_golden_frames_stay_as_they_are() -> None:
    golden = json.loads(GOLDEN_FILE.read_text())

    frames = {type(message).__name__: encode(message).hex() for message in EXAMPLES}

    assert frames == golden


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_is_refused_on_the_wrong_channel_and_from_the_wrong_sender(message: Message) -> None:
    spec = spec_of(message)

    for channel in Channel:
        for sender in Sender:
            if (channel, sender) != (spec.channel, spec.sender):
                with pytest.raises(MalformedMessage):
                    decode(encode(message), channel, sender)


@pytest.mark.parametrize(
    "plain",
    [
        [],
        [True, 1, 1, "0.1.0"],
        ["1", 1, 1, "0.1.0"],
        [1, 1, 1],
        [1, 1, 1, "0.1.0", 0],
        [1, 1, -1, "0.1.0"],
        [1, 1, 1 << 16, "0.1.0"],
        [1, 1, True, "0.1.0"],
        [1, 1, 1.0, "0.1.0"],
        [1, 1, 1, b"0.1.0"],
        [1, 1, 1, "x" * 65],
        [99],
        {"a": 1},
        5,
        None,
    ],
    ids=repr,
)
def test_a_message_out_of_its_bounds_is_malformed(plain: object) -> None:
    data = pack(plain)

    with pytest.raises(MalformedMessage):
        decode(data, Channel.CONTROL, Sender.CLIENT)


@given(st.binary(max_size=200))
def test_junk_is_malformed_or_a_message_but_never_another_error(data: bytes) -> None:
    for channel in Channel:
        for sender in Sender:
            try:
                decode(data, channel, sender)
            except MalformedMessage:
                continue


@pytest.mark.parametrize(
    "data", [b"\x91" * 5000 + b"\x01", b"\xdd\xff\xff\xff\xff", b"\xc7\x05\x01hello", b"\xdb\xff\xff\xff\xff"]
)
def test_deep_huge_and_extension_frames_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        unpack(data, nbytes_max=MESSAGE_NBYTES_MAX)


def test_a_message_longer_than_the_limit_is_malformed_before_it_is_parsed() -> None:
    with pytest.raises(MalformedMessage, match="131073 bytes"):
        decode(bytes(MESSAGE_NBYTES_MAX + 1), Channel.CONTROL, Sender.CLIENT)


def test_a_sender_keeps_its_own_bounds() -> None:
    with pytest.raises(MalformedMessage, match="at most 256"):
        encode(m.Acquire(1, (ExpertKey(0, 0),) * (KEYS_MAX + 1)))


def test_the_protocol_page_lists_every_message_field_and_word() -> None:
    page = PROTOCOL_PAGE.read_text()

    rows = [f"| {spec.number} | {spec.name} | {_fields_text(spec.struct)} |" for spec in SCHEMA]
    words = [f"| `{word}` |" for words in (m.Code, m.StoreState) for word in words]

    assert [line for line in page.splitlines() if re.match(r"\| \d+ \|", line)] == rows
    assert [word for word in words if word not in page] == []


def _fields_text(struct: Struct) -> str:
    names = getattr(struct.cls, "_fields", None) or [field.name for field in fields(struct.cls)]
    texts = [f"{name}: {_kind_text(kind)}" for name, kind in zip(names, struct.kinds, strict=True)]
    return ", ".join(texts) or "none"


def _kind_text(kind: Kind) -> str:  # noqa: C901 - one line for each kind
    match kind:
        case Count(maximum):
            return f"count({maximum})"
        case Real():
            return "real"
        case Text(length_max):
            return f"text({length_max})"
        case Blob(nbytes):
            return f"blob({nbytes})"
        case Word(words):
            return words.__name__
        case Struct(cls, _):
            return cls.__name__
        case Items(inner, length_max):
            return f"[{_kind_text(inner)}]({length_max})"
        case Maybe(inner):
            return f"{_kind_text(inner)}?"
