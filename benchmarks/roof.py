"""How near a decoded token comes to reading its weights with nothing to compute: what is left to gain, and where.

Layers of Mixtral's size. What a token reads is read in the same order, by as many threads, from the same mapping, in
the same process, in turn with the tokens (our_roof.py).
"""

import json
import sys
from collections.abc import Iterator

from benchmarks.big_files import synthetic_store
from benchmarks.figures import Figure, ratios
from benchmarks.processes import Environment
from benchmarks.settings import Settings

_N_LAYERS, _CONTEXT_TOKENS, _N_TOKENS = 4, 512, 4


def measure_roof(environment: Environment, settings: Settings) -> list[Figure]:
    """Return, for every scheme and set of kernels, a token's milliseconds beside those of reading its weights."""
    return [figure for scheme in settings.schemes for figure in _measure_scheme(environment, settings, scheme)]


def _measure_scheme(environment: Environment, settings: Settings, scheme: str) -> Iterator[Figure]:
    store = synthetic_store(settings.folder, _N_LAYERS, scheme)
    with environment.daemon(store):
        for kernels in settings.kernels or (None,):
            numbers = (settings.threads, _CONTEXT_TOKENS, _N_TOKENS, settings.rounds)
            arguments = [str(store), str(settings.folder), *map(str, numbers), *([kernels] if kernels else [])]
            found = json.loads(environment.run([sys.executable, "-m", "benchmarks.our_roof", *arguments]))
            read_s, decode_s, outside_s = found["read_s"], found["decode_s"], found["outside_s"]
            name = f"{scheme}, {_N_LAYERS} layers{f', {kernels}' if kernels else ''}"
            yield Figure(f"{name}: reading a token's weights", "ms", tuple(value * 1e3 for value in read_s))
            yield Figure(f"{name}: that is", "GB/s", tuple(found["nbytes"] / value / 1e9 for value in read_s))
            yield Figure(f"{name}: decode of a token", "ms", tuple(value * 1e3 for value in decode_s))
            yield Figure(f"{name}: of it outside of products", "ms", tuple(value * 1e3 for value in outside_s))
            yield Figure(f"{name}: decode / reading", "", ratios(decode_s, read_s))
