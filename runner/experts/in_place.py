"""Experts computed straight from the shared mapping: no copies, no cache, no expert touched that is not used.

Knows no gate and no store format: a record's bytes and its spans go to quant.expert as they are. Nobody blocks here but
the kernel, which may have to map a page.
"""

import torch
from torch import Tensor

from protocol.handles import ExpertKey
from protocol.layout import record_spans
from quant.expert import Expert
from quant.workspace import Workspace
from runner.store_view import StoreView


class InPlaceExperts:
    """An ExpertSource over a store that lies in memory; used from one thread, the workspace's."""

    def __init__(self, store: StoreView, workspace: Workspace) -> None:
        self._store = store
        self._workspace = workspace
        self._experts: dict[ExpertKey, Expert] = {}
        model = store.manifest.model
        self._expert_nelements = 3 * model.hidden_size * model.intermediate_size

    def forward(self, layer: int, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, fp32 [T, hidden]; raise CorruptExpert."""
        n_tokens, top_k = expert_ids.shape
        contributions = hidden_states.new_empty(n_tokens, top_k, hidden_states.shape[1])
        # For each expert used, where: the tokens and their places among the gate's choices.
        if n_tokens == 1:
            uses = [(expert, 0, place) for place, expert in enumerate(expert_ids[0].tolist())]
        else:
            chosen = sorted(set(expert_ids.flatten().tolist()))
            uses = [(expert, *(expert_ids == expert).nonzero(as_tuple=True)) for expert in chosen]
        experts = [self._expert(layer, expert) for expert, _, _ in uses]

        def work(first: int, n: int) -> None:
            for expert, (_, tokens, places) in zip(experts[first : first + n], uses[first : first + n], strict=True):
                contributions[tokens, places] = expert(hidden_states[tokens].view(-1, hidden_states.shape[1]))

        if len(uses) < self._workspace.n_threads:
            work(0, len(uses))  # each expert is shared among all threads
        else:
            self._workspace.split(len(uses), self._expert_nelements, work)  # each thread takes whole experts
        return sum_in_order(contributions, weights)

    def prefetch(self, layer: int, expert_ids: Tensor) -> None:
        """Do nothing: the experts are in memory."""

    def _expert(self, layer: int, expert: int) -> Expert:
        key = ExpertKey(layer, expert)
        found = self._experts.get(key)
        if found is None:
            record = self._store.manifest.experts[key]
            data = torch.frombuffer(self._store.expert_record(key), dtype=torch.uint8)
            found = Expert(data, record_spans(record.layout_id, record.parts), workspace=self._workspace)
            self._experts[key] = found
        return found


def sum_in_order(contributions: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over k of contributions [T, k, hidden] by weights [T, k], added in the order of k: [T, hidden]."""
    weighted = contributions * weights.unsqueeze(-1)
    total = weighted[:, 0]
    for place in range(1, weighted.shape[1]):
        total = total + weighted[:, place]
    return total
