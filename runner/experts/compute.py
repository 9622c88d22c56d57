"""How experts that lie in slots are computed: the door behind which kernels stand, and the C library's behind it.

Knows neither copies nor events: whoever calls has seen to it that the slots hold what they are said to hold. Called by
the work of a device's compute queue, one call at a time.

Letters: T tokens, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from protocol.manifest import Manifest
from quant.expert import Expert, LayerExperts
from quant.workspace import Workspace
from runner.experts.record_layouts import RecordLayouts


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCall:
    """What is to be computed of one layer, and where it is to be written."""

    layer: int
    hidden_states: Tensor  # f32 [T, H]
    expert_ids: Tensor  # int64 [T, top_k]
    weights: Tensor  # f32 [T, top_k]
    out: Tensor  # f32 [T, H]


class ExpertCompute(Protocol):
    """Computes with experts in slots: `slots` says for experts of the call's layer in which slot each lies.

    Where and when an expert is computed changes no bit: `forward` writes what `contribute` in any number of parts and
    `finish` write. contributions is f32 [T, top_k, H].
    """

    def use_slots(self, slots: Sequence[Tensor]) -> None:
        """Compute from these slots from now on, uint8 [slot_nbytes] each."""
        ...

    def contribute(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None:
        """Write what these experts return into their places of contributions, and leave those of others."""
        ...

    def finish(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None:
        """Contribute the last experts; write the weighted sum, added in the order of the places, to the call's out."""
        ...

    def forward(self, call: ExpertCall, slots: Mapping[int, int]) -> None:
        """Write the weighted sum to the call's out where all experts that were chosen lie in slots."""
        ...


class CExperts:
    """ExpertCompute on the CPU, by the C library or, without it, by torch; of one thread at a time, the workspace's."""

    def __init__(self, manifest: Manifest, workspace: Workspace, *, exact: bool = False) -> None:
        model = manifest.model
        # For a part of a call's experts: all layers' table, empty between two calls.
        self._some = LayerExperts(model.n_experts, model.hidden_size, workspace=workspace, exact=exact)
        # For all of a call's experts: a layer's table, which keeps what was there; those not chosen do not matter.
        self._all = [
            LayerExperts(model.n_experts, model.hidden_size, workspace=workspace, exact=exact)
            for _ in range(model.n_layers)
        ]
        self._slots_of_all: list[dict[int, int]] = [{} for _ in range(model.n_layers)]
        self._layouts = RecordLayouts(manifest)
        self._slots: Sequence[Tensor] = ()
        self._experts: dict[tuple[int, int], Expert] = {}  # (slot, layout)

    def use_slots(self, slots: Sequence[Tensor]) -> None:
        """Compute from these slots from now on."""
        self._slots = slots
        self._experts.clear()
        for table, known in zip(self._all, self._slots_of_all, strict=True):
            for expert in known:
                table.put(expert, None)  # else it would hold the memory of slots that are gone
            known.clear()

    def contribute(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None:
        """Write what these experts return into their places of contributions, and leave those of others."""
        with self._put(call.layer, slots) as some:
            some.contribute(call.hidden_states, call.expert_ids, contributions)

    def finish(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None:
        """Contribute the last experts; write the weighted sum, added in the order of the places, to the call's out."""
        with self._put(call.layer, slots) as some:
            some.finish(call.hidden_states, call.expert_ids, contributions, call.weights, call.out)

    def forward(self, call: ExpertCall, slots: Mapping[int, int]) -> None:
        """Write the weighted sum to the call's out where all experts that were chosen lie in slots."""
        known, table = self._slots_of_all[call.layer], self._all[call.layer]
        for expert, slot in slots.items():
            if known.get(expert) != slot:
                table.put(expert, self._expert(call.layer, expert, slot))
                known[expert] = slot
        table.forward(call.hidden_states, call.expert_ids, call.weights, call.out)

    @contextmanager
    def _put(self, layer: int, slots: Mapping[int, int]) -> Iterator[LayerExperts]:
        """Yield the table of all layers with these experts in it, and no others."""
        try:
            for expert, slot in slots.items():
                self._some.put(expert, self._expert(layer, expert, slot))
            yield self._some
        finally:
            for expert in slots:
                self._some.put(expert, None)

    def _expert(self, layer: int, expert: int, slot: int) -> Expert:
        """Return how that expert is computed from the slot; one object for all of a layout."""
        layout = self._layouts.number(layer, expert)
        known = self._experts.get((slot, layout))
        if known is None:
            known = self._experts[slot, layout] = Expert(self._slots[slot], self._layouts.spans(layout))
        return known
