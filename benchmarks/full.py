"""A whole Mixtral-8x7B of 2 and of 3 bits: tokens a second end to end, and whether the machine swapped meanwhile.

llama.cpp's whole model is not run: its time is 32 layers and what is beside them, measured in the same run before and
after ours. Tens of GB on disk: only when asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.big_files import synthetic_store
from benchmarks.figures import Figure
from benchmarks.layers import PeerLayers, TokenTimes, our_speed
from benchmarks.peer import SpeedPlan
from benchmarks.processes import Environment, SwapState, read_swap
from benchmarks.settings import Settings

N_LAYERS = 32
SCHEMES = ("2bit-g16", "3bit-g64")


def measure_full(environment: Environment, settings: Settings) -> list[Figure]:
    """Return the speeds of every scheme's whole store, the swapping, and the ratio to llama.cpp's extrapolated time."""
    plan = SpeedPlan(threads=settings.threads, runs=settings.runs)
    schemes = [scheme for scheme in SCHEMES if scheme in settings.schemes]
    return [figure for scheme in schemes for figure in _measure_scheme(environment, settings, scheme, plan)]


def _measure_scheme(environment: Environment, settings: Settings, scheme: str, plan: SpeedPlan) -> Iterator[Figure]:
    store = synthetic_store(settings.folder, N_LAYERS, scheme)
    program = settings.llama_bench
    peer = None if program is None else PeerLayers(program, settings.folder, scheme, plan)
    ours: list[TokenTimes] = []
    swaps: list[tuple[SwapState, SwapState]] = []
    for _ in range(settings.rounds):
        if peer is not None:
            peer.measure()
        before = read_swap()
        with environment.daemon(store):
            ours.append(TokenTimes.of(our_speed(environment, store, plan), plan))
        swaps.append((before, read_swap()))
    if peer is not None:
        peer.measure()
    yield from _our_figures(scheme, store, plan, ours, swaps)
    if peer is not None:
        yield from _their_figures(scheme, peer, plan, ours)


def _our_figures(
    scheme: str, store: Path, plan: SpeedPlan, ours: list[TokenTimes], swaps: list[tuple[SwapState, SwapState]]
) -> Iterator[Figure]:
    name = f"Mixtral-8x7B, {scheme}"
    nbytes = sum(path.stat().st_size for path in store.iterdir())
    yield Figure(f"{name}: store", "GB", (nbytes / 1e9,))
    yield Figure(f"{name}: decode", "tok/s", tuple(1 / times.decode_s for times in ours))
    yield Figure(f"{name}: prefill", "tok/s", tuple(plan.prompt_tokens / times.prefill_s for times in ours))
    before, after = zip(*swaps, strict=True)
    yield Figure(f"{name}: swap in use before", "MB", tuple(state.used_nbytes / 1e6 for state in before))
    yield Figure(f"{name}: swap in use after", "MB", tuple(state.used_nbytes / 1e6 for state in after))
    moved = tuple(float(end.n_pages_moved - start.n_pages_moved) for start, end in swaps)
    yield Figure(f"{name}: pages swapped in or out meanwhile", "", moved)


def _their_figures(scheme: str, peer: PeerLayers, plan: SpeedPlan, ours: list[TokenTimes]) -> Iterator[Figure]:
    decode, prefill = peer.fastest_decode(), peer.fastest_prefill()
    decode_s = [
        N_LAYERS * layer.decode_s + beside.decode_s for layer, beside in zip(decode.layers, decode.besides, strict=True)
    ]
    prefill_s = [
        N_LAYERS * layer.prefill_s + beside.prefill_s
        for layer, beside in zip(prefill.layers, prefill.besides, strict=True)
    ]
    name = f"Mixtral-8x7B, llama.cpp {peer.type_name}, {N_LAYERS} layers extrapolated"
    yield Figure(f"{name}: decode", "tok/s", tuple(1 / value for value in decode_s))
    yield Figure(f"{name}: prefill", "tok/s", tuple(plan.prompt_tokens / value for value in prefill_s))
    # Theirs was measured once more than ours: each of ours is held against the middle of all of theirs.
    name = f"Mixtral-8x7B, {scheme}: tok/s ours / llama.cpp extrapolated"
    yield Figure(f"{name}, decode", "", tuple(median(decode_s) / times.decode_s for times in ours))
    yield Figure(f"{name}, prefill", "", tuple(median(prefill_s) / times.prefill_s for times in ours))
