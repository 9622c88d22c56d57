"""Who waits at a word of shared memory goes on when it changes, and may only read it."""

import os
import platform
import threading

import pytest

from protocol import bell as bells
from protocol.bell import Bell, BellRinger
from protocol.segment import SegmentBuilder, SegmentKind, map_segment

WITHIN_S = 20.0

needs_futex = pytest.mark.skipif(
    platform.machine() not in {"x86_64", "aarch64"}, reason="the kernel's number of futex is not known here"
)


def pair() -> tuple[BellRinger, Bell]:
    memory = memoryview(bytearray(4))
    return BellRinger(memory), Bell(memory)


def test_a_bell_that_was_rung_meanwhile_is_not_waited_at() -> None:
    ringer, bell = pair()
    n_rings = bell.n_rings

    ringer.ring()

    assert bell.wait(n_rings, WITHIN_S)


def test_a_bell_that_is_not_rung_is_waited_at_for_a_time() -> None:
    _, bell = pair()

    assert not bell.wait(bell.n_rings, 0.001)


def test_the_count_begins_anew_after_the_greatest_number() -> None:
    memory = memoryview(bytearray(b"\xff" * 4))
    ringer, bell = BellRinger(memory), Bell(memory)

    ringer.ring()

    assert bell.n_rings == 0


@needs_futex
def test_a_process_that_may_only_read_the_word_is_woken() -> None:
    with SegmentBuilder("expertd-test", 4096) as builder:
        builder.populate(0, 4096, collapse_until=0.0)
        fd = builder.share()
        bell = Bell(map_segment(fd, 4096, SegmentKind.SLOT_TABLE)[8:12])
        os.close(fd)
        ringer = BellRinger(builder.view[8:12])
        heard: list[bool] = []
        waiting = threading.Thread(target=lambda: heard.append(bell.wait(0, WITHIN_S)))

        waiting.start()
        while not heard and waiting.is_alive() and bell.n_rings == 0:
            ringer.ring()
        waiting.join(WITHIN_S)
        ringer.release()

    assert heard == [True]


def test_where_the_call_is_not_known_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    memory = memoryview(bytearray(4))
    ringer, bell = bells.BellRinger(memory), bells.Bell(memory)

    assert not bell.can_be_waited_at
    assert not bell.wait(0, WITHIN_S)
    ringer.ring()
    assert bell.wait(0, WITHIN_S)
