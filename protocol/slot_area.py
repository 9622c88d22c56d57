"""How much memory the slots of a store take that is larger than memory: pure arithmetic, of the daemon and of plans.

Dense weights and pinned experts lie in memory for good; every other expert is read into a slot when it is needed. A
slot takes any of those, so it is as long as the longest of their records; a table says what lies in which slot.
"""

from typing import Final

from protocol.layout import PAGE_NBYTES, aligned

# What the table says of a slot: its generation, and the layer and number of its expert.
SLOT_ENTRY_NBYTES: Final = 16
# Behind the last entry: how often a slot was filled, which is the word of a bell.
BELL_NBYTES: Final = 4


def least_slots(top_k: int, n_experts: int) -> int:
    """Return the fewest slots to work with, of a store with that many experts to be read.

    What a token needs in a layer, twice, so that the next layer's can come meanwhile.
    """
    return min(2 * top_k, n_experts)


def slot_table_nbytes(n_slots: int) -> int:
    """Return what the table of that many slots takes."""
    return aligned(n_slots * SLOT_ENTRY_NBYTES + BELL_NBYTES, PAGE_NBYTES)


def slot_area_nbytes(n_slots: int, slot_nbytes: int) -> int:
    """Return what that many slots and their table take."""
    return n_slots * slot_nbytes + slot_table_nbytes(n_slots)


def slots_within(nbytes: int, slot_nbytes: int) -> int:
    """Return how many slots fit into that many bytes with their table; 0 if none does."""
    n_slots = max(0, nbytes // (slot_nbytes + SLOT_ENTRY_NBYTES))
    while n_slots and slot_area_nbytes(n_slots, slot_nbytes) > nbytes:
        n_slots -= 1
    return n_slots
