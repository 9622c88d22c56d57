"""How much memory a store may take. Pure: knows neither files nor processes."""

from dataclasses import dataclass

from protocol.errors import OutOfMemory
from protocol.handles import ExpertKey

# What must stay free beside the store, for the runners' caches and everybody else.
RESERVE_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class MemoryWish:
    """How many bytes a store may take, None: what there is; and which experts stay in memory if not all can."""

    memory_nbytes: int | None = None
    pinned: tuple[ExpertKey, ...] = ()


ALL_THERE_IS = MemoryWish()


def check_fits(nbytes: int, wish: MemoryWish, available_nbytes: int) -> None:
    """Raise OutOfMemory if a store of so many bytes fits neither what it may take nor what there is."""
    if wish.memory_nbytes is not None and nbytes > wish.memory_nbytes:
        raise OutOfMemory(f"the store needs {nbytes / 1e9:.2f} GB, {wish.memory_nbytes / 1e9:.2f} GB are allowed")
    if nbytes + RESERVE_NBYTES > available_nbytes:
        raise OutOfMemory(
            f"the store needs {nbytes / 1e9:.2f} GB and {RESERVE_NBYTES / 1e9:.2f} GB to spare, "
            f"{available_nbytes / 1e9:.2f} GB are available"
        )
