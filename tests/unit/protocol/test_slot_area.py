import pytest

from protocol.slot_area import least_slots, slot_area_nbytes, slots_within

PAGE = 4096


def test_slots_and_the_pages_of_their_table_are_counted() -> None:
    assert slot_area_nbytes(4, 10 * PAGE) == 4 * 10 * PAGE + PAGE
    assert slot_area_nbytes(257, PAGE) == 257 * PAGE + 2 * PAGE


@pytest.mark.parametrize("slot_nbytes", [PAGE, 70_000 * PAGE])
@pytest.mark.parametrize("n_slots", [1, 4, 256, 257, 5000])
def test_as_many_slots_fit_as_take_no_more_than_there_is(slot_nbytes: int, n_slots: int) -> None:
    nbytes = slot_area_nbytes(n_slots, slot_nbytes)

    assert slots_within(nbytes, slot_nbytes) == n_slots
    assert slots_within(nbytes - 1, slot_nbytes) == n_slots - 1


@pytest.mark.parametrize("nbytes", [-PAGE, 0, PAGE])
def test_in_too_little_no_slot_fits(nbytes: int) -> None:
    assert slots_within(nbytes, PAGE) == 0


def test_two_layers_choices_are_the_least_or_all_experts_where_there_are_fewer() -> None:
    assert least_slots(2, n_experts=256) == 4
    assert least_slots(2, n_experts=3) == 3
