"""A service with a store in it, without a daemon: records, times and one open descriptor a store."""

import os
from pathlib import Path

from expertd.loader import LoadedStore
from expertd.service import MemoryFigures, Service
from expertd.sessions import Session
from protocol import messages as m
from protocol.catalogue import plan_catalogue
from protocol.fdpass import Credentials
from protocol.handles import ExpertKey
from protocol.manifest import Manifest, ModelFacts, TensorSchemes
from protocol.messages import Refused

UID, PID = 1000, 77
DIGEST = "ab" * 32
OTHER_DIGEST = "cd" * 32


def new_service() -> Service:
    """Return a daemon's state at time 0; its tokens are 0, 1, 2, ... as bytes."""
    tokens = iter(range(1000))
    return Service(
        uid=UID,
        pid=PID,
        new_token=lambda nbytes: next(tokens).to_bytes(nbytes, "big"),
        memory=lambda: MemoryFigures(1 << 20, 1 << 30),
        now=0.0,
    )


def connect(service: Service, pid: int = 1, *, now: float = 0.0) -> Session:
    """Return a session that has said hello."""
    session = service.open_session(Credentials(pid, UID), now)
    assert isinstance(session, Session)
    service.handle(session, m.Hello(2, 2, "0.1.0"), now)
    return session


def loaded_store(digest: str = DIGEST, corrupt: tuple[ExpertKey, ...] = ()) -> LoadedStore:
    """Return an empty store that owns one descriptor."""
    model = ModelFacts("mixtral", 1, 1, 1, 64, 64, "silu", "softmax", "top_k", 0)
    manifest = Manifest(model, TensorSchemes("bf16", "bf16", "bf16", "bf16"), "none", {}, {}, ())
    fd = os.open(os.devnull, os.O_RDONLY)
    return LoadedStore(plan_catalogue(manifest), digest, 4096, 0.5, 0, corrupt, [fd])


def put_store(service: Service, digest: str = DIGEST) -> LoadedStore:
    """Return a store that the service now holds."""
    held = service.begin_load(Path("/store"), digest)
    loaded = loaded_store(digest)
    service.store_loaded(held, loaded, 0.0)
    return loaded


def attach(service: Service, session: Session, digest: str = DIGEST) -> None:
    """Attach a session; it must not be refused."""
    outcome = service.handle(session, m.Attach(digest), 0.0)
    assert isinstance(outcome.reply, m.Attached)


def refusal(reply: m.Message | None) -> Refused:
    """Return a reply that must be a refusal."""
    assert isinstance(reply, Refused)
    return reply


def store_status(service: Service, digest: str = DIGEST) -> m.StoreStatus | None:
    """Return what the status says of a store, None if it says nothing."""
    return next((store for store in service.status(0.0).stores if store.digest == digest), None)


def is_open(fd: int) -> bool:
    """Whether a descriptor is open in this process."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
