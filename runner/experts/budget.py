"""How many slots each layer gets: from a number of experts, or from a budget of device memory. Pure.

Knows no device and allocates nothing: it is asked before anything is allocated. A slot holds the largest record. The
spares are slots that belong to no layer: a miss fills one of them, and the victim's becomes the spare.
"""

from dataclasses import dataclass

from runner.errors import ConfigInvalid

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class SlotNeeds:
    """What the model asks of its slots: how long one is, how many spares there are, how many experts."""

    n_layers: int
    n_experts: int
    top_k: int
    slot_nbytes: int
    n_spares: int


@dataclass(frozen=True, slots=True)
class FixedMemory:
    """What lies in the device's memory beside the slots, in bytes; staging is counted, wherever it is pinned.

    `context_nbytes` is what the device's driver takes for the process.
    """

    dense_weights_nbytes: int
    kv_cache_nbytes: int
    workspace_nbytes: int
    staging_nbytes: int
    context_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """All of it."""
        in_use_nbytes = self.dense_weights_nbytes + self.kv_cache_nbytes + self.workspace_nbytes
        return in_use_nbytes + self.staging_nbytes + self.context_nbytes


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """How many slots each layer has, how many are spare, and the device memory that is used with them."""

    quotas: tuple[int, ...]  # one a layer; they differ by one at most
    n_spares: int
    nbytes: int


def plan_slots(
    needs: SlotNeeds, fixed: FixedMemory, *, cache_experts: int | None = None, device_memory_nbytes: int | None = None
) -> SlotPlan:
    """Return each layer's slots for exactly one of the two options; raise ConfigInvalid, saying what would be valid.

    cache_experts          so many slots for each layer, from top_k to n_experts
    device_memory_nbytes   as many as fit beside what is fixed; layers share what divides unevenly, the first ones more
    """
    if cache_experts is not None and device_memory_nbytes is None:
        return _plan_by_count(needs, fixed, cache_experts)
    if device_memory_nbytes is not None and cache_experts is None:
        return _plan_by_memory(needs, fixed, device_memory_nbytes)
    came = "neither" if cache_experts is None else "both"
    raise ConfigInvalid(f"exactly one of --cache-experts and --device-memory is expected, {came} came")


def _plan_by_count(needs: SlotNeeds, fixed: FixedMemory, cache_experts: int) -> SlotPlan:
    if not needs.top_k <= cache_experts <= needs.n_experts:
        raise ConfigInvalid(
            f"--cache-experts: {needs.top_k} (a token's experts) to {needs.n_experts} (all of a layer's) are expected, "
            f"{cache_experts} came"
        )
    return _plan(needs, fixed, [cache_experts] * needs.n_layers)


def _plan_by_memory(needs: SlotNeeds, fixed: FixedMemory, device_memory_nbytes: int) -> SlotPlan:
    n_slots = (device_memory_nbytes - fixed.nbytes) // needs.slot_nbytes - needs.n_spares
    if n_slots < needs.n_layers * needs.top_k:
        raise ConfigInvalid(_too_small(needs, fixed, device_memory_nbytes))
    each, n_more = divmod(min(n_slots, needs.n_layers * needs.n_experts), needs.n_layers)
    return _plan(needs, fixed, [each + (layer < n_more) for layer in range(needs.n_layers)])


def _plan(needs: SlotNeeds, fixed: FixedMemory, quotas: list[int]) -> SlotPlan:
    nbytes = fixed.nbytes + (sum(quotas) + needs.n_spares) * needs.slot_nbytes
    return SlotPlan(tuple(quotas), needs.n_spares, nbytes)


def _too_small(needs: SlotNeeds, fixed: FixedMemory, device_memory_nbytes: int) -> str:
    least = _plan(needs, fixed, [needs.top_k] * needs.n_layers).nbytes
    n_slots = needs.n_layers * needs.top_k
    return (
        f"--device-memory: at least {least} bytes ({_gib(least, rounded_up=True)} GiB) are needed, "
        f"{device_memory_nbytes} ({_gib(device_memory_nbytes)} GiB) came; the least is dense weights "
        f"{fixed.dense_weights_nbytes}, kv_cache {fixed.kv_cache_nbytes}, workspace {fixed.workspace_nbytes}, staging "
        f"{fixed.staging_nbytes}, context {fixed.context_nbytes} and {n_slots} + {needs.n_spares} spare slots of "
        f"{needs.slot_nbytes} bytes"
    )


def _gib(nbytes: int, *, rounded_up: bool = False) -> str:
    # Hundredths, so that what is said to be enough is, and what is not is not said to be.
    hundredths = (nbytes * 100 + (_GIB - 1 if rounded_up else 0)) // _GIB
    return f"{hundredths // 100}.{hundredths % 100:02d}"
