"""What the expert cache costs a layer in Python where nothing is to be copied: request, use, prefetch.

The cache and the stand-in accelerator are those of a run; only what is computed is left out, so that all the time is
theirs. Every expert has a slot and is there. A layer's call is a decode step's: one token, its experts as routing is
uniform, and a guess for the next layer offered before it. The manifest is a store's; its records are blank.
"""

import math
from collections.abc import Mapping, Sequence
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.errors import NothingToMeasure
from benchmarks.figures import Figure
from benchmarks.settings import Settings
from protocol.handles import ExpertKey
from protocol.manifest import MANIFEST_FILE, Manifest, load_manifest
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.experts.cache import CachedExperts, CacheSettings
from runner.experts.compute import ExpertCall

_N_STEPS = 200


class _BlankStore:
    """A StoreView of a manifest's shape over one record of zeros."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._record = bytearray(max(record.nbytes for record in manifest.experts.values()))

    @property
    def host_slots(self) -> None:
        """None: all is in memory."""
        return None

    def expert_record(self, key: ExpertKey) -> memoryview:
        return memoryview(self._record)[: self.manifest.experts[key].nbytes]

    def dense_record(self, name: str) -> memoryview:
        raise NothingToMeasure(f"{name}: no dense weight is used here")

    def side_file(self, name: str) -> bytes | None:
        raise NothingToMeasure(f"{name}: no file is used here")


class _NothingComputed:
    """An ExpertCompute that takes no time."""

    def use_slots(self, slots: Sequence[Tensor]) -> None: ...

    def contribute(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None: ...

    def finish(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None: ...

    def forward(self, call: ExpertCall, slots: Mapping[int, int]) -> None: ...


def measure_cache(settings: Settings) -> list[Figure]:
    """Return the milliseconds a layer; raise NothingToMeasure without a store."""
    if settings.store is None:
        raise NothingToMeasure("cache: a store is needed; `make demo` makes one")
    store = _BlankStore(load_manifest((settings.store / MANIFEST_FILE).read_bytes()))
    samples = tuple(_measure_ms(store) for _ in range(settings.rounds))
    return [Figure("expert cache, all resident: request, use and prefetch, a layer", "ms", samples)]


def _measure_ms(store: _BlankStore) -> float:
    model = store.manifest.model
    device = LinkDevice(LinkSpeed(math.inf))
    quotas = (model.n_experts,) * model.n_layers
    with CachedExperts(store, device, _NothingComputed(), CacheSettings(quotas)) as experts:
        everything = torch.arange(model.n_experts).view(-1, 1)
        hidden_states = torch.zeros(model.n_experts, model.hidden_size)
        for layer in range(model.n_layers):
            experts.forward(layer, hidden_states, everything, torch.ones(model.n_experts, 1))
        _step(experts, model.n_layers, model.n_experts, model.top_k, model.hidden_size)
        began_s = perf_counter()
        for _ in range(_N_STEPS):
            _step(experts, model.n_layers, model.n_experts, model.top_k, model.hidden_size)
        took_s = perf_counter() - began_s
    device.close()
    return took_s / _N_STEPS / model.n_layers * 1e3


def _step(experts: CachedExperts, n_layers: int, n_experts: int, top_k: int, hidden_size: int) -> None:
    hidden_states, weights = torch.zeros(1, hidden_size), torch.ones(1, top_k)
    chosen = [torch.randperm(n_experts)[:top_k].view(1, -1) for _ in range(n_layers + 1)]
    for layer in range(n_layers):
        if layer + 1 < n_layers:
            experts.prefetch(layer + 1, chosen[layer + 1].clone)
        experts.forward(layer, hidden_states, chosen[layer], weights)
