"""Mixtral's width with slots for half of the experts: token by token what the store in memory answers."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.convert.config import QuantizeConfig
from expertd.store import read_manifest
from protocol.control_client import ControlClient
from protocol.messages import Unload, Unloaded
from protocol.runtime_dir import RuntimeDir
from runner.config import RunnerConfig
from runner.engine import open_configured
from runner.experts.counters import Counters
from runner.models.opening import CachePlan
from tests.support.daemon import DaemonProcess
from tests.support.tiers import load_tiered
from tools.geometry import GEOMETRIES, MIXTRAL_8X7B
from tools.synthetic_store.store import plan_synthetic_store, write_synthetic_store

pytestmark = pytest.mark.slow  # 2.6 GB are written, and read three times

PROMPT = list(range(1000, 31000, 1500))
N_NEW = 24
N_LAYERS = 4


@pytest.fixture(scope="module")
def full_width(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of four layers of Mixtral's width at 2 bits, whose gates foresee each other."""
    path = tmp_path_factory.mktemp("full") / "store"
    geometry = replace(GEOMETRIES[MIXTRAL_8X7B], n_layers=N_LAYERS)
    write_synthetic_store(path, plan_synthetic_store(geometry, QuantizeConfig(experts="2bit-g16")), seed=0)
    yield path
    shutil.rmtree(path)


def answer(path: Path, depth: int) -> tuple[list[int], Counters | None]:
    config = RunnerConfig(device="cpu", threads=2, context=64, autostart=False, prefetch_depth=depth)
    with open_configured(path, config, CachePlan(is_guarded=False)) as engine:
        return list(engine.generate(PROMPT, max_new_tokens=N_NEW)), engine.counters


def test_half_of_the_experts_in_slots_give_the_tokens_of_all_in_memory(
    daemon: DaemonProcess, runtime: RuntimeDir, full_width: Path
) -> None:
    manifest = read_manifest(full_width)
    daemon.load(full_width, manifest.digest)
    resident, _ = answer(full_width, 0)
    with ControlClient(runtime) as client:
        client.ask(Unload(manifest.digest), Unloaded)

    load_tiered(daemon, full_width, manifest, n_slots=len(manifest.experts) // 2)
    answers = [answer(full_width, depth) for depth in (0, 2)]

    assert len(resident) == N_NEW
    assert [tokens for tokens, _ in answers] == [resident, resident]
    for _, counters in answers:
        assert counters is not None
        assert counters.misses > N_NEW
    counted = answers[1][1]
    assert counted is not None
    assert counted.prefetches_used > 0
