"""What a store or a daemon looks like to a person and to a program. Pure: records in, text out."""

from dataclasses import asdict
from pathlib import Path

from protocol.layout import Part
from protocol.manifest import Manifest, Record
from protocol.messages import SessionStatus, Status, StoreStatus
from protocol.version import STORE_FORMAT_VERSION


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


def inspect_text(path: Path, manifest: Manifest) -> str:
    """Return what `expertd inspect` prints."""
    model, schemes = manifest.model, manifest.schemes
    n_weights = sum(_n_weights(record) for record in manifest.experts.values())
    rows = [
        ("store", f"{path}, format {STORE_FORMAT_VERSION}, digest {manifest.digest[:12]}"),
        (
            "model",
            f"{model.architecture}, {model.n_layers} layers of {model.n_experts} experts, {model.top_k} per token",
        ),
        ("sizes", f"hidden {model.hidden_size}, expert {model.intermediate_size}"),
        ("experts", f"{schemes.experts}, {_gb(manifest.experts_nbytes)}, {_bits(manifest.experts_nbytes, n_weights)}"),
        (
            "dense",
            f"attention {schemes.attention}, head {schemes.head}, rest {schemes.other}, {_gb(manifest.dense_nbytes)}",
        ),
        ("solver", manifest.solver),
        ("one expert", _expert_line(manifest)),
        ("files", ", ".join(file.name for file in manifest.files)),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def inspect_json(manifest: Manifest) -> dict[str, object]:
    """Return what `expertd inspect --json` prints: everything but the list of single records."""
    n_weights = sum(_n_weights(record) for record in manifest.experts.values())
    first = next(iter(manifest.experts.values()))
    return {
        "format_version": STORE_FORMAT_VERSION,
        "digest": manifest.digest,
        "model": asdict(manifest.model),
        "schemes": asdict(manifest.schemes),
        "solver": manifest.solver,
        "n_experts_in_all": len(manifest.experts),
        "expert_nbytes": first.nbytes,
        "experts_nbytes": manifest.experts_nbytes,
        "experts_bits_per_weight": manifest.experts_nbytes * 8 / n_weights,
        "dense_nbytes": manifest.dense_nbytes,
        "dense": {name: [part.scheme for part in record.parts] for name, record in manifest.dense.items()},
        "files": [asdict(file) for file in manifest.files],
    }


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


def _expert_line(manifest: Manifest) -> str:
    record = next(iter(manifest.experts.values()))
    return f"{_mb(record.nbytes)}: " + ", ".join(_part_text(part) for part in record.parts)


def _part_text(part: Part) -> str:
    return f"{part.name} {part.rows} x {part.cols} {part.scheme}"


def _n_weights(record: Record) -> int:
    return sum(part.rows * part.cols for part in record.parts)


def _bits(nbytes: int, n_weights: int) -> str:
    return f"{nbytes * 8 / n_weights:.3f} bits per weight"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
