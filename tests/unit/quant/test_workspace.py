"""The workspace: what goes to which thread, and what an error there leaves."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.workspace import Workspace


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3000), st.sampled_from([1, 512, 1 << 18]))
def test_every_item_is_worked_on_once(n_threads: int, n_items: int, item_nelements: int) -> None:
    ranges: list[tuple[int, int]] = []
    with Workspace(n_threads) as workspace:
        workspace.split(n_items, item_nelements, lambda first, n: ranges.append((first, n)))

    covered = [item for first, n in sorted(ranges) for item in range(first, first + n)]
    assert covered == list(range(n_items))
    assert len(ranges) <= n_threads


def test_large_matrices_are_shared_among_all_threads() -> None:
    threads = set()
    gate = threading.Barrier(3, timeout=30)

    def work(_first: int, _n: int) -> None:
        gate.wait()  # passes only if three threads are here at once
        threads.add(threading.get_ident())

    with Workspace(3) as workspace:
        workspace.split(4096, 4096, work)

    assert len(threads) == 3


@pytest.mark.parametrize("failing_item", [0, 2048])
def test_an_error_in_any_share_is_raised_after_the_others_ended(failing_item: int) -> None:
    done = []

    def work(first: int, _n: int) -> None:
        if first == failing_item:
            raise ValueError(f"item {first}")
        done.append(first)

    with Workspace(2) as workspace, pytest.raises(ValueError, match=f"item {failing_item}"):
        workspace.split(4096, 4096, work)

    assert done == [2048 - failing_item]


def test_every_thread_has_scratch_memory_of_its_own() -> None:
    gate = threading.Barrier(2, timeout=30)
    addresses = set()

    with Workspace(2) as workspace:

        def work(_first: int, _n: int) -> None:
            addresses.add(workspace.matrix(8, 8).data_ptr())
            gate.wait()

        workspace.split(4096, 4096, work)

    assert len(addresses) == 2


def test_work_that_splits_again_does_the_inner_part_by_itself() -> None:
    inner_threads: dict[int, set[int]] = {0: set(), 1: set()}

    with Workspace(2) as workspace:

        def work(first: int, _n: int) -> None:
            workspace.split(4096, 4096, lambda _first, _n: inner_threads[first].add(threading.get_ident()))

        workspace.split(2, 1 << 20, work)

    assert [len(threads) for threads in inner_threads.values()] == [1, 1]


def test_scratch_memory_grows_and_is_reused() -> None:
    workspace = Workspace()

    large, small = workspace.matrix(8, 100), workspace.matrix(4, 50)

    assert large.shape == (8, 100)
    assert small.shape == (4, 50)
    assert small.data_ptr() == large.data_ptr()
