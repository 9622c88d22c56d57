"""Experts computed on a device that holds only some of them: the others are copied into its slots when they are used.

Owns the slots, the copy engine and the order of copies and computations. Knows no gate, no kernel and no store format.

One call, in this order. Under the lock: the chosen experts that are cached are pinned, the others get slots, and their
copies are asked for, before anything is launched. Then what is there is launched, then the others one by one, in the
order of their copies; where a call uses more experts than there are slots, slots are given back as soon as they were
used. Last the contributions, each stored by itself, are summed in the gate's order: where and when an expert was
computed changes no bit. Use of a slot: pin; wait for FILLED under the lock; the compute queue waits for `ready`;
launch; record `last_use`; only then unpin, so that whoever refills the slot finds that record.

Who may block whom. The model's thread blocks until the copy engine has submitted, and, if the cache `waits`, until the
device has computed; never with the lock held. The copy engine never waits for the model.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from protocol.handles import ExpertKey
from runner.devices.device import Buffer, Device
from runner.errors import CorruptExpert
from runner.experts.compute import ExpertCall, ExpertCompute
from runner.experts.counters import Counters, Tally
from runner.experts.order import by_last_token, in_one_row
from runner.experts.prefetch import DECODE_TOKENS_MAX, Guard
from runner.experts.slots import Claim, SlotTable
from runner.experts.source import PREFILL_TOKENS_MIN, Guess
from runner.experts.transfer import CHUNK_NBYTES, CopyEngine, new_slots
from runner.experts.wanted import Wanted
from runner.store_view import StoreView

# So many slots belong to no layer.
N_SPARES = 4


class CacheMode(Enum):
    """What is kept: by the policy; nothing between two calls; or nothing, and all of a layer's experts are copied."""

    CACHED = auto()
    UNCACHED = auto()
    NAIVE = auto()


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """How many slots each layer has and how many are spare; how copies are made.

    `waits`: a result is there when `forward` returns. Else the compute queue writes it, and whoever reads it is on that
    queue too, as a model on a GPU is. `is_direct`: the device reads the store's mapping, nothing is staged; else
    `n_stagers` threads stage.
    """

    quotas: tuple[int, ...]
    n_spares: int = N_SPARES
    mode: CacheMode = CacheMode.CACHED
    chunk_nbytes: int = CHUNK_NBYTES
    is_direct: bool = False
    n_stagers: int = 1
    waits: bool = True


class CachedExperts:
    """An ExpertSource over a store and a device, both of which outlive it. Called from the model's one thread.

    Use it in a `with`, or close it. `guard` decides whether prefetches are followed; without one all are. `stepped_by`
    replaces the copy engine's thread (see CopyEngine); `clock` gives monotonic seconds.
    """

    def __init__(
        self,
        store: StoreView,
        device: Device,
        compute: ExpertCompute,
        settings: CacheSettings,
        *,
        guard: Guard | None = None,
        stepped_by: Callable[[CopyEngine], bool] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store = store
        self._device = device
        self._compute = compute
        self._settings = settings
        self._guard = guard
        self._clock = clock
        model = store.manifest.model
        self._n_layers, self._n_experts = model.n_layers, model.n_experts
        self._sources: list[list[Tensor | None]] = [[None] * model.n_experts for _ in range(model.n_layers)]
        self._tally = Tally()
        self._table = SlotTable(
            settings.quotas, settings.n_spares, self._tally, keeps=settings.mode is CacheMode.CACHED
        )
        slot_nbytes = max(record.nbytes for record in store.manifest.experts.values())
        self._slots = new_slots(device, self._table.n_slots, slot_nbytes)
        compute.use_slots([slot.buffer.tensor for slot in self._slots])
        self._done = device.new_event("output written")
        # Where the cache waits for results: the buffer that it reads them from, and its rows of the last call.
        self._outputs: list[Buffer] = []
        self._out: Tensor | None = None
        self._engine = CopyEngine(
            device,
            self._slots,
            self._table,
            self._tally,
            chunk_nbytes=min(settings.chunk_nbytes, slot_nbytes),
            is_direct=settings.is_direct,
            n_stagers=settings.n_stagers,
            stepped_by=stepped_by,
        )
        self._lock = self._engine.condition
        self._guesses: list[tuple[int, Guess]] = []
        # A call that was left by an exception has pins that no event answers for.
        self._is_in_call = False
        self._step_began_s, self._step_began_misses = 0.0, 0
        self._engine.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the copy engine and wait until the device has run all that it was given."""
        self._engine.close()

    @property
    def counters(self) -> Counters:
        """What happened until now."""
        with self._lock:
            return self._tally.snapshot()

    def forward(self, layer: int, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, fp32 [T, hidden].

        Raise CorruptExpert, before anything is copied, or what went wrong in copying or in the device.
        """
        n_tokens = expert_ids.shape[0]
        if layer == 0:
            self._step_began_s, self._step_began_misses = self._clock(), self._tally.misses
        groups = by_last_token(expert_ids)
        self._begin(layer, groups)
        call = ExpertCall(layer, hidden_states, expert_ids, weights, self._new_out(n_tokens, hidden_states))
        wanted = self._request(layer, groups)
        guesses = self._guesses if n_tokens >= PREFILL_TOKENS_MIN else []
        pinned = self._launch_all(call, wanted)
        with self._lock:
            self._table.unpin(pinned.values())
            self._table.settle(layer)
        if guesses:
            # The next layer's copies go on where this one's end: its slots are spare now.
            self._copy_ahead([(ahead, in_one_row(guess())) for ahead, guess in guesses])
        self._is_in_call = False
        result = self._finished(call.out, wanted) if self._settings.waits else call.out
        if layer == self._n_layers - 1 and self._guard is not None and n_tokens <= DECODE_TOKENS_MAX:
            self._observe(self._guard, n_tokens)
        return result

    def prefetch(self, layer: int, guess: Guess) -> None:
        """Note a guess; the next `forward` follows it behind all that it waits for itself, if slots are to spare.

        What it guesses is computed only where that is of use. It is computed before the launch and followed behind it:
        whatever the host does just behind a launch keeps the stand-in's thread from the interpreter's lock.
        """
        self._guesses.append((layer, guess))

    def follows_guesses(self, layer: int) -> bool:
        """Return whether a guess for the layer may lead to a copy, as far as is known before the next `forward`."""
        if self._guard is not None and not self._guard.is_on:
            return False
        with self._lock:
            return self._table.n_cached(layer) < self._n_experts

    def _begin(self, layer: int, groups: Sequence[Sequence[int]]) -> None:
        """Make sure that the call can be made: its records are there, and so are the slots."""
        for group in groups:
            for expert in group:
                self._source(layer, expert)
        if self._is_in_call:
            self._recover()
        self._is_in_call = True
        if self._settings.mode is CacheMode.NAIVE:
            self._copy_unused(layer, groups)

    def _request(self, layer: int, groups: Sequence[Sequence[int]]) -> Wanted:
        """Pin or claim a slot for each expert, as far as there are slots, and ask for all copies."""
        table, wanted = self._table, Wanted(layer, all_at_once=self._settings.mode is CacheMode.NAIVE)
        with self._lock:
            self._engine.check()
            self._engine.come_by()
            table.begin(layer, groups)
            for group in groups:
                for expert in group:
                    slot = table.pin(layer, expert)
                    if slot is None:
                        wanted.missing.append(expert)
                    else:
                        self._put(wanted, expert, slot)
            self._claim_slots(wanted)
        self._go_on(wanted)
        return wanted

    def _go_on(self, wanted: Wanted) -> None:
        """Let copies that were asked for be submitted, and note which were."""
        if wanted.pending:
            self._engine.go_on()
            with self._lock:
                wanted.collect(self._table.is_ready)

    def _claim_slots(self, wanted: Wanted) -> None:
        """Give slots to missing experts as long as there are any, and ask for their copies; under the lock."""
        table, engine = self._table, self._engine
        engine.cancel(table.take_dropped())
        while wanted.missing:
            claim = table.claim(wanted.layer, wanted.missing[0])
            if claim is not None:
                self._take(wanted, wanted.missing.popleft(), claim)
            elif dropped := table.take_dropped():
                engine.cancel(dropped)  # some may be free at once
            else:
                return

    def _take(self, wanted: Wanted, expert: int, claim: Claim) -> None:
        """Ask for the copy into a claimed slot, unless it was prefetched; under the lock."""
        if claim.is_new:
            self._engine.submit(claim.slot, self._source(wanted.layer, expert), is_demand=True)
        elif not self._table.is_ready(claim.slot):
            self._engine.promote(claim.slot)
        self._put(wanted, expert, claim.slot)

    def _put(self, wanted: Wanted, expert: int, slot: int) -> None:
        """Note where an expert's copy has come to; under the lock."""
        there = self._slots[slot]
        if not self._table.is_ready(slot):
            wanted.pending[expert] = slot
        elif there.is_awaited or self._device.has_happened(there.ready):
            wanted.ready[expert] = slot
        else:
            wanted.coming[expert] = slot

    def _launch_all(self, call: ExpertCall, wanted: Wanted) -> dict[int, int]:
        """Launch what is there, then the others as they come, the last with the sum; return what is still pinned."""
        likely = self._likely()
        contributions: Tensor | None = None
        pinned: dict[int, int] = {}
        while True:
            group = wanted.take()
            pinned |= group
            if wanted.is_taken:
                self._launch_last(call, group, contributions)
                self._copy_ahead(likely)
                return pinned
            if contributions is None:
                contributions = call.hidden_states.new_empty(*call.expert_ids.shape, call.hidden_states.shape[1])
            if group:
                work = partial(self._compute.contribute, call, group, contributions)
                self._launch(group, work, is_awaited=wanted.is_submitted)
            self._copy_ahead(likely)
            likely = []
            if not wanted.may_launch:
                self._await_more(wanted, pinned)
                pinned = {}

    def _launch_last(self, call: ExpertCall, group: dict[int, int], contributions: Tensor | None) -> None:
        """Launch a call's last experts, or its only ones, and the sum."""
        if contributions is None:
            work = partial(self._compute.forward, call, group)
        else:
            work = partial(self._compute.finish, call, group, contributions)
        self._launch(group, work, writes=self._outputs, is_awaited=True)

    def _launch(
        self, slots: dict[int, int], work: Callable[[], None], writes: Sequence[Buffer] = (), *, is_awaited: bool
    ) -> None:
        """Launch work that reads those slots, behind the copies into them."""
        device, compute = self._device, self._device.compute
        read = [self._slots[slot] for slot in slots.values()]
        for slot in read:
            if not slot.is_awaited:
                compute.wait(slot.ready)
                slot.is_awaited = True  # what the queue is given later is behind it, too
        is_awaited = is_awaited and self._settings.waits
        device.launch(work, reads=[slot.buffer for slot in read], writes=writes, is_awaited=is_awaited)
        for slot in read:
            compute.record(slot.last_use)
            slot.was_used = True

    def _likely(self) -> list[tuple[int, list[int]]]:
        """Return the layers ahead with what is guessed for them, as far as a guess is of use."""
        guesses, self._guesses = self._guesses, []
        if self._guard is not None and not self._guard.is_on:
            return []
        with self._lock:
            useful = [(layer, guess) for layer, guess in guesses if self._table.may_guess(layer, self._n_experts)]
        return [(layer, in_one_row(guess())) for layer, guess in useful]

    def _copy_ahead(self, likely: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Ask for the copies of what was guessed and is not there; the likeliest come first."""
        for layer, experts in likely:
            sources = [self._source_of_guess(layer, expert) for expert in experts]
            with self._lock:
                self._engine.check()
                for expert, source in zip(experts, sources, strict=True):
                    slot = None if source is None else self._table.guess(layer, expert)
                    if source is not None and slot is not None:
                        self._engine.submit(slot, source, is_demand=False)
            self._engine.go_on()

    def _await_more(self, wanted: Wanted, launched: dict[int, int]) -> None:
        """Unpin what was launched; block until another copy of those that are wanted was submitted."""
        began_s = self._clock()
        with self._lock:
            self._table.unpin(launched.values())
            self._claim_slots(wanted)
        self._go_on(wanted)
        with self._lock:
            while not self._has_more(wanted):
                self._engine.wait()
            self._tally.waited_s += self._clock() - began_s

    def _has_more(self, wanted: Wanted) -> bool:
        """Note what the engine did; return whether something may be launched; under the lock that `wait` begins in."""
        self._claim_slots(wanted)
        wanted.collect(self._table.is_ready)
        return wanted.may_launch

    def _copy_unused(self, layer: int, groups: Sequence[Sequence[int]]) -> None:
        """Copy all of the layer's experts but those; nobody computes with them."""
        used = {expert for group in groups for expert in group}
        unused = [expert for expert in range(self._n_experts) if expert not in used]
        for expert in unused:
            self._source(layer, expert)
        wanted = self._request(layer, [unused])
        submitted = wanted.take()
        while not wanted.is_taken:
            self._await_more(wanted, submitted)
            submitted = wanted.take()
        with self._lock:
            self._table.unpin(submitted.values())

    def _recover(self) -> None:
        """Give back what a call had pinned that ended with an exception."""
        self._device.drain()  # whatever was launched has been computed, recorded or not
        with self._lock:
            self._engine.check()
            self._table.unpin_all()
            self._engine.cancel(self._table.take_dropped())

    def _finished(self, out: Tensor, wanted: Wanted) -> Tensor:
        """Block until the device has computed `out`; return the host's own copy of it."""
        self._device.compute.record(self._done)
        waited_s = 0.0
        for awaited in wanted.awaited:
            if awaited.before is not None:
                self._device.synchronize(self._slots[awaited.before].last_use)
            began_s = self._clock()
            self._device.synchronize(self._slots[awaited.slot].ready)
            waited_s += self._clock() - began_s
        self._device.synchronize(self._done)
        if waited_s:
            with self._lock:
                self._tally.waited_s += waited_s
        with self._device.host_read(self._outputs[0]):
            return out.clone()

    def _observe(self, guard: Guard, n_tokens: int) -> None:
        n_misses = self._tally.misses - self._step_began_misses
        guard.observe(self._clock() - self._step_began_s, n_tokens, n_misses)

    def _new_out(self, n_tokens: int, hidden_states: Tensor) -> Tensor:
        """Return memory for the output: of the host's buffer where the cache waits for it, else new, on the device."""
        if not self._settings.waits:
            return hidden_states.new_empty(n_tokens, hidden_states.shape[1])
        if self._out is None or self._out.shape[0] != n_tokens:
            if not self._outputs or self._outputs[0].tensor.shape[0] < n_tokens:
                self._outputs = [self._device.new_host_buffer("output", torch.empty(n_tokens, hidden_states.shape[1]))]
            self._out = self._outputs[0].tensor[:n_tokens]
        return self._out

    def _source(self, layer: int, expert: int) -> Tensor:
        """Return the expert's record in the shared mapping, uint8; raise CorruptExpert."""
        source = self._sources[layer][expert]
        if source is None:
            record = self._store.expert_record(ExpertKey(layer, expert))
            source = self._sources[layer][expert] = torch.frombuffer(record, dtype=torch.uint8)
        return source

    def _source_of_guess(self, layer: int, expert: int) -> Tensor | None:
        try:
            return self._source(layer, expert)
        except CorruptExpert:
            return None  # it is an error when it is chosen, not when someone guesses it
