"""Experts computed straight from the shared mapping: no copies, no cache, no expert touched that is not used.

Knows no gate and no store format: a record's bytes and its spans go to quant.expert as they are. Nobody blocks here but
the kernel, which may have to map a page.
"""

import torch
from torch import Tensor

from protocol.handles import ExpertKey
from protocol.layout import record_spans
from quant.errors import ExpertMissing
from quant.expert import Expert, LayerExperts
from quant.workspace import Workspace
from runner.experts.source import Guess
from runner.store_view import StoreView


class InPlaceExperts:
    """An ExpertSource over a store that lies in memory; used from one thread, the workspace's."""

    def __init__(self, store: StoreView, workspace: Workspace, *, exact: bool = False) -> None:
        self._store = store
        model = store.manifest.model
        # Each layer's, of those experts that were used so far.
        self.layers = [
            LayerExperts(model.n_experts, model.hidden_size, workspace=workspace, exact=exact)
            for _ in range(model.n_layers)
        ]

    def forward(self, layer: int, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, fp32 [T, hidden]; raise CorruptExpert."""
        experts = self.layers[layer]
        try:
            return experts.forward(hidden_states, expert_ids, weights)
        except ExpertMissing:  # at the first use of an expert; asking before each call would cost more than the call
            for expert in set(expert_ids.flatten().tolist()):
                if not experts.has(expert):
                    experts.put(expert, self._load(ExpertKey(layer, expert)))
        return experts.forward(hidden_states, expert_ids, weights)

    def prefetch(self, layer: int, guess: Guess) -> None:
        """Do nothing: the experts are in memory."""

    def _load(self, key: ExpertKey) -> Expert:
        record = self._store.manifest.experts[key]
        data = torch.frombuffer(self._store.expert_record(key), dtype=torch.uint8)
        return Expert(data, record_spans(record.layout_id, record.parts))
