"""A runner, expertd and a store larger than its memory: the answers are those of a store that is all in memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.convert.config import QuantizeConfig
from expertd.store import read_manifest
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from runner.config import RunnerConfig
from runner.engine import Engine, open_configured
from runner.errors import ConfigInvalid, CorruptExpert
from runner.models.opening import CachePlan
from tests.support.daemon import DaemonProcess
from tests.support.local_store import LocalStore
from tests.support.small_stores import make_small_store
from tests.support.stores import flip_byte
from tests.support.tiers import load_tiered

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28]
N_NEW = 16
N_LAYERS, N_EXPERTS = 4, 8
N_KEYS = N_LAYERS * N_EXPERTS
LEAST = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = QuantizeConfig(experts="4bit-g64", attention="4bit-g64", head="8bit-g64")
    folder = tmp_path_factory.mktemp("small")
    return make_small_store(folder, config, n_experts=N_EXPERTS, n_layers=N_LAYERS, hidden=64, intermediate=128).path


@pytest.fixture
def small(path: Path) -> Manifest:
    return read_manifest(path)


def settings(**options: object) -> RunnerConfig:
    return RunnerConfig(**({"device": "cpu", "threads": 1, "context": 64, "autostart": False} | options))  # type: ignore[arg-type]


def answers(engine: Engine) -> Iterator[list[int]]:
    """Yield the greedy answers to a prompt and to its beginning."""
    for n_tokens in (len(PROMPT), 5):
        yield list(engine.generate(PROMPT[:n_tokens], max_new_tokens=N_NEW))


def answers_in_place(path: Path) -> list[list[int]]:
    with Engine(LocalStore(path), settings()) as engine:
        return list(answers(engine))


@pytest.mark.parametrize("n_slots", [LEAST, N_KEYS // 4, N_KEYS - 1])
@pytest.mark.parametrize("depth", [0, 2])
def test_answers_are_the_same_with_any_number_of_slots(
    daemon: DaemonProcess, path: Path, small: Manifest, n_slots: int, depth: int
) -> None:
    load_tiered(daemon, path, small, n_slots=n_slots)

    with open_configured(path, settings(prefetch_depth=depth), CachePlan(is_guarded=False)) as engine:
        tiered = list(answers(engine))
        counters = engine.counters

    assert tiered == answers_in_place(path)
    assert counters is not None
    assert counters.misses > 0
    assert bool(counters.prefetches_issued) == (depth > 0)


def test_pinned_experts_are_computed_where_they_lie(daemon: DaemonProcess, path: Path, small: Manifest) -> None:
    pinned = tuple(ExpertKey(layer, expert) for layer in (1, 3) for expert in range(0, N_EXPERTS, 2))
    load_tiered(daemon, path, small, n_slots=len(pinned), pinned=pinned)

    with open_configured(path, settings()) as engine:
        tiered = list(answers(engine))

    assert tiered == answers_in_place(path)
    assert daemon.store(small.digest).n_pinned == len(pinned)


def test_two_runners_share_the_slots_and_both_answer_right(daemon: DaemonProcess, path: Path, small: Manifest) -> None:
    load_tiered(daemon, path, small, n_slots=LEAST)
    with (
        open_configured(path, settings()) as engine,
        open_configured(path, settings(prefetch_depth=0)) as other,
    ):
        pairs = list(
            zip(
                engine.generate(PROMPT, max_new_tokens=N_NEW),
                other.generate(PROMPT, max_new_tokens=N_NEW),
                strict=True,
            )
        )

    expected = answers_in_place(path)[0]
    assert pairs == [(token, token) for token in expected]


def test_an_accelerator_is_refused_with_the_remedy(daemon: DaemonProcess, path: Path, small: Manifest) -> None:
    load_tiered(daemon, path, small, n_slots=LEAST)

    with pytest.raises(ConfigInvalid, match=r"^--device: link:1GB/s takes experts from memory.*--device cpu$"):
        open_configured(path, settings(device="link:1GB/s", cache_experts=2))


def test_a_damaged_expert_is_named(daemon: DaemonProcess, tmp_path: Path) -> None:
    config = QuantizeConfig(experts="4bit-g64", attention="4bit-g64", head="8bit-g64")
    path = make_small_store(tmp_path, config, n_experts=4, n_layers=2, hidden=64, intermediate=128).path
    manifest = read_manifest(path)
    load_tiered(daemon, path, manifest, n_slots=LEAST)
    record = manifest.experts[ExpertKey(1, 1)]
    flip_byte(path / record.file, record.offset + 500)

    with (
        open_configured(path, settings()) as engine,
        pytest.raises(CorruptExpert, match=r"^layers\.1\.experts\.1 is corrupt"),
    ):
        list(answers(engine))
