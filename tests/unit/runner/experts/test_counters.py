"""What the cache counted, and between two moments."""

from dataclasses import fields

from runner.experts.counters import Counters, Tally


def test_a_snapshot_does_not_change_afterwards() -> None:
    tally = Tally(hits=3, misses=1)

    snapshot = tally.snapshot()
    tally.hits += 1

    assert (snapshot.hits, snapshot.misses, snapshot.hit_ratio) == (3, 1, 0.75)


def test_the_difference_is_what_happened_in_between() -> None:
    tally = Tally(hits=3, copied_nbytes=10, waited_s=0.5)
    before = tally.snapshot()
    tally.hits, tally.copied_nbytes, tally.waited_s = 5, 30, 0.75

    between = tally.snapshot() - before

    assert (between.hits, between.copied_nbytes, between.waited_s) == (2, 20, 0.25)


def test_without_uses_there_is_no_hit_ratio() -> None:
    assert Tally().snapshot().hit_ratio is None


def test_the_tally_has_the_counters_fields_in_their_order() -> None:
    assert [field.name for field in fields(Tally)] == [field.name for field in fields(Counters)]
