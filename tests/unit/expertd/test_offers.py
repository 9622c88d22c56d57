"""Offers and loads of one store side by side: whoever is first, nothing is served twice and nothing is left."""

import os
from pathlib import Path

import pytest

from expertd.budget import ALL_THERE_IS, MemoryWish
from expertd.loader import LoadedStore, LoadProgress, SealedPart
from expertd.offers import Adoption, Offers
from expertd.sessions import Session, SessionTable
from expertd.stores import HeldStore, StoreTable
from protocol import messages as m
from protocol.catalogue import plan_catalogue, plan_tiered_catalogue
from protocol.fdpass import Credentials
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, Refused, StoreState

DIGEST, OTHER = "a" * 64, "b" * 64
PINNED = (ExpertKey(0, 1), ExpertKey(1, 0))


class Desk:
    """The tables that offers are decided over, and one client."""

    def __init__(self, manifest: Manifest) -> None:
        self.stores = StoreTable()
        self.sessions = SessionTable()
        self.offers = Offers(self.stores, self.sessions)
        self.session: Session = self.sessions.open(Credentials(4242, 0), 0.0)
        self._manifest = manifest

    def offer(self, digest: str = DIGEST, path: str = "/store", session: Session | None = None) -> Adoption | Refused:
        return self.offers.offer(session or self.session, m.Offer(path, digest, None, 3), [])

    def adoption(self) -> Adoption:
        adoption = self.offer()
        assert isinstance(adoption, Adoption)
        return adoption

    def loaded(self) -> LoadedStore:
        catalogue = plan_catalogue(self._manifest)
        return LoadedStore(catalogue, DIGEST, 1, 0.0, 0, ())

    def sealed(self) -> SealedPart:
        return SealedPart(plan_tiered_catalogue(self._manifest, PINNED, 4), [os.open(os.devnull, os.O_RDONLY)])

    def read(self, wish: MemoryWish = ALL_THERE_IS) -> HeldStore:
        store = self.stores.begin(DIGEST, Path("/store"), wish)
        store.is_read = True
        return store


@pytest.fixture
def desk(manifest: Manifest) -> Desk:
    return Desk(manifest)


def code_of(answer: object) -> Code:
    assert isinstance(answer, Refused), answer
    return answer.code


def test_a_proven_offer_makes_the_store_ready_and_attaches_who_offered(desk: Desk) -> None:
    adoption = desk.adoption()

    answer = desk.offers.taken(adoption, desk.loaded())

    assert answer == m.Attached(DIGEST, 0)
    assert desk.session.store is adoption.store
    assert adoption.store.state is StoreState.READY


def test_an_offer_that_fails_leaves_nothing(desk: Desk) -> None:
    adoption = desk.adoption()

    answer = desk.offers.failed(adoption, Refused(Code.STORE_INVALID, "wrong"))

    assert code_of(answer) is Code.STORE_INVALID
    assert len(desk.stores) == 0


def test_an_offer_that_fails_leaves_the_load_that_goes_on(desk: Desk) -> None:
    store = desk.read()
    adoption = desk.adoption()

    desk.offers.failed(adoption, Refused(Code.STORE_INVALID, "wrong"))

    assert desk.stores.find(DIGEST) is store
    assert store.state is StoreState.LOADING
    assert not store.progress.cancelled


def test_a_proven_offer_ends_the_load_of_the_same_store(desk: Desk) -> None:
    store = desk.read()

    desk.offers.taken(desk.adoption(), desk.loaded())
    late = desk.loaded()
    desk.stores.finish(store, late)

    assert store.progress.cancelled
    assert store.loaded is not late


def test_a_load_that_is_first_makes_the_offer_unneeded(desk: Desk) -> None:
    store = desk.read()
    adoption = desk.adoption()
    first = desk.loaded()
    desk.stores.finish(store, first)

    answer = desk.offers.taken(adoption, desk.loaded())

    assert code_of(answer) is Code.STORE_HELD
    assert store.loaded is first
    assert desk.session.store is None


def test_a_store_that_was_unloaded_meanwhile_is_not_served(desk: Desk) -> None:
    adoption = desk.adoption()
    desk.stores.unload(adoption.store, is_mapped=False)

    answer = desk.offers.taken(adoption, desk.loaded())

    assert code_of(answer) is Code.UNKNOWN_STORE
    assert len(desk.stores) == 0


def test_who_offered_and_ended_leaves_the_store(desk: Desk) -> None:
    adoption = desk.adoption()
    desk.sessions.close(desk.session)

    desk.offers.taken(adoption, desk.loaded())

    assert desk.session.store is None
    assert adoption.store.state is StoreState.READY


def test_a_second_offer_waits_for_the_first(desk: Desk) -> None:
    desk.adoption()
    other = desk.sessions.open(Credentials(4243, 0), 0.0)

    assert code_of(desk.offer(session=other)) is Code.STORE_LOADING


def test_another_store_of_that_path_is_store_changed(desk: Desk) -> None:
    desk.stores.begin(OTHER, Path("/store"))

    assert code_of(desk.offer()) is Code.STORE_CHANGED


def test_what_was_unloaded_is_taken_only_when_it_is_wanted_again(desk: Desk) -> None:
    desk.offers.refuse(DIGEST)

    refused = desk.offer()
    desk.offers.welcome(DIGEST)

    assert code_of(refused) is Code.UNKNOWN_STORE
    assert isinstance(desk.offer(), Adoption)


def test_an_attached_session_offers_nothing(desk: Desk) -> None:
    desk.session.store = HeldStore(OTHER, Path("/other"), progress=LoadProgress())

    assert code_of(desk.offer()) is Code.ALREADY_ATTACHED


def test_a_sealed_part_begins_one_load_that_holds_the_store_as_it_was(desk: Desk) -> None:
    adoption = desk.adoption()

    answer = desk.offers.taken_in_part(adoption, desk.sealed())
    begins = [desk.offers.begin_load(adoption.store) for _ in range(2)]
    sealed = adoption.store.begin()

    assert code_of(answer) is Code.STORE_LOADING
    assert begins == [True, False]
    assert adoption.store.wish == MemoryWish(None, PINNED)
    assert sealed is not None
    sealed.close()


def test_a_load_that_waits_goes_on_from_a_sealed_part_in_the_way_it_was_ordered(desk: Desk) -> None:
    store = desk.read(MemoryWish(1000))

    desk.offers.taken_in_part(desk.adoption(), desk.sealed())

    assert not desk.offers.begin_load(store)
    assert store.wish == MemoryWish(1000)
    assert store.sealed is not None
    store.close()


def test_a_sealed_part_is_let_go_when_the_load_has_begun_without_it(desk: Desk) -> None:
    store = desk.read()
    adoption, sealed = desk.adoption(), desk.sealed()
    store.begin()

    answer = desk.offers.taken_in_part(adoption, sealed)

    assert code_of(answer) is Code.STORE_LOADING
    assert (store.sealed, sealed.fds) == (None, [])


def test_a_sealed_part_of_a_store_that_was_unloaded_meanwhile_is_let_go(desk: Desk) -> None:
    adoption, sealed = desk.adoption(), desk.sealed()
    desk.stores.unload(adoption.store, is_mapped=False)

    answer = desk.offers.taken_in_part(adoption, sealed)

    assert code_of(answer) is Code.UNKNOWN_STORE
    assert sealed.fds == []


def test_unloading_lets_a_sealed_part_go_that_no_load_has_taken(desk: Desk) -> None:
    adoption, sealed = desk.adoption(), desk.sealed()
    desk.offers.taken_in_part(adoption, sealed)

    desk.stores.unload(adoption.store, is_mapped=False)

    assert sealed.fds == []


def test_a_second_offer_is_not_needed_beside_a_sealed_part(desk: Desk) -> None:
    adoption, sealed = desk.adoption(), desk.sealed()
    desk.offers.taken_in_part(adoption, sealed)
    other = desk.sessions.open(Credentials(4243, 0), 0.0)

    assert code_of(desk.offer(session=other)) is Code.STORE_LOADING
    sealed.close()


def test_all_of_a_store_is_not_taken_for_a_load_that_may_have_less(desk: Desk) -> None:
    store = desk.read(MemoryWish(0))
    loaded = desk.loaded()

    answer = desk.offers.taken(desk.adoption(), loaded)

    assert code_of(answer) is Code.STORE_LOADING
    assert not store.awaits_offers
    assert store.state is StoreState.LOADING
    assert not store.progress.cancelled
