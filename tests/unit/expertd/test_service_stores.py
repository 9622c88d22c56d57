"""What becomes of a store: loaded once, attached, unloaded, orphaned, freed."""

from pathlib import Path

import pytest

from protocol import messages as m
from protocol.messages import Code, StoreState
from protocol.schema import STORES_MAX
from tests.unit.expertd.services import (
    DIGEST,
    OTHER_DIGEST,
    attach,
    connect,
    is_open,
    loaded_store,
    new_service,
    put_store,
    refusal,
    store_status,
)


def test_a_wish_for_an_unknown_store_starts_a_load() -> None:
    service = new_service()
    session = connect(service)

    outcome = service.handle(session, m.Load("/store", DIGEST), 0.0)

    assert isinstance(outcome.reply, m.StoreStatus)
    assert outcome.reply.state is StoreState.LOADING
    assert outcome.load is not None
    assert (outcome.load.path, outcome.load.digest) == (Path("/store"), DIGEST)


def test_a_store_that_is_loading_or_loaded_is_not_loaded_again() -> None:
    service = new_service()
    session = connect(service)
    service.handle(session, m.Load("/store", DIGEST), 0.0)

    while_loading = service.handle(session, m.Load("/store", DIGEST), 0.0)
    put_store(service, OTHER_DIGEST)
    when_loaded = service.handle(session, m.Load("/store", OTHER_DIGEST), 0.0)

    assert while_loading.load is None
    assert when_loaded.load is None
    assert isinstance(when_loaded.reply, m.StoreStatus)
    assert when_loaded.reply.state is StoreState.READY
    service.close()


def test_a_store_that_failed_may_be_tried_again() -> None:
    service = new_service()
    session = connect(service)
    store = service.begin_load(Path("/store"), DIGEST)
    service.store_failed(store, Code.STORE_INVALID, "cut")

    outcome = service.handle(session, m.Load("/store", DIGEST), 0.0)

    assert outcome.load is not None
    assert isinstance(outcome.reply, m.StoreStatus)
    assert outcome.reply.error is None


@pytest.mark.parametrize(
    ("path", "digest"),
    [
        ("store", DIGEST),
        ("/store", "ab"),
        ("/store", "AB" * 32),
        ("/store", "a\n" * 32),
        ("/sto\0re", DIGEST),
        ("/" + "é" * 600, DIGEST),
    ],
)
def test_a_load_without_an_absolute_path_and_a_digest_is_refused(path: str, digest: str) -> None:
    service = new_service()
    session = connect(service)

    outcome = service.handle(session, m.Load(path, digest), 0.0)

    assert refusal(outcome.reply).code is Code.BAD_MESSAGE
    assert outcome.load is None
    assert service.status(0.0).stores == ()


def test_there_are_at_most_so_many_stores() -> None:
    service = new_service()
    session = connect(service)
    for number in range(STORES_MAX):
        service.handle(session, m.Load("/store", f"{number:064x}"), 0.0)

    outcome = service.handle(session, m.Load("/store", DIGEST), 0.0)

    assert refusal(outcome.reply).code is Code.TOO_MANY
    assert outcome.load is None


def test_attach_hands_out_the_descriptors_of_a_loaded_store() -> None:
    service = new_service()
    session = connect(service)
    loaded = put_store(service)

    outcome = service.handle(session, m.Attach(DIGEST), 0.0)

    assert outcome.reply == m.Attached(DIGEST, 1)
    assert outcome.fds == tuple(loaded.fds)
    service.close()


def test_attach_to_a_store_that_is_not_there_is_refused_by_its_state() -> None:
    service = new_service()
    session = connect(service)
    service.begin_load(Path("/loading"), DIGEST)
    failed = service.begin_load(Path("/failed"), OTHER_DIGEST)
    service.store_failed(failed, Code.STORE_INVALID, "cut")

    unknown, loading, broken = (
        refusal(service.handle(session, m.Attach(digest), 0.0).reply) for digest in ("ef" * 32, DIGEST, OTHER_DIGEST)
    )

    assert unknown.code is Code.UNKNOWN_STORE
    assert loading.code is Code.STORE_LOADING
    assert broken == m.Refused(Code.STORE_INVALID, "cut")
    assert session.store is None


def test_a_session_attaches_to_one_store() -> None:
    service = new_service()
    session = connect(service)
    put_store(service)
    attach(service, session)

    again = service.handle(session, m.Attach(DIGEST), 0.0)

    assert refusal(again.reply).code is Code.ALREADY_ATTACHED
    service.close()


def test_a_store_nobody_maps_is_gone_when_it_is_unloaded() -> None:
    service = new_service()
    session = connect(service)
    loaded = put_store(service)
    fd = loaded.fds[0]

    outcome = service.handle(session, m.Unload(DIGEST), 0.0)

    assert outcome.reply == m.Unloaded(DIGEST)
    assert not is_open(fd)
    assert store_status(service) is None


def test_a_store_somebody_maps_is_an_orphan_until_the_last_one_ends() -> None:
    service = new_service()
    first, second = connect(service, 1), connect(service, 2)
    fd = put_store(service).fds[0]
    attach(service, first)
    attach(service, second)
    service.handle(first, m.Unload(DIGEST), 0.0)

    service.close_session(first, 1.0)
    after_first = store_status(service)
    service.close_session(second, 2.0)
    after_second = store_status(service)

    assert not is_open(fd)
    assert after_first is not None
    assert (after_first.state, after_first.nbytes) == (StoreState.ORPHANED, 4096)
    assert after_second is None


def test_an_orphan_is_not_attached_to_and_not_unloaded_twice() -> None:
    service = new_service()
    holder, other = connect(service, 1), connect(service, 2)
    put_store(service)
    attach(service, holder)
    service.handle(holder, m.Unload(DIGEST), 0.0)

    attached = service.handle(other, m.Attach(DIGEST), 0.0)
    unloaded = service.handle(other, m.Unload(DIGEST), 0.0)

    assert refusal(attached.reply).code is Code.UNKNOWN_STORE
    assert refusal(unloaded.reply).code is Code.UNKNOWN_STORE


def test_an_orphan_may_be_loaded_again() -> None:
    service = new_service()
    holder, other = connect(service, 1), connect(service, 2)
    put_store(service)
    attach(service, holder)
    service.handle(holder, m.Unload(DIGEST), 0.0)

    outcome = service.handle(other, m.Load("/store", DIGEST), 0.0)
    assert outcome.load is not None
    service.store_loaded(outcome.load, loaded_store(), 0.0)
    service.close_session(holder, 1.0)

    status = store_status(service)
    assert status is not None
    assert status.state is StoreState.READY
    service.close()


def test_a_load_that_ends_after_its_unload_is_let_go() -> None:
    service = new_service()
    session = connect(service)
    store = service.begin_load(Path("/store"), DIGEST)
    service.handle(session, m.Unload(DIGEST), 0.0)
    loaded = loaded_store()
    fd = loaded.fds[0]

    service.store_loaded(store, loaded, 0.0)

    assert store.progress.cancelled
    assert not is_open(fd)
    assert store_status(service) is None


def test_draining_cancels_loads_and_takes_no_new_one() -> None:
    service = new_service()
    session = connect(service)
    store = service.begin_load(Path("/store"), DIGEST)

    service.drain()
    outcome = service.handle(session, m.Load("/other", OTHER_DIGEST), 0.0)

    assert store.progress.cancelled
    assert refusal(outcome.reply).code is Code.DRAINING
    assert outcome.load is None


def test_lack_of_memory_names_who_still_maps_an_unloaded_store() -> None:
    service = new_service()
    holder, other = connect(service, 4711), connect(service, 4712)
    put_store(service)
    attach(service, holder)
    service.handle(other, m.Unload(DIGEST), 0.0)
    store = service.begin_load(Path("/big"), OTHER_DIGEST)

    service.store_failed(store, Code.OUT_OF_MEMORY, "2 GB asked, 1 GB free")

    assert store.error is not None
    assert "2 GB asked, 1 GB free" in store.error.detail
    assert "4711" in store.error.detail
    assert "4712" not in store.error.detail


def test_no_text_of_a_store_can_make_a_status_that_cannot_be_sent() -> None:
    from protocol.codec import encode

    service = new_service()
    store = service.begin_load(Path("/store"), DIGEST)

    service.store_failed(store, Code.STORE_INVALID, "\ud800" * 600)

    assert encode(service.status(0.0))


def test_an_unused_daemon_is_idle_from_its_start() -> None:
    service = new_service()

    idle_s = service.idle_s(30.0)

    assert idle_s == 30.0


def test_a_load_or_an_attached_runner_is_use_and_a_status_is_not() -> None:
    service = new_service()
    session = connect(service)
    store = service.begin_load(Path("/store"), DIGEST)

    while_loading = service.idle_s(50.0)
    service.store_loaded(store, loaded_store(), 60.0)
    attach(service, session)
    while_attached = service.idle_s(90.0)
    service.close_session(session, 100.0)
    asker = connect(service, 2, now=120.0)
    service.handle(asker, m.GetStatus(), 130.0)
    after = service.idle_s(130.0)

    assert (while_loading, while_attached, after) == (0.0, 0.0, 30.0)
    service.close()


def test_a_store_loaded_again_beside_its_orphan_is_another_copy() -> None:
    service = new_service()
    session = connect(service)
    put_store(service)
    attach(service, session)
    service.handle(session, m.Unload(DIGEST), 1.0)

    put_store(service)

    states = [(store.state, store.n_sessions) for store in service.status(2.0).stores]
    assert states == [(StoreState.READY, 0), (StoreState.ORPHANED, 1)]
    service.close_session(session, 3.0)
    assert [store.state for store in service.status(4.0).stores] == [StoreState.READY]
    service.close()
