import pytest

from runner.devices.cuda_registration import (
    HostRange,
    LibCuda,
    Refused,
    Registration,
    contiguous_ranges,
    register,
)
from runner.errors import DeviceUnavailable

PAGE = 4096
GIB = 1 << 30


class FakeDriver:
    """Page-locks at most so many ranges."""

    def __init__(self, n_ranges_max: int = 100) -> None:
        self.registered: dict[int, tuple[int, int]] = {}
        self._n_ranges_max = n_ranges_max

    def register(self, address: int, nbytes: int, flags: int) -> int:
        if len(self.registered) == self._n_ranges_max:
            return 2
        self.registered[address] = (nbytes, flags)
        return 0

    def unregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def name_of(self, result: int) -> str:
        return f"CUDA_ERROR_{result}"


def test_all_ranges_are_locked_read_only_and_for_every_context_until_it_is_closed() -> None:
    driver = FakeDriver()

    registration = register(driver, [HostRange(PAGE, 2 * PAGE), HostRange(GIB, PAGE)], is_read_only=True)

    assert driver.registered == {PAGE: (2 * PAGE, 0x09), GIB: (PAGE, 0x09)}
    assert isinstance(registration, Registration)
    assert registration.nbytes == 3 * PAGE
    registration.close()
    assert driver.registered == {}


def test_memory_that_may_be_written_is_locked_without_the_read_only_flag() -> None:
    driver = FakeDriver()

    register(driver, [HostRange(PAGE, PAGE)], is_read_only=False)

    assert driver.registered == {PAGE: (PAGE, 0x01)}


def test_where_one_range_is_refused_none_stays_locked_and_the_reason_is_kept() -> None:
    driver = FakeDriver(n_ranges_max=2)

    outcome = register(driver, [HostRange(n * GIB, PAGE) for n in range(4)], is_read_only=True)

    assert outcome == Refused("CUDA_ERROR_2")
    assert driver.registered == {}


def test_closing_twice_is_closing_once() -> None:
    driver = FakeDriver()
    registration = register(driver, [HostRange(PAGE, PAGE)], is_read_only=True)
    assert isinstance(registration, Registration)

    registration.close()
    registration.close()

    assert driver.registered == {}


def test_a_machine_without_the_driver_says_so() -> None:
    with pytest.raises(DeviceUnavailable, match=r"the CUDA driver cannot be used: .*libnocuda.so"):
        LibCuda("libnocuda.so.1")


def test_neighbours_are_locked_together_up_to_the_limit() -> None:
    records = [HostRange(n * PAGE, PAGE) for n in (0, 1, 2, 3, 4, 9)]

    ranges = contiguous_ranges(reversed(records), nbytes_max=2 * PAGE)

    assert ranges == [
        HostRange(0, 2 * PAGE),
        HostRange(2 * PAGE, 2 * PAGE),
        HostRange(4 * PAGE, PAGE),
        HostRange(9 * PAGE, PAGE),
    ]


def test_ranges_are_whole_pages_and_no_page_is_locked_twice() -> None:
    records = [HostRange(100, PAGE), HostRange(100 + PAGE, 50), HostRange(5 * PAGE - 1, 2)]

    assert contiguous_ranges(records, nbytes_max=PAGE) == [HostRange(0, 2 * PAGE), HostRange(4 * PAGE, 2 * PAGE)]


def test_a_record_longer_than_the_limit_is_one_range() -> None:
    assert contiguous_ranges([HostRange(0, 3 * PAGE)], nbytes_max=PAGE) == [HostRange(0, 3 * PAGE)]
