"""What a daemon looks like to a person and to a program. Pure: records in, text out."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePath

from expertd.rates import Rates
from expertd.tables import Column, table
from protocol.messages import SessionStatus, Status, StoreState, StoreStatus

_NONE = "-"

_STORE_COLUMNS = (
    Column("store", 10, is_words=True),
    Column("state", 9, is_words=True),
    Column("memory", 8),
    Column("budget", 5),
    Column("slots", 7),
    Column("pinned", 2),
    Column("loads", 3),
    Column("read", 4),
    Column("corrupt", 1),
    Column("sessions", 6),
)
_STORE_RATES = (Column("loads/s", 7), Column("read/s", 8))

_SESSION_COLUMNS = (
    Column("pid", 10),
    Column("model", 9, is_words=True),
    Column("version", 1, is_words=True),
    Column("age", 6),
    Column("leases", 3),
    Column("hits", 2),
    Column("misses", 4),
    Column("hit ratio", 8),
    Column("read", 5),
    Column("waited", 4),
)
_SESSION_RATES = (Column("hits/s", 8), Column("misses/s", 6), Column("read/s", 7), Column("waiting", 5))


def status_text(status: Status) -> str:
    """Return what `expertd status` prints."""
    lines = [
        *_head(status, None),
        "",
        *_stores(status, None, None),
        *_remarks(status),
        "",
        *_sessions(status, None, None),
    ]
    return "\n".join(lines)


def top_text(status: Status, rates: Rates, width: int, height: int) -> str:
    """Return what `expertd top` shows in a terminal of that size: what does not fit below is left out, and counted."""
    lines = [*_head(status, width), "", *_stores(status, rates, width), "", *_sessions(status, rates, width)]
    if len(lines) > height:
        n_left_out = len(lines) - height + 1
        lines = [*lines[: height - 1], f"… {n_left_out} more"[:width]]
    return "\n".join(lines)


def status_json(status: Status) -> dict[str, object]:
    """Return what `expertd status --json` prints."""
    return {"running": True} | asdict(status)


def _head(status: Status, width: int | None) -> list[str]:
    lines = [
        f"expertd {status.library_version}, pid {status.pid}, up {_duration(status.age_s)}",
        f"memory: {_gb(status.shared_nbytes)} shared in stores, {_mb(status.private_nbytes)} of its own, "
        f"{_gb(status.available_nbytes)} available on this machine",
    ]
    if status.n_bad_messages:
        lines.append(f"bad messages: {status.n_bad_messages}")
    return [line[:width] for line in lines]


def _stores(status: Status, rates: Rates | None, width: int | None) -> list[str]:
    if not status.stores:
        return ["no stores"]
    columns = _STORE_COLUMNS if rates is None else (*_STORE_COLUMNS, *_STORE_RATES)
    return table(columns, [_store_row(store, rates) for store in status.stores], width)


def _store_row(store: StoreStatus, rates: Rates | None) -> list[str]:
    row = [
        store.path,
        store.state,
        _gb(store.nbytes) if store.nbytes else f"{_gb(store.loaded_nbytes)} so far",
        _NONE if store.memory_nbytes is None else _gb(store.memory_nbytes),
        f"{store.n_used_slots}/{store.n_slots}" if store.n_slots else _residence(store),
        str(store.n_pinned) if store.n_slots else _NONE,
        str(store.n_loads) if store.n_slots else _NONE,
        _gb(store.read_nbytes) if store.n_slots else _NONE,
        str(store.n_corrupt),
        str(store.n_sessions),
    ]
    if rates is None:
        return row
    now = rates.of_store(store) if store.n_slots else None
    return [*row, *(2 * [_NONE] if now is None else [f"{now.loads:.1f}", _mb(now.read_nbytes)])]


def _residence(store: StoreStatus) -> str:
    return "all in memory" if store.state in (StoreState.READY, StoreState.ORPHANED) else _NONE


def _remarks(status: Status) -> list[str]:
    """Return what fits into no column: digests, how fast stores were loaded, what is wrong with them."""
    lines: list[str] = []
    for store in status.stores:
        line = f"{store.path}: digest {store.digest[:12]}"
        if store.load_s:
            line += f", loaded in {store.load_s:.2f} s"
        if store.load_s and not store.n_slots:  # slots are filled later
            line += f", {store.nbytes / store.load_s / 1e9:.2f} GB/s"
        if store.n_slots:
            line += f"; slots of {_mb(store.slot_nbytes)}"
        lines.append(line)
        if store.n_corrupt:
            named = ", ".join(map(str, store.corrupt))
            lines.append(f"  {store.n_corrupt} of {store.n_experts} experts are corrupt and not served: {named}")
        if store.error is not None:
            lines.append(f"  {store.error.detail} ({store.error.code})")
    return lines


def _sessions(status: Status, rates: Rates | None, width: int | None) -> list[str]:
    # Whoever asks for the status is a session too, and no news to himself.
    attached = [session for session in status.sessions if session.digest]
    if not attached:
        return ["no sessions"]
    columns = _SESSION_COLUMNS if rates is None else (*_SESSION_COLUMNS, *_SESSION_RATES)
    return table(columns, [_session_row(session, status.stores, rates) for session in attached], width)


def _session_row(session: SessionStatus, stores: Sequence[StoreStatus], rates: Rates | None) -> list[str]:
    n_wanted = session.n_hits + session.n_misses
    row = [
        str(session.pid),
        _model(session, stores),
        session.library_version,
        _duration(session.age_s),
        str(session.n_leases),
        str(session.n_hits),
        str(session.n_misses),
        f"{session.n_hits / n_wanted:.1%}" if n_wanted else _NONE,
        _gb(session.read_nbytes),
        _seconds(session.waited_s),
    ]
    if rates is None:
        return row
    now = rates.of_session(session)
    if now is None:
        return [*row, *4 * [_NONE]]
    return [*row, f"{now.hits:.1f}", f"{now.misses:.1f}", _mb(now.read_nbytes), f"{now.waited:.0%}"]


def _model(session: SessionStatus, stores: Sequence[StoreStatus]) -> str:
    """Return the name of the folder that a session's store came from; of one that is gone, its digest."""
    paths = [store.path for store in stores if store.digest == session.digest]
    return PurePath(paths[0]).name if paths else str(session.digest)[:12]


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else _duration(seconds)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
