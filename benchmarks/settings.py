"""What a measurement is told: where its files lie, how often and on how many threads it measures. Pure data."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of the benchmarks. A path that is None was not given or not found."""

    folder: Path  # the benchmarks' part of the user's cache
    rounds: int = 5
    runs: int = 3  # of a program's own, in one round; their median counts
    threads: int = 2
    store: Path | None = None
    text: Path | None = None
    llama_bench: Path | None = None
    prototype: Path | None = None
    schemes: tuple[str, ...] = ("4bit-g64", "3bit-g64", "2bit-g16")
    kernels: tuple[str, ...] = ()  # sets of ours to be measured; those in use if none is named
    demo_checkpoint: Path | None = None
    demo_source: Path | None = None
    checkpoint: Path | None = None
    tokens: int = 4096
    tiers: tuple[str, ...] = ("demo", "half", "three-quarters")  # which stores larger than memory

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """One thread, and all that are used."""
        return (1,) if self.threads == 1 else (1, self.threads)
