"""One example of every message of the schema: for golden frames and as seeds of mutation."""

from protocol import messages as m
from protocol.handles import ExpertHandle, ExpertKey
from protocol.messages import Code, Message, StoreState

_DIGEST = "0123456789abcdef" * 4
_KEYS = (ExpertKey(0, 7), ExpertKey(31, 0))
_STORE = m.StoreStatus(
    _DIGEST, "/models/demo", StoreState.READY, 4096, 4096, 0.5, 240, 1, (ExpertKey(3, 4),), 2, None,
    1 << 30, 60, 4096, 58, 24, 100, 409_600,
)  # fmt: skip
_FAILED_STORE = m.StoreStatus(
    _DIGEST, "/models/big", StoreState.FAILED, 0, 0, 0.0, 0, 0, (), 0, m.Refused(Code.OUT_OF_MEMORY, "too big")
)

EXAMPLES: tuple[Message, ...] = (
    m.Hello(2, 2, "0.1.0"),
    m.Attach(_DIGEST),
    m.Load("/models/demo", _DIGEST, 8_000_000_000, _KEYS),
    m.Unload(_DIGEST),
    m.GetStatus(),
    m.Stop(),
    m.Offer("/models/demo", _DIGEST, None, 27),
    m.Welcome(2, "0.1.0", 4242, bytes(range(16))),
    m.Attached(_DIGEST, 3),
    _STORE,
    m.Unloaded(_DIGEST),
    m.Status(
        4242,
        "0.1.0",
        12.5,
        15_000_000,
        4096,
        8_000_000_000,
        0,
        (_STORE, _FAILED_STORE),
        (
            m.SessionStatus(4243, "0.1.0", 1.5, _DIGEST, 2, 30, 4, 90_000, 1.25),
            m.SessionStatus(4244, "0.1.0", 0.0, None),
        ),
    ),
    m.Stopping(),
    m.Draining(),
    m.Refused(Code.UNKNOWN_STORE, "no such store"),
    m.Prefetch(1, _KEYS, 50),
    m.Acquire(2, _KEYS),
    m.Release(3, _KEYS),
    m.GetStats(4),
    m.Granted(
        5,
        (ExpertHandle(ExpertKey(0, 7), 1, 4096, 8192, 2),),
        (m.KeyRefusal(ExpertKey(31, 0), m.Refused(Code.CORRUPT, "its checksum is wrong")),),
        1,
    ),
    m.Stats(7, 3.25, 10, 1, 2, 30, 4, 5, 6, 7, 8, 90_000, 1.25),
    m.RequestRefusal(8, m.Refused(Code.STORE_IS_RESIDENT, "no lease is needed")),
)
