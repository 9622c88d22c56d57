"""The threads of a workspace: how many there are, when they sleep, whom they belong to."""

import gc
import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import Tensor

from protocol.schemes import BF16, Q4_G64
from quant.errors import QuantError, WorkspaceBusy, WorkspaceForked
from quant.kernels import Product
from quant.workspace import Workspace
from tests.support.waiting import wait_until
from tests.unit.quant.c_library import needs_library
from tests.unit.quant.matrices import encoded, gaussian, have_equal_bits
from tests.unit.quant.threads import is_asleep, thread_ids, times_of

pytestmark = needs_library

# Enough panels that several threads get items.
PART = encoded(2048, 64, Q4_G64)


@pytest.fixture(scope="module", autouse=True)
def _first_thread() -> None:
    """Start and end one: the thread sanitizer, where it watches, adds one of its own to a process's first."""
    Workspace(2).close()


def product_of(workspace: Workspace) -> Product:
    return Product([PART], workspace=workspace, exact=False)


def started(n_threads: int) -> tuple[Workspace, set[int]]:
    """Return a workspace and the ids of the threads that came with it."""
    before = thread_ids()
    workspace = Workspace(n_threads)
    return workspace, thread_ids() - before


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_a_workspace_has_one_thread_less_than_it_computes_with(n_threads: int) -> None:
    workspace, others = started(n_threads)

    with workspace:
        assert len(others) == n_threads - 1


def test_threads_end_when_the_workspace_is_closed_or_forgotten() -> None:
    before = thread_ids()
    closed, forgotten = Workspace(3), Workspace(3)

    closed.close()
    del forgotten
    gc.collect()

    wait_until(lambda: thread_ids() <= before, "the end of the workspaces' threads")


def test_two_hundred_workspaces_leave_no_thread_and_no_descriptor() -> None:
    x = gaussian(1, 64)
    threads, descriptors = thread_ids(), n_descriptors()

    for i in range(200):
        with Workspace(1 + i % 4) as workspace:
            product_of(workspace)(x)

    wait_until(lambda: thread_ids() <= threads, "the end of the workspaces' threads")
    assert n_descriptors() == descriptors


@pytest.mark.parametrize("n_threads", [2, 3, 4])
@pytest.mark.parametrize("awake", [False, True])
def test_thousands_of_short_calls_after_each_other_lose_no_item(n_threads: int, *, awake: bool) -> None:
    xs = [gaussian(1, 64, std=1.0, seed=seed) for seed in range(16)]
    with Workspace() as workspace:
        expected = [product_of(workspace)(x)[0] for x in xs]

    with Workspace(n_threads) as workspace, workspace.awake() if awake else nullcontext():
        product = product_of(workspace)
        n_wrong = sum(not torch.equal(product(xs[i % 16])[0], expected[i % 16]) for i in range(12_000))

    assert n_wrong == 0


def test_more_threads_than_cores_compute_as_one() -> None:
    x = gaussian(5, 64, std=1.0)

    with Workspace() as one, Workspace(40) as many:
        expected, y = product_of(one)(x)[0], product_of(many)(x)[0]

    assert have_equal_bits(y, expected)


def test_two_workspaces_in_two_threads_do_not_meet() -> None:
    xs = [gaussian(1, 64, std=1.0, seed=seed) for seed in range(2)]
    with Workspace() as workspace:
        expected = [product_of(workspace)(x)[0] for x in xs]
    wrong: list[int] = []

    def compute(i: int) -> None:
        with Workspace(2) as workspace, workspace.awake():
            product = product_of(workspace)
            wrong.extend(i for _ in range(2000) if not torch.equal(product(xs[i])[0], expected[i]))

    threads = [threading.Thread(target=compute, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_a_second_thread_is_refused_while_the_first_computes() -> None:
    part = encoded(1024, 1024, BF16)
    much, little = gaussian(256, 1024), gaussian(1, 1024)
    is_over = threading.Event()
    results: list[Tensor] = []

    with Workspace(2) as workspace:
        product = Product([part], workspace=workspace, exact=False)
        expected = product(much)[0]

        def compute_much() -> None:
            while not is_over.is_set():
                try:
                    results.extend(product(much))
                except WorkspaceBusy:
                    continue

        thread = threading.Thread(target=compute_much)
        thread.start()
        try:
            wait_until(lambda: is_refused(lambda: product(little)), "a call that meets another one")
        finally:
            is_over.set()
            thread.join()
        after = product(much)[0]

    assert all(have_equal_bits(y, expected) for y in [*results, after])


def is_refused(compute: Callable[[], object]) -> bool:
    try:
        compute()
    except WorkspaceBusy as error:
        return "each thread needs a workspace of its own" in str(error)
    return False


def test_threads_sleep_between_calls() -> None:
    workspace, others = started(3)
    with workspace:
        product_of(workspace)(gaussian(1, 64))

        wait_until(lambda: all(map(is_asleep, others)), "the workspace's threads to sleep")

        assert_idle(others)


def test_threads_sleep_soon_while_they_are_to_stay_awake_and_nothing_comes() -> None:
    workspace, others = started(3)
    with workspace, workspace.awake():
        product_of(workspace)(gaussian(1, 64))

        wait_until(lambda: all(map(is_asleep, others)), "the workspace's threads to sleep")

        assert_idle(others)


def test_threads_that_were_kept_awake_sleep_afterwards() -> None:
    workspace, others = started(3)
    x = gaussian(1, 64)
    with workspace:
        product = product_of(workspace)
        with workspace.awake():
            for _ in range(500):
                product(x)

        wait_until(lambda: all(map(is_asleep, others)), "the workspace's threads to sleep")

        assert_idle(others)


def test_threads_take_no_signals() -> None:
    workspace, others = started(3)

    with workspace:
        product_of(workspace)(gaussian(1, 64))
        wait_until(lambda: all(map(is_asleep, others)), "the workspace's threads to be there and to sleep")
        masks = [blocked_signals(thread_id) for thread_id in others]

    assert all(mask >> (number - 1) & 1 for mask in masks for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_that_the_threads_are_not_its_own() -> None:
    x = gaussian(1, 64)
    with Workspace(2) as workspace:
        product = product_of(workspace)
        expected = product(x)[0]

        def compute_closed_and_anew() -> bool:
            with pytest.raises(WorkspaceForked, match="make a workspace here"):
                product(x)
            workspace.close()
            with Workspace(2) as own:
                return have_equal_bits(product_of(own)(x)[0], expected)

        exit_code = in_a_forked_process(compute_closed_and_anew)
        after = product(x)[0]

    assert exit_code == 0
    assert have_equal_bits(after, expected)


def in_a_forked_process(check: Callable[[], bool]) -> int:
    """Return 0 if the check holds in a child of this process, within 20 seconds."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        holds = False
        try:
            holds = check()
        finally:
            os._exit(0 if holds else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_closed_workspace_computes_no_more_and_may_be_closed_again() -> None:
    workspace = Workspace(2)
    product = product_of(workspace)

    workspace.close()
    workspace.close()

    with pytest.raises(QuantError, match="matrix: the workspace is closed"):
        product(torch.ones(1, 64))


@pytest.mark.parametrize("n_threads", [0, -1, 1025])
def test_a_number_of_threads_that_cannot_be_is_refused(n_threads: int) -> None:
    with pytest.raises(QuantError, match=f"1 to 1024 threads, not {n_threads}"):
        Workspace(n_threads)


def n_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def blocked_signals(thread_id: int) -> int:
    status = Path(f"/proc/self/task/{thread_id}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)


def assert_idle(others: set[int]) -> None:
    """Fail if one of the threads runs while this one works for a while."""
    before = {thread_id: times_of(thread_id) for thread_id in others}
    x = torch.ones(256, 256)
    for _ in range(100):
        x @ x
    assert {thread_id: times_of(thread_id) for thread_id in others} == before


def test_the_time_of_products_is_counted() -> None:
    x = gaussian(1, 64, std=1.0)
    with Workspace(2) as workspace:
        product = product_of(workspace)
        before = workspace.products_s

        started_s = perf_counter()
        product(x)
        elapsed_s = perf_counter() - started_s

        assert before == 0
        assert 0 < workspace.products_s <= elapsed_s


def test_a_closed_workspace_spends_no_time() -> None:
    workspace = Workspace(1)
    workspace.close()

    assert workspace.products_s == 0
