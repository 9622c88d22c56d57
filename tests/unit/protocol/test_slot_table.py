"""Where slots lie, and what the table says of them while the daemon fills them."""

import pytest

from protocol.errors import SegmentError
from protocol.handles import ExpertHandle, ExpertKey
from protocol.slot_table import SlotArea, SlotEntry, SlotTable, SlotTableWriter, plan_slot_area

KEY, OTHER = ExpertKey(31, 7), ExpertKey(65535, 65535)
MIB = 1 << 20
AREA = plan_slot_area(300 * MIB, 8, first_segment=2)


def table(n_slots: int = 4) -> tuple[SlotTableWriter, SlotTable]:
    memory = bytearray(4096)
    return SlotTableWriter(memoryview(memory), n_slots), SlotTable(memoryview(memory), n_slots)


def handle(slot: int, *, area: SlotArea = AREA) -> ExpertHandle:
    segment, offset = area.place(slot)
    return ExpertHandle(KEY, segment, offset, 4096, 2)


def test_slots_fill_segments_of_at_most_a_gibibyte_and_the_table_comes_last() -> None:
    assert AREA.slots_per_segment == 3
    assert AREA.segments_nbytes() == [900 * MIB, 900 * MIB, 600 * MIB]
    assert (AREA.first_segment, AREA.table_segment, AREA.table_nbytes) == (2, 5, 4096)


def test_a_slot_larger_than_a_segment_has_one_of_its_own() -> None:
    area = plan_slot_area(1500 * MIB, 2, first_segment=0)

    assert area.segments_nbytes() == [1500 * MIB, 1500 * MIB]


def test_a_handle_names_its_slot() -> None:
    assert [AREA.slot_of(handle(slot)) for slot in range(8)] == list(range(8))


@pytest.mark.parametrize(
    "changes",
    [
        {"segment": 1},
        {"segment": 5},
        {"offset": 4096},
        {"segment": 4, "offset": 600 * MIB},
        {"offset": 900 * MIB},
        {"nbytes": 300 * MIB + 1},
    ],
    ids=str,
)
def test_a_handle_that_names_no_slot_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(SegmentError, match=str(KEY)):
        AREA.slot_of(handle(0)._replace(**changes))  # type: ignore[arg-type]


def test_an_empty_table_holds_nothing() -> None:
    _, reader = table()

    assert reader.present() == {}


def test_a_slot_that_is_being_written_holds_nothing() -> None:
    writer, reader = table()

    writer.begin(1)

    assert reader.present() == {}


def test_a_published_slot_holds_its_expert() -> None:
    writer, reader = table()
    for slot, key in ((1, KEY), (3, OTHER)):
        writer.begin(slot)
        writer.publish(slot, key)

    present = reader.present()

    assert present == {KEY: SlotEntry(1, 2), OTHER: SlotEntry(3, 2)}
    assert reader.still_holds(KEY, present[KEY])


def test_an_expert_is_found_where_it_is_now() -> None:
    writer, reader = table()
    for slot, key in ((0, OTHER), (2, ExpertKey(0, 0)), (0, KEY), (3, OTHER)):
        writer.begin(slot)
        writer.publish(slot, key)
    writer.begin(3)

    found = [reader.find(key) for key in (KEY, ExpertKey(0, 0), OTHER, ExpertKey(7, 31))]

    assert found == [SlotEntry(0, 4), SlotEntry(2, 2), None, None]


def test_a_reader_sees_that_its_slot_is_being_written() -> None:
    writer, reader = table()
    writer.begin(1)
    writer.publish(1, KEY)
    entry = reader.present()[KEY]

    writer.begin(1)

    assert not reader.still_holds(KEY, entry)


def test_a_reader_sees_that_its_slot_was_filled_anew_even_with_the_same_expert() -> None:
    writer, reader = table()
    writer.begin(1)
    writer.publish(1, KEY)
    entry = reader.present()[KEY]

    writer.begin(1)
    generation = writer.publish(1, KEY)

    assert generation == 4
    assert not reader.still_holds(KEY, entry)


def test_a_slot_whose_filling_failed_is_begun_again_with_the_same_generation() -> None:
    writer, reader = table()
    writer.begin(0)
    writer.begin(0)

    generation = writer.publish(0, KEY)

    assert generation == 2
    assert reader.present() == {KEY: SlotEntry(0, 2)}


def test_a_reader_is_not_fooled_by_an_entry_that_mixes_two_moments() -> None:
    writer, reader = table()
    writer.begin(0)
    writer.publish(0, KEY)
    writer.begin(0)
    writer.publish(0, OTHER)

    mixed = SlotEntry(0, 4)  # the generation of now, read beside the key of before

    assert not reader.still_holds(KEY, mixed)


def test_the_table_is_little_endian_words_of_generation_layer_and_expert() -> None:
    memory = bytearray(4096)
    writer = SlotTableWriter(memoryview(memory), 2)

    writer.begin(1)
    writer.publish(1, ExpertKey(3, 258))

    assert memory[16:32].hex() == "0200000000000000" + "03000000" + "02010000"
