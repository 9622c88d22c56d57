"""A model whose dense weights, kv_caches and experts' slots lie in a device's memory. Owns the order of opening.

What is needed is counted before anything is allocated, and compared with what the user allows and the device has.
Opening blocks: the dense weights are copied.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from quant.triton_kernels import Products
from runner.devices.device import Device
from runner.errors import OutOfMemory
from runner.experts.budget import FixedMemory, SlotNeeds, SlotPlan, plan_slots
from runner.experts.cache import N_SPARES, CachedExperts, CacheMode, CacheSettings
from runner.experts.device_compute import DeviceExperts
from runner.experts.prefetch import Guard
from runner.experts.transfer import CopyEngine, staging_nbytes
from runner.kv_cache import KVCache, allocate_kv_cache, kv_cache_nbytes
from runner.models.computation import Computation, kv_shape
from runner.models.device_lookahead import DeviceLookahead
from runner.models.device_memory import workspace_nbytes
from runner.models.device_mixtral import DeviceMixtral
from runner.models.device_weights import DeviceWeights, copy_dense_weights, dense_nbytes
from runner.weights import DenseWeights


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A device, what computes on it, and what is known of its memory.

    is_direct       it reads the store's mapping by itself; else records go through staging chunks
    n_stagers       how many threads fill those
    context_nbytes  what its driver takes for this process
    free_nbytes     what can still be had
    """

    device: Device
    products: Products
    is_direct: bool
    context_nbytes: int
    free_nbytes: int
    n_stagers: int = 1


@dataclass(frozen=True, slots=True)
class HowCached:
    """How the cache works, beyond what the user's options say: what measurements and tests vary."""

    mode: CacheMode = CacheMode.CACHED
    holds_all: bool = False
    is_guarded: bool = True
    stepped_by: Callable[[CopyEngine], bool] | None = None


@dataclass(frozen=True, slots=True)
class OpenedOnDevice:
    """The model, its cache, what makes its kv_caches, and the memory that was planned."""

    model: DeviceMixtral
    cache: CachedExperts
    new_kv_cache: Callable[[int], KVCache]
    planned_nbytes: int


def open_on_device(
    computation: Computation, weights: DenseWeights, on_device: OnDevice, how: HowCached, owned: ExitStack
) -> OpenedOnDevice:
    """Return the model on that device; what has to be closed is entered into `owned`. Raise RunnerError."""
    plan = _planned(computation, weights, on_device, how)
    device = on_device.device
    with device.computing(), torch.no_grad():
        dense = copy_dense_weights(weights, on_device.products.device)
        cache = CachedExperts(
            computation.store,
            device,
            DeviceExperts(computation.store.manifest, on_device.products),
            CacheSettings(
                quotas=plan.quotas,
                n_spares=plan.n_spares,
                mode=how.mode,
                is_direct=on_device.is_direct,
                n_stagers=on_device.n_stagers,
                waits=False,
            ),
            guard=Guard() if how.is_guarded else None,
            stepped_by=how.stepped_by,
        )
    owned.enter_context(cache)
    model = DeviceMixtral(
        computation.config,
        dense,
        cache,
        device,
        on_device.products,
        lookahead=None if how.mode is CacheMode.NAIVE else _lookahead(computation, dense, cache, on_device.products),
    )
    return OpenedOnDevice(model, cache, partial(_new_kv_cache, computation, on_device), plan.nbytes)


def _planned(computation: Computation, weights: DenseWeights, on_device: OnDevice, how: HowCached) -> SlotPlan:
    """Return the slots that there is memory for; raise ConfigInvalid or OutOfMemory, saying what is needed."""
    settings, config = computation.settings, computation.config
    fixed = FixedMemory(
        dense_weights_nbytes=dense_nbytes(weights),
        kv_cache_nbytes=kv_cache_nbytes(context=settings.context, **kv_shape(computation)),
        workspace_nbytes=workspace_nbytes(
            computation.store,
            config,
            on_device.products,
            n_tokens=settings.prefill_chunk,
            context=settings.context,
            kv_dtype=kv_shape(computation)["dtype"],
        ),
        staging_nbytes=0 if on_device.is_direct else staging_nbytes(),
        context_nbytes=on_device.context_nbytes,
    )
    available_nbytes = on_device.free_nbytes + on_device.context_nbytes
    cache_experts = config.n_experts if how.holds_all else settings.cache_experts
    device_memory = None if how.holds_all else settings.device_memory
    if cache_experts is None and device_memory is None:
        device_memory = available_nbytes
    plan = plan_slots(_slot_needs(computation), fixed, cache_experts=cache_experts, device_memory_nbytes=device_memory)
    if plan.nbytes > available_nbytes:
        raise OutOfMemory(
            f"{plan.nbytes} bytes are needed on the device ({fixed.nbytes} beside {sum(plan.quotas)} + {plan.n_spares} "
            f"spare slots), {available_nbytes} can be had; a smaller --cache-experts, --device-memory or --context fits"
        )
    return plan


def _slot_needs(computation: Computation) -> SlotNeeds:
    config = computation.config
    largest = max(record.nbytes for record in computation.store.manifest.experts.values())
    return SlotNeeds(
        n_layers=config.n_layers,
        n_experts=config.n_experts,
        top_k=config.top_k,
        slot_nbytes=allocated_nbytes(largest),
        n_spares=N_SPARES,
    )


def _lookahead(
    computation: Computation, weights: DeviceWeights, cache: CachedExperts, products: Products
) -> DeviceLookahead | None:
    settings, config = computation.settings, computation.config
    if not settings.prefetch_depth:
        return None
    return DeviceLookahead(
        weights.layers,
        config.rms_norm_eps,
        products,
        n_guessed=min(settings.prefetch_experts, config.n_experts),
        depth=settings.prefetch_depth,
        is_wanted=cache.follows_guesses,
    )


def _new_kv_cache(computation: Computation, on_device: OnDevice, context: int) -> KVCache:
    with on_device.device.computing():
        return allocate_kv_cache(on_device.products.device, context=context, **kv_shape(computation))


# torch hands out blocks of 10 MiB and more in steps of 2 MiB (c10/cuda/CUDACachingAllocator).
_LARGE_NBYTES = 10 << 20
_STEP_NBYTES = 2 << 20


def allocated_nbytes(nbytes: int) -> int:
    """Return how much of a GPU's memory torch takes for so many bytes; smaller blocks share what was taken."""
    return nbytes if nbytes < _LARGE_NBYTES else -(-nbytes // _STEP_NBYTES) * _STEP_NBYTES
