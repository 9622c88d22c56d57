"""A model over an attached store, on the device that was chosen. Owns what each device needs beside the model.

cpu     all in place, in the shared mapping; of a store larger than memory the experts in the slots they are read into
link    the stand-in accelerator: experts in its slots, all else on the host as on the cpu
cuda    a GPU: everything in its memory (opening_cuda, opening_device)
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from quant.layers import Layers
from runner.devices import AUTO, CPU, is_gpu
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed, parse_link
from runner.errors import ConfigInvalid, DeviceFailed, OutOfMemory
from runner.experts.budget import FixedMemory, SlotNeeds, plan_slots
from runner.experts.cache import N_SPARES, CachedExperts, CacheMode, CacheSettings
from runner.experts.compute import CExperts
from runner.experts.in_place import InPlaceExperts
from runner.experts.prefetch import Guard
from runner.experts.tiered import TieredExperts
from runner.experts.transfer import CHUNK_NBYTES, CopyEngine
from runner.kv_cache import KVCache, kv_cache_nbytes, reserve_kv_cache
from runner.models.computation import Computation, kv_shape
from runner.models.lookahead import Lookahead
from runner.models.mixtral import Mixtral
from runner.models.mixtral_config import MixtralConfig
from runner.models.model import Model
from runner.models.opening_cuda import open_cuda
from runner.models.opening_device import HowCached, OnDevice, open_on_device
from runner.store_view import HostSlots, StoreView
from runner.weights import DenseWeights, load_dense_weights

_log = logging.getLogger(__name__)

# What a step takes between its layers, in floats a token: this many times the hidden size (configs/runner.toml).
_STEP_WIDTHS = 16
# What is read from a disk on a guess should be a tenth likelier than what is not: it halves what is read in vain, and
# wins as much time (docs/LOG.md). In the logits of a gate, of which exp() is the likelihood.
_MARGIN = 0.1
# A piece of a copy: shorter ones cost the host more than giving up a wrong guess earlier wins.
_CHUNK_S = 200e-6
_CHUNK_NBYTES_MIN = 1 << 16


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model, its cache of experts unless they are computed in place, and the memory that was planned for it.

    `new_kv_cache` returns one for a context of so many tokens; it raises OutOfMemory.
    """

    model: Model
    new_kv_cache: Callable[[int], KVCache]
    cache: CachedExperts | TieredExperts | None = None
    planned_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How the cache of a device works, beyond what the user's options say: what measurements and tests vary.

    `is_direct`: the stand-in's memory is the host's, so that it reads the mapping by itself. `on_device`: the device to
    compute all of the model on, instead of the one that the options name.
    """

    mode: CacheMode = CacheMode.CACHED
    holds_all: bool = False  # whatever the options say of slots
    is_guarded: bool = True
    is_direct: bool = True
    new_device: Callable[[LinkSpeed], LinkDevice] = LinkDevice
    stepped_by: Callable[[CopyEngine], bool] | None = None
    on_device: OnDevice | None = None


def open_model(computation: Computation, owned: ExitStack, plan: CachePlan | None = None) -> OpenedModel:
    """Return the model on its device; what has to be closed is entered into `owned`. Raise RunnerError."""
    store, settings, workspace = computation.store, computation.settings, computation.workspace
    weights = load_dense_weights(store, workspace, computation.config, exact=settings.exact)
    plan = plan or CachePlan()
    if store.host_slots is not None:
        return _in_slots(computation, weights, store.host_slots, plan)
    if plan.on_device is not None:
        return _on_device(computation, weights, plan.on_device, plan, owned)
    if is_gpu(computation.device):
        on_gpu = _on_gpu(computation, weights, plan, owned)
        if on_gpu is not None:
            return on_gpu
    elif computation.device != CPU:
        return _on_link(computation, weights, owned, plan)
    experts = InPlaceExperts(store, workspace, exact=settings.exact)
    layers = Layers(weights.attention_segments, experts.layers, workspace=workspace)
    return OpenedModel(Mixtral(computation.config, weights, experts, workspace, layers=layers), _on_host(computation))


def _on_gpu(computation: Computation, weights: DenseWeights, plan: CachePlan, owned: ExitStack) -> OpenedModel | None:
    """Return the model on its GPU; None, with a warning, if it does not fit there and nobody asked for that GPU."""
    settings = computation.settings
    is_asked_for = settings.device != AUTO or settings.cache_experts is not None or settings.device_memory is not None
    with ExitStack() as opening:
        try:
            opened = _on_device(computation, weights, open_cuda(computation, opening), plan, opening)
        except (ConfigInvalid, DeviceFailed, OutOfMemory) as error:
            if is_asked_for:
                raise
            _log.warning("computing on the CPU, since %s cannot be used: %s", computation.device, error)
            return None
        owned.enter_context(opening.pop_all())
    return opened


def _on_device(
    computation: Computation, weights: DenseWeights, on_device: OnDevice, plan: CachePlan, owned: ExitStack
) -> OpenedModel:
    how = HowCached(mode=plan.mode, holds_all=plan.holds_all, is_guarded=plan.is_guarded, stepped_by=plan.stepped_by)
    opened = open_on_device(computation, weights, on_device, how, owned)
    return OpenedModel(opened.model, opened.new_kv_cache, opened.cache, opened.planned_nbytes)


def _in_slots(computation: Computation, weights: DenseWeights, slots: HostSlots, plan: CachePlan) -> OpenedModel:
    """Return the model on the CPU over a store larger than memory; raise ConfigInvalid for another device."""
    store, settings, workspace = computation.store, computation.settings, computation.workspace
    if computation.device != CPU:
        if settings.device != AUTO:
            raise ConfigInvalid(
                f"--device: {settings.device} takes experts from memory, which does not hold all of this store's; "
                "give expertd more --memory, or compute with --device cpu"
            )
        _log.warning("computing on the CPU: %s takes experts from memory, which does not hold all", computation.device)
    experts = TieredExperts(
        store,
        slots,
        CExperts(store.manifest, workspace, exact=settings.exact),
        guard=Guard() if plan.is_guarded else None,
    )
    model = Mixtral(computation.config, weights, experts, workspace, _lookahead(computation, weights, margin=_MARGIN))
    return OpenedModel(model, _on_host(computation), experts)


def _lookahead(computation: Computation, weights: DenseWeights, *, margin: float = 0.0) -> Lookahead | None:
    """Return what foresees experts on the host, unless nobody wants that."""
    config, settings = computation.config, computation.settings
    if not settings.prefetch_depth:
        return None
    return Lookahead(
        [segment.weights for segment in weights.attention_segments],
        config.rms_norm_eps,
        n_guessed=min(settings.prefetch_experts, config.n_experts),
        depth=settings.prefetch_depth,
        margin=margin,
    )


def _on_link(computation: Computation, weights: DenseWeights, owned: ExitStack, plan: CachePlan) -> OpenedModel:
    store, config, settings = computation.store, computation.config, computation.settings
    slots = plan_slots(
        slot_needs(store, config),
        _memory_on_link(computation),
        cache_experts=config.n_experts if plan.holds_all else settings.cache_experts,
        device_memory_nbytes=None if plan.holds_all else settings.device_memory,
    )
    speed = parse_link(computation.device)
    device = plan.new_device(speed)
    owned.callback(device.close)
    cache = CachedExperts(
        store,
        device,
        CExperts(store.manifest, computation.workspace, exact=settings.exact),
        CacheSettings(
            quotas=slots.quotas,
            n_spares=slots.n_spares,
            mode=plan.mode,
            chunk_nbytes=_chunk_nbytes(speed),
            is_direct=plan.is_direct,
        ),
        guard=Guard() if plan.is_guarded else None,
        stepped_by=plan.stepped_by,
    )
    owned.enter_context(cache)
    ahead = None if plan.mode is CacheMode.NAIVE else _lookahead(computation, weights)
    model = Mixtral(config, weights, cache, computation.workspace, ahead)
    return OpenedModel(model, _on_host(computation), cache, slots.nbytes)


def _on_host(computation: Computation) -> Callable[[int], KVCache]:
    """Return what makes kv_caches in the host's memory."""
    return lambda context: reserve_kv_cache(context=context, **kv_shape(computation))


def _chunk_nbytes(speed: LinkSpeed) -> int:
    """Return how much is copied at once: what takes the link a moment, after which a wrong guess is given up."""
    return int(min(max(speed.bytes_per_s * _CHUNK_S, _CHUNK_NBYTES_MIN), CHUNK_NBYTES))


def slot_needs(store: StoreView, config: MixtralConfig, n_spares: int = N_SPARES) -> SlotNeeds:
    """Return what the store's experts ask of a device's slots."""
    return SlotNeeds(
        n_layers=config.n_layers,
        n_experts=config.n_experts,
        top_k=config.top_k,
        slot_nbytes=max(record.nbytes for record in store.manifest.experts.values()),
        n_spares=n_spares,
    )


def _memory_on_link(computation: Computation) -> FixedMemory:
    """Return what is used beside the slots; dense weights lie in the shared mapping, and nothing is staged."""
    config, settings = computation.config, computation.settings
    return FixedMemory(
        dense_weights_nbytes=0,
        kv_cache_nbytes=kv_cache_nbytes(context=settings.context, **kv_shape(computation)),
        workspace_nbytes=settings.prefill_chunk * config.hidden_size * _STEP_WIDTHS * 4,
        staging_nbytes=0,
    )
