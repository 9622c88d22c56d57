"""A model over an attached store, on the device that was chosen. Owns what each device needs beside the model.

cpu     all in place, in the shared mapping
link    the stand-in accelerator: experts in its slots, all else on the host as on the cpu
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from quant.workspace import Workspace
from runner.config import RunnerConfig
from runner.devices import CPU
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed, parse_link
from runner.experts.budget import FixedMemory, SlotNeeds, plan_slots
from runner.experts.cache import N_SPARES, CachedExperts, CacheMode, CacheSettings
from runner.experts.compute import CExperts
from runner.experts.in_place import InPlaceExperts
from runner.experts.prefetch import Guard
from runner.experts.transfer import CopyEngine
from runner.kv_cache import kv_cache_nbytes
from runner.models.lookahead import Lookahead
from runner.models.mixtral import Mixtral
from runner.models.mixtral_config import MixtralConfig
from runner.store_view import StoreView
from runner.weights import DenseWeights, load_dense_weights

# What a step takes between its layers, in floats a token: this many times the hidden size (configs/runner.toml).
_STEP_WIDTHS = 16


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model, its cache of experts unless they are computed in place, and the memory that was planned for it."""

    model: Mixtral
    cache: CachedExperts | None = None
    planned_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How the cache of a device works, beyond what the user's options say: what measurements and tests vary.

    `is_direct`: the stand-in's memory is the host's, so that it reads the mapping by itself.
    """

    mode: CacheMode = CacheMode.CACHED
    is_guarded: bool = True
    is_direct: bool = True
    new_device: Callable[[LinkSpeed], LinkDevice] = LinkDevice
    stepped_by: Callable[[CopyEngine], bool] | None = None


@dataclass(frozen=True, slots=True)
class Computation:
    """What is computed with what: a store's model, the user's options, the device's full name, the host's threads."""

    store: StoreView
    config: MixtralConfig
    settings: RunnerConfig
    device: str
    workspace: Workspace


def open_model(computation: Computation, owned: ExitStack, plan: CachePlan | None = None) -> OpenedModel:
    """Return the model on its device; what has to be closed is entered into `owned`. Raise RunnerError."""
    store, settings, workspace = computation.store, computation.settings, computation.workspace
    weights = load_dense_weights(store, workspace, computation.config, exact=settings.exact)
    if computation.device == CPU:
        experts = InPlaceExperts(store, workspace, exact=settings.exact)
        return OpenedModel(Mixtral(computation.config, weights, experts, workspace))
    return _on_link(computation, weights, owned, plan or CachePlan())


def _on_link(computation: Computation, weights: DenseWeights, owned: ExitStack, plan: CachePlan) -> OpenedModel:
    store, config, settings = computation.store, computation.config, computation.settings
    slots = plan_slots(
        slot_needs(store, config),
        _memory_on_link(config, settings),
        cache_experts=settings.cache_experts,
        device_memory_nbytes=settings.device_memory,
    )
    device = plan.new_device(parse_link(computation.device))
    owned.callback(device.close)
    cache = CachedExperts(
        store,
        device,
        CExperts(store.manifest, computation.workspace, exact=settings.exact),
        CacheSettings(quotas=slots.quotas, n_spares=slots.n_spares, mode=plan.mode, is_direct=plan.is_direct),
        guard=Guard() if plan.is_guarded else None,
        stepped_by=plan.stepped_by,
    )
    owned.enter_context(cache)
    ahead = None
    if settings.prefetch_depth and plan.mode is not CacheMode.NAIVE:
        ahead = Lookahead(
            [segment.weights for segment in weights.attention_segments],
            config.rms_norm_eps,
            n_guessed=min(settings.prefetch_experts, config.n_experts),
            depth=settings.prefetch_depth,
        )
    return OpenedModel(Mixtral(config, weights, cache, computation.workspace, ahead), cache, slots.nbytes)


def slot_needs(store: StoreView, config: MixtralConfig, n_spares: int = N_SPARES) -> SlotNeeds:
    """Return what the store's experts ask of a device's slots."""
    return SlotNeeds(
        n_layers=config.n_layers,
        n_experts=config.n_experts,
        top_k=config.top_k,
        slot_nbytes=max(record.nbytes for record in store.manifest.experts.values()),
        n_spares=n_spares,
    )


def _memory_on_link(config: MixtralConfig, settings: RunnerConfig) -> FixedMemory:
    """Return what is used beside the slots; dense weights lie in the shared mapping, and nothing is staged."""
    dtype = torch.float32 if settings.exact else torch.float16
    return FixedMemory(
        dense_weights_nbytes=0,
        kv_cache_nbytes=kv_cache_nbytes(config.n_layers, config.n_kv_heads, settings.context, config.head_dim, dtype),
        workspace_nbytes=settings.prefill_chunk * config.hidden_size * _STEP_WIDTHS * 4,
        staging_nbytes=0,
    )
