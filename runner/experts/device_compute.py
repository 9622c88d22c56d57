"""Experts in slots of a device's memory, computed there: an ExpertCompute over a device's products.

Knows neither copies nor events. Called by the work of the device's compute queue, one call at a time; nobody blocks.
Which expert a token chose is known to the host, so that what is launched depends on it; the device is told where the
tokens of each expert stand, in one small copy a call.

Bits: every expert computes all of its tokens of a call at once, whichever slot it lies in and whenever that is, and
writes each contribution to its own place; they are summed by the same additions in every case.

Letters: T tokens, H hidden size, n tokens of one expert.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from protocol.manifest import Manifest
from quant.device_parts import DeviceExpert
from quant.expert import sum_in_order
from quant.triton_kernels import Products
from runner.devices.upload import upload
from runner.experts.compute import ExpertCall
from runner.experts.record_layouts import RecordLayouts


class DeviceExperts:
    """ExpertCompute on a device; of one thread at a time."""

    def __init__(self, manifest: Manifest, products: Products) -> None:
        self._products = products
        self._layouts = RecordLayouts(manifest)
        self._slots: Sequence[Tensor] = ()
        self._experts: dict[tuple[int, int], DeviceExpert] = {}  # (slot, layout)
        self._tokens: _CallTokens | None = None

    def use_slots(self, slots: Sequence[Tensor]) -> None:
        """Compute from these slots from now on."""
        self._slots = slots
        self._experts.clear()

    def contribute(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None:
        """Write what these experts return into their places of contributions, and leave those of others."""
        tokens = self._tokens_of(call)
        for expert, slot in slots.items():
            tokens.contribute(expert, self._expert(call.layer, expert, slot), contributions)

    def finish(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None:
        """Contribute the last experts; write the weighted sum, added in the order of the places, to the call's out."""
        self.contribute(call, slots, contributions)
        self._tokens = None
        call.out.copy_(sum_in_order(contributions, call.weights))

    def forward(self, call: ExpertCall, slots: Mapping[int, int]) -> None:
        """Write the weighted sum to the call's out where all experts that were chosen lie in slots."""
        contributions = call.hidden_states.new_empty(*call.expert_ids.shape, call.hidden_states.shape[1])
        self.finish(call, slots, contributions)

    def _tokens_of(self, call: ExpertCall) -> "_CallTokens":
        """Return what all parts of a call share; made with the first one."""
        if self._tokens is None or self._tokens.call is not call:
            self._tokens = _CallTokens(call, self._products)
        return self._tokens

    def _expert(self, layer: int, expert: int, slot: int) -> DeviceExpert:
        """Return how that expert is computed from the slot; one object for all of a layout."""
        layout = self._layouts.number(layer, expert)
        known = self._experts.get((slot, layout))
        if known is None:
            known = self._experts[slot, layout] = DeviceExpert(self._slots[slot], self._layouts.spans(layout))
        return known


class _CallTokens:
    """The tokens of one call: their activations, and which of them go to which expert."""

    def __init__(self, call: ExpertCall, products: Products) -> None:
        self.call = call
        self._products = products
        self._hidden_states = call.hidden_states.to(products.dtype)  # [T, H]
        n_tokens, self._top_k = call.expert_ids.shape
        flat = call.expert_ids.flatten()  # [T * top_k], the expert of each place
        self._only_row: list[int] | None = flat.tolist() if n_tokens == 1 else None
        if self._only_row is None:
            places = flat.argsort(stable=True)
            self._places = upload(places, products.device)  # [T * top_k], those of one expert side by side
            self._ends: list[int] = flat.bincount().cumsum(0).tolist()

    def contribute(self, expert_id: int, expert: DeviceExpert, contributions: Tensor) -> None:
        """Write what one expert returns for the tokens that chose it."""
        if self._only_row is not None:
            place = self._only_row.index(expert_id)
            self._products.expert(self._hidden_states, expert, contributions[0, place : place + 1])
            return
        start = self._ends[expert_id - 1] if expert_id else 0
        places = self._places[start : self._ends[expert_id]]  # [n]
        hidden_states = self._hidden_states.index_select(0, places // self._top_k)  # [n, H]
        out = contributions.new_empty(places.shape[0], contributions.shape[-1])
        self._products.expert(hidden_states, expert, out)
        contributions.view(-1, contributions.shape[-1]).index_copy_(0, places, out)
