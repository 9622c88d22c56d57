"""Who makes room for whom: layers share the slots evenly, each gives up what it used longest ago."""

from expertd.eviction import EvictionOrder
from protocol.handles import ExpertKey


def held(*keys: tuple[int, int]) -> EvictionOrder:
    """Return an order in which these were used, the latest last."""
    order = EvictionOrder()
    for layer, expert in keys:
        order.hold(ExpertKey(layer, expert))
        order.offer(ExpertKey(layer, expert))
    return order


def test_a_layer_that_has_its_share_gives_up_what_it_used_longest_ago() -> None:
    order = held((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1))

    assert order.victim(ExpertKey(1, 5), is_hint=False) == ExpertKey(1, 0)


def test_a_layer_that_has_more_makes_room_for_one_that_has_less() -> None:
    order = held((0, 0), (1, 0), (2, 0), (2, 1), (2, 2))

    assert order.victim(ExpertKey(0, 5), is_hint=False) == ExpertKey(2, 0)


def test_of_layers_with_equally_many_the_one_passed_last_makes_room() -> None:
    order = held((0, 0), (1, 0), (3, 0), (4, 0))

    assert order.victim(ExpertKey(2, 5), is_hint=False) == ExpertKey(1, 0)


def test_with_fewer_slots_than_a_token_uses_experts_the_layers_to_come_keep_theirs() -> None:
    order = held((5, 0), (6, 0), (7, 0))

    assert order.victim(ExpertKey(4, 1), is_hint=False) == ExpertKey(7, 0)


def test_a_hint_takes_nothing_of_its_own_layer_nor_of_the_one_that_foresees() -> None:
    order = held((1, 0), (2, 0), (3, 0), (4, 0), (5, 0))

    assert order.victim(ExpertKey(4, 1), is_hint=True) == ExpertKey(2, 0)


def test_what_is_kept_is_no_victim_and_what_was_touched_is_the_last() -> None:
    order = held((0, 0), (0, 1), (0, 2))

    order.keep(ExpertKey(0, 0))
    order.touch(ExpertKey(0, 1))

    assert order.victim(ExpertKey(0, 5), is_hint=False) == ExpertKey(0, 2)


def test_where_everything_is_kept_nobody_makes_room() -> None:
    order = held((0, 0))

    order.keep(ExpertKey(0, 0))

    assert order.victim(ExpertKey(0, 5), is_hint=False) is None


def test_what_was_let_go_counts_for_its_layer_no_more() -> None:
    order = held((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))

    order.let_go(ExpertKey(0, 0))

    assert order.victim(ExpertKey(0, 5), is_hint=False) == ExpertKey(1, 0)
