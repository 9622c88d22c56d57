import pytest

from expertd.budget import ALL_THERE_IS, RESERVE_NBYTES, MemoryWish, check_fits
from protocol.errors import OutOfMemory

GB = 10**9


def test_a_store_that_leaves_the_reserve_free_fits() -> None:
    check_fits(4 * GB, ALL_THERE_IS, 4 * GB + RESERVE_NBYTES)


def test_a_store_that_leaves_less_than_the_reserve_does_not_fit() -> None:
    with pytest.raises(OutOfMemory, match=r"needs 4\.00 GB .* are available"):
        check_fits(4 * GB, ALL_THERE_IS, 4 * GB + RESERVE_NBYTES - 1)


def test_a_store_larger_than_it_may_be_does_not_fit() -> None:
    with pytest.raises(OutOfMemory, match=r"needs 4\.00 GB, 3\.00 GB are allowed"):
        check_fits(4 * GB, MemoryWish(3 * GB), 100 * GB)
