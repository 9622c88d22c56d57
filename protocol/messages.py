"""The messages the two processes exchange, as frozen records. Knows neither bytes nor sockets.

`protocol.schema` gives each its number, channel and bounds; docs/protocol.md is the authority on their meaning.
"""

from dataclasses import dataclass
from enum import StrEnum

from protocol.handles import ExpertHandle, ExpertKey


class Code(StrEnum):
    """Why a request is refused."""

    VERSION_MISMATCH = "version_mismatch"
    BAD_MESSAGE = "bad_message"
    ALREADY_ATTACHED = "already_attached"
    NOT_ATTACHED = "not_attached"
    UNKNOWN_STORE = "unknown_store"
    UNKNOWN_EXPERT = "unknown_expert"
    STORE_LOADING = "store_loading"
    STORE_INVALID = "store_invalid"
    STORE_HELD = "store_held"
    STORE_CHANGED = "store_changed"
    STORE_IS_RESIDENT = "store_is_resident"
    CORRUPT = "corrupt"
    READ_FAILED = "read_failed"
    OUT_OF_MEMORY = "out_of_memory"
    TOO_MANY = "too_many"
    DRAINING = "draining"


class StoreState(StrEnum):
    """Where a store is in its life."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    ORPHANED = "orphaned"  # unloaded, but a runner still maps it


# --- control channel, from a client -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """Open a session: the protocol versions the client speaks."""

    lowest_version: int
    highest_version: int
    library_version: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Ask for the segments of a loaded store."""

    digest: str


@dataclass(frozen=True, slots=True)
class Load:
    """Ask the daemon to load the store in that directory, which must have that digest.

    `memory_nbytes` bounds what the store takes of the daemon's memory, None: what there is. Where that is less than the
    store, the pinned experts stay in memory, as far as they fit, and the others are read when they are acquired.
    """

    path: str
    digest: str
    memory_nbytes: int | None = None
    pinned: tuple[ExpertKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """Give a daemon the segments of a store that an earlier one had: catalogue and sealed segments follow, in order.

    `memory_nbytes` is that of `Load`, for a store with slots, which are not offered: they are made anew, and the answer
    is that it is being loaded.
    """

    path: str
    digest: str
    memory_nbytes: int | None
    n_fds: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Ask the daemon to let a store go; its memory is freed when the last runner that maps it ends."""

    digest: str


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Ask what the daemon holds and for whom."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask the daemon to drain and end."""


# --- control channel, from the daemon -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """The session is open; `token` must head every frame on the request channel."""

    version: int
    library_version: str
    pid: int
    token: bytes


@dataclass(frozen=True, slots=True)
class Attached:
    """The store's file descriptors follow: the catalogue's segment, then the data segments in order.

    After an `Offer` none do: the store is served from the memory that was offered.
    """

    digest: str
    n_fds: int


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """One store of the daemon. `n_corrupt` experts failed their checksum; `corrupt` names the first of them.

    `nbytes` is what its segments take. A store that is larger than its budget has slots: `n_used_slots` of them hold an
    expert, `n_pinned` experts need none, and `n_loads` times an expert was read into one, `read_nbytes` in all.
    """

    digest: str
    path: str
    state: StoreState
    nbytes: int
    loaded_nbytes: int
    load_s: float
    n_experts: int
    n_corrupt: int
    corrupt: tuple[ExpertKey, ...]
    n_sessions: int
    error: "Refused | None"
    memory_nbytes: int | None = None
    n_slots: int = 0
    slot_nbytes: int = 0
    n_used_slots: int = 0
    n_pinned: int = 0
    n_loads: int = 0
    read_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """One open connection; `digest` is None until it attaches. The counters are those of `Stats`."""

    pid: int
    library_version: str
    age_s: float
    digest: str | None
    n_leases: int = 0
    n_hits: int = 0
    n_misses: int = 0
    read_nbytes: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Status:
    """What the daemon holds and for whom."""

    pid: int
    library_version: str
    age_s: float
    private_nbytes: int
    shared_nbytes: int
    available_nbytes: int
    n_bad_messages: int
    stores: tuple[StoreStatus, ...]
    sessions: tuple[SessionStatus, ...]


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The store is gone from the daemon's table."""

    digest: str


@dataclass(frozen=True, slots=True)
class Stopping:
    """The daemon drains and ends."""


@dataclass(frozen=True, slots=True)
class Draining:
    """Sent unasked to every session: no new work is taken; what is mapped stays valid."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The request is not carried out; `detail` holds no paths and no addresses."""

    code: Code
    detail: str


# --- request channel ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Hint that experts will be needed within the deadline. No lease, no reply.

    What an earlier hint of this session named, and this one does not, is no longer waited for.
    """

    request_id: int
    keys: tuple[ExpertKey, ...]
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Acquire:
    """Ask for leases on experts of a store larger than memory; asking again for what one holds is no error."""

    request_id: int
    keys: tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Give back what leases there are on those experts, and count all of them as used just now. No reply."""

    request_id: int
    keys: tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True)
class GetStats:
    """Ask for the counters of this session."""

    request_id: int


@dataclass(frozen=True, slots=True)
class KeyRefusal:
    """One expert of a request cannot be had; the others can."""

    key: ExpertKey
    reason: Refused


@dataclass(frozen=True, slots=True)
class Granted:
    """What has come in of a request: where those experts lie, and which cannot be had.

    `n_awaited` experts are still to come, in further messages of that request; 0 ends it.
    """

    request_id: int
    handles: tuple[ExpertHandle, ...]
    refusals: tuple[KeyRefusal, ...] = ()
    n_awaited: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """The counters of this session.

    A hit is an expert that was in memory when it was acquired, or when it was read without being acquired; a miss one
    that was waited for. A prefetch was used, came late (was waited for), was wasted (read, and evicted unused) or
    dropped (never read). `read_nbytes` were read because of this session.
    """

    request_id: int
    age_s: float
    n_requests: int
    n_refused: int
    n_leases: int
    n_hits: int = 0
    n_misses: int = 0
    n_prefetch_used: int = 0
    n_prefetch_late: int = 0
    n_prefetch_wasted: int = 0
    n_prefetch_dropped: int = 0
    read_nbytes: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestRefusal:
    """A request on the request channel is not carried out."""

    request_id: int
    reason: Refused


Message = (
    Hello | Attach | Load | Offer | Unload | GetStatus | Stop
    | Welcome | Attached | Status | Unloaded | Stopping | Draining | Refused | StoreStatus
    | Prefetch | Acquire | Release | GetStats
    | Granted | Stats | RequestRefusal
)  # fmt: skip
