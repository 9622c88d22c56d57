"""What others held is taken only if it is proven: seals, sizes, every byte."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.adoption import adopt
from expertd.budget import ALL_THERE_IS, MemoryWish
from expertd.errors import LoadCancelled, StoreInvalid
from expertd.loader import LoadedStore, Loader, LoaderSettings, LoadProgress, SealedPart
from protocol.catalogue import Catalogue, encode_catalogue
from protocol.fdpass import close_all
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.segment import SegmentBuilder, make_segment
from tests.support.leaks import Holdings, holdings
from tests.support.tiers import memory_for, open_tiered

KEY = ExpertKey(1, 2)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[Holdings]:
    """Whatever is refused is closed."""
    before = holdings()
    yield before
    assert holdings().beyond(before) == []


class Offer:
    """A loaded store's descriptors, to be falsified."""

    def __init__(self, store: Path, manifest: Manifest, wish: MemoryWish = ALL_THERE_IS) -> None:
        loaded = Loader(LoaderSettings(2, 0.0), lambda: 1 << 60, LoadProgress(), open_tiered).load(
            store, manifest.digest, wish
        )
        if loaded.tiered is not None:
            loaded.tiered.stop()
            loaded.tiered.join(20.0)
        self.catalogue: Catalogue = loaded.catalogue
        self.digest = loaded.digest
        self.fds = loaded.fds

    def replace_segment(self, index: int, fd: int) -> None:
        os.close(self.fds[index])
        self.fds[index] = fd

    def replace_catalogue(self, catalogue: Catalogue) -> None:
        self.replace_segment(0, make_segment("expertd-catalogue", encode_catalogue(catalogue)))

    def content(self, index: int) -> bytearray:
        return bytearray(os.pread(self.fds[index], os.fstat(self.fds[index]).st_size, 0))


@pytest.fixture
def offer(store: Path, manifest: Manifest) -> Offer:
    """A store that is what it says."""
    return Offer(store, manifest)


def test_a_true_store_is_adopted_as_it_is(offer: Offer) -> None:
    fds = list(offer.fds)

    loaded = adopt(offer.fds, offer.digest, n_threads=2)

    assert isinstance(loaded, LoadedStore)
    assert (loaded.catalogue, loaded.fds, loaded.corrupt) == (offer.catalogue, fds, ())
    assert loaded.nbytes == sum(offer.catalogue.segments_nbytes)
    loaded.close()


def change_a_byte(offer: Offer) -> None:
    data = offer.content(2)
    data[offer.catalogue.experts[KEY].offset + 5000] ^= 1
    offer.replace_segment(2, make_segment("expertd-store", bytes(data)))


def leave_unsealed(offer: Offer) -> None:
    data = offer.content(2)
    fd = os.memfd_create("expertd-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    offer.replace_segment(2, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    os.close(fd)


def leave_unpopulated(offer: Offer) -> None:
    with SegmentBuilder("expertd-store", os.fstat(offer.fds[2]).st_size) as builder:
        offer.replace_segment(2, builder.seal())


def give_a_file(offer: Offer) -> None:
    offer.replace_segment(2, os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC))


def give_one_less(offer: Offer) -> None:
    os.close(offer.fds.pop())


def give_one_twice(offer: Offer) -> None:
    offer.fds.append(os.dup(offer.fds[-1]))


def give_none(offer: Offer) -> None:
    close_all(offer.fds)
    offer.fds.clear()


def add_a_useless_segment(offer: Offer) -> None:
    offer.replace_catalogue(replace(offer.catalogue, segments_nbytes=(*offer.catalogue.segments_nbytes, 1 << 20)))
    offer.fds.append(make_segment("expertd-store", bytes(1 << 20)))


def hide_an_expert(offer: Offer) -> None:
    experts = {key: handle for key, handle in offer.catalogue.experts.items() if key != KEY}
    offer.replace_catalogue(replace(offer.catalogue, experts=experts))


def swap_two_experts(offer: Offer) -> None:
    one, two = offer.catalogue.experts[KEY], offer.catalogue.experts[ExpertKey(0, 0)]
    swapped = offer.catalogue.experts | {
        one.key: one._replace(offset=two.offset),
        two.key: two._replace(offset=one.offset),
    }
    offer.replace_catalogue(replace(offer.catalogue, experts=swapped))


def give_junk_as_catalogue(offer: Offer) -> None:
    offer.replace_segment(0, make_segment("expertd-catalogue", b"junk" * 100))


def give_a_writable_descriptor(offer: Offer) -> None:
    data = offer.content(2)
    fd = os.memfd_create("expertd-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    offer.replace_segment(2, fd)


FORGERIES: dict[Callable[[Offer], None], str] = {
    change_a_byte: "its checksum is wrong",
    leave_unsealed: "seals",
    leave_unpopulated: "holes",
    give_a_file: "no sealable memory|bytes were expected",
    give_one_less: "segments were promised",
    give_one_twice: "segments were promised",
    give_none: "no descriptors",
    add_a_useless_segment: "larger than what they hold",
    hide_an_expert: "1 experts are missing",
    swap_two_experts: "its checksum is wrong",
    give_junk_as_catalogue: "not msgpack|catalogue",
    give_a_writable_descriptor: "not read-only",
}


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_what_is_not_what_it_says_is_refused(offer: Offer, forge: Callable[[Offer], None]) -> None:
    forge(offer)

    with pytest.raises(StoreInvalid, match=FORGERIES[forge]):
        adopt(offer.fds, offer.digest, n_threads=2)


def test_another_stores_segments_are_refused(offer: Offer) -> None:
    with pytest.raises(StoreInvalid, match="is of store"):
        adopt(offer.fds, "f" * 64, n_threads=2)


def test_a_trusted_holder_may_lack_experts_and_they_count_as_corrupt(offer: Offer) -> None:
    hide_an_expert(offer)

    loaded = adopt(offer.fds, offer.digest, n_threads=2, may_lack_experts=True)

    assert isinstance(loaded, LoadedStore)
    assert loaded.corrupt == (KEY,)
    loaded.close()


def test_a_store_that_is_no_longer_wanted_is_let_go(offer: Offer) -> None:
    with pytest.raises(LoadCancelled):
        adopt(offer.fds, offer.digest, n_threads=2, is_wanted=lambda: False)


@pytest.fixture
def with_slots(store: Path, manifest: Manifest) -> Offer:
    """A store whose dense weights and one expert are sealed, and the others come into slots."""
    return Offer(store, manifest, MemoryWish(memory_for(manifest, 4, (KEY,)), (KEY,)))


@pytest.mark.parametrize("n_sent", [3, 5], ids=["sealed", "all"])
def test_of_a_store_with_slots_the_sealed_part_is_adopted_as_it_is(with_slots: Offer, n_sent: int) -> None:
    """The descriptors of slots and of their table may come along; they are closed."""
    fds = with_slots.fds[:n_sent]
    close_all(with_slots.fds[n_sent:])
    sealed = fds[1:3]

    part = adopt(fds, with_slots.digest, n_threads=2)

    assert isinstance(part, SealedPart)
    assert (part.catalogue, part.fds) == (with_slots.catalogue, sealed)
    assert part.nbytes == sum(os.fstat(fd).st_size for fd in sealed)
    part.close()


def test_a_sealed_part_with_a_wrong_byte_is_refused(with_slots: Offer) -> None:
    change_a_byte(with_slots)

    with pytest.raises(StoreInvalid, match="its checksum is wrong"):
        adopt(with_slots.fds, with_slots.digest, n_threads=2)


def test_a_sealed_part_that_is_not_all_there_is_refused(with_slots: Offer) -> None:
    close_all(with_slots.fds[2:])

    with pytest.raises(StoreInvalid, match="2 segments were promised, 1 came"):
        adopt(with_slots.fds[:2], with_slots.digest, n_threads=2)
