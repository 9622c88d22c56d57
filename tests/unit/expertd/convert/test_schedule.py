from expertd.convert.schedule import Schedule


def needs(*shards: str) -> dict[int, frozenset[str]]:
    """Return records that need the shards named by letters: `needs("a", "ab")` are record 0 and record 1."""
    return {number: frozenset(names) for number, names in enumerate(shards)}


def records_of(schedule: Schedule) -> list[int]:
    """Take every record that can be worked on now."""
    return list(iter(schedule.next_record, None))


def test_with_everything_here_records_come_in_their_order() -> None:
    schedule = Schedule(needs("a", "b", "a"), ["a", "b"], here=frozenset("ab"), n_ahead=None)

    assert records_of(schedule) == [0, 1, 2]
    assert schedule.next_shard() is None


def test_a_record_waits_for_all_of_its_shards() -> None:
    schedule = Schedule(needs("ab", "a"), ["a", "b"], here=frozenset(), n_ahead=None)
    before = records_of(schedule), schedule.next_shard()
    schedule.take_shard("a")
    with_one = records_of(schedule), schedule.next_shard()
    schedule.take_shard("b")

    assert before == ([], "a")
    assert with_one == ([1], "b")
    assert records_of(schedule) == [0]


def test_one_shard_is_fetched_at_a_time() -> None:
    schedule = Schedule(needs("a", "b"), ["a", "b"], here=frozenset(), n_ahead=None)

    assert [schedule.next_shard(), schedule.next_shard()] == ["a", None]


def test_a_shard_that_nothing_needs_is_not_fetched() -> None:
    schedule = Schedule(needs("b"), ["a", "b", "c"], here=frozenset(), n_ahead=None)

    assert schedule.next_shard() == "b"
    schedule.take_shard("b")
    assert schedule.next_shard() is None


def test_a_shard_is_free_when_the_last_record_that_needs_it_is_finished() -> None:
    schedule = Schedule(needs("a", "ab", "b"), ["a", "b"], here=frozenset("ab"), n_ahead=None)
    records_of(schedule)

    assert schedule.finish(0) == []
    assert schedule.finish(1) == ["a"]
    assert not schedule.is_done
    assert schedule.finish(2) == ["b"]
    assert schedule.is_done


def test_no_more_shards_are_fetched_than_may_be_here() -> None:
    schedule = Schedule(needs("a", "b", "c", "d"), ["a", "b", "c", "d"], here=frozenset(), n_ahead=2)
    for name in "ab":
        assert schedule.next_shard() == name
        schedule.take_shard(name)

    full = schedule.next_shard()
    records = records_of(schedule)
    still_full = schedule.next_shard()
    schedule.finish(records[0])

    assert full is None
    assert still_full is None
    assert schedule.next_shard() == "c"


def test_where_nothing_can_be_worked_on_otherwise_one_more_is_fetched() -> None:
    schedule = Schedule(needs("abc"), ["a", "b", "c"], here=frozenset(), n_ahead=1)
    fetched = []
    while (name := schedule.next_shard()) is not None:
        fetched.append(name)
        schedule.take_shard(name)

    assert fetched == ["a", "b", "c"]
    assert records_of(schedule) == [0]


def test_whatever_the_split_all_is_done() -> None:
    splits = needs("ad", "b", "cd", "abc", "d", "e", "ae")
    schedule = Schedule(splits, ["a", "b", "c", "d", "e"], here=frozenset(), n_ahead=1)
    finished = []
    for _ in range(100):
        name = schedule.next_shard()
        if name is not None:
            schedule.take_shard(name)
        for record in records_of(schedule):
            schedule.finish(record)
            finished.append(record)

    assert sorted(finished) == list(splits)
    assert schedule.is_done


def test_what_is_worked_on_at_once_stays_within_the_budget() -> None:
    costs = {0: 5, 1: 5, 2: 3}
    schedule = Schedule(needs("a", "a", "a"), ["a"], here=frozenset("a"), n_ahead=None, costs=costs, budget=8)

    first = records_of(schedule)
    schedule.finish(0)

    assert first == [0, 2]
    assert records_of(schedule) == [1]


def test_a_record_that_is_dearer_than_the_budget_is_worked_on_alone() -> None:
    schedule = Schedule(needs("a", "a"), ["a"], here=frozenset("a"), n_ahead=None, costs={0: 9, 1: 1}, budget=8)

    alone = records_of(schedule)
    schedule.finish(0)

    assert alone == [0]
    assert records_of(schedule) == [1]
