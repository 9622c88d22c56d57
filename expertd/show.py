"""What a daemon looks like to a person and to a program. Pure: records in, text out."""

from dataclasses import asdict

from protocol.messages import SessionStatus, Status, StoreStatus


def status_text(status: Status) -> str:
    """Return what `expertd status` prints."""
    # Whoever asks for the status is a session too, and no news to himself.
    attached = [session for session in status.sessions if session.digest]
    lines = [
        f"expertd {status.library_version}, pid {status.pid}, up {_duration(status.age_s)}",
        f"memory: {_gb(status.shared_nbytes)} shared in stores, {_mb(status.private_nbytes)} of its own, "
        f"{_gb(status.available_nbytes)} available on this machine",
        "stores:" if status.stores else "stores: none",
        *(f"  {line}" for store in status.stores for line in _store_lines(store)),
        "sessions:" if attached else "sessions: none",
        *(f"  {_session_line(session)}" for session in attached),
    ]
    if status.n_bad_messages:
        lines.append(f"bad messages: {status.n_bad_messages}")
    return "\n".join(lines)


def status_json(status: Status) -> dict[str, object]:
    """Return what `expertd status --json` prints."""
    return {"running": True} | asdict(status)


def _store_lines(store: StoreStatus) -> list[str]:
    size = _gb(store.nbytes) if store.nbytes else f"{_gb(store.loaded_nbytes)} so far"
    lines = [f"{store.path} [{store.state}] {size}, digest {store.digest[:12]}, {store.n_sessions} session(s)"]
    if store.load_s:
        lines.append(f"  loaded in {store.load_s:.2f} s, {store.nbytes / store.load_s / 1e9:.2f} GB/s")
    if store.n_corrupt:
        named = ", ".join(map(str, store.corrupt))
        lines.append(f"  {store.n_corrupt} of {store.n_experts} experts are corrupt and not served: {named}")
    if store.error is not None:
        lines.append(f"  {store.error.detail} ({store.error.code})")
    return lines


def _session_line(session: SessionStatus) -> str:
    store = str(session.digest)[:12]
    return f"pid {session.pid}, version {session.library_version}, store {store}, for {_duration(session.age_s)}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
