"""The table of slots: who is evicted, what a prefetch may take, and that slots are neither lost nor shared."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from runner.experts.counters import Tally
from runner.experts.slots import SlotTable


def table_of(*quotas: int, n_spares: int = 0, keeps: bool = True) -> tuple[SlotTable, Tally]:
    tally = Tally()
    return SlotTable(quotas, n_spares, tally, keeps=keeps), tally


def use(table: SlotTable, layer: int, *groups: Iterable[int]) -> list[int]:
    """Make a whole call of the layer, its copies done at once; return the experts that were cached."""
    table.begin(layer, [list(group) for group in groups])
    hits = []
    for expert in (expert for group in groups for expert in group):
        slot = table.pin(layer, expert)
        if slot is None:
            claim = table.claim(layer, expert)
            assert claim is not None
            slot = claim.slot
            table.filled(slot)
        else:
            hits.append(expert)
        table.unpin([slot])
    table.settle(layer)
    return hits


def test_an_expert_that_was_used_is_a_hit_until_the_quota_is_needed_by_others() -> None:
    table, tally = table_of(2, n_spares=2)

    hits = [use(table, 0, experts) for experts in ([0, 1], [1, 2], [0, 1], [3, 4], [0, 1])]

    # 0 went for 2, 2 for 0, both for 3 and 4.
    assert hits == [[], [1], [1], [], []]
    assert (tally.hits, tally.misses, tally.evictions) == (2, 8, 6)


def test_the_expert_used_longest_ago_is_evicted() -> None:
    table, _ = table_of(3, n_spares=1)
    for experts in ([0, 1], [2, 0], [3, 2]):
        use(table, 0, experts)

    hits = use(table, 0, [0, 1, 2, 3])

    assert hits == [0, 2, 3]


def test_after_many_tokens_the_experts_of_the_last_ones_stay() -> None:
    table, _ = table_of(2, n_spares=4)
    use(table, 0, [6, 7])

    use(table, 0, [6], [3], [1, 2], [7], [0])

    assert use(table, 0, [0, 7]) == [0, 7]


def test_without_spares_too_the_experts_of_the_last_tokens_stay() -> None:
    table, _ = table_of(2)
    use(table, 0, [6, 7])

    use(table, 0, [6], [3], [1, 2], [7], [0])

    assert use(table, 0, [0, 7]) == [0, 7]


def test_layers_do_not_evict_each_other() -> None:
    table, _ = table_of(2, 3, n_spares=1)
    use(table, 1, [0, 1, 2])

    for expert in range(8):
        use(table, 0, [expert])

    assert use(table, 1, [0, 1, 2]) == [0, 1, 2]


def test_a_table_that_keeps_nothing_never_hits() -> None:
    table, tally = table_of(2, n_spares=1, keeps=False)

    for _ in range(3):
        use(table, 0, [0, 1])

    assert (tally.hits, tally.misses, tally.evictions) == (0, 6, 6)


def test_a_miss_takes_a_spare_slot_and_leaves_the_victims_for_later() -> None:
    table, _ = table_of(2, n_spares=1)
    use(table, 0, [0, 1])
    table.begin(0, [[2]])

    claim = table.claim(0, 2)

    assert claim is not None
    assert claim.is_new
    assert claim.slot == 2
    assert table.pin(0, 0) == 0


def test_a_pinned_expert_is_not_evicted_and_a_miss_waits_for_the_pin() -> None:
    table, _ = table_of(2)
    use(table, 0, [0, 1])
    table.begin(0, [[0], [1], [2]])
    slots = [table.pin(0, expert) for expert in (0, 1)]

    refused = table.claim(0, 2)
    table.unpin([slot for slot in slots[1:] if slot is not None])
    claim = table.claim(0, 2)

    assert refused is None
    assert claim is not None
    assert claim.slot == slots[1]


def test_a_prefetch_evicts_nothing_and_takes_no_more_than_the_spares() -> None:
    table, tally = table_of(2, 2, n_spares=2)
    use(table, 0, [0, 1])
    use(table, 1, [0, 1])

    slots = [table.guess(1, expert) for expert in (0, 2, 2, 3, 4)]

    assert [slot is not None for slot in slots] == [False, True, False, True, False]
    assert tally.prefetches_issued == 2
    assert use(table, 0, [0, 1]) == [0, 1]


def test_a_prefetched_expert_counts_as_a_miss_that_was_foreseen() -> None:
    table, tally = table_of(2, n_spares=2)
    for expert in (4, 5):
        slot = table.guess(0, expert)
        assert slot is not None
        if expert == 4:
            table.filled(slot)
    table.begin(0, [[4, 5]])

    claims = [table.claim(0, expert) for expert in (4, 5)]

    assert [claim is not None and not claim.is_new for claim in claims] == [True, True]
    assert (tally.misses, tally.prefetches_used, tally.prefetches_late) == (2, 2, 1)


def test_what_was_prefetched_in_vain_is_spare_again_at_once_if_it_was_copied() -> None:
    table, tally = table_of(1, n_spares=1)
    use(table, 0, [0])
    slot = table.guess(0, 1)
    assert slot is not None
    table.filled(slot)

    table.begin(0, [[2]])

    assert tally.prefetches_wasted == 1
    assert table.take_dropped() == []
    claim = table.claim(0, 2)
    assert claim is not None
    assert claim.slot == slot


def test_what_is_prefetched_in_vain_is_spare_when_the_engine_has_let_go_of_it() -> None:
    table, tally = table_of(1, n_spares=1)
    use(table, 0, [0])
    slot = table.guess(0, 1)
    assert slot is not None

    table.begin(0, [[0, 2]])
    pinned = table.pin(0, 0)
    refused = table.claim(0, 2)
    dropped = table.take_dropped()
    table.given_back(slot)
    claim = table.claim(0, 2)

    assert pinned is not None
    assert refused is None
    assert dropped == [slot]
    assert table.take_dropped() == []
    assert claim is not None
    assert claim.slot == slot
    assert tally.prefetches_cancelled == 1


def test_a_miss_takes_back_what_another_layer_prefetched_before_it_goes_without() -> None:
    table, tally = table_of(1, 1, n_spares=1)
    use(table, 1, [0])
    table.begin(0, [[0], [1]])
    first = table.claim(0, 0)
    guess = table.guess(1, 1)

    refused = table.claim(0, 1)

    assert first is not None
    assert guess is not None
    assert refused is None
    assert table.take_dropped() == [guess]
    assert tally.prefetches_cancelled == 1


calls = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), st.booleans()),
    max_size=30,
)


@given(calls=calls, n_spares=st.integers(0, 3), quota=st.integers(1, 4))
def test_slots_are_neither_lost_nor_given_to_two_experts(
    calls: list[tuple[int, list[int], bool]], n_spares: int, quota: int
) -> None:
    table, tally = table_of(quota, quota, n_spares=n_spares)
    for layer, experts, is_prefetch in calls:
        if is_prefetch:
            for expert in experts:
                table.guess(layer, expert)
        else:
            for expert in experts:
                table.begin(layer, [[expert]])
                for slot in table.take_dropped():
                    table.given_back(slot)
                use(table, layer, [expert])

    held = [slot for cached in table._cached for slot in cached.values()] + list(table._guesses.values())
    unused = list(table._spares)
    assert sorted(held + unused + table._dropped) == list(range(table.n_slots))
    assert all(len(cached) <= quota for cached in table._cached)
    n_open = len(table._guesses)
    n_ended = tally.prefetches_used + tally.prefetches_cancelled + tally.prefetches_wasted
    assert tally.prefetches_issued == n_ended + n_open
