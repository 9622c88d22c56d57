"""One expert of Mixtral's size at a time, computed from a sealed segment: milliseconds, GB/s, share of the bandwidth.

More than 1 GB of different experts take turns, so that every weight comes from memory. In each round our kernels, the
bandwidth and, if it was asked for, another implementation are measured one after another: what a shared machine does
to one it does to all.
"""

import dataclasses
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from benchmarks.bandwidth import BandwidthMeter
from benchmarks.errors import NothingToMeasure
from benchmarks.expert_prototype import Prototype
from benchmarks.figures import Figure, ratios
from benchmarks.segments import sealed
from benchmarks.settings import Settings
from protocol.layout import R8, Part, PartSpan, record_nbytes, record_spans
from quant.errors import KernelsMissing
from quant.expert import Expert, LayerExperts
from quant.library import kernels_in_use, use_kernels
from quant.workspace import Workspace
from tools.geometry import GEOMETRIES, MIXTRAL_8X7B, Geometry
from tools.synthetic_store.packed import random_record

BATCHES = (1, 4, 16)
_SEGMENT_NBYTES_MIN = 1_000_000_000

Compute = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class _Contender:
    """Somebody's experts, to be called in turn with hidden states f32 [T, H]; `nbytes` of one expert."""

    name: str
    nbytes: int
    experts: tuple[Compute, ...]
    kernels: str | None = None

    def median_s(self, hidden_states: Tensor) -> float:
        """Return the seconds an expert takes, the middle of one turn of all; the call before warms up."""
        if self.kernels is not None:
            use_kernels(self.kernels)
        self.experts[-1](hidden_states)
        seconds = []
        for expert in self.experts:
            start = perf_counter()
            expert(hidden_states)
            seconds.append(perf_counter() - start)
        return median(seconds)


def measure_kernels(
    settings: Settings, geometry: Geometry = GEOMETRIES[MIXTRAL_8X7B], *, segment_nbytes: int = _SEGMENT_NBYTES_MIN
) -> list[Figure]:
    """Return milliseconds an expert, GB/s and shares for every scheme, batch and number of threads.

    As many experts take turns as are needed for segment_nbytes.
    """
    torch.set_num_threads(1)
    in_use = kernels_in_use()
    try:
        return [
            figure
            for scheme in settings.schemes
            for figure in _measure_scheme(settings, geometry, scheme, segment_nbytes)
        ]
    finally:
        if in_use is not None:
            use_kernels(in_use)


def _measure_scheme(settings: Settings, geometry: Geometry, scheme: str, segment_nbytes: int) -> Iterator[Figure]:
    parts = expert_parts(geometry, scheme)
    spans = record_spans(R8, parts)
    nbytes = record_nbytes(R8, parts)
    n_experts = -(-segment_nbytes // nbytes)
    segment = sealed(n_experts * nbytes, lambda view: _fill(view, parts, nbytes))
    records = torch.frombuffer(segment, dtype=torch.uint8).view(n_experts, nbytes)
    meter = BandwidthMeter(segment, settings.folder)
    prototype = None
    if settings.prototype is not None:
        prototype = Prototype(settings.prototype, settings.folder, geometry, scheme, n_experts)
    for n_threads in settings.thread_counts:
        # Awake as during a generation: our threads wait up to 100 µs for the next call before they sleep.
        with Workspace(n_threads) as workspace, workspace.awake():
            experts = our_experts(records, spans, geometry.hidden, workspace)
            contenders = [_Contender(_name_of(name), nbytes, experts, name) for name in _kernels(settings)]
            if prototype is not None:
                contenders.append(_Contender("prototype", prototype.nbytes, prototype.experts(n_threads)))
            rounds = _measure_rounds(settings, geometry, n_threads, meter, contenders)
        yield from _figures(f"{scheme}, {n_threads} thread(s)", rounds, contenders)


def _kernels(settings: Settings) -> tuple[str, ...]:
    """Return the names of our sets of kernels to be measured; raise NothingToMeasure."""
    in_use = kernels_in_use()
    if in_use is None:
        raise NothingToMeasure("the C library was not built")
    try:
        for name in settings.kernels:
            use_kernels(name)
    except KernelsMissing as error:
        raise NothingToMeasure(str(error)) from None
    finally:
        use_kernels(in_use)
    return settings.kernels or (in_use,)


def _name_of(kernels: str) -> str:
    return f"ours ({kernels})"


def our_experts(
    records: Tensor, spans: tuple[PartSpan, ...], hidden_size: int, workspace: Workspace
) -> tuple[Compute, ...]:
    """Return what computes each expert of records u8 [n, nbytes] by itself: the place that knows our interface."""
    layer = LayerExperts(len(records), hidden_size, workspace=workspace)
    for number, record in enumerate(records):
        layer.put(number, Expert(record, spans))

    def computing(number: int) -> Compute:
        chosen = {n: (torch.full((n, 1), number), torch.ones(n, 1)) for n in BATCHES}
        return lambda hidden_states: layer.forward(hidden_states, *chosen[hidden_states.shape[0]])

    return tuple(computing(number) for number in range(len(records)))


def expert_parts(geometry: Geometry, scheme: str) -> tuple[Part, ...]:
    """Return the parts of one expert's record, as the converter orders them."""
    up = (geometry.intermediate, geometry.hidden)
    return tuple(Part(name, *shape, scheme) for name, shape in (("w1", up), ("w3", up), ("w2", up[::-1])))


@dataclasses.dataclass(frozen=True, slots=True)
class _Rounds:
    """One sample a round: the bandwidth, and the seconds an expert takes by contender and batch."""

    bandwidth: list[float]
    seconds: dict[tuple[str, int], list[float]]


def _measure_rounds(
    settings: Settings, geometry: Geometry, n_threads: int, meter: BandwidthMeter, contenders: list[_Contender]
) -> _Rounds:
    rounds = _Rounds([], {})
    inputs = {n_tokens: torch.randn(n_tokens, geometry.hidden) for n_tokens in BATCHES}
    for _ in range(settings.rounds):
        rounds.bandwidth.append(meter.best_gb_per_s(n_threads))
        for n_tokens, hidden_states in inputs.items():
            for contender in contenders:
                taken = rounds.seconds.setdefault((contender.name, n_tokens), [])
                taken.append(contender.median_s(hidden_states))
    return rounds


def _figures(on: str, rounds: _Rounds, contenders: list[_Contender]) -> Iterator[Figure]:
    yield Figure(f"{on}: read bandwidth, best", "GB/s", tuple(rounds.bandwidth))
    for n_tokens in BATCHES:
        for contender in contenders:
            taken = rounds.seconds[contender.name, n_tokens]
            name = f"{on}, batch {n_tokens}: {contender.name}"
            yield Figure(f"{name}, an expert", "ms", tuple(value * 1e3 for value in taken))
            if n_tokens == 1:
                rates = tuple(contender.nbytes / value / 1e9 for value in taken)
                yield Figure(f"{name}, weights", "GB/s", rates)
                yield Figure(f"{name}, share of the bandwidth", "", ratios(rates, rounds.bandwidth))
        *ours, last = contenders
        for contender in ours if last.kernels is None else ():
            taken, theirs = (rounds.seconds[one.name, n_tokens] for one in (contender, last))
            yield Figure(f"{on}, batch {n_tokens}: time {contender.name} / {last.name}", "", ratios(taken, theirs))


def _fill(view: memoryview, parts: tuple[Part, ...], nbytes: int) -> None:
    for number in range(view.nbytes // nbytes):
        at = number * nbytes
        for data in random_record(parts, nbytes, np.random.Generator(np.random.SFC64(number))):
            view[at : at + data.nbytes] = data.data
            at += data.nbytes
