"""A store larger than its memory: what foreseeing experts wins, beside the most that it can win.

R is the time a token's reading takes, C that of its computing. Without foreseeing a token takes R + C; with it at least
the longer of the two, and what was not foreseen is still waited for. With the share r of the misses foreseen at most

    (R + C) / ((1 - r) R + max(C, r R))

is won. That is beside a runner that does one thing after the other; ours, without foreseeing, computes what is there
while the rest of a layer is read, so that its own gain by foreseeing is less, and stands beside it.

`tiered` holds the reader to the speed at which R = C; as computing is many times faster than most disks are, it
computes on one thread in 32-bit floats. `tiered-disk` is the disk as it is and the runner as it is used.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.big_files import synthetic_store
from benchmarks.errors import CommandFailed
from benchmarks.figures import Figure
from benchmarks.foreseeing import Choices, Decoded, Oracle, decode, record
from benchmarks.processes import Environment
from benchmarks.settings import Settings
from protocol.control_client import ControlClient
from protocol.manifest import MANIFEST_FILE, Manifest, load_manifest
from protocol.messages import GetStatus, Status
from protocol.runtime_dir import RuntimeDir
from protocol.slot_area import slot_area_nbytes
from runner.config import RunnerConfig
from runner.engine import Engine, open_configured
from runner.models.opening import CachePlan

N_LAYERS, SCHEME = 4, "4bit-g64"
N_BEFORE, N_TOKENS = 8, 24
# Of the experts, how many have a slot.
SHARE_OF_DEMO = 0.25
SHARES_OF_LARGE = {"half": 0.5, "three-quarters": 0.75}


@dataclass(frozen=True, slots=True)
class Tier:
    """A store, and what it is held in."""

    name: str
    path: Path
    manifest: Manifest
    memory_nbytes: int

    @staticmethod
    def of(name: str, path: Path, share: float) -> "Tier":
        """Return a store with slots for that share of its experts."""
        manifest = load_manifest((path / MANIFEST_FILE).read_bytes())
        records = manifest.experts.values()
        slot_nbytes = max(record.nbytes for record in records)
        slots_nbytes = slot_area_nbytes(int(len(records) * share), slot_nbytes)
        return Tier(name, path, manifest, manifest.dense_nbytes + slots_nbytes)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run: how far ahead, and with whose guesses; `recall` None: the gates'."""

    name: str
    depth: int
    recall: float | None = None


WITHOUT = Way("without foreseeing", 0)
WAYS = (Way("foreseeing 1 layer", 1), Way("foreseeing 2 layers", 2))
KNOWING = (Way("knowing 1 layer", 1, 1.0), Way("knowing 2 layers", 2, 1.0), Way("8 of 10 right, 2 layers", 2, 0.8))


def measure_tiered(environment: Environment, settings: Settings) -> list[Figure]:
    """Return what is won where reading takes as long as computing."""
    figures = []
    for tier in _tiers(settings):
        config = RunnerConfig(device="cpu", threads=1, exact=True, context=N_BEFORE + N_TOKENS)
        _say(f"{tier.name}: in memory")
        with _daemon(environment, tier.path), open_configured(tier.path, config) as engine:
            choices = record(engine, _token_ids(engine))
            resident = decode(engine, _token_ids(engine), N_BEFORE)
        _say(f"{tier.name}: what is read")
        unlimited = _measured(environment, tier, config, [WITHOUT], choices)[WITHOUT]
        speed = unlimited.token_nbytes / resident.token_s
        _say(f"{tier.name}: with a reader of {speed / 1e6:.0f} MB/s")
        ways = (WITHOUT, *WAYS, *KNOWING)
        measured = _measured(environment, tier, config, ways, choices, nbytes_per_s=speed)
        figures += list(_figures(tier, resident, measured, nbytes_per_s=speed))
    return figures


def measure_tiered_disk(environment: Environment, settings: Settings) -> list[Figure]:
    """Return what is won with the disk as it is."""
    figures = []
    for tier in _tiers(settings):
        config = RunnerConfig(device="cpu", threads=settings.threads, context=N_BEFORE + N_TOKENS)
        _say(f"{tier.name}: in memory")
        with _daemon(environment, tier.path), open_configured(tier.path, config) as engine:
            choices = record(engine, _token_ids(engine))
            resident = decode(engine, _token_ids(engine), N_BEFORE)
        _say(f"{tier.name}: from the disk")
        measured = _measured(environment, tier, config, (WITHOUT, *WAYS, *KNOWING[1:2]), choices)
        figures += list(_figures(tier, resident, measured, nbytes_per_s=None))
    return figures


def _tiers(settings: Settings) -> Iterator[Tier]:
    if "demo" in settings.tiers and settings.store is not None:
        yield Tier.of(f"demo store, {SHARE_OF_DEMO:.0%}", settings.store, SHARE_OF_DEMO)
    for name, share in SHARES_OF_LARGE.items():
        if name in settings.tiers:
            large = synthetic_store(settings.folder, N_LAYERS, SCHEME)
            yield Tier.of(f"{N_LAYERS} layers of Mixtral, {share:.0%}", large, share)


def _measured(
    environment: Environment,
    tier: Tier,
    config: RunnerConfig,
    ways: "tuple[Way, ...] | list[Way]",
    choices: Choices,
    *,
    nbytes_per_s: float | None = None,
) -> dict[Way, Decoded]:
    """Return what each way takes; every one begins with empty slots."""
    measured = {}
    for way in ways:
        with _daemon(environment, tier.path, memory_nbytes=tier.memory_nbytes, nbytes_per_s=nbytes_per_s):
            settings = RunnerConfig(
                device=config.device,
                threads=config.threads,
                exact=config.exact,
                context=config.context,
                prefetch_depth=way.depth,
            )
            with open_configured(tier.path, settings, CachePlan(is_guarded=False)) as engine:
                oracle = None
                if way.recall is not None:
                    n_experts = tier.manifest.model.n_experts
                    oracle = Oracle(choices, n_experts, depth=way.depth, recall=way.recall)
                with ControlClient(RuntimeDir(environment.runtime_dir)) as client:
                    read_nbytes = partial(_read_nbytes, client, tier.manifest.digest)
                    ids = _token_ids(engine)
                    measured[way] = decode(engine, ids, N_BEFORE, oracle=oracle, read_nbytes=read_nbytes)
    return measured


def _read_nbytes(client: ControlClient, digest: str) -> int:
    """Return what the daemon has read into the store's slots, wanted or not."""
    return next(store.read_nbytes for store in client.ask(GetStatus(), Status).stores if store.digest == digest)


def _figures(
    tier: Tier, resident: Decoded, measured: dict[Way, Decoded], *, nbytes_per_s: float | None
) -> Iterator[Figure]:
    without = measured[WITHOUT]
    if any(decoded.digest != resident.digest for decoded in measured.values()):
        raise CommandFailed(f"{tier.name}: the logits are not those of the store in memory")
    computing_s = resident.token_s
    waited_s = without.counters.waited_s / without.n_tokens if without.counters is not None else 0.0
    reading_s = waited_s if nbytes_per_s is None else without.token_nbytes / nbytes_per_s
    yield _figure(tier, "computing, a token (C)", "ms", computing_s * 1e3)
    yield _figure(tier, "reading, a token (R)", "ms", reading_s * 1e3)
    for way, decoded in measured.items():
        name = f"{way.name}: "
        yield _figure(tier, name + "a token", "ms", decoded.token_s * 1e3)
        yield _figure(tier, name + "read, a token", "MB", decoded.token_nbytes / 1e6)
        if way.depth:
            unforeseen_s = (1 - decoded.recall) * reading_s
            at_most = (reading_s + computing_s) / (unforeseen_s + max(computing_s, decoded.recall * reading_s))
            yield _figure(tier, name + "misses foreseen", "", decoded.recall)
            yield _figure(tier, name + "gain over the runner without", "", without.token_s / decoded.token_s)
            gain = (reading_s + computing_s) / decoded.token_s
            yield _figure(tier, name + "gain over R + C", "", gain)
            yield _figure(tier, name + "that, of the most with that foreseen", "", gain / at_most)


def _figure(tier: Tier, name: str, unit: str, value: float) -> Figure:
    return Figure(f"{tier.name}: {name}", unit, (value,))


def _token_ids(engine: Engine) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(engine.config.vocab_size, (N_BEFORE + N_TOKENS,), generator=generator).tolist()
    return ids


@contextmanager
def _daemon(
    environment: Environment, store: Path, *, memory_nbytes: int | None = None, nbytes_per_s: float | None = None
) -> Iterator[None]:
    """Have a daemon hold the store, in so much memory, with a reader of that speed; this process meets it too."""
    os.environ["EXPERTD_RUNTIME_DIR"] = str(environment.runtime_dir)
    config = environment.runtime_dir.parent / "expertd.toml"
    config.write_text("" if nbytes_per_s is None else f'read_limit = "{nbytes_per_s / 1e6:.3f}MB/s"\n')
    memory = [] if memory_nbytes is None else ["--memory", str(memory_nbytes)]
    environment.expertd("start", "--config", str(config), *memory, str(store))
    try:
        yield
    finally:
        environment.expertd("stop")


def _say(what: str) -> None:
    print(f"{what} …", file=sys.stderr)
