import ctypes
import mmap
import os
import time
from collections.abc import Iterator

import pytest
import torch

from protocol.errors import SegmentError
from protocol.segment import (
    HUGE_PAGE_NBYTES,
    SegmentBuilder,
    SegmentKind,
    check_seals_hold,
    check_segment,
    make_segment,
    map_segment,
    segment_nbytes,
    still_refused,
)


@pytest.fixture
def sealed() -> Iterator[int]:
    fd = make_segment("test", b"immutable" * 1000)
    yield fd
    os.close(fd)


def test_a_segment_holds_what_was_written_into_it() -> None:
    with SegmentBuilder("test", 3 * HUGE_PAGE_NBYTES + 4096) as builder:
        builder.populate(0, builder.nbytes, collapse_until=time.monotonic() + 10)
        builder.view[-5:] = b"hello"
        fd = builder.seal()

    view = map_segment(fd, segment_nbytes(fd))
    os.close(fd)

    assert bytes(view[-5:]) == b"hello"
    assert not any(view[:4096])


def test_a_huge_page_that_is_refused_is_asked_for_again_and_no_other() -> None:
    asked: list[int] = []

    def collapse(page: int) -> bool:
        asked.append(page)
        return page != 20 or asked.count(page) == 3

    refused = still_refused([10, 20, 30], collapse, n_times=8)

    assert refused == []
    assert asked == [10, 20, 30, 20, 20]


def test_a_huge_page_that_is_always_refused_is_asked_for_so_many_times() -> None:
    asked: list[int] = []

    def refuse(page: int) -> bool:
        asked.append(page)
        return False

    refused = still_refused([10], refuse, n_times=8)

    assert refused == [10]
    assert asked == [10] * 8


def test_a_mapping_lies_where_huge_pages_can_be_used(sealed: int) -> None:
    view = map_segment(sealed, 9000)

    address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))

    assert address % HUGE_PAGE_NBYTES == 0


def test_a_mapping_lives_as_long_as_the_last_tensor_over_it() -> None:
    fd = make_segment("test", b"immutable" * 1000)
    view = map_segment(fd, 9000)
    os.close(fd)
    tensor = torch.frombuffer(view[9:18], dtype=torch.uint8)

    del view

    assert bytes(tensor.tolist()) == b"immutable"
    assert "memfd:test" in _maps()
    del tensor
    assert "memfd:test" not in _maps()


@pytest.mark.parametrize("nbytes", [8999, 9001, 0, 1 << 40])
def test_a_segment_of_another_size_is_not_mapped(sealed: int, nbytes: int) -> None:
    with pytest.raises(SegmentError, match="9000 bytes"):
        map_segment(sealed, nbytes)


def test_an_unsealed_memfd_is_not_mapped() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)

    with pytest.raises(SegmentError, match="its content could change"):
        map_segment(fd, 4096)

    os.close(fd)


def test_a_descriptor_that_is_no_memory_is_not_mapped() -> None:
    reader, writer = os.pipe()

    with pytest.raises(SegmentError, match="no sealable memory"):
        check_segment(reader, 1)

    os.close(reader)
    os.close(writer)


def test_the_descriptor_given_out_cannot_write(sealed: int) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(sealed, b"x", 0)
    with pytest.raises(OSError, match=r"Invalid argument|Operation not permitted"):
        os.ftruncate(sealed, 1)


def test_the_seals_hold_on_this_kernel() -> None:
    check_seals_hold()


def test_closing_an_unfinished_segment_frees_it() -> None:
    builder = SegmentBuilder("unfinished", 4096)

    builder.close()
    builder.close()

    assert "memfd:unfinished" not in _maps()
    with pytest.raises(SegmentError):
        builder.seal()


def test_an_empty_segment_is_refused() -> None:
    with pytest.raises(SegmentError):
        SegmentBuilder("empty", 0)


def _maps() -> str:
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - not a file of ours
        return maps.read()


def test_what_the_builder_writes_into_shared_slots_is_seen_through_the_read_only_mapping() -> None:
    with SegmentBuilder("test", 8192) as builder:
        builder.populate(0, 8192, collapse_until=0.0)
        fd = builder.share()
        view = map_segment(fd, 8192, SegmentKind.SLOTS)

        builder.view[5000:5005] = b"hello"

        assert bytes(view[5000:5005]) == b"hello"
        os.close(fd)


def test_nobody_but_the_builder_can_write_into_shared_slots() -> None:
    with SegmentBuilder("test", 8192) as builder:
        builder.populate(0, 8192, collapse_until=0.0)
        fd = builder.share()
        writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR) if os.access(f"/proc/self/fd/{fd}", os.W_OK) else fd

        with pytest.raises(OSError, match=r"not permitted|Bad file"):
            os.pwrite(writable, b"x", 0)
        with pytest.raises(OSError, match=r"not permitted|denied"):
            mmap.mmap(writable, 8192, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match=r"not permitted|Invalid"):
            os.ftruncate(writable, 0)

        for each in {fd, writable}:
            os.close(each)


def test_slots_are_no_sealed_segment_and_a_sealed_segment_holds_no_slots(sealed: int) -> None:
    with SegmentBuilder("test", 4096) as builder:
        fd = builder.share()
        with pytest.raises(SegmentError, match="seals"):
            check_segment(fd, 4096)
        with pytest.raises(SegmentError, match="seals"):
            check_segment(sealed, 9000, SegmentKind.SLOTS)
        os.close(fd)
