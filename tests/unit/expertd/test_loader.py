"""A load gives exactly the files' bytes, sealed, or an error and nothing else."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from expertd.budget import ALL_THERE_IS, RESERVE_NBYTES, MemoryWish
from expertd.errors import LoadCancelled, StoreInvalid
from expertd.loader import LoadedStore, Loader, LoaderSettings, LoadProgress, SealedPart
from protocol.catalogue import decode_catalogue
from protocol.errors import OutOfMemory
from protocol.handles import ExpertKey
from protocol.manifest import DENSE_FILE, Manifest
from protocol.segment import check_segment, map_segment, segment_nbytes
from tests.support.leaks import holdings
from tests.support.stores import EXPERTS_FILE, dense_damaged, flip_byte
from tests.support.tiers import memory_for, open_tiered

KEY = ExpertKey(1, 2)


def plenty() -> int:
    return 1 << 40


def load(
    store: Path,
    digest: str,
    *,
    available: Callable[[], int] = plenty,
    wish: MemoryWish = ALL_THERE_IS,
    sealed: SealedPart | None = None,
) -> LoadedStore:
    return Loader(LoaderSettings(2, 30.0), available, LoadProgress(), open_tiered).load(store, digest, wish, sealed)


def loaded_experts(loaded: LoadedStore) -> dict[ExpertKey, bytes]:
    """Return what the segments hold of each expert, as a client would find it."""
    catalogue = decode_catalogue(bytes(map_segment(loaded.fds[0], segment_nbytes(loaded.fds[0]))))
    views = [map_segment(fd, n) for fd, n in zip(loaded.fds[1:], catalogue.segments_nbytes, strict=True)]
    return {
        key: bytes(views[handle.segment][handle.offset : handle.offset + handle.nbytes])
        for key, handle in catalogue.experts.items()
    }


def file_experts(store: Path, manifest: Manifest) -> dict[ExpertKey, bytes]:
    data = (store / EXPERTS_FILE).read_bytes()
    return {key: data[record.offset : record.offset + record.nbytes] for key, record in manifest.experts.items()}


def test_the_segments_hold_what_the_files_hold(store: Path, manifest: Manifest) -> None:
    loaded = load(store, manifest.digest)

    experts = loaded_experts(loaded)

    assert experts == file_experts(store, manifest)
    assert loaded.nbytes == manifest.experts_nbytes + manifest.dense_nbytes
    loaded.close()


def test_dense_records_are_in_the_catalogue_and_whole(store: Path, manifest: Manifest) -> None:
    loaded = load(store, manifest.digest)
    handle = loaded.catalogue.dense["embed_tokens"]
    record = manifest.dense["embed_tokens"]

    view = map_segment(loaded.fds[1 + handle.segment], loaded.catalogue.segments_nbytes[handle.segment])

    data = (store / DENSE_FILE).read_bytes()[record.offset : record.offset + record.nbytes]
    assert view[handle.offset : handle.offset + handle.nbytes] == data
    loaded.close()


def test_every_segment_is_sealed(store: Path, manifest: Manifest) -> None:
    loaded = load(store, manifest.digest)

    sizes = [segment_nbytes(loaded.fds[0]), *loaded.catalogue.segments_nbytes]

    for fd, nbytes in zip(loaded.fds, sizes, strict=True):
        check_segment(fd, nbytes)
    loaded.close()


def test_all_records_count_as_progress(store: Path, manifest: Manifest) -> None:
    progress = LoadProgress()

    loaded = Loader(LoaderSettings(2, 0.0), plenty, progress, open_tiered).load(store, manifest.digest)

    assert progress.loaded_nbytes == loaded.nbytes
    loaded.close()


def test_a_corrupt_expert_is_left_out_and_the_others_are_served(store: Path, manifest: Manifest) -> None:
    flip_byte(store / EXPERTS_FILE, manifest.experts[KEY].offset + 100)

    loaded = load(store, manifest.digest)

    expected = file_experts(store, manifest)
    del expected[KEY]
    assert loaded.corrupt == (KEY,)
    assert loaded_experts(loaded) == expected
    loaded.close()


def test_not_a_byte_of_a_corrupt_expert_is_in_memory(store: Path, manifest: Manifest) -> None:
    flip_byte(store / EXPERTS_FILE, manifest.experts[KEY].offset + 100)
    last = max(manifest.experts.values(), key=lambda record: record.offset)
    data = (store / EXPERTS_FILE).read_bytes()
    needle = data[manifest.experts[KEY].offset :][:64]

    loaded = load(store, manifest.digest)

    segments = [bytes(map_segment(fd, segment_nbytes(fd))) for fd in loaded.fds[1:]]
    assert not any(needle in segment for segment in segments)
    assert any(data[last.offset :][:64] in segment for segment in segments)
    loaded.close()


def test_a_corrupt_dense_record_is_refused_by_its_name(store: Path, manifest: Manifest) -> None:
    flip_byte(store / DENSE_FILE, manifest.dense["norm"].offset)

    with pytest.raises(StoreInvalid, match="norm: its checksum is wrong"):
        load(store, manifest.digest)


def test_another_store_than_the_one_asked_for_is_refused(store: Path) -> None:
    with pytest.raises(StoreInvalid, match="was expected"):
        load(store, "0" * 64)


def test_too_little_memory_is_said_before_any_is_taken(store: Path, manifest: Manifest) -> None:
    with pytest.raises(OutOfMemory, match=r"needs 0\.00 GB .* 0\.27 GB are available"):
        load(store, manifest.digest, available=lambda: 256 << 20)


def test_a_cancelled_load_ends(store: Path, manifest: Manifest) -> None:
    progress = LoadProgress()
    progress.cancelled = True

    with pytest.raises(LoadCancelled):
        Loader(LoaderSettings(2, 30.0), plenty, progress, open_tiered).load(store, manifest.digest)


class CancelledAfter(LoadProgress):
    """The progress of a load that is no longer wanted once so many bytes are in memory."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self._nbytes = nbytes

    def add(self, nbytes: int) -> None:
        super().add(nbytes)
        self.cancelled = self.loaded_nbytes >= self._nbytes


def test_a_load_cancelled_between_two_segments_leaves_nothing(store: Path, manifest: Manifest) -> None:
    before = holdings()
    progress = CancelledAfter(manifest.dense_nbytes)

    with pytest.raises(LoadCancelled):
        Loader(LoaderSettings(1, 30.0), plenty, progress, open_tiered).load(store, manifest.digest)

    assert progress.loaded_nbytes == manifest.dense_nbytes
    assert holdings().beyond(before) == []


def break_dense(store: Path, manifest: Manifest) -> None:
    flip_byte(store / DENSE_FILE, manifest.dense["norm"].offset)


def take_dense_away(store: Path, manifest: Manifest) -> None:
    del manifest
    (store / DENSE_FILE).unlink()


@pytest.mark.parametrize("damage", [break_dense, take_dense_away])
def test_a_failed_load_leaves_no_mapping_no_descriptor_and_no_thread(
    store: Path, manifest: Manifest, damage: Callable[[Path, Manifest], None]
) -> None:
    damage(store, manifest)
    before, threads = holdings(), threading.active_count()

    with pytest.raises(StoreInvalid):
        load(store, manifest.digest)

    assert holdings().beyond(before) == []
    assert threading.active_count() == threads


def test_closing_a_loaded_store_closes_every_descriptor(store: Path, manifest: Manifest) -> None:
    before = holdings()
    loaded = load(store, manifest.digest)

    loaded.close()
    loaded.close()

    assert holdings().beyond(before) == []


def test_a_file_cut_under_the_load_makes_its_experts_corrupt(store: Path, manifest: Manifest) -> None:
    """The size is checked first; who cuts the file after that gets no half expert served."""
    cut_at = manifest.experts[KEY].offset + 1

    def cut() -> int:
        os.truncate(store / EXPERTS_FILE, cut_at)
        return plenty()

    loaded = load(store, manifest.digest, available=cut)

    gone = {key for key, record in manifest.experts.items() if record.offset + record.nbytes > cut_at}
    assert KEY in gone
    assert set(loaded.corrupt) == gone
    loaded.close()


def sealed_part(store: Path, manifest: Manifest, wish: MemoryWish) -> SealedPart:
    """Return what is sealed of a store with slots, as somebody else has it."""
    loaded = load(store, manifest.digest, wish=wish)
    fds = [os.dup(fd) for fd in loaded.sealed_fds[1:]]
    let_go(loaded)
    return SealedPart(loaded.catalogue, fds)


def let_go(loaded: LoadedStore) -> None:
    loaded.close()
    assert loaded.tiered is not None
    loaded.tiered.stop()
    loaded.tiered.join(20.0)


def inodes(fds: list[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


def test_a_load_goes_on_from_a_sealed_part_and_makes_slots(store: Path, manifest: Manifest) -> None:
    """What is sealed is not read: on disk it is damaged. There may be more slots than there were."""
    before = holdings()
    sealed = sealed_part(store, manifest, MemoryWish(memory_for(manifest, 4, (KEY,)), (KEY,)))
    expected = inodes(sealed.fds)
    with dense_damaged(store, manifest):
        loaded = load(store, manifest.digest, wish=MemoryWish(memory_for(manifest, 5, (KEY,)), (KEY,)), sealed=sealed)

    found, area = inodes(loaded.fds[1:3]), loaded.catalogue.slots
    let_go(loaded)

    assert found == expected
    assert area is not None
    assert area.n_slots == 5
    assert holdings().beyond(before) == []


def test_a_sealed_part_does_not_count_as_memory_that_is_still_to_be_had(store: Path, manifest: Manifest) -> None:
    wish = MemoryWish(memory_for(manifest, 4))
    sealed = sealed_part(store, manifest, wish)
    available = RESERVE_NBYTES + memory_for(manifest, 4) - sealed.nbytes

    loaded = load(store, manifest.digest, wish=wish, sealed=sealed, available=lambda: available)

    assert loaded.tiered is not None
    let_go(loaded)


def test_a_sealed_part_of_other_pinned_experts_is_let_go_and_the_store_read(store: Path, manifest: Manifest) -> None:
    sealed = sealed_part(store, manifest, MemoryWish(memory_for(manifest, 4, (KEY,)), (KEY,)))
    others = inodes(sealed.fds)

    loaded = load(store, manifest.digest, wish=MemoryWish(memory_for(manifest, 4)), sealed=sealed)

    found = inodes(loaded.fds)
    let_go(loaded)
    assert sealed.fds == []
    assert not set(found) & set(others)


def test_a_failed_load_lets_a_sealed_part_go(store: Path, manifest: Manifest) -> None:
    sealed = sealed_part(store, manifest, MemoryWish(memory_for(manifest, 4)))

    with pytest.raises(OutOfMemory):
        load(store, manifest.digest, sealed=sealed, available=lambda: 0)

    assert sealed.fds == []
