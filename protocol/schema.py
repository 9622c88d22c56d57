"""The table of messages: each one's number, channel, sender and the bounds of its fields.

A message travels as a msgpack array: its number, then its fields in order. Records inside a message are arrays too.
Nothing is optional and nothing is named on the wire; a new field is a new protocol version.
"""

from dataclasses import dataclass
from enum import StrEnum

from protocol import messages as m
from protocol.handles import ExpertHandle, ExpertKey

MESSAGE_NBYTES_MAX = 128 * 1024
TOKEN_NBYTES = 16
DIGEST_LENGTH = 64
KEYS_MAX = 256
SESSIONS_MAX = 256
STORES_MAX = 16
CORRUPT_KEYS_MAX = 16
PINNED_KEYS_MAX = 4096
REFUSALS_MAX = 64
OFFERED_FDS_MAX = 1024

_U16 = (1 << 16) - 1
_U32 = (1 << 32) - 1
_U63 = (1 << 63) - 1


class Channel(StrEnum):
    """The two sockets of the daemon."""

    CONTROL = "control"
    REQUEST = "request"


class Sender(StrEnum):
    """Who may send a message."""

    CLIENT = "client"
    DAEMON = "daemon"


@dataclass(frozen=True, slots=True)
class Count:
    """A whole number from 0 to the maximum."""

    maximum: int


@dataclass(frozen=True, slots=True)
class Real:
    """A finite number of seconds, at least 0."""


@dataclass(frozen=True, slots=True)
class Text:
    """UTF-8 of at most so many characters."""

    length_max: int


@dataclass(frozen=True, slots=True)
class Blob:
    """Exactly so many bytes."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Word:
    """One of the words of an enumeration."""

    words: type[StrEnum]


@dataclass(frozen=True, slots=True)
class Struct:
    """A record: an array of its fields."""

    cls: type
    kinds: "tuple[Kind, ...]"


@dataclass(frozen=True, slots=True)
class Items:
    """At most so many values of one kind."""

    kind: "Kind"
    length_max: int


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value or nil."""

    kind: "Kind"


Kind = Count | Real | Text | Blob | Word | Struct | Items | Maybe


@dataclass(frozen=True, slots=True)
class MessageSpec:
    """One row of the table."""

    number: int
    channel: Channel
    sender: Sender
    struct: Struct

    @property
    def name(self) -> str:
        """The message's name."""
        return self.struct.cls.__name__


_DIGEST = Text(DIGEST_LENGTH)
_VERSION_TEXT = Text(64)
_PATH = Text(1024)
_PID = Count(_U32)
_NBYTES = Count(_U63)
_REQUEST_ID = Count(_U63)
_KEY = Struct(ExpertKey, (Count(_U16), Count(_U16)))
_KEYS = Items(_KEY, KEYS_MAX)
_HANDLE = Struct(ExpertHandle, (_KEY, Count(_U16), _NBYTES, _NBYTES, Count(_U63)))
_REFUSED = Struct(m.Refused, (Word(m.Code), Text(512)))
_KEY_REFUSAL = Struct(m.KeyRefusal, (_KEY, _REFUSED))
_NUMBER = Count(_U63)
_STORE_STATUS = Struct(
    m.StoreStatus,
    (
        _DIGEST,
        _PATH,
        Word(m.StoreState),
        _NBYTES,
        _NBYTES,
        Real(),
        Count(_U32),
        Count(_U32),
        Items(_KEY, CORRUPT_KEYS_MAX),
        Count(_U32),
        Maybe(_REFUSED),
        Maybe(_NBYTES),
        Count(_U32),
        _NBYTES,
        Count(_U32),
        Count(_U32),
        _NUMBER,
        _NBYTES,
    ),
)
_SESSION_STATUS = Struct(
    m.SessionStatus,
    (_PID, _VERSION_TEXT, Real(), Maybe(_DIGEST), Count(_U32), _NUMBER, _NUMBER, _NBYTES, Real()),
)
_STATUS = Struct(
    m.Status,
    (
        _PID,
        _VERSION_TEXT,
        Real(),
        _NBYTES,
        _NBYTES,
        _NBYTES,
        _NUMBER,
        Items(_STORE_STATUS, STORES_MAX),
        Items(_SESSION_STATUS, SESSIONS_MAX),
    ),
)

_CONTROL_CLIENT = (Channel.CONTROL, Sender.CLIENT)
_CONTROL_DAEMON = (Channel.CONTROL, Sender.DAEMON)
_REQUEST_CLIENT = (Channel.REQUEST, Sender.CLIENT)
_REQUEST_DAEMON = (Channel.REQUEST, Sender.DAEMON)

SCHEMA: tuple[MessageSpec, ...] = (
    MessageSpec(1, *_CONTROL_CLIENT, Struct(m.Hello, (Count(_U16), Count(_U16), _VERSION_TEXT))),
    MessageSpec(2, *_CONTROL_CLIENT, Struct(m.Attach, (_DIGEST,))),
    MessageSpec(3, *_CONTROL_CLIENT, Struct(m.Load, (_PATH, _DIGEST, Maybe(_NBYTES), Items(_KEY, PINNED_KEYS_MAX)))),
    MessageSpec(4, *_CONTROL_CLIENT, Struct(m.Unload, (_DIGEST,))),
    MessageSpec(5, *_CONTROL_CLIENT, Struct(m.GetStatus, ())),
    MessageSpec(6, *_CONTROL_CLIENT, Struct(m.Stop, ())),
    MessageSpec(7, *_CONTROL_CLIENT, Struct(m.Offer, (_PATH, _DIGEST, Maybe(_NBYTES), Count(OFFERED_FDS_MAX)))),
    MessageSpec(17, *_CONTROL_DAEMON, Struct(m.Welcome, (Count(_U16), _VERSION_TEXT, _PID, Blob(TOKEN_NBYTES)))),
    MessageSpec(18, *_CONTROL_DAEMON, Struct(m.Attached, (_DIGEST, Count(_U16)))),
    MessageSpec(19, *_CONTROL_DAEMON, _STORE_STATUS),
    MessageSpec(20, *_CONTROL_DAEMON, Struct(m.Unloaded, (_DIGEST,))),
    MessageSpec(21, *_CONTROL_DAEMON, _STATUS),
    MessageSpec(22, *_CONTROL_DAEMON, Struct(m.Stopping, ())),
    MessageSpec(23, *_CONTROL_DAEMON, Struct(m.Draining, ())),
    MessageSpec(24, *_CONTROL_DAEMON, _REFUSED),
    MessageSpec(33, *_REQUEST_CLIENT, Struct(m.Prefetch, (_REQUEST_ID, _KEYS, Count(_U32)))),
    MessageSpec(34, *_REQUEST_CLIENT, Struct(m.Acquire, (_REQUEST_ID, _KEYS))),
    MessageSpec(35, *_REQUEST_CLIENT, Struct(m.Release, (_REQUEST_ID, _KEYS))),
    MessageSpec(36, *_REQUEST_CLIENT, Struct(m.GetStats, (_REQUEST_ID,))),
    MessageSpec(
        49,
        *_REQUEST_DAEMON,
        Struct(
            m.Granted,
            (_REQUEST_ID, Items(_HANDLE, KEYS_MAX), Items(_KEY_REFUSAL, REFUSALS_MAX), Count(KEYS_MAX)),
        ),
    ),
    MessageSpec(51, *_REQUEST_DAEMON, Struct(m.Stats, (_REQUEST_ID, Real(), *[_NUMBER] * 9, _NBYTES, Real()))),
    MessageSpec(52, *_REQUEST_DAEMON, Struct(m.RequestRefusal, (_REQUEST_ID, _REFUSED))),
)
