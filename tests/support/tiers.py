"""Stores that are held in less memory than they have bytes."""

from collections.abc import Collection
from pathlib import Path

from expertd.slot_memory import SlotMemory
from expertd.store import StoreFiles
from expertd.tiered import TieredStore, TierSettings
from protocol import messages as m
from protocol.catalogue import Catalogue
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import StoreState, StoreStatus
from protocol.slot_area import slot_area_nbytes
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_until


def open_tiered(
    catalogue: Catalogue, files: StoreFiles, memory: SlotMemory, corrupt: Collection[ExpertKey]
) -> TieredStore:
    """Put a store to work that is larger than its memory, without a daemon; nobody is woken."""
    settings = TierSettings(2, None, wake=lambda: None, on_failure=lambda: None)
    return TieredStore(catalogue, files, memory, corrupt, settings)


def memory_for(manifest: Manifest, n_slots: int, pinned: tuple[ExpertKey, ...] = ()) -> int:
    """Return the budget with which a store has so many slots."""
    slot_nbytes = max(record.nbytes for key, record in manifest.experts.items() if key not in pinned)
    pinned_nbytes = sum(manifest.experts[key].nbytes for key in pinned)
    return manifest.dense_nbytes + pinned_nbytes + slot_area_nbytes(n_slots, slot_nbytes)


def load_tiered(
    daemon: DaemonProcess, store: Path, manifest: Manifest, *, n_slots: int, pinned: tuple[ExpertKey, ...] = ()
) -> StoreStatus:
    """Have a store loaded with so many slots; return its status."""
    nbytes = memory_for(manifest, n_slots, pinned)
    with daemon.client() as client:
        client.ask(m.Load(str(store), manifest.digest, nbytes, pinned), StoreStatus)
    wait_until(lambda: daemon.store(manifest.digest).state is not StoreState.LOADING, "the store to be loaded")
    held = daemon.store(manifest.digest)
    assert held.state is StoreState.READY, held
    assert held.n_slots == n_slots, held
    return held
