"""What runners have of their own: far less than their store, which all of them use where it lies."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.processes import private_dirty_nbytes
from expertd.store import read_manifest
from protocol.manifest import Manifest
from tests.support.daemon import DaemonProcess, status_nbytes
from tests.support.runner_process import CONTEXT, waiting_runner
from tests.support.segments import segments_of
from tests.support.small_stores import make_small_store

# Beside this much a runner's private memory holds its kv_cache alone.
PRIVATE_NBYTES_MAX = 400e6
# How much more of its own a runner may have on the large store than on the tiny one, as a fraction of the large one's
# dense weights: activations and scratch are wider there (10 MB). A copy of the dense weights would be 1 of them, in
# float32 2, a copy of the experts 2, in float32 4.
GROWTH_MAX = 0.5

N_LAYERS, N_KV_HEADS, HEAD_DIM = 3, 4, 64
KV_CACHE_NBYTES = CONTEXT * N_LAYERS * N_KV_HEADS * HEAD_DIM * 2 * 2  # keys and values in fp16


@dataclass(frozen=True)
class Stores:
    """A store whose dense weights and whose experts are far above the noise, and one where nothing is."""

    large: Path
    tiny: Path


@dataclass(frozen=True)
class Measured:
    """Some runners on one store: what each has of its own, what it read and maps of the store, and what all share.

    `private_nbytes` is the Private_Dirty of all but the segments; `anonymous_nbytes` would show a copy made there, too.
    """

    private_nbytes: tuple[int, ...]
    anonymous_nbytes: tuple[int, ...]
    read_nbytes: tuple[int, ...]
    mapped_nbytes: tuple[int, ...]
    shared_nbytes: int


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    large = make_small_store(
        tmp_path_factory.mktemp("large"),
        hidden=512,
        intermediate=1024,
        n_layers=N_LAYERS,
        n_heads=8,
        n_kv_heads=N_KV_HEADS,
        n_experts=8,
        vocab=16384,
        dtype="bf16",
    )
    return Stores(large.path, make_small_store(tmp_path_factory.mktemp("tiny")).path)


@pytest.fixture
def large(stores: Stores) -> Manifest:
    return read_manifest(stores.large)


@pytest.fixture
def _serving(daemon: DaemonProcess, stores: Stores) -> None:
    """A daemon that holds both stores."""
    for path in (stores.large, stores.tiny):
        daemon.load(path, read_manifest(path).digest)


def measured(store: Path, n_runners: int) -> Measured:
    """Measure runners that have all generated and are all still there."""
    with ExitStack() as stack:
        pids = [stack.enter_context(waiting_runner(store)).pid for _ in range(n_runners)]
        return Measured(
            private_nbytes=tuple(private_dirty_nbytes(pid) for pid in pids),
            anonymous_nbytes=tuple(status_nbytes(pid, "RssAnon") for pid in pids),
            read_nbytes=tuple(status_nbytes(pid, "RssShmem") for pid in pids),
            mapped_nbytes=tuple(sum(segments_of(pid).values()) for pid in pids),
            shared_nbytes=sum(segments_of(*pids).values()),
        )


@pytest.mark.usefixtures("_serving")
@pytest.mark.parametrize("n_runners", [1, 2])
def test_what_a_runner_has_of_its_own_does_not_grow_with_the_store(
    stores: Stores, large: Manifest, n_runners: int
) -> None:
    on_tiny = measured(stores.tiny, 1)

    on_large = measured(stores.large, n_runners)

    growth_nbytes = [nbytes - on_tiny.anonymous_nbytes[0] for nbytes in on_large.anonymous_nbytes]
    assert large.experts_nbytes > large.dense_nbytes > 35e6
    assert min(on_large.read_nbytes) > 0.9 * (large.experts_nbytes + large.dense_nbytes / 2)  # of the embeddings, rows
    assert set(on_large.mapped_nbytes) == {on_large.shared_nbytes}  # all of them map the same
    assert on_large.shared_nbytes >= large.experts_nbytes + large.dense_nbytes
    assert max(growth_nbytes) < GROWTH_MAX * large.dense_nbytes
    assert max(on_large.private_nbytes) <= PRIVATE_NBYTES_MAX + KV_CACHE_NBYTES
