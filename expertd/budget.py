"""How much memory a store may take. Pure: knows neither files nor processes."""

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import OutOfMemory
from protocol.handles import ExpertKey
from protocol.manifest import Manifest, Record
from protocol.slot_area import least_slots, slot_area_nbytes, slots_within

# What must stay free beside the store, for the runners' caches and everybody else.
RESERVE_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class MemoryWish:
    """How many bytes a store may take, None: what there is; and which experts stay in memory if not all can."""

    memory_nbytes: int | None = None
    pinned: tuple[ExpertKey, ...] = ()


ALL_THERE_IS = MemoryWish()


@dataclass(frozen=True, slots=True)
class TierPlan:
    """How a store is held that is larger than its memory: what stays there, and slots for the rest."""

    pinned: frozenset[ExpertKey]
    n_slots: int


def plan_memory(manifest: Manifest, wish: MemoryWish, available_nbytes: int) -> TierPlan | None:
    """Return how a store is held that does not fit into what it may take; None if it fits; raise OutOfMemory."""
    store_nbytes = manifest.dense_nbytes + manifest.experts_nbytes
    there_is = available_nbytes - RESERVE_NBYTES
    allowed = there_is if wish.memory_nbytes is None else wish.memory_nbytes
    least = least_nbytes(manifest)
    if allowed < min(least, store_nbytes) <= there_is:
        raise OutOfMemory(
            f"the store needs at least {least / 1e9:.2f} GB of its {store_nbytes / 1e9:.2f} GB in memory, "
            f"{allowed / 1e9:.2f} GB are allowed"
        )
    wanted = min(store_nbytes, max(allowed, least))
    if wanted > there_is:
        raise OutOfMemory(
            f"the store needs {wanted / 1e9:.2f} GB and {RESERVE_NBYTES / 1e9:.2f} GB to spare, "
            f"{available_nbytes / 1e9:.2f} GB are available; "
            f"at least {least / 1e9:.2f} of its {store_nbytes / 1e9:.2f} GB must be in memory"
        )
    if store_nbytes <= allowed:
        return None
    return _plan_slots(manifest, wish.pinned, allowed - manifest.dense_nbytes)


def least_nbytes(manifest: Manifest) -> int:
    """Return the least that must be in memory: the dense weights, and slots for a token's experts in two layers."""
    n_slots = least_slots(manifest.model.top_k, len(manifest.experts))
    return manifest.dense_nbytes + slot_area_nbytes(n_slots, _longest(manifest.experts.values()))


def _plan_slots(manifest: Manifest, wanted: Iterable[ExpertKey], nbytes: int) -> TierPlan:
    """Return what is pinned, of what is wanted, and how many slots there are in so many bytes."""
    longest = _longest(manifest.experts.values())
    least = slot_area_nbytes(least_slots(manifest.model.top_k, len(manifest.experts)), longest)
    # What is not pinned must not starve: half of the memory for experts is for whatever comes.
    for_pinned = min(nbytes // 2, nbytes - least)
    pinned = set()
    for key in dict.fromkeys(wanted):
        record = manifest.experts.get(key)
        if record is not None and record.nbytes <= for_pinned:
            pinned.add(key)
            for_pinned -= record.nbytes
    others = [record for key, record in manifest.experts.items() if key not in pinned]
    left = nbytes - sum(manifest.experts[key].nbytes for key in pinned)
    return TierPlan(frozenset(pinned), min(len(others), slots_within(left, _longest(others))))


def _longest(records: Iterable[Record]) -> int:
    return max(record.nbytes for record in records)
