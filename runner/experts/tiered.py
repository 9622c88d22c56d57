"""Experts of a store larger than memory, computed from the slots that expertd reads them into.

One call, in this order: what is there is found by a look at the slots, without a message; the rest is demanded at once;
then later layers' experts are hinted at; then what is there is computed, and the rest as it comes in. Contributions are
kept apart and summed in the gate's order: where and when an expert was computed changes no bit. Behind each
computation a slot is looked at again: if the daemon has given it to another expert meanwhile, the contribution is
forgotten and the expert demanded.

Who may block whom: the model's thread waits for the daemon where an expert is demanded; nobody waits for the runner.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from protocol.fault_points import FaultPoint, reached
from protocol.handles import ExpertKey
from protocol.slot_table import SlotEntry
from runner.errors import SessionGone, StoreUnavailable
from runner.experts.compute import ExpertCall, ExpertCompute
from runner.experts.counters import Counters, Tally
from runner.experts.foreseen import Foreseen
from runner.experts.leases import Leases
from runner.experts.order import by_last_token
from runner.experts.prefetch import DECODE_TOKENS_MAX, Guard
from runner.experts.presence import Presence
from runner.experts.source import PREFILL_TOKENS_MIN, Guess
from runner.store_view import HostSlots, StoreView

# A hint that is older than this is of a runner that has stopped.
_DEADLINE_MS = 2000
# More than that of one session are dropped (docs/protocol.md, section 5).
_HINTS_MAX = 64
# An expert that the daemon took back so often while it was computed: something is wrong with one of us.
_LOSSES_MAX = 16
_SESSIONS_MAX = 10


class TieredExperts:
    """An ExpertSource over a store with slots; used from the model's one thread. `clock` gives monotonic seconds.

    `guard` decides whether prefetches are sent; without one all are.
    """

    def __init__(
        self,
        store: StoreView,
        slots: HostSlots,
        compute: ExpertCompute,
        *,
        guard: Guard | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._compute = compute
        self._guard = guard
        self._clock = clock
        self._n_layers = store.manifest.model.n_layers
        self._tally = Tally()
        self._step_began_s, self._n_misses_before = 0.0, 0
        self._use(slots)

    @property
    def counters(self) -> Counters:
        """What happened until now."""
        return self._tally.snapshot()

    def forward(self, layer: int, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, fp32 [T, hidden].

        Raise CorruptExpert, ReadFailed or StoreUnavailable; the next call begins afresh.
        """
        n_tokens = expert_ids.shape[0]
        if layer == 0:
            self._step_began_s, self._n_misses_before = self._clock(), self._tally.misses
        out = torch.empty(n_tokens, hidden_states.shape[1])
        call = ExpertCall(layer, hidden_states, expert_ids, weights, out)
        groups = by_last_token(expert_ids)
        self._in_some_session(partial(self._compute_call, call, [expert for group in groups for expert in group]))
        if layer == self._n_layers - 1:
            self._in_some_session(self._end_step)
            if self._guard is not None and n_tokens <= DECODE_TOKENS_MAX:
                n_misses = self._tally.misses - self._n_misses_before
                self._guard.observe(self._clock() - self._step_began_s, n_tokens, n_misses)
        return out

    def prefetch(self, layer: int, guess: Guess) -> None:
        """Note a guess; the next `forward` hints at what it names, behind what it demands itself."""
        self._foreseen.note(layer, guess)

    def _in_some_session(self, action: Callable[[], None]) -> None:
        """Do it, anew with the slots of another session as often as the one before is gone."""
        for _ in range(_SESSIONS_MAX):
            if self._is_gone:
                self._use(self._slots.renewed())
            try:
                action()
            except SessionGone:
                self._let_go()
            else:
                return
        raise StoreUnavailable(f"{_SESSIONS_MAX} sessions with expertd ended while one layer was computed")

    def _end_step(self) -> None:
        self._leases.release()

    def _use(self, slots: HostSlots) -> None:
        """Compute from these slots from now on; what was asked for and hinted at is forgotten."""
        self._slots = slots
        self._presence = Presence(self._store, slots, self._tally)
        self._leases = Leases(slots.requests, slots.n_slots, self._clock)
        self._foreseen = Foreseen(self._presence, self._tally, self._guard)
        self._compute.use_slots(self._presence.records)
        self._is_in_call = False
        self._is_gone = False

    def _let_go(self) -> None:
        """Hold nothing of a session that is gone: the memory of its slots may be needed for the next one's."""
        self._is_gone = True
        self._compute.use_slots(())
        self._presence.records.clear()

    def _compute_call(self, call: ExpertCall, chosen: Sequence[int]) -> None:
        if self._is_in_call:
            self._leases.give_up()  # of a call that was left by an exception
        self._is_in_call = True
        places, absent = self._look_for(call.layer, chosen)
        self._foreseen.judge(call.layer, chosen, absent)
        if absent:
            self._compute_as_they_come(call, places, absent)
        elif not self._compute_at_once(call, places):
            self._compute_as_they_come(call, *self._look_for(call.layer, chosen))
        self._is_in_call = False

    def _look_for(self, layer: int, experts: Iterable[int]) -> tuple[dict[int, SlotEntry], list[int]]:
        """Return where those are that are there, and the others."""
        places, absent = {}, []
        for expert in experts:
            place = self._presence.find(ExpertKey(layer, expert))
            if place is None:
                absent.append(expert)
            else:
                places[expert] = place
        return places, absent

    def _compute_at_once(self, call: ExpertCall, places: dict[int, SlotEntry]) -> bool:
        """Compute the whole call from what is there; return whether that stayed there."""
        keys = [ExpertKey(call.layer, expert) for expert in places]
        self._leases.use(keys)
        self._hint(len(places))
        self._compute.forward(call, {expert: place.slot for expert, place in places.items()})
        return all(map(self._presence.is_still_there, keys, places.values()))

    def _compute_as_they_come(self, call: ExpertCall, places: dict[int, SlotEntry], absent: Sequence[int]) -> None:
        """Demand what is not there; compute what is, and the others as they come in; sum behind the last one."""
        layer, leases = call.layer, self._leases
        leases.demand([ExpertKey(layer, expert) for expert in absent], [ExpertKey(layer, expert) for expert in places])
        n_chosen = len(places) + len(absent)
        self._hint(n_chosen)
        contributions = call.hidden_states.new_empty(*call.expert_ids.shape, call.hidden_states.shape[1])
        # Few tokens: as many experts at once as there are. Many: one by one, as others wait for its slot.
        is_prefill = call.expert_ids.shape[0] >= PREFILL_TOKENS_MIN
        ready = deque(places.items())
        n_losses = 0
        while ready or not leases.are_all_there:
            if not leases.are_all_there:
                ready += self._collect(waits=not ready)
            batch = dict(ready.popleft() for _ in range(min(1 if is_prefill else n_chosen, len(ready))))
            lost = self._contribute(call, batch, contributions, is_last=not ready and leases.are_all_there)
            n_losses += len(lost)
            if n_losses > _LOSSES_MAX:
                raise StoreUnavailable(f"expertd took {lost[0]} back again and again while it was computed")
            if is_prefill and not leases.are_all_there:
                leases.release()
            leases.demand(lost)

    def _contribute(
        self, call: ExpertCall, batch: dict[int, SlotEntry], contributions: Tensor, *, is_last: bool
    ) -> list[ExpertKey]:
        """Compute these experts, and the sum of all behind the last; return those that did not stay meanwhile."""
        compute = self._compute.finish if is_last else self._compute.contribute
        compute(call, {expert: place.slot for expert, place in batch.items()}, contributions)
        reached(FaultPoint.RUNNER_SLOTS_COMPUTED)
        found = {ExpertKey(call.layer, expert): place for expert, place in batch.items()}
        lost = [key for key, place in found.items() if not self._presence.is_still_there(key, place)]
        self._leases.use(key for key in found if key not in lost)
        return lost

    def _collect(self, *, waits: bool) -> list[tuple[int, SlotEntry]]:
        """Return what has come in of what was demanded; `waits` for something to."""
        n_rings = self._presence.bell.n_rings  # before the look: what comes in behind it rings again
        places = self._found()
        if waits and not places:
            places = self._await_some(n_rings)
        if places:
            self._tally.copied_nbytes += sum(self._presence.nbytes(key) for key, _ in places)
            self._leases.ask_for_more()
        return [(key.expert, place) for key, place in places]

    def _await_some(self, n_rings: int) -> list[tuple[ExpertKey, SlotEntry]]:
        """Return what comes in first behind that ring; nothing if nothing is awaited any more."""
        began_s, bell = self._clock(), self._presence.bell
        self._leases.release()  # nobody waits for what we hold while we wait ourselves
        places = self._granted()
        while not places and not self._leases.are_all_there:
            self._leases.wait(bell, n_rings)
            n_rings = bell.n_rings
            places = self._found() or self._granted()
        self._tally.waited_s += self._clock() - began_s
        return places

    def _found(self) -> list[tuple[ExpertKey, SlotEntry]]:
        """Return what of that which is awaited lies in slots by now."""
        places = [(key, place) for key in self._leases.awaited if (place := self._presence.find(key)) is not None]
        for key, _ in places:
            self._leases.found(key)
        return places

    def _granted(self) -> list[tuple[ExpertKey, SlotEntry]]:
        """Return what has come in by messages."""
        return [(handle.key, self._presence.granted(handle)) for handle in self._leases.collect()]

    def _hint(self, n_chosen: int) -> None:
        """Tell the daemon what later layers are likely to choose, as far as slots go beside the present layer's."""
        hints = self._foreseen.hints(min(self._presence.n_slots - n_chosen, _HINTS_MAX))
        if hints is not None:
            self._leases.tell_uses()  # what was used just now is not what makes room for what may be used
            self._leases.prefetch(hints, _DEADLINE_MS)
