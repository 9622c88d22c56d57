import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runner.devices import choose_device
from runner.devices.cpu import n_cores_of_quota, n_physical_cores, n_usable_cores, set_threads
from runner.errors import DeviceUnavailable


def write_topology(folder: Path, siblings: dict[int, str]) -> None:
    for cpu, listed in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(listed + "\n")


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def quota(tmp_path: Path, own_cgroups: str, files: dict[str, str]) -> int | None:
    """Return the quota of a process in these cgroups, with these files where cgroups are mounted."""
    write_files(tmp_path / "cgroup", files)
    (tmp_path / "own").write_text(own_cgroups)
    return n_cores_of_quota(tmp_path / "own", tmp_path / "cgroup")


@pytest.fixture
def torch_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@without_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused_with_the_reason_and_what_to_do(name: str) -> None:
    with pytest.raises(DeviceUnavailable, match=rf"device {name}: (torch .* without CUDA|.* no .*GPU).*; --device cpu"):
        choose_device(name)


def test_a_link_is_taken_by_its_full_name() -> None:
    assert choose_device("link:12GB/s,10us") == "link:12GB/s,10us"


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "cuda:1234", "CPU", "link", ""])
def test_what_is_no_device_is_refused_with_what_is(name: str) -> None:
    with pytest.raises(
        DeviceUnavailable, match=rf"auto, cpu, cuda, cuda:N or link:SPEED .* is expected, '{name}' came"
    ):
        choose_device(name)


def test_two_threads_of_one_core_count_once(tmp_path: Path) -> None:
    write_topology(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})

    assert n_physical_cores({0, 1, 2, 3}, tmp_path) == 2


def test_only_the_cores_that_may_be_used_count(tmp_path: Path) -> None:
    write_topology(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})

    assert n_physical_cores({1, 3}, tmp_path) == 1


def test_without_a_topology_each_cpu_is_a_core(tmp_path: Path) -> None:
    assert n_physical_cores({0, 1, 5}, tmp_path) == 3


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("1000 100000", 1), ("max 100000", None)],
)
def test_a_quota_is_rounded_up_to_whole_cores(tmp_path: Path, cpu_max: str, cores: int | None) -> None:
    assert quota(tmp_path, "0::/user/runner\n", {"user/runner/cpu.max": cpu_max + "\n"}) == cores


def test_the_tightest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {
        "a/b/c/cpu.max": "max 100000\n",
        "a/b/cpu.max": "800000 100000\n",
        "a/cpu.max": "300000 100000\n",
        "a/b/other/cpu.max": "100000 100000\n",
    }

    assert quota(tmp_path, "0::/a/b/c\n", files) == 3


def test_a_container_finds_its_quota_where_its_cgroups_begin(tmp_path: Path) -> None:
    # /proc/self/cgroup may name a cgroup as the host sees it, which is not mounted here, or one beside this one.
    for own_cgroups in ("0::/\n", "0::/docker/0123abcd\n", "0::/../beside\n"):
        assert quota(tmp_path, own_cgroups, {"cpu.max": "400000 100000\n"}) == 4


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_a_quota_of_version_1_counts_too(tmp_path: Path, mount: str) -> None:
    own_cgroups = "12:memory:/job\n4:cpu,cpuacct:/job/step\n1:name=systemd:/job\n0::/job\n"
    files = {
        f"{mount}/job/cpu.cfs_quota_us": "250000\n",
        f"{mount}/job/cpu.cfs_period_us": "100000\n",
        f"{mount}/job/step/cpu.cfs_quota_us": "-1\n",
        f"{mount}/job/step/cpu.cfs_period_us": "100000\n",
        "memory/job/cpu.cfs_quota_us": "100000\n",
        "memory/job/cpu.cfs_period_us": "100000\n",
    }

    assert quota(tmp_path, own_cgroups, files) == 3


@pytest.mark.parametrize("content", ["", "max", "many 100000", "100000 0", "0 100000", "-1 100000"])
def test_what_is_no_quota_limits_nothing(tmp_path: Path, content: str) -> None:
    assert quota(tmp_path, "0::/job\nno line at all\n", {"job/cpu.max": content}) is None


def test_without_cgroups_there_is_no_quota(tmp_path: Path) -> None:
    assert n_cores_of_quota(tmp_path / "absent", tmp_path / "absent") is None


@pytest.mark.parametrize(("quota_us", "cores"), [(100000, 1), (200000, 2), (900000, 2)])
def test_as_many_cores_are_used_as_there_are_and_as_the_quota_allows(tmp_path: Path, quota_us: int, cores: int) -> None:
    write_topology(tmp_path / "cpu", {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    write_files(tmp_path, {"own": "0::/\n", "cgroup/cpu.max": f"{quota_us} 100000\n"})

    assert n_usable_cores({0, 1, 2, 3}, tmp_path / "cpu", tmp_path / "own", tmp_path / "cgroup") == cores


@pytest.mark.usefixtures("torch_threads")
def test_a_number_of_threads_that_was_asked_for_is_taken_and_torch_gets_one() -> None:
    torch.set_num_threads(2)

    assert set_threads(7) == 7
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("torch_threads")
def test_by_default_there_is_no_thread_without_a_cpu() -> None:
    assert 1 <= set_threads(None) <= len(os.sched_getaffinity(0))
