"""One store in use: the daemon, attaching, sharing, the first token, and perplexity where a text is given."""

import sys

from benchmarks.daemon import measure_attach, measure_load, measure_start
from benchmarks.errors import NothingToMeasure
from benchmarks.figures import Figure
from benchmarks.generation import measure_generation, measure_perplexity
from benchmarks.processes import Environment
from benchmarks.settings import Settings
from benchmarks.sharing import measure_sharing

_MEASUREMENTS = (measure_start, measure_load, measure_attach, measure_sharing, measure_generation)


def measure_store(environment: Environment, settings: Settings) -> list[Figure]:
    """Return all figures of one store with a tokenizer; raise BenchmarkError."""
    if settings.store is None:
        raise NothingToMeasure("store: a store with a tokenizer is needed")
    figures: list[Figure] = []
    for measure in _MEASUREMENTS:
        print(f"{measure.__module__}.{measure.__name__} …", file=sys.stderr)
        figures += measure(environment, settings.store, settings.rounds)
    if settings.text is not None:
        figures += measure_perplexity(environment, settings.store, settings.text)
    return figures
