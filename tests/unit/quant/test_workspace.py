"""The workspace: which rows go to which thread, and what an error there leaves."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.workspace import Workspace


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3000), st.sampled_from([64, 4096]))
def test_every_row_is_worked_on_once_in_whole_panels(n_threads: int, rows: int, cols: int) -> None:
    ranges: list[tuple[int, int]] = []
    with Workspace(n_threads) as workspace:
        workspace.split_rows(rows, cols, lambda first_row, n_rows: ranges.append((first_row, n_rows)))

    covered = [row for first_row, n_rows in sorted(ranges) for row in range(first_row, first_row + n_rows)]
    assert covered == list(range(rows))
    assert all(first_row % 8 == 0 for first_row, _ in ranges)
    assert len(ranges) <= n_threads


def test_large_matrices_are_shared_among_all_threads() -> None:
    threads = set()
    gate = threading.Barrier(3, timeout=30)

    def work(_first_row: int, _n_rows: int) -> None:
        gate.wait()  # passes only if three threads are here at once
        threads.add(threading.get_ident())

    with Workspace(3) as workspace:
        workspace.split_rows(4096, 4096, work)

    assert len(threads) == 3


@pytest.mark.parametrize("failing_row", [0, 2048])
def test_an_error_in_any_share_is_raised_after_the_others_ended(failing_row: int) -> None:
    done = []

    def work(first_row: int, _n_rows: int) -> None:
        if first_row == failing_row:
            raise ValueError(f"row {first_row}")
        done.append(first_row)

    with Workspace(2) as workspace, pytest.raises(ValueError, match=f"row {failing_row}"):
        workspace.split_rows(4096, 4096, work)

    assert done == [2048 - failing_row]


def test_scratch_memory_grows_and_is_reused() -> None:
    workspace = Workspace()

    large, small = workspace.matrix(8, 100), workspace.matrix(4, 50)

    assert large.shape == (8, 100)
    assert small.shape == (4, 50)
    assert small.data_ptr() == large.data_ptr()
