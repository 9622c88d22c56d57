"""The time of one layer of Mixtral's size, ours and llama.cpp's: (time of 4 layers - time of 1) / 3.

The difference leaves out embeddings, head and what a program does only once a token. All four, ours and theirs, follow
each other in every round.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.big_files import NEAREST_TYPE, synthetic_gguf, synthetic_store
from benchmarks.figures import Figure, ratios
from benchmarks.peer import LlamaBench, Speed, SpeedPlan
from benchmarks.processes import Environment
from benchmarks.settings import Settings

FEW, MANY = 1, 4


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Seconds: of a whole prefill, of one decoded token."""

    prefill_s: float
    decode_s: float

    @staticmethod
    def of(speed: Speed, plan: SpeedPlan) -> "TokenTimes":
        """Return the times that such speeds mean."""
        return TokenTimes(plan.prompt_tokens / speed.prefill, 1 / speed.decode)

    def layer(self, many: "TokenTimes") -> "TokenTimes":
        """Return the times of one layer, of these with FEW layers and those with MANY."""
        n = MANY - FEW
        return TokenTimes((many.prefill_s - self.prefill_s) / n, (many.decode_s - self.decode_s) / n)

    def beside(self, layer: "TokenTimes") -> "TokenTimes":
        """Return what is left of these times with FEW layers without its layers: embeddings, head, once a token."""
        return TokenTimes(self.prefill_s - FEW * layer.prefill_s, self.decode_s - FEW * layer.decode_s)


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """One sample a round of one program: of MANY layers, of a layer, and of all beside the layers."""

    wholes: list[TokenTimes] = field(default_factory=list)
    layers: list[TokenTimes] = field(default_factory=list)
    besides: list[TokenTimes] = field(default_factory=list)

    def add(self, few: TokenTimes, many: TokenTimes) -> None:
        """Take a round's two measurements."""
        layer = few.layer(many)
        self.wholes.append(many)
        self.layers.append(layer)
        self.besides.append(few.beside(layer))

    @property
    def decode_s(self) -> list[float]:
        """A layer's seconds for a decoded token."""
        return [layer.decode_s for layer in self.layers]

    @property
    def prefill_s(self) -> list[float]:
        """A layer's seconds for the prefill."""
        return [layer.prefill_s for layer in self.layers]


def measure_layers(environment: Environment, settings: Settings) -> list[Figure]:
    """Return milliseconds a layer in decode and prefill for every scheme, theirs and the ratios if there is a peer."""
    plan = SpeedPlan(threads=settings.threads, runs=settings.runs)
    return [figure for scheme in settings.schemes for figure in _measure_scheme(environment, settings, scheme, plan)]


def our_speed(environment: Environment, store: Path, plan: SpeedPlan, kernels: str | None = None) -> Speed:
    """Return the speeds of one `runner bench` process on a store that a daemon holds, with those kernels of ours."""
    output = environment.runner(
        "bench", "--store", str(store), "--json", "--threads", str(plan.threads), "--runs", str(plan.runs),
        "--prompt-tokens", str(plan.prompt_tokens), "--context-tokens", str(plan.context_tokens),
        "--decode-tokens", str(plan.decode_tokens), *(["--kernels", kernels] if kernels else []),
    )  # fmt: skip
    figures = json.loads(output)
    return Speed(figures["prefill_tokens_per_s"], figures["decode_tokens_per_s"])


class PeerLayers:
    """llama.cpp's layers of the type nearest to a scheme, a round at a time, with each of its settings."""

    def __init__(self, program: Path, folder: Path, scheme: str, plan: SpeedPlan) -> None:
        self.type_name = NEAREST_TYPE[scheme]
        self._models = [synthetic_gguf(folder, n_layers, self.type_name) for n_layers in (FEW, MANY)]
        self._bench = LlamaBench(program)
        self._plan = plan
        self._by_setting: list[LayerTimes] = []

    def measure(self) -> None:
        """Measure one round."""
        by_model = [self._bench.speeds(model, self._plan) for model in self._models]
        for setting, speeds in enumerate(zip(*by_model, strict=True)):
            if setting == len(self._by_setting):
                self._by_setting.append(LayerTimes())
            self._by_setting[setting].add(*(TokenTimes.of(speed, self._plan) for speed in speeds))

    def fastest_decode(self) -> LayerTimes:
        """Return the rounds with the setting that decodes fastest."""
        return fastest(self._by_setting, lambda whole: whole.decode_s)

    def fastest_prefill(self) -> LayerTimes:
        """Return the rounds with the setting that prefills fastest."""
        return fastest(self._by_setting, lambda whole: whole.prefill_s)


def fastest(settings: list[LayerTimes], seconds: Callable[[TokenTimes], float]) -> LayerTimes:
    """Return the setting with the smallest median time of MANY layers.

    A layer's time would not do: it is a difference, and one disturbed measurement of FEW layers makes it small.
    """
    return min(settings, key=lambda times: median(map(seconds, times.wholes)))


def _measure_scheme(environment: Environment, settings: Settings, scheme: str, plan: SpeedPlan) -> Iterator[Figure]:
    stores = [synthetic_store(settings.folder, n_layers, scheme) for n_layers in (FEW, MANY)]
    program = settings.llama_bench
    peer = None if program is None else PeerLayers(program, settings.folder, scheme, plan)
    ours: dict[str | None, LayerTimes] = {kernels: LayerTimes() for kernels in settings.kernels or (None,)}
    with environment.daemon(stores[0]):
        environment.expertd("load", str(stores[1]))
        for _ in range(settings.rounds):
            for kernels, times in ours.items():
                speeds = (our_speed(environment, store, plan, kernels) for store in stores)
                times.add(*(TokenTimes.of(speed, plan) for speed in speeds))
            if peer is not None:
                peer.measure()
    for kernels, times in ours.items():
        yield from _figures(f"{scheme}: {_name_of(kernels)}", plan, times, times)
    if peer is not None:
        decode, prefill = peer.fastest_decode(), peer.fastest_prefill()
        yield from _figures(f"{peer.type_name}: llama.cpp", plan, decode, prefill)
        for kernels, times in ours.items():
            of = f"of a layer, {_name_of(kernels)} / llama.cpp"
            yield Figure(f"{scheme}: decode {of}", "", ratios(times.decode_s, decode.decode_s))
            yield Figure(f"{scheme}: prefill {of}", "", ratios(times.prefill_s, prefill.prefill_s))


def _name_of(kernels: str | None) -> str:
    return "ours" if kernels is None else f"ours ({kernels})"


def _figures(name: str, plan: SpeedPlan, decode: LayerTimes, prefill: LayerTimes) -> Iterator[Figure]:
    yield Figure(f"{name}, decode of a token, a layer", "ms", tuple(value * 1e3 for value in decode.decode_s))
    besides = tuple(beside.decode_s * 1e3 for beside in decode.besides)
    yield Figure(f"{name}, decode of a token, beside the layers", "ms", besides)
    name = f"{name}, prefill of {plan.prompt_tokens} tokens, a layer"
    yield Figure(name, "ms", tuple(value * 1e3 for value in prefill.prefill_s))
