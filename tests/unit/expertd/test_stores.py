"""The table of stores and who closes their descriptors."""

from pathlib import Path

from expertd.store import path_problem
from expertd.stores import StoreTable
from protocol.handles import ExpertKey
from protocol.messages import Code, Refused, StoreState
from protocol.schema import CORRUPT_KEYS_MAX
from tests.unit.expertd.services import DIGEST, OTHER_DIGEST, is_open, loaded_store


def test_a_store_is_loading_then_ready() -> None:
    table = StoreTable()
    store = table.begin(DIGEST, Path("/store"))

    before = store.status(0)
    table.finish(store, loaded_store())
    after = store.status(2)

    assert (before.state, before.nbytes) == (StoreState.LOADING, 0)
    assert (after.state, after.nbytes, after.loaded_nbytes, after.n_sessions) == (StoreState.READY, 4096, 4096, 2)
    table.close()


def test_the_progress_of_a_load_shows() -> None:
    table = StoreTable()
    store = table.begin(DIGEST, Path("/store"))

    store.progress.add(100)
    store.progress.add(50)

    assert store.status(0).loaded_nbytes == 150


def test_closing_the_table_closes_every_descriptor_and_stops_every_load() -> None:
    table = StoreTable()
    ready = table.begin(DIGEST, Path("/a"))
    table.finish(ready, loaded := loaded_store())
    fd = loaded.fds[0]
    loading = table.begin(OTHER_DIGEST, Path("/b"))

    table.close()

    assert not is_open(fd)
    assert loading.progress.cancelled
    assert len(table) == 0


def test_a_failed_store_says_why_and_is_unloaded_without_a_trace() -> None:
    table = StoreTable()
    store = table.begin(DIGEST, Path("/store"))
    table.fail(store, Refused(Code.STORE_INVALID, "cut"))

    status = store.status(0)
    table.unload(store, is_mapped=False)

    assert (status.state, status.error) == (StoreState.FAILED, Refused(Code.STORE_INVALID, "cut"))
    assert table.find(DIGEST) is None


def test_an_old_orphan_does_not_take_its_successor_along() -> None:
    table = StoreTable()
    orphan = table.begin(DIGEST, Path("/store"))
    table.finish(orphan, loaded_store())
    table.unload(orphan, is_mapped=True)
    successor = table.begin(DIGEST, Path("/store"))
    both = table.all()

    table.forget_orphan(orphan)

    assert both == [successor, orphan]
    assert table.find(DIGEST) is successor
    assert table.all() == [successor]


def test_a_status_names_so_many_corrupt_experts_and_counts_all() -> None:
    table = StoreTable()
    store = table.begin(DIGEST, Path("/store"))
    corrupt = tuple(ExpertKey(0, expert) for expert in range(CORRUPT_KEYS_MAX + 5))
    table.finish(store, loaded_store(corrupt=corrupt))

    status = store.status(0)

    assert status.n_corrupt == CORRUPT_KEYS_MAX + 5
    assert status.corrupt == corrupt[:CORRUPT_KEYS_MAX]
    table.close()


def test_a_path_that_no_status_could_carry_is_known() -> None:
    problems = [path_problem(path) for path in ("/store", "/" + "x" * 1023, "/" + "x" * 1024, "/\udcff", "/a\0b")]

    assert [problem is None for problem in problems] == [True, True, False, False, False]
