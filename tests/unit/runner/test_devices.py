from pathlib import Path

import pytest

from runner.devices import choose_device
from runner.devices.cpu import n_physical_cores
from runner.errors import DeviceUnavailable


def write_topology(folder: Path, siblings: dict[int, str]) -> None:
    for cpu, listed in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(listed + "\n")


def test_auto_is_the_cpu() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"


def test_cuda_is_refused_with_what_to_do_now() -> None:
    with pytest.raises(DeviceUnavailable, match=r"comes with a later version; .* --device cpu"):
        choose_device("cuda")


def test_two_threads_of_one_core_count_once(tmp_path: Path) -> None:
    write_topology(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})

    assert n_physical_cores({0, 1, 2, 3}, tmp_path) == 2


def test_only_the_cores_that_may_be_used_count(tmp_path: Path) -> None:
    write_topology(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})

    assert n_physical_cores({1, 3}, tmp_path) == 1


def test_without_a_topology_each_cpu_is_a_core(tmp_path: Path) -> None:
    assert n_physical_cores({0, 1, 5}, tmp_path) == 3
